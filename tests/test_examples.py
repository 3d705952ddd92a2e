"""The examples, run as a user runs them: they end well, draw a picture, and compute what they say."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib.image import imread

EXAMPLES = Path(__file__).parent.parent / "examples"
TIME_LIMIT = 180  # seconds for one run; against hanging, not a measure of speed


class Example(NamedTuple):
    """A script of `examples/` that writes `<name>.png` unless told otherwise."""

    name: str
    fast: tuple[str, ...]  # arguments that make it end within seconds
    result: str  # pattern of the line that holds the result
    options: tuple[str, ...]


TABLE = (
    Example(
        "train_digits",
        fast=("--epochs", "2", "--kernel", "foreach"),
        result=r"^Test accuracy: \d+\.\d+ %$",
        options=("--kernel", "--donate", "--epochs", "--seed", "--output"),
    ),
    Example(
        "lr_sweep",
        fast=("--steps", "5", "--learning-rates", "4"),
        result=r"^.*Best learning rate: [\d.]+, test loss [\d.]+ nats$",
        options=("--learning-rates", "--members", "--steps", "--seed", "--threads", "--output"),
    ),
    Example(
        "learn_the_optimizer",
        fast=("--steps", "2"),
        result=r"^ *40 steps, learnt +loss [\d.]+ \([\d.]+\), accuracy [\d.]+$",
        options=("--steps", "--seed", "--output"),
    ),
    Example(
        "few_shot",
        fast=("--meta-steps", "3"),
        result=r"^Adam  learnt  ( +[\d.]+ \+- [\d.]+){3} +[\d.]+$",
        options=("--meta-steps", "--inner-steps", "--shots", "--seed", "--threads", "--output"),
    ),
    Example(
        "many_fits",
        fast=("--fits", "50", "--loop", "2", "--steps", "5"),
        result=r"^Largest difference to torch.optim.Adam over 2 fits: [\d.e-]+$",
        options=("--fits", "--loop", "--steps", "--seed", "--output"),
    ),
    Example(
        "finetune_groups",
        fast=("--steps", "8"),
        result=r"^Largest difference of parameters: 0$",
        options=("--steps", "--seed", "--save-every", "--checkpoint", "--resume", "--output"),
    ),
    Example(
        "bf16_training",
        fast=("--steps", "60", "--members", "2"),
        result=r"^bfloat16, masters +[\d.]+ \+- [\d.]+$",
        options=("--members", "--steps", "--lr", "--seed", "--output"),
    ),
    Example(
        "ddp_overlap",
        fast=("--steps", "5"),
        result=r"^Largest difference of parameters: 0$",
        options=("--processes", "--steps", "--seed", "--output"),
    ),
    Example(
        "rpc_parameter_server",
        fast=("--steps", "5"),
        result=r"^Largest difference of parameters: 0$",
        options=("--steps", "--seed", "--output"),
    ),
    Example(
        "fsdp2_checkpoint",
        fast=("--steps", "8"),
        result=r"^Largest difference to the plain run: [\d.e-]+ nats$",
        options=("--steps", "--seed", "--output"),
    ),
)
every_example = pytest.mark.parametrize("example", TABLE, ids=[example.name for example in TABLE])


def test_every_example_is_in_the_table():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {example.name for example in TABLE}


def run(name: str, *arguments: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, in the folder `cwd`."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    assert done.returncode == status, done.stderr
    return done


def number_after(label: str, text: str) -> float:
    found = re.search(rf"^{re.escape(label)}: ([\d.]+)", text, re.MULTILINE)
    assert found, f"no {label!r} in {text!r}"
    return float(found[1])


def check_picture(path: Path) -> None:
    """A PNG of a readable size with something drawn in colour, which empty axes and text are not."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rgb = imread(path)[..., :3]  # (height, width, 3), 0 to 1
    height, width, _ = rgb.shape
    assert width >= 600
    assert height >= 300
    is_coloured = rgb.max(axis=-1) - rgb.min(axis=-1) > 0.3
    assert is_coloured.sum() > 500


@every_example
def test_example_draws_a_picture_and_prints_its_result(example: Example, tmp_path: Path):
    done = run(example.name, *example.fast, cwd=tmp_path)
    picture = tmp_path / f"{example.name}.png"
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]
    check_picture(picture)
    assert re.search(example.result, done.stdout, re.MULTILINE), done.stdout
    assert f"Picture: {picture}" in done.stdout.splitlines()
    assert "Warning" not in done.stderr


@every_example
def test_help_explains_every_option(example: Example, tmp_path: Path):
    text = run(example.name, "--help", cwd=tmp_path).stdout
    for option in example.options:
        # The option at the start of a line, then its argument or choices, then some words of explanation.
        assert re.search(rf"^ +{option}\b(?: \S+)?\s+[a-z]\w* \w+", text, re.MULTILINE), f"{option} in {text}"
    assert list(tmp_path.iterdir()) == []


def test_train_digits_learns_with_default_arguments(tmp_path: Path):
    done = run("train_digits", cwd=tmp_path)
    assert 97 <= number_after("Test accuracy", done.stdout) <= 100
    assert 0 < number_after("Training loss in the last epoch", done.stdout) < 0.1
    check_picture(tmp_path / "train_digits.png")


def test_train_digits_depends_on_the_seed_alone(tmp_path: Path):
    first = train_digits(tmp_path, "--seed", "3")
    # Each start of Python takes seconds, so one run stands for both: the same seed again, and donation.
    assert train_digits(tmp_path, "--seed", "3", "--donate") == first
    assert train_digits(tmp_path, "--seed", "4") != first


def test_train_digits_refuses_to_train_for_no_epochs(tmp_path: Path):
    done = run("train_digits", "--epochs", "0", cwd=tmp_path, status=2)
    assert "error: --epochs is 0, expected at least 1" in done.stderr


def train_digits(folder: Path, *arguments: str) -> tuple[float, float, bytes]:
    """Loss, accuracy and picture after one epoch. The folder of the picture is made when there is none."""
    picture = folder / "new" / "picture.png"
    picture.unlink(missing_ok=True)
    text = run("train_digits", "--epochs", "1", "--output", "new/picture.png", *arguments, cwd=folder).stdout
    loss, accuracy = (number_after(label, text) for label in ("Training loss in the last epoch", "Test accuracy"))
    return loss, accuracy, picture.read_bytes()
