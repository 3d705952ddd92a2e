"""The examples, run as scripts: they end well, draw a readable picture, and compute what they say."""

import re
import runpy
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from tests.benchmarks.measure import Curve
from tests.benchmarks.plot import draw

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NO_DIFFERENCE = r"^Largest difference of parameters: 0$"
# Scripts that write `<name>.svg`: arguments that make them end within seconds, and the line that holds the result.
TABLE = {
    "train_digits": ("--epochs 1 --kernel foreach", r"^Test accuracy: \d+\.\d+ %$"),
    "lr_sweep": ("--steps 3 --learning-rates 3", r"^.*Best learning rate: [\d.]+, test loss [\d.]+ nats$"),
    "learn_the_optimizer": ("--steps 1", r"^ *40 steps, learnt +loss [\d.]+ \([\d.]+\), accuracy [\d.]+$"),
    "few_shot": ("--meta-steps 2 --inner-steps 2", r"^Adam  learnt  ( +[\d.]+ \+- [\d.]+){3} +[\d.]+$"),
    "many_fits": (
        "--fits 20 --loop 2 --steps 5",
        r"^Largest difference to torch.optim.Adam over \d+ fits: [\d.e-]+$",
    ),
    "finetune_groups": ("--steps 4 --save-every 2", NO_DIFFERENCE),
    "bf16_training": ("--steps 20 --members 2", r"^bfloat16, masters +[\d.]+ \+- [\d.]+$"),
    "ddp_overlap": ("--steps 5", NO_DIFFERENCE),
    "rpc_parameter_server": ("--steps 5", NO_DIFFERENCE),
    "fsdp2_checkpoint": ("--steps 8", r"^Largest difference to the plain run: [\d.e-]+ nats$"),
}


def run(name: str, arguments: str) -> None:
    """Run an example as `__main__` in the current folder, where torch and matplotlib are loaded already."""
    with mock.patch("sys.argv", [name, *arguments.split()]):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def number_after(label: str, text: str) -> float:
    found = re.search(rf"^{re.escape(label)}: ([\d.]+)", text, re.MULTILINE)
    assert found, f"no {label!r} in {text!r}"
    return float(found[1])


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example_draws_a_picture_and_prints_its_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    fast, result = TABLE[name]
    monkeypatch.chdir(tmp_path)
    run(name, fast)
    out, err = capfd.readouterr()  # of the processes that an example starts too
    picture = tmp_path / f"{name}.svg"
    assert [*tmp_path.iterdir()] == [picture]
    check_picture(picture)
    assert re.search(result, out, re.MULTILINE), out
    assert f"Picture: {picture}" in out.splitlines()
    assert "Warning" not in err


@pytest.mark.parametrize("name", TABLE)
def test_help_and_gallery_explain_each_example(name: str, capsys: pytest.CaptureFixture[str]):
    fast, result = TABLE[name]
    with pytest.raises(SystemExit, match=r"^0$"):
        run(name, "--help")
    text = capsys.readouterr().out
    options = set(re.findall(r"\[(--[\w-]+)", text))
    for option in options:
        # The option at the start of a line, then its argument or choices, then some words of explanation.
        assert re.search(rf"^ +{option}\b(?: \S+)?\s+[a-z]\w* \w+", text, re.MULTILINE), f"{option} in {text}"

    page = (ROOT / "docs" / "gallery.md").read_text()
    (section,) = (part for part in page.split("\n## ")[1:] if f"python examples/{name}.py" in part)
    image = re.search(r"^!\[([^]]+)\]\(([^)]+)\)$", section, re.MULTILINE)
    assert image
    assert len(image[1]) > 40, "the picture is not described"
    assert ROOT / "docs" / image[2] in PICTURES
    shell = re.search(r"^```console\n\$ (.+)\n((?:.*\n)+)```$", section, re.MULTILINE)
    assert shell
    shown = dict(re.findall(r" (--[\w-]+) (\S+)", shell[1]))
    assert {"--seed", "--output", *re.findall(r"--\S+", fast), *shown} <= options
    assert shown["--output"] == f"docs/{image[2]}"
    assert re.search(result, shell[2], re.MULTILINE)


def test_train_digits_learns_and_depends_on_the_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)

    def train(arguments: str) -> tuple[float, float, bytes]:
        run("train_digits", f"--output new/picture.svg {arguments}")
        text = capsys.readouterr().out
        loss, accuracy = (number_after(label, text) for label in ("Training loss in the last epoch", "Test accuracy"))
        return loss, accuracy, Path("new/picture.svg").read_bytes()

    loss, accuracy, _ = train("")
    assert 97 <= accuracy <= 100
    assert 0 < loss < 0.1
    first, again, donated, other = (train(f"--epochs 1 --seed {seed}") for seed in ("3", "3", "3 --donate", "4"))
    assert first == again == donated
    assert first != other
    with pytest.raises(SystemExit, match=r"^2$"):
        train("--epochs 0")
    assert "error: --epochs is 0, expected at least 1" in capsys.readouterr().err


# Pictures: one file for light and for dark pages, with no background, in colours that stand out from both.

BACKGROUNDS = ("#ffffff", "#131416")  # of light pages, and of furo's dark ones; GitHub's are darker
LINE_CONTRAST = 3.0  # what WCAG 2.2 asks of graphics
TEXT_CONTRAST = 4.25  # it asks 4.5 of small text, and no colour has more than 4.29 with both backgrounds
WIDTH = 432  # points, 576 pixels: less than a column of text on a page
SMALLEST_TEXT = 9  # points
LARGEST_FILE = 80_000  # bytes
# The unit in parentheses, or what is counted.
UNIT = re.compile(r"\(.+\)|\b(epoch|step|steps|patches|leaves|elements|members)\b")

TEXT = "{http://www.w3.org/2000/svg}text"
PICTURES = sorted((ROOT / "docs" / "img").iterdir())
STYLE = matplotlib.rc_params_from_file(EXAMPLES / "gallery.mplstyle", use_default_template=False)
CYCLE = STYLE["axes.prop_cycle"].by_key()["color"]

# Machado, Oliveira and Fernandes (2009), table 1, severity 1.0: linear RGB as others see it.
SEEN_BY = {
    "most": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def linear_rgb(colour: str) -> np.ndarray:
    """Of "#rrggbb", (3,), 0 to 1."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """By WCAG 2.2, from 1 to 21."""
    low, high = sorted(linear_rgb(colour) @ (0.2126, 0.7152, 0.0722) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB for daylight (D65), in which colours as far apart as 2.3 are just told from each other."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = np.cbrt(to_xyz @ linear.clip(0.001, 1) / (0.95047, 1, 1.08883))  # no colour here is nearly black
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def style_of(element: ElementTree.Element) -> dict[str, str]:
    return dict(re.findall(r"([\w-]+): *([^;]+)", element.get("style", "")))


def texts(group: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()).strip() for element in group.iter(TEXT)]


def is_inside(text: ElementTree.Element, height: float) -> bool:
    """Whether a text begins and ends inside the picture, in the font that it was laid out with."""
    style = style_of(text)
    font = FontProperties(family="DejaVu Sans", weight=style.get("font-weight", "normal"))
    width = TextPath((0, 0), text.text, float(style["font-size"].removesuffix("px")), prop=font).get_extents().width
    is_upright = "rotate(-90" in text.get("transform", "")
    # Turned by -90 degrees, text runs upwards, from larger to smaller y.
    anchor = height - float(text.get("y", "nan")) if is_upright else float(text.get("x", "nan"))
    begin = anchor - {"start": 0.0, "middle": 0.5, "end": 1.0}[style["text-anchor"]] * width
    return 0 <= begin <= begin + width <= (height if is_upright else WIDTH)


def labels_of_axes(picture: ElementTree.Element) -> Iterator[str]:
    """What is written along each axis that has numbers, apart from these."""
    for axis in picture.iter():
        if axis.get("id", "").startswith("matplotlib.axis_"):
            ticks = [group for group in axis if "tick_" in group.get("id", "") and any(texts(group))]
            if ticks:
                yield " ".join(text for group in axis if group not in ticks for text in texts(group))


def check_picture(path: Path) -> None:
    """An SVG that can be read in a column of text, on light and on dark pages."""
    picture = ElementTree.parse(path).getroot()
    height = float(picture.get("height", "").removesuffix("pt"))
    assert picture.get("width") == f"{WIDTH}pt"
    assert path.stat().st_size < LARGEST_FILE

    drawn = set(re.findall(r"(?:fill|stroke): (#\w{6})", path.read_text()))
    assert drawn & set(CYCLE[:-1]), "nothing is drawn, or in grey alone"
    written = {style_of(element)["fill"] for element in picture.iter() if style_of(element).get("font-size")}
    for background in BACKGROUNDS:
        assert {colour for colour in drawn if contrast(colour, background) < LINE_CONTRAST} == set()
        assert {colour for colour in written if contrast(colour, background) < TEXT_CONTRAST} == set()

    labels = list(labels_of_axes(picture))
    assert len(labels) >= 2
    assert [label for label in labels if not UNIT.search(label)] == []
    sizes = [float(style_of(element).get("font-size", "inf").removesuffix("px")) for element in picture.iter()]
    assert min(sizes) >= SMALLEST_TEXT
    assert [text.text for text in picture.iter(TEXT) if text.get("x") and not is_inside(text, height)] == []


def test_pictures_of_the_docs_are_readable_on_light_and_dark_pages():
    for picture in PICTURES:
        check_picture(picture)


def test_benchmark_draws_readable_curves(tmp_path: Path):
    series = {"donated": [0.1, 1.0, 9.0], "TorchOpt": [1.0, 8.0, None], "bound": [0.001, 0.1, 10.0]}
    curve = Curve("leaves", "leaves of 64 elements", "ms", rounds=1, x=[10, 1_000, 100_000], series=series)
    draw([curve, curve], tmp_path / "scaling.svg")
    check_picture(tmp_path / "scaling.svg")


def test_colours_of_the_style_stand_out_and_are_told_apart():
    inks = {value for name, value in STYLE.items() if name.endswith("color")}
    for background in BACKGROUNDS:
        assert min(contrast(colour, background) for colour in CYCLE) >= LINE_CONTRAST
        assert min(contrast(colour, background) for colour in inks) >= TEXT_CONTRAST
    for seen in SEEN_BY.values():
        colours = [lab(np.asarray(seen) @ linear_rgb(colour)) for colour in CYCLE]
        assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > 20
