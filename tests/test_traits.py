"""What is remembered about the tensors of an update changes no result and no error, and keeps nothing alive."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, arguments, traits

SHAPES = ((3, 3), (5,), (2, 4))
TIMEOUT = 60.0  # seconds, where a fault would wait for ever


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traits, "_known", ())


class Call(NamedTuple):
    """The arguments of one `adam_update`."""

    params: list[Any]
    grads: list[Any]
    state: AdamState
    hparams: AdamHparams

    def run(self, **options: Any) -> tuple[Any, AdamState]:
        return adam_update(*self, **options)


def make(
    seed: int = 0,
    *,
    per_leaf_step: bool = True,
    hparams: AdamHparams | None = None,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> Call:
    """A call in the middle of training, of the same traits for every seed."""
    generator = torch.Generator().manual_seed(seed)
    params, grads, first, second, third = (
        [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(5)
    )
    hparams = hparams or AdamHparams(lr=0.1)
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    state = AdamState(
        torch_pytree.tree_map(lambda x: x + 3, state.step),
        first,
        [squared(x) for x in second],
        [squared(x) for x in third] if hparams.amsgrad else (),
    )
    return Call(params, grads, state, hparams)


def squared(x: Tensor) -> Tensor:
    """Like `exp_avg_sq`: not negative, and of the dtype of `x`."""
    return torch.view_as_complex(torch.view_as_real(x).square()) if x.is_complex() else x.square()


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def describe(tree: Any) -> list[tuple[Any, ...]]:
    """All that can be told of the tensors of a result."""
    return [
        (type(x), x.dtype, x.device, x.shape, x.stride(), x.requires_grad, x.is_inference(), _values(x))
        for x in tensors_of(tree)
    ]


def _values(x: Tensor) -> list[int] | None:
    if x.is_meta:
        return None
    x = x.detach().as_subclass(Tensor).clone(memory_format=torch.contiguous_format)
    return x.resolve_conj().resolve_neg().view(-1).view(torch.uint8).tolist()


def outcome(call: Call, **options: Any) -> Any:
    """The description of a result, or of an error."""
    try:
        return describe(call.run(**options))
    except Exception as error:
        return type(error), str(error)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each update that had to look at its tensors one by one."""
    made: list[int] = []

    def find(listed: Any, *rest: Any) -> Any:
        made.append(len(listed.tensors))
        return traits.find_traits(listed, *rest)

    monkeypatch.setattr(arguments, "find_traits", find)
    return made


# What is alike is recognised.

KINDS: dict[str, Callable[[int], Call]] = {
    "plain": lambda seed: make(seed, per_leaf_step=False),
    "per_leaf_step": make,
    "amsgrad": lambda seed: make(seed, hparams=AdamHparams(lr=0.1, amsgrad=True)),
    "tensor_lr": lambda seed: make(seed, hparams=AdamHparams(lr=torch.tensor(0.1 + seed), eps=torch.tensor(1e-8))),
    "none_gradient": lambda seed: (call := make(seed))._replace(grads=[call.grads[0], None, call.grads[2]]),
    "bfloat16": lambda seed: make(seed, dtype=torch.bfloat16),
    "complex": lambda seed: make(seed, dtype=torch.complex64),
    "parameters": lambda seed: (call := make(seed))._replace(
        params=[nn.Parameter(x, requires_grad=False) for x in call.params]
    ),
    "transposed": lambda seed: (call := make(seed))._replace(grads=[call.grads[0].mT, *call.grads[1:]]),
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_alike_are_looked_at_once(kind: str, donate: bool, searches: list[int]) -> None:
    for seed in range(4):
        KINDS[kind](seed).run(donate=donate)
    assert len(searches) == 1


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("kind", KINDS)
def test_remembered_or_not_results_are_the_same(kind: str, donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = [outcome(KINDS[kind](seed), donate=donate) for seed in range(3)]
    monkeypatch.setattr(traits, "_guards", None)  # torch has no such thing
    for seed in range(3):
        monkeypatch.setattr(traits, "_known", ())
        assert outcome(KINDS[kind](seed), donate=donate) == remembered[seed]
        assert traits._known == ()
    assert isinstance(remembered[0], list)


class Sure:
    """Guards that find everything alike."""

    def __init__(self, *_: Tensor, **__: None) -> None:
        pass

    def check(self, *_: Tensor) -> bool:
        return True


@pytest.mark.parametrize("change", ["no_module", "no_class", "other_arguments", "other_methods", "other_meaning"])
def test_private_guards_are_taken_only_if_they_compare_what_they_should(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert traits._find_guards() is traits._guards is not None
    module = "torch._C._dynamo.guards"
    if change == "no_module":
        monkeypatch.setitem(sys.modules, module, None)
    elif change == "no_class":
        monkeypatch.delattr(sys.modules[module], "TensorGuards")
    else:
        guards = {"other_arguments": lambda _: Sure(), "other_methods": lambda *_, **__: None, "other_meaning": Sure}
        monkeypatch.setattr(sys.modules[module], "TensorGuards", guards[change])
    assert traits._find_guards() is None


def test_a_training_loop_looks_once(searches: list[int]) -> None:
    params, grads, state, hparams = make()
    for donate in (False, False, True, True, False):
        params, state = adam_update(params, grads, state, hparams, donate=donate)
    assert len(searches) == 1


# What differs is noticed.


class Subclass(Tensor):
    """A tensor with a meaning of its own."""


def negative(x: Tensor) -> Tensor:
    """The values of `x` behind a lazy negation."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def lazily_negative(x: Tensor) -> Tensor:
    """The values of `x`, of its strides, behind a lazy negation."""
    return torch._neg_view(-x)  # no public function makes one without a change of strides


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


LEAF_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda x: x.to(torch.float64),
    "half": lambda x: x.to(torch.bfloat16),
    "integer": lambda x: x.to(torch.int64),
    "shape": lambda x: x[:2],
    "dims": lambda x: x.unsqueeze(0),
    "transposed": lambda x: x.mT,
    "expanded": lambda x: x[:1].expand(x.shape),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "meta": lambda x: x.to("meta"),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "parameter": nn.Parameter,
    "subclass": lambda x: x.as_subclass(Subclass),
    "negative": negative,
    "lazily_negative": lazily_negative,
    "complex": lambda x: x.to(torch.complex64),
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "sparse": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged),
    "mkldnn": Tensor.to_mkldnn,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "none": lambda _: None,
    "number": lambda _: 1.0,
    "numpy": Tensor.numpy,
    "inference": inference,
}
PLACES = ("params", "grads", "exp_avg", "exp_avg_sq")
UNUSUAL = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning",
    "ignore:Sparse CSR tensor support is in beta:UserWarning",
    "ignore:Sparse invariant checks:UserWarning",
    "ignore:quantize_per_tensor:UserWarning",
    "ignore:.*[qQ]uantiz.*",
)


def changed(call: Call, place: str, change: Callable[[Any], Any]) -> Call:
    """`call` with its first leaf at `place` changed."""
    if place in ("params", "grads"):
        leaves = [*getattr(call, place)]
        return call._replace(**{place: [change(leaves[0]), *leaves[1:]]})
    leaves = [*getattr(call.state, place)]
    return call._replace(state=call.state._replace(**{place: [change(leaves[0]), *leaves[1:]]}))


def assert_noticed(change: Callable[[Call], Call], searches: list[int], **options: Any) -> Any:
    """What a changed call does after plain ones is what it does in a process that has seen none."""
    expected = outcome(change(make(5)), **options)
    traits._known = ()
    for seed in range(2):
        make(seed).run()
        make(seed).run(donate=True)
    searches.clear()
    assert outcome(change(make(5)), **options) == expected
    assert len(searches) == 1
    assert outcome(change(make(5)), **options) == expected
    searches.clear()
    make(6).run()
    assert searches == []
    return expected


@UNUSUAL
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
# None among the parameters is no leaf: all trees then differ from theirs.
@pytest.mark.parametrize(
    ("name", "place"), [(n, p) for n in LEAF_CHANGES for p in PLACES if (n, p) != ("none", "params")]
)
def test_a_change_of_one_leaf_is_noticed(name: str, place: str, donate: bool, searches: list[int]) -> None:
    assert_noticed(lambda call: changed(call, place, LEAF_CHANGES[name]), searches, donate=donate)


STEP_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "dtype": Tensor.double,
    "integer": Tensor.int,
    "shape": lambda x: x.reshape(1),
    "spent": lambda _: torch.empty(0),
    "meta": lambda x: x.to("meta"),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "none": lambda _: None,
    "number": lambda _: 3.0,
    "inference": inference,
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("name", STEP_CHANGES)
def test_a_change_of_one_step_is_noticed(name: str, donate: bool, searches: list[int]) -> None:
    assert_noticed(lambda call: changed(call, "step", STEP_CHANGES[name]), searches, donate=donate)


CALL_CHANGES: dict[str, Callable[[Call], Call]] = {
    "tensor_lr": lambda call: call._replace(hparams=AdamHparams(lr=torch.tensor(0.2))),
    "lr_that_requires_grad": lambda call: call._replace(hparams=AdamHparams(lr=torch.tensor(0.2, requires_grad=True))),
    "meta_lr": lambda call: call._replace(hparams=AdamHparams(lr=torch.tensor(0.2, device="meta"))),
    "amsgrad": lambda _: make(5, hparams=AdamHparams(amsgrad=True)),
    "shared_step": lambda _: make(5, per_leaf_step=False),
    "fewer_leaves": lambda _: make(5, shapes=SHAPES[:2]),
    "more_leaves": lambda _: make(5, shapes=(*SHAPES, (1,))),
    "other_order": lambda _: make(5, shapes=SHAPES[::-1]),
    "no_gradient": lambda call: call._replace(grads=[None] * 3),
}


@pytest.mark.parametrize("name", CALL_CHANGES)
def test_a_change_of_the_call_is_noticed(name: str, searches: list[int]) -> None:
    assert_noticed(CALL_CHANGES[name], searches)


def test_one_tensor_in_two_places_gives_the_same_each_time() -> None:
    call = make(shapes=((4,), (4,)))
    expected = describe(call._replace(grads=[call.grads[0], call.grads[0].clone()]).run())
    for _ in range(3):
        assert describe(call._replace(grads=[call.grads[0]] * 2).run()) == expected


def test_which_gradients_are_none_is_noticed() -> None:
    call = make(shapes=((4,), (4,), (4,)))
    for place in (0, 1, 2, 0, 1, 2):
        grads = [None if i == place else grad for i, grad in enumerate(call.grads)]
        params, state = call._replace(grads=grads).run()
        assert [float(step) for step in state.step] == [3.0 if i == place else 4.0 for i in range(3)]
        assert [torch.equal(a, b) for a, b in zip(params, call.params, strict=True)] == [i == place for i in range(3)]


def test_a_gradient_in_the_place_of_another_is_noticed() -> None:
    call = make()
    first, _, last = call.grads
    call._replace(grads=[first, None, last]).run()
    with pytest.raises(ValueError, match=r"grads\[1\] has shape \(2, 4\), but params\[1\] has shape \(5,\)"):
        call._replace(grads=[first, last, None]).run()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda call: changed(call, "step", Tensor.double), TypeError, r"state.step\[0\] is of torch.float64"),
        (lambda call: changed(call, "step", lambda _: torch.empty(0)), RuntimeError, r"state.step\[0\] is empty"),
        (lambda call: changed(call, "grads", Tensor.int), TypeError, r"grads\[0\] is of torch.int32"),
        (
            lambda call: call._replace(state=call.state._replace(step=torch.zeros(3))),
            ValueError,
            r"state.step has shape \(3,\)",
        ),
    ],
    ids=["step_dtype", "spent", "gradient", "step_shape"],
)
def test_what_was_refused_is_refused_again(change: Callable[[Call], Call], error: type, match: str) -> None:
    call = make()
    wrong = change(call)
    for _ in range(3):
        with pytest.raises(error, match=match):
            wrong.run()
    call.run()
    with pytest.raises(error, match=match):
        wrong.run()


def test_a_shared_step_refuses_none_each_time() -> None:
    call = make(per_leaf_step=False)
    wrong = call._replace(grads=[None, *call.grads[1:]])
    for _ in range(3):
        with pytest.raises(ValueError, match=r"grads\[0\] is None, but all leaves share one step"):
            wrong.run()


# Grad mode and transforms are asked each time.


def tracked(call: Call) -> Call:
    return call._replace(params=[x.clone().requires_grad_() for x in call.params])


def test_grad_mode_is_not_remembered() -> None:
    call = tracked(make())
    for _ in range(3):
        with torch.no_grad():
            assert not any(x.requires_grad for x in call.run()[0])
        assert all(x.requires_grad for x in call.run()[0])
        with pytest.raises(RuntimeError, match="Cannot donate: the update is watched by autograd"):
            call.run(donate=True)


def test_requires_grad_is_read_each_time() -> None:
    call = make()
    call.run()
    lr = torch.tensor(0.1)
    with_lr = call._replace(hparams=AdamHparams(lr=lr))
    assert not with_lr.run()[0][0].requires_grad
    call.params[0].requires_grad_()
    assert call.run()[0][0].requires_grad
    call.params[0].requires_grad_(False)
    assert not call.run()[0][0].requires_grad
    lr.requires_grad_()
    assert with_lr.run()[0][0].requires_grad


def test_transforms_do_not_disturb_what_is_remembered(searches: list[int]) -> None:
    call = make()

    def loss(params: list[Tensor]) -> Tensor:
        new, _ = call._replace(params=params).run()
        return sum((x**2).sum() for x in new)

    expected_gradient = describe(torch.func.grad(loss)(call.params))
    traits._known = ()
    expected = describe(call.run())
    for _ in range(2):
        assert describe(torch.func.grad(loss)(call.params)) == expected_gradient
        searches.clear()
        assert describe(call.run()) == expected
        assert searches == []


# Nothing is kept alive.


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_nothing_is_kept_alive(donate: bool) -> None:
    call = make(hparams=AdamHparams(lr=torch.tensor(0.1), amsgrad=True))
    result = call.run(donate=donate)
    assert len(traits._known) == 1
    given = [weakref.ref(x) for x in tensors_of((call, result))]
    del call, result
    gc.collect()
    assert [ref() for ref in given if ref() is not None] == []


def test_the_memory_is_bounded() -> None:
    calls = [make(shapes=((size,),)) for size in range(1, 3 * traits._LISTS)]
    expected = [describe(call.run()) for call in calls]
    assert len(traits._known) == traits._LISTS
    for call, description in zip(calls[::-1], expected[::-1], strict=True):
        assert describe(call.run()) == description
    assert len(traits._known) == traits._LISTS


# Donation.


def assert_refused(call: Call, match: str) -> None:
    """Donation raises and changes nothing."""
    before = describe(call)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            call.run(donate=True)
        assert describe(call) == before


def overlapping() -> Call:
    """Two parameters that share four elements, each contiguous as ever."""
    call = make(shapes=((3, 3), (5,), (2, 4)))
    flat = torch.randn(10)
    return call._replace(params=[flat[:9].view(3, 3), flat[5:], call.params[2]])


def aliased_gradient() -> Call:
    call = make()
    return call._replace(grads=[call.params[0].view(3, 3), *call.grads[1:]])


def moment_in_parameter() -> Call:
    call = make()
    state = call.state._replace(exp_avg=[call.params[0].view(3, 3), *call.state.exp_avg[1:]])
    return call._replace(state=state)


def step_in_moment() -> Call:
    call = make()
    state = call.state._replace(step=[call.state.exp_avg[1][2].abs_(), *call.state.step[1:]])
    return call._replace(state=state)


OVERLAPS: dict[str, tuple[Callable[[], Call], str]] = {
    "parameters": (overlapping, r"Cannot donate params\[0\]: it shares memory with params\[1\]"),
    "gradient": (aliased_gradient, r"Cannot donate params\[0\]: it shares memory with grads\[0\]"),
    "moment": (moment_in_parameter, r"Cannot donate params\[0\]: it shares memory with state.exp_avg\[0\]"),
    "step": (step_in_moment, r"Cannot donate state.exp_avg\[1\]: it shares memory with state.step\[0\]"),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlap_is_refused_after_safe_donations(name: str, searches: list[int]) -> None:
    build, match = OVERLAPS[name]
    assert_refused(build(), match)
    traits._known = ()
    params, grads, state, hparams = make()
    for _ in range(3):
        params, state = adam_update(params, grads, state, hparams, donate=True)
    assert traits._known[0][2].disjoint is not None
    searches.clear()
    assert_refused(build(), match)
    assert searches == []  # alike, but for where they lie
    adam_update(params, grads, state, hparams, donate=True)


def test_memory_that_is_used_again_is_looked_at_again() -> None:
    build, match = OVERLAPS["parameters"]
    for _ in range(20):
        make().run(donate=True)  # its memory is free again afterwards
        with pytest.raises(RuntimeError, match=match):
            build().run(donate=True)


def test_replaced_data_is_noticed() -> None:
    call = make()
    params, state = call.run(donate=True)
    call = call._replace(params=params, state=state)
    params, state = call.run(donate=True)
    call = call._replace(params=params, state=state)
    original = call.params[0].data
    call.params[0].data = call.grads[0].data
    assert_refused(call, r"Cannot donate params\[0\]: it shares memory with grads\[0\]")
    call.params[0].data = original
    call.run(donate=True)


def test_inference_tensors_are_refused_after_safe_donations() -> None:
    make().run(donate=True)
    with torch.inference_mode():
        call = make()
        call.run()
        make().run(donate=True)
    assert_refused(call, r"Cannot donate tensors made under torch.inference_mode\(\)")


# Threads.


def test_threads_do_not_disturb_each_other() -> None:
    calls = [make(seed, shapes=((seed + 1,), (3, seed % 3 + 1))) for seed in range(12)]
    expected = []
    for call in calls:
        traits._known = ()
        expected.append(describe(call.run()))
    faults: list[str] = []
    barrier = threading.Barrier(4)

    def work(place: int) -> None:
        try:
            barrier.wait(TIMEOUT)
            for turn in range(150):
                index = (turn * (place + 1) + place) % len(calls)
                if describe(calls[index].run()) != expected[index]:
                    faults.append(f"call {index} is wrong in thread {place}")
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert faults == []
    assert len(traits._known) <= traits._LISTS


@pytest.mark.parametrize("kernel", ["single", "foreach", "fused"])
def test_inference_tensors_are_not_taken_for_ordinary_ones_seen_in_inference_mode(kernel: Any) -> None:
    hparams, params, grads = AdamHparams(lr=0.1), [torch.ones(7)], [torch.ones(7)]
    state = adam_init(params, hparams)
    with torch.inference_mode():
        adam_update(params, grads, state, hparams, kernel=kernel)
        made_here = [torch.ones(7)]
        state_here = adam_init(made_here, hparams)
    with pytest.raises(RuntimeError, match=r"Cannot donate tensors made under torch\.inference_mode"):
        adam_update(made_here, [torch.ones(7)], state_here, hparams, kernel=kernel, donate=True)
    assert made_here[0].tolist() == [1.0] * 7
    assert state_here.exp_avg[0].tolist() == [0.0] * 7
    assert state_here.step.shape == ()
