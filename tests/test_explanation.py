"""What `explain` says of an update is what the update does."""

import importlib
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.func import grad, jacfwd, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from functional_adam import AdamHparams, adam_init, adam_update, explain
from tests.builders import KERNELS_AND_AUTO, assert_unchanged, clone, snapshot, tensors_of
from tests.oracles import KERNELS
from tests.strategies import in_layout, random_tensor

HPARAMS = AdamHparams(lr=0.1, weight_decay=0.01)

# Which kernel runs and what is copied for it cannot be seen from outside: the record of the kernel and what makes the
# memory of a copy are watched.
KERNEL_RECORDS: dict[str, Any] = importlib.import_module("functional_adam.adam.kernels").KERNELS
STAGING = importlib.import_module("functional_adam.tensors.staging")


class Done(NamedTuple):
    """What an update has done."""

    runs: list[tuple[str, int]]  # the kernel of each call, and how many leaves it got
    copied: list[int]  # the bytes of each temporary copy that is made for a kernel


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    found = Done([], [])

    def watched(run: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        return lambda *args: (note(*args), run(*args))[1]

    for name, record in KERNEL_RECORDS.items():
        run = watched(record.run, lambda batch, *_, name=name: found.runs.append((name, len(batch.grads))))
        monkeypatch.setitem(KERNEL_RECORDS, name, record._replace(run=run))
    copy = watched(STAGING.empty_like, lambda x, dtype: found.copied.append(x.numel() * dtype.itemsize))
    monkeypatch.setattr(STAGING, "empty_like", copy)
    return found


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(shape, dtype, sum(shape))


def gaps(rows: int, columns: int) -> Tensor:
    return in_layout(randn(rows, columns), "strided")


TREES: dict[str, tuple[Any, Any]] = {
    "plain": ([randn(2, 3), randn(4)], [randn(2, 3), randn(4)]),
    "transposed": ([randn(2, 3), randn(4)], [randn(3, 2).T, randn(4)]),
    "gaps": ([gaps(2, 3), gaps(4, 2)], [randn(2, 3), gaps(4, 2)]),
    "several_dtypes": (
        [randn(3), randn(5, dtype=torch.float64), randn(7, dtype=torch.bfloat16), randn(9)],
        [randn(3), randn(5), randn(7), randn(9, dtype=torch.float64)],
    ),
    "complex": ([randn(2, 3, dtype=torch.complex128)], [randn(2, 3, dtype=torch.complex64).conj()]),
    "negative": ([randn(3)], [randn(3, dtype=torch.complex64).conj().imag]),
    "scalar": (randn(), randn()),
}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the state and of the update
    "adam": ({}, {}),
    "amsgrad": ({"hparams": AdamHparams(amsgrad=True)}, {}),
    "grad_scale": ({}, {"grad_scale": 2.0}),
    "float32_moments": ({"moment_dtype": torch.float32}, {}),
    "masters": ({"master_params": True, "per_leaf_step": True}, {}),
    "groups": ({"hparams": AdamHparams(lr=torch.tensor(0.1)), "per_leaf_step": True}, {}),
}


def call(params: Any, grads: Any = None, *, hparams: AdamHparams = HPARAMS, **options: Any) -> tuple[Any, ...]:
    """The arguments of a first update; parameters are as good as gradients."""
    return params, params if grads is None else grads, adam_init(params, hparams, **options), hparams


def call_of(tree: str, options: str = "adam") -> tuple[Any, ...]:
    """The same of TREES, with parameters in memory of their own for donation, in the layout of the tree's."""
    params, grads = TREES[tree]
    own = torch_pytree.tree_map(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x), params)
    return call(own, grads, **OPTIONS[options][0])


def paths_of(params: Any) -> list[tuple[str, Tensor]]:
    return [(f"params[{i}]", x) for i, x in enumerate(params)] if isinstance(params, list) else [("params", params)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tree", TREES)
def test_the_named_kernel_runs_on_the_named_groups_and_copies(tree: str, options: str, done: Done) -> None:
    for kernel, donate in product(KERNELS_AND_AUTO, (False, True)):
        arguments, keywords = call_of(tree, options), OPTIONS[options][1]
        before = snapshot(arguments)
        explanation = explain(*arguments, kernel=kernel, donate=donate, **keywords)
        assert_unchanged(arguments, before)
        assert done == ([], [])
        adam_update(*arguments, kernel=kernel, donate=donate, **keywords)

        assert explanation.watched_by is None
        groups = explanation.groups
        wide = {"float32_moments": torch.float32, "masters": torch.float32}.get(options, torch.bfloat16)
        dtypes = {path: group.dtype for group in groups for path in group.leaves}
        assert dtypes == {path: torch.promote_types(x.dtype, wide) for path, x in paths_of(arguments[0])}
        assert sum(len(group.leaves) for group in groups) == len(dtypes)
        assert sum(group.element_count for group in groups) == sum(x.numel() for x in tensors_of(arguments[0]))
        assert {group.device for group in groups} == {torch.device("cpu")}
        assert done.runs == [(explanation.computed_by, len(group.leaves)) for group in groups]
        temporary = [x for x in explanation.new_memory if "is a result" not in x.why and "rounded" not in x.why]
        assert sum(x.nbytes for x in temporary) == sum(done.copied)
        assert sum(len(x.tensors) for x in temporary) == len(done.copied)
        results = [path for x in explanation.new_memory if "is a result" in x.why for path in x.tensors]
        columns = 4 if arguments[3].amsgrad else 3
        assert len(results) == (0 if donate else columns * len(tensors_of(arguments[0])))
        done.runs.clear()
        done.copied.clear()


HERE, THERE, WIDE = torch.ones(2), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("params", "lr", "expected"),
    [
        ([], 0.1, []),
        ([HERE, HERE], 0.1, [(torch.float32, 0.1, [0, 1])]),
        ([HERE, THERE, HERE], 0.1, [(torch.float32, 0.1, [0, 2]), (torch.float32, 0.1, [1])]),
        ([HERE, WIDE, HERE], 0.1, [(torch.float32, 0.1, [0, 2]), (torch.float64, 0.1, [1])]),
        ([HERE] * 3, [0.1, 0.2, 0.1], [(torch.float32, 0.1, [0, 2]), (torch.float32, 0.2, [1])]),
    ],
)
def test_a_group_is_of_one_device_and_dtype_and_one_set_of_numbers(params: Any, lr: Any, expected: Any) -> None:
    groups = explain(*call(params, hparams=AdamHparams(lr=lr), per_leaf_step=True)).groups
    paths = [(dtype, number, [f"params[{i}]" for i in places]) for dtype, number, places in expected]
    assert [(group.dtype, group.hparams.lr, group.leaves) for group in groups] == paths


def test_new_memory_is_named_by_what_it_stands_for() -> None:
    of_results = [
        (["params[0]", "params[1]"], 52),
        (["state.exp_avg[0]", "state.exp_avg[1]"], 52),
        (["state.exp_avg_sq[0]", "state.exp_avg_sq[1]"], 52),
    ]
    assert [(x.tensors, x.nbytes) for x in explain(*call([randn(3), randn(2, 5)])).new_memory] == of_results
    # Masters stand in the place of their parameters.
    params = [randn(3, dtype=torch.bfloat16), randn(2)]
    arguments = call(params, clone(params), master_params=True, moment_dtype=torch.float32)
    assert [(x.tensors, x.nbytes, x.why) for x in explain(*arguments, donate=True).new_memory] == [
        (["params[0]"], 6, "is rounded from its master"),
        (["grads[0]"], 12, "is of torch.bfloat16 and computed in torch.float32"),
    ]
    # A parameter that stands still is not rounded.
    for donate in (False, True):
        arguments = call([randn(3, dtype=torch.bfloat16)], [None], master_params=True, per_leaf_step=True)
        new_memory = explain(*arguments, donate=donate).new_memory
        assert not any("rounded" in x.why for x in new_memory)
        assert [x.tensors for x in new_memory if x.tensors == ["params[0]"]] == [["params[0]"]] * (not donate)


@pytest.mark.parametrize("found_inf", [None, 1.0, torch.tensor(float("nan"))])
def test_what_is_skipped_or_has_no_gradient_stands_still(found_inf: Any, done: Done) -> None:
    params = [randn(3), randn(2), randn(4)]
    arguments = call(params, [params[0], None, params[2]], per_leaf_step=True)
    explanation = explain(*arguments, found_inf=found_inf)
    adam_update(*arguments, found_inf=found_inf)
    still, moving = ["params[1]"], [["params[0]", "params[2]"]]
    assert explanation.still == (still if found_inf is None else ["params[0]", "params[1]", "params[2]"])
    assert [group.leaves for group in explanation.groups] == (moving if found_inf is None else [])
    assert done.runs == ([("fused", 2)] if found_inf is None else [])


def same_error(arguments: Sequence[Any], keywords: dict[str, Any]) -> str:
    """What the update raises, and `explain` too."""
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"\w") as expected:
        adam_update(*arguments, **keywords)
    with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
        explain(*arguments, **keywords)
    return str(expected.value)


X = torch.ones(3)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "shape": (call(X, torch.ones(4)), {}),
    "structure": (call([X], {"a": X}), {}),
    "kernel": (call(X), {"kernel": "cuda"}),
    "order": ((X, adam_init(X, HPARAMS), X, HPARAMS), {}),
    "overlap": (call(X), {"donate": True}),
    "grad_scale": (call(X), {"grad_scale": "2"}),
}


@pytest.mark.parametrize(("arguments", "keywords"), BAD.values(), ids=BAD)
def test_it_raises_what_the_update_raises(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    assert same_error(arguments, keywords)


def test_why_a_kernel_cannot_run_is_what_the_error_says() -> None:
    arguments = call(torch.empty(3, device="meta"))
    explanation = explain(*arguments)
    assert explanation.computed_by == "foreach"
    assert list(explanation.reasons) == ["fused", "foreach", "single"]
    expected = same_error(arguments, {"kernel": "fused"})
    assert expected.startswith("kernel='fused' cannot run here: there are leaves on meta")
    assert explanation.reasons["fused"] in expected
    other = "single was asked for"
    assert explain(*call(X), kernel="single").reasons == {"fused": other, "foreach": other, "single": "asked for"}


def seen_inside(transform: Callable[[Callable[[Tensor], Tensor]], Any], x: Tensor, **options: Any) -> Any:
    """What `explain` says where `transform` runs a function of `x`."""
    found: list[Any] = []

    def loss(param: Tensor) -> Tensor:
        arguments = call(param, param.clone())
        found.append(explain(*arguments, **options))
        return adam_update(*arguments, **options)[0].sum()

    transform(loss)(x)
    return found[0]


@pytest.mark.parametrize(
    ("transform", "shape", "computed_by", "watched_by"),
    [
        (grad, (3,), "fused", "a torch.func transform"),
        (vmap, (2, 3), "fused", "a torch.func transform"),
        (jacfwd, (3,), "fused", "a torch.func transform"),
        (lambda f: jacfwd(jacfwd(f)), (3,), "equations", "forward mode within forward mode"),
        (make_fx, (3,), "equations", "a compiler or tracer"),
    ],
    ids=["grad", "vmap", "jvp", "nested", "make_fx"],
)
def test_a_watcher_is_named(
    transform: Any, shape: tuple[int, ...], computed_by: str, watched_by: str, done: Done
) -> None:
    explanation = seen_inside(transform, randn(*shape))
    assert explanation.computed_by == computed_by
    assert explanation.watched_by.startswith(watched_by)
    assert {name for name, _ in done.runs} == {computed_by} - {"equations"}
    assert explanation.computed_by in str(explanation)
    if computed_by == "equations":
        assert all("is opaque to" in explanation.reasons[name] for name in KERNELS)
        # They are computed in float32 for half types.
        groups = seen_inside(transform, randn(*shape, dtype=torch.bfloat16)).groups
        assert [group.dtype for group in groups] == [torch.float32]


def test_autograd_is_named_and_donation_refused_alike() -> None:
    arguments = call(randn(3).requires_grad_())
    explanation = explain(*arguments)
    assert explanation.watched_by is not None
    assert explanation.watched_by.startswith("autograd")
    assert explanation.watched_by in explanation.reasons["fused"]
    assert same_error(arguments, {"donate": True}).startswith("Cannot donate: the update is watched by autograd")
    # A tracer changes nothing about that.
    with pytest.raises(RuntimeError, match="Cannot donate: the update is watched by autograd"):
        make_fx(lambda g: adam_update(arguments[0], g, *arguments[2:], donate=True)[0])(randn(3))
    # An update that may be skipped chooses every tensor.
    copies = explain(*arguments, found_inf=torch.tensor(0.0)).new_memory
    chosen = [path for x in copies if "is chosen by found_inf" in x.why for path in x.tensors]
    assert chosen == ["params", "state.exp_avg", "state.exp_avg_sq", "grads"]


def test_a_traced_donation_is_copied_into_the_memory_given(monkeypatch: pytest.MonkeyPatch) -> None:
    # Under torch.compile `explain` is not traced, so that it cannot be asked there.
    monkeypatch.setattr("functional_adam.call.plan.is_compiled_here", lambda: True)
    found = seen_inside(make_fx, randn(3), donate=True).new_memory
    why = "is computed apart, then copied into donated memory"
    assert [x.tensors for x in found] == [["params"], ["state.exp_avg"], ["state.exp_avg_sq"]]
    assert {x.why.partition(":")[0] for x in found} == {why}


def test_the_table_has_no_loose_ends() -> None:
    params = {f"layer{i}": randn(2, 3) for i in range(3)}
    lines = str(explain(*call(params, {**params, "layer1": None}, per_leaf_step=True), grad_scale=2.0)).splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert max(map(len, lines)) <= 120
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines]
    assert ["params['layer0'] and 1 other", "12", "torch.float32", "cpu"] in cells
    assert ["params['layer1']", "nothing: stands still"] in cells
    assert ["grads['layer0'] and 1 other", "48", "is divided by grad_scale"] in cells
    assert str(explain(*call(params))).splitlines()[1].split() == ["fused", "yes", "the", "fastest", "that", "can"]
