"""What is remembered about the tensors of an update changes no result and no error, and keeps nothing alive."""

import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_adam import AdamHparams, adam_update
from tests.builders import Call, as_bytes, make_call, negative, strided, tensors_of
from tests.strategies import in_layout

SHAPES = ((3, 3), (5,), (2, 4))
facts: Any = importlib.import_module("functional_adam.call.facts")
plan: Any = importlib.import_module("functional_adam.call.plan")


# No public call shows whether the memory answered, so that its names stand here, and only here.


def forget() -> None:
    plan._plans._known = ()


def entries() -> tuple[Any, ...]:
    """One for each list of tensors that was looked at one by one."""
    return plan._plans._known


@pytest.fixture(autouse=True)
def _forget() -> None:
    forget()


make = partial(make_call, SHAPES, per_leaf_step=True)


def changed(call: Call, place: str, change: Callable[[Tensor], Any], leaf: str = "leaf0") -> Call:
    """`call` with one leaf at `place` changed."""
    holder = call if place in call._fields else call.state
    tree = getattr(holder, place)
    holder = holder._replace(**{place: {**tree, leaf: change(tree[leaf])}})
    return holder if isinstance(holder, Call) else call._replace(state=holder)


def describe(tree: Any) -> list[tuple[Any, ...]]:
    """All that can be told of the tensors of a result."""
    return [
        (type(x), x.dtype, x.device, x.shape, x.stride(), x.requires_grad, x.is_inference())
        + (() if x.is_meta else (as_bytes(x).tolist(),))
        for x in tensors_of(tree)
    ]


def outcome(call: Call, **options: Any) -> Any:
    """The description of a result, or of an error."""
    try:
        return describe(adam_update(*call, **options))
    except Exception as error:
        return type(error), str(error)


# What is alike is recognised.

KINDS: dict[str, Callable[[int], Call]] = {
    "shared_step": lambda seed: make(seed=seed, per_leaf_step=False),
    "tensor_lr": lambda seed: make(seed=seed, hparams=AdamHparams(lr=torch.tensor(0.1 + seed), amsgrad=True)),
    "none_gradient": lambda seed: changed(make(seed=seed), "grads", lambda _: None, "leaf1"),
    "complex": lambda seed: make(seed=seed, dtype=torch.complex64),
    "parameters": lambda seed: make(seed=seed, layout=lambda x: nn.Parameter(x, requires_grad=False)),
    "transposed": lambda seed: changed(make(seed=seed), "grads", lambda x: x.mT),
}
each_donate = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


@each_donate
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_alike_are_looked_at_once_and_give_what_they_give_without_memory(
    kind: str, donate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = [outcome(KINDS[kind](seed), donate=donate) for seed in range(4)]
    assert len(entries()) == 1
    forget()
    monkeypatch.setattr(facts, "_guards", None)  # as where torch has none
    assert [outcome(KINDS[kind](seed), donate=donate) for seed in range(4)] == remembered
    assert entries() == ()
    assert all(isinstance(result, list) for result in remembered)


class Sure:
    """Guards that find everything alike."""

    def __init__(self, *_: Tensor, **__: None) -> None:
        pass

    def check(self, *_: Tensor) -> bool:
        return True


@pytest.mark.parametrize(
    "guards", [None, lambda _: Sure(), lambda *_, **__: None, Sure], ids=["none", "arguments", "methods", "meaning"]
)
def test_private_guards_are_taken_only_if_they_compare_what_they_should(
    guards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert facts._find_guards() is not None
    module = "torch._C._dynamo.guards"
    monkeypatch.setattr(sys.modules[module], "TensorGuards", guards)
    assert facts._find_guards() is None
    monkeypatch.setitem(sys.modules, module, None)
    assert facts._find_guards() is None


# What differs is noticed.


class Subclass(Tensor):
    """A tensor with a meaning of its own."""


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


ANY_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda x: x.to("meta"),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "none": lambda _: None,
    "number": lambda _: 1.0,
    "inference": inference,
    "double": Tensor.double,
    "integer": Tensor.int,
}
LEAF_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    **ANY_CHANGES,
    "half": Tensor.bfloat16,
    "shape": lambda x: x[:2],
    "dims": lambda x: x.unsqueeze(0),
    "transposed": lambda x: x.mT,
    "expanded": partial(in_layout, layout="expanded"),
    "gaps": strided,
    "parameter": nn.Parameter,
    "subclass": lambda x: x.as_subclass(Subclass),
    "negative": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "lazily_negative": negative,
    "complex": lambda x: x.to(torch.complex64),
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "sparse": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged),
    "mkldnn": Tensor.to_mkldnn,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "numpy": Tensor.numpy,
}
STEP_CHANGES = {**ANY_CHANGES, "shape": lambda x: x.reshape(1), "spent": lambda _: torch.empty(0)}


def with_lr(call: Call, **options: Any) -> Call:
    return call._replace(hparams=AdamHparams(lr=torch.tensor(0.2, **options)))


CHANGES: dict[str, Callable[[Call], Call]] = {
    f"{place}_{name}": partial(changed, place=place, change=change)
    for place in ("params", "grads", "exp_avg", "exp_avg_sq", "step")
    for name, change in (STEP_CHANGES if place == "step" else LEAF_CHANGES).items()
}
CHANGES |= {
    "tensor_lr": with_lr,
    "lr_that_requires_grad": lambda call: with_lr(call, requires_grad=True),
    "meta_lr": lambda call: with_lr(call, device="meta"),
    "amsgrad": lambda _: make(hparams=AdamHparams(amsgrad=True)),
    "shared_step": lambda _: make(per_leaf_step=False),
    "shared_step_and_none": lambda _: changed(make(per_leaf_step=False), "grads", lambda _: None),
    "stacked_step": lambda call: call._replace(state=call.state._replace(step=torch.zeros(3))),
    "fewer_leaves": lambda _: make_call(SHAPES[:2], per_leaf_step=True),
    "more_leaves": lambda _: make_call((*SHAPES, (1,)), per_leaf_step=True),
    "other_order": lambda _: make_call(SHAPES[::-1], per_leaf_step=True),
    "no_gradient": lambda call: call._replace(grads=dict.fromkeys(call.grads)),
    "one_tensor_in_two_places": lambda call: changed(call, "exp_avg", lambda _: call.grads["leaf0"]),
}
# None among the parameters is no leaf: all trees then differ from theirs.
del CHANGES["params_none"]


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning",
    "ignore:Sparse CSR tensor support is in beta:UserWarning",
    "ignore:Sparse invariant checks:UserWarning",
    "ignore:.*[qQ]uantiz.*",
)
@each_donate
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_call_does_after_plain_ones_what_it_does_first(change: Callable[[Call], Call], donate: bool) -> None:
    expected = outcome(change(make(seed=5)), donate=donate)
    assert outcome(change(make(seed=5)), donate=donate) == expected
    forget()
    for seed in range(2):
        adam_update(*make(seed=seed))
        adam_update(*make(seed=seed), donate=True)
    for _ in range(2):
        assert outcome(change(make(seed=5)), donate=donate) == expected
    found = entries()
    adam_update(*make(seed=6))
    assert entries() is found


def test_which_gradients_are_none_is_noticed() -> None:
    call = make_call(((4,),) * 3, per_leaf_step=True)
    for place in [*call.grads, *call.grads]:
        params, state = adam_update(*changed(call, "grads", lambda _: None, place))
        for name, param in params.items():
            assert state.step[name] == (3 if name == place else 4)
            assert torch.equal(param, call.params[name]) == (name == place)
    # The gradient of the last leaf in the place of another, after calls in which that one had none.
    call = make()
    adam_update(*changed(call, "grads", lambda _: None, "leaf1"))
    swapped = call._replace(grads={**call.grads, "leaf1": call.grads["leaf2"], "leaf2": None})
    with pytest.raises(
        ValueError, match=r"grads\['leaf1'\] has shape \(2, 4\), but params\['leaf1'\] has shape \(5,\)"
    ):
        adam_update(*swapped)


# Grad mode and transforms are asked each time.


def test_grad_mode_and_requires_grad_are_not_remembered() -> None:
    lr = torch.tensor(0.1)
    call = make(hparams=AdamHparams(lr=lr))

    def is_tracked() -> bool:
        return adam_update(*call)[0]["leaf0"].requires_grad

    assert not is_tracked()
    for x in (call.params["leaf0"], lr):
        x.requires_grad_()
        for _ in range(2):
            assert is_tracked()
            with torch.no_grad():
                assert not is_tracked()
            with pytest.raises(RuntimeError, match="Cannot donate: the update is watched by autograd"):
                adam_update(*call, donate=True)
        x.requires_grad_(False)
        assert not is_tracked()


def test_transforms_do_not_disturb_what_is_remembered() -> None:
    call = make()

    def loss(params: Any) -> Tensor:
        return sum((x**2).sum() for x in adam_update(params, *call[1:])[0].values())

    expected_gradient = describe(torch.func.grad(loss)(call.params))
    forget()
    expected = outcome(call)
    for _ in range(2):
        assert describe(torch.func.grad(loss)(call.params)) == expected_gradient
        found = entries()
        assert outcome(call) == expected
        assert entries() is found


# Nothing is kept alive.


@each_donate
def test_nothing_is_kept_alive(donate: bool) -> None:
    call = make(hparams=AdamHparams(lr=torch.tensor(0.1), amsgrad=True))
    result = adam_update(*call, donate=donate)
    assert len(entries()) == 1
    given = [weakref.ref(x) for x in tensors_of((call, result))]
    del call, result
    gc.collect()
    assert [ref() for ref in given if ref() is not None] == []


def test_the_memory_is_bounded() -> None:
    params, grads, state, hparams = make()
    for donate in (False, False, True, True, False):
        params, state = adam_update(params, grads, state, hparams, donate=donate)
    assert len(entries()) == 2  # one plan without donation, one with
    calls = [make_call(((size,),)) for size in range(1, 24)]
    expected = [outcome(call) for call in calls]
    count = len(entries())
    assert 2 < count < len(calls)
    assert [outcome(call) for call in calls[::-1]] == expected[::-1]
    assert len(entries()) == count


# Donation.


def assert_refused(call: Call, match: str) -> None:
    """Donation raises and changes nothing."""
    before = describe(call)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            adam_update(*call, donate=True)
        assert describe(call) == before


def overlapping(call: Call) -> Call:
    """Two parameters that share four elements, each contiguous as ever."""
    flat = torch.randn(10)
    return call._replace(params={**call.params, "leaf0": flat[:9].view(3, 3), "leaf1": flat[5:]})


OVERLAPS: list[tuple[Callable[[Call], Call], str, str]] = [
    (overlapping, "params['leaf0']", "params['leaf1']"),
    (lambda c: changed(c, "grads", lambda _: c.params["leaf0"].view(3, 3)), "params['leaf0']", "grads['leaf0']"),
    (lambda c: changed(c, "exp_avg", lambda _: c.params["leaf0"][:]), "params['leaf0']", "state.exp_avg['leaf0']"),
    (
        lambda c: changed(c, "step", lambda _: c.state.exp_avg["leaf1"][2].abs_()),
        "state.exp_avg['leaf1']",
        "state.step['leaf0']",
    ),
]


@pytest.mark.parametrize(("build", "first", "second"), OVERLAPS, ids=["parameters", "gradient", "moment", "step"])
def test_overlap_is_refused_before_and_after_safe_donations(
    build: Callable[[Call], Call], first: str, second: str
) -> None:
    match = f"Cannot donate {first}: it shares memory with {second}".replace("[", r"\[")
    assert_refused(build(make()), match)
    forget()
    for seed in range(5):
        adam_update(*make(seed=seed), donate=True)  # its memory is free again afterwards
        found = entries()
        assert_refused(build(make()), match)
        assert entries() is found  # alike, but for where they lie


def test_replaced_data_is_noticed() -> None:
    params, grads, state, hparams = make()
    for _ in range(2):
        params, state = adam_update(params, grads, state, hparams, donate=True)
    original, params["leaf0"].data = params["leaf0"].data, grads["leaf0"].data
    call = Call(params, grads, state, hparams)
    assert_refused(call, r"Cannot donate params\['leaf0'\]: it shares memory with grads\['leaf0'\]")
    params["leaf0"].data = original
    adam_update(*call, donate=True)


def test_inference_tensors_are_refused_whatever_was_seen_in_whatever_mode() -> None:
    ordinary = make()
    adam_update(*make(), donate=True)
    with torch.inference_mode():
        call = make()
        adam_update(*make(), donate=True)
        adam_update(*ordinary, donate=True)  # last, since the latest memory is asked first
    for mode in (torch.enable_grad, torch.no_grad):  # the second has the grad mode of inference mode
        with mode():
            assert_refused(call, r"Cannot donate tensors made under torch\.inference_mode\(\)")
