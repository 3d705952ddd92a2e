"""Donation gives the same bits in the same memory, and refuses whatever would make that unsafe."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, donation
from functional_adam.call.donation import find_overlap
from tests.strategies import PROPERTY

# torch scripts some formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")

KERNELS = ("auto", "single", "foreach", "fused")
HPARAMS = AdamHparams(lr=0.1, weight_decay=0.1, amsgrad=True)

LONG_PROPERTY = settings(PROPERTY, max_examples=10 * PROPERTY.max_examples)

each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def clone(tree: Any) -> Any:
    return torch_pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def as_bytes(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(got: Any, expected: Any) -> None:
    assert torch_pytree.tree_structure(got) == torch_pytree.tree_structure(expected)
    for a, b in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(as_bytes(a), as_bytes(b))


def make(
    *,
    hparams: AdamHparams = HPARAMS,
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
    per_leaf_step: bool = False,
) -> tuple[Any, Any, AdamState, AdamHparams]:
    """Params, grads, state and hparams in the middle of training."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return layout(torch.randn(shape, generator=generator, dtype=dtype))

    def rand_like(x: Tensor) -> Tensor:
        return layout(torch.rand(x.shape, generator=generator, dtype=dtype))

    params = {"layer": [randn(5, 7), randn(7)], "scale": randn(), "image": (randn(2, 3, 4, 5),)}
    grads = torch_pytree.tree_map(lambda x: randn(*x.shape), params)
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)
    state = AdamState(
        torch_pytree.tree_map(lambda x: x + 3, state.step),
        *(torch_pytree.tree_map(rand_like, tree) for tree in state[1:4]),
    )
    return params, grads, state, hparams


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() >= 2 else x


def snapshot(tree: Any) -> list[tuple[Any, ...]]:
    tensors = tensors_of(tree)
    return [(x.data_ptr(), x._version, x.shape, x.stride(), x.detach().clone()) for x in tensors]


def assert_unchanged(tree: Any, before: list[tuple[Any, ...]]) -> None:
    for now, then in zip(snapshot(tree), before, strict=True):
        assert now[:-1] == then[:-1]
        assert torch.equal(as_bytes(now[-1]), as_bytes(then[-1]))


CASES: dict[str, dict[str, Any]] = {
    "plain": {"hparams": AdamHparams(lr=0.1)},
    "coupled_amsgrad": {},
    "decoupled_maximize": {"hparams": AdamHparams(weight_decay=0.1, decoupled_weight_decay=True, maximize=True)},
    "bfloat16": {"dtype": torch.bfloat16},
    "complex": {"dtype": torch.complex64},
    "strided": {"layout": strided},
    "transposed": {"layout": transposed},
    "per_leaf_step": {"per_leaf_step": True},
    "parameters": {"layout": lambda x: nn.Parameter(x.clone(), requires_grad=False)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "grad_scale": {"grad_scale": torch.tensor(8.0)},
    "found_inf_true": {"found_inf": torch.tensor(1.0)},
    "found_inf_false": {"found_inf": torch.tensor(0.0), "grad_scale": 2.0},
}


# Same bits, same memory.


@each_kernel
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_donation_gives_the_same_bits_in_the_same_memory(kernel: str, case: str, options: str) -> None:
    params, grads, state, hparams = make(**CASES[case])
    expected = adam_update(params, grads, state, hparams, kernel=kernel, **OPTIONS[options])
    pointers = [x.data_ptr() for x in tensors_of((params, state))]
    strides = [x.stride() for x in tensors_of((params, state))]
    got = adam_update(params, grads, state, hparams, kernel=kernel, donate=True, **OPTIONS[options])
    assert_same_bits(got, expected)
    assert [x.data_ptr() for x in tensors_of(got)] == pointers
    assert [x.stride() for x in tensors_of(got)] == strides


@each_kernel
def test_none_gradients_stand_still_in_donated_memory(kernel: str) -> None:
    params, grads, state, hparams = make(per_leaf_step=True)
    grads["layer"][0] = None
    expected = adam_update(params, grads, state, hparams, kernel=kernel)
    still = clone((params["layer"][0], state.exp_avg["layer"][0], state.step["layer"][0]))
    pointers = [x.data_ptr() for x in tensors_of((params, state))]
    got = adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    assert_same_bits(got, expected)
    assert_same_bits((got[0]["layer"][0], got[1].exp_avg["layer"][0], got[1].step["layer"][0]), still)
    assert [x.data_ptr() for x in tensors_of(got)] == pointers


@each_kernel
def test_a_donated_loop_equals_a_pure_loop(kernel: str) -> None:
    params, grads, state, hparams = make()
    pure, donated = (params, state), clone((params, state))
    for _ in range(5):
        pure = adam_update(pure[0], grads, pure[1], hparams, kernel=kernel)
        donated = adam_update(donated[0], grads, donated[1], hparams, kernel=kernel, donate=True)
        assert_same_bits(donated, pure)


@each_kernel
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_the_new_step_is_a_fresh_object_on_the_old_memory(kernel: str, per_leaf_step: bool) -> None:
    params, grads, state, hparams = make(per_leaf_step=per_leaf_step)
    old, pointers = tensors_of(state.step), [x.data_ptr() for x in tensors_of(state.step)]
    _, new_state = adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    new = tensors_of(new_state.step)
    assert [x.data_ptr() for x in new] == pointers
    assert not any(a is b for a in old for b in new)
    assert [x.item() for x in new] == [4.0] * len(new)
    assert [x.numel() for x in old] == [0] * len(old)


# Autograd notices.


def buffers_of(params: Any, state: AdamState) -> list[Tensor]:
    return tensors_of((params, state[1:]))


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_version_counters_of_the_buffers_move(kernel: str, case: str) -> None:
    params, grads, state, hparams = make(**CASES[case])
    buffers = buffers_of(params, state)
    versions = [x._version for x in buffers]
    adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    assert all(x._version > before for x, before in zip(buffers, versions, strict=True))


@each_kernel
@pytest.mark.parametrize("which", range(4), ids=["params", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_backward_through_a_stale_saved_value_raises(kernel: str, which: int) -> None:
    params, grads, state, hparams = make()
    saved = (params, *state[1:4])[which]["layer"][0]
    x = torch.ones_like(saved, requires_grad=True)
    product = (x * saved).sum()
    adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@each_kernel
def test_backward_through_the_returned_values_of_the_last_donation_works(kernel: str) -> None:
    params, grads, state, hparams = make()
    params, state = adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    x = torch.ones_like(params["layer"][0], requires_grad=True)
    (x * params["layer"][0]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, params["layer"][0])


# Nothing that is tracked is donated.


@each_kernel
@pytest.mark.parametrize("which", ["params", "grads", "state", "lr", "beta1", "beta2", "eps", "weight_decay"])
def test_what_requires_grad_is_not_donated(kernel: str, which: str) -> None:
    params, grads, state, _ = make()
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    numbers = {k: torch.tensor(v, requires_grad=True) if k == which else v for k, v in numbers.items()}
    betas = (numbers.pop("beta1"), numbers.pop("beta2"))
    hparams = AdamHparams(betas=betas, amsgrad=True, **numbers)
    target = {"params": params, "grads": grads, "state": state.exp_avg_sq}.get(which)
    if target is not None:
        target["layer"][1].requires_grad_()
    before = snapshot((params, grads, state))
    with pytest.raises(RuntimeError, match=r"[Dd]onat"):
        adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    assert_unchanged((params, grads, state), before)


@each_kernel
def test_a_scale_that_requires_grad_is_not_donated_to(kernel: str) -> None:
    params, grads, state, hparams = make()
    scale = torch.tensor(2.0, requires_grad=True)
    before = snapshot((params, grads, state))
    with pytest.raises(RuntimeError, match=r"[Dd]onat"):
        adam_update(params, grads, state, hparams, kernel=kernel, donate=True, grad_scale=scale)
    assert_unchanged((params, grads, state), before)


def donate_in_grad(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.grad(lambda y: run(y).sum())(x)


def donate_in_vmap(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.vmap(run)(x.expand(2, *x.shape))


def donate_in_jvp(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.jvp(run, (x,), (x,))


def donate_in_vjp(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.vjp(run, x)


def donate_in_dual_level(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        run(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = [donate_in_grad, donate_in_vmap, donate_in_jvp, donate_in_vjp, donate_in_dual_level]


@each_kernel
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("is_used", [True, False])
def test_nothing_is_donated_under_a_transform(kernel: str, transform: Callable[..., None], is_used: bool) -> None:
    params, grads, state, hparams = make()
    before = snapshot((params, grads, state))

    def run(x: Tensor) -> Tensor:
        leaves = [x if is_used else grads["layer"][0], grads["layer"][1]]
        new, _ = adam_update(params, {**grads, "layer": leaves}, state, hparams, kernel=kernel, donate=True)
        return new["layer"][0] * x

    with torch.no_grad(), pytest.raises(RuntimeError, match=r"[Dd]onat"):
        transform(run, grads["layer"][0])
    assert_unchanged((params, grads, state), before)


@each_kernel
def test_parameters_are_donated_under_no_grad(kernel: str) -> None:
    params, grads, state, hparams = make()
    expected = adam_update(params, grads, state, hparams, kernel=kernel)
    module_params = torch_pytree.tree_map(lambda x: nn.Parameter(x.clone()), params)
    with torch.no_grad():
        got = adam_update(module_params, grads, state, hparams, kernel=kernel, donate=True)
    assert_same_bits(got, expected)
    for old, new in zip(tensors_of(module_params), tensors_of(got[0]), strict=True):
        assert type(new) is Tensor
        assert not new.requires_grad
        assert new.data_ptr() == old.data_ptr()


# Memory that somebody else in the call uses is not donated.


def one_leaf() -> tuple[Tensor, Tensor, AdamState]:
    generator = torch.Generator().manual_seed(1)
    param = torch.randn(6, generator=generator)
    return param, torch.randn(6, generator=generator), adam_init(param, AdamHparams())


def same_param_twice() -> tuple[Any, Any, AdamState]:
    p, g, _ = one_leaf()
    params = [p, p]
    return params, [g, g.clone()], adam_init(params, AdamHparams())


def overlapping_views() -> tuple[Any, Any, AdamState]:
    flat = torch.arange(10.0)
    params = [flat[:6], flat[5:]]
    return params, [torch.ones(6), torch.ones(5)], adam_init(params, AdamHparams())


def overlapping_strided_views() -> tuple[Any, Any, AdamState]:
    flat = torch.arange(12.0)
    params = [flat[::2], flat[::3]]
    return params, [torch.ones(6), torch.ones(4)], adam_init(params, AdamHparams())


def overlapping_columns() -> tuple[Any, Any, AdamState]:
    w = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    params = [w[:, :6], w[:, 5:]]
    return params, [torch.ones(4, 6), torch.ones(4, 5)], adam_init(params, AdamHparams())


def param_is_grad() -> tuple[Any, Any, AdamState]:
    p, _, state = one_leaf()
    return p, p, state


def param_overlaps_grad() -> tuple[Any, Any, AdamState]:
    flat = torch.arange(10.0)
    return flat[:6], flat[4:], adam_init(flat[:6], AdamHparams())


def grad_is_expanded_param() -> tuple[Any, Any, AdamState]:
    p, _, _ = one_leaf()
    p = p[:1]
    params = [p, torch.ones(3)]
    return params, [torch.ones(1), p.expand(3)], adam_init(params, AdamHparams())


def grad_is_param_of_another_dtype() -> tuple[Any, Any, AdamState]:
    p, _, state = one_leaf()
    return p, p.view(torch.int32).view(torch.float32), state


def param_is_moment() -> tuple[Any, Any, AdamState]:
    p, g, state = one_leaf()
    return p, g, state._replace(exp_avg=p)


def grad_is_moment() -> tuple[Any, Any, AdamState]:
    p, _, state = one_leaf()
    return p, state.exp_avg_sq, state


def moment_is_moment() -> tuple[Any, Any, AdamState]:
    p, g, state = one_leaf()
    return p, g, state._replace(exp_avg=state.exp_avg_sq)


def step_is_part_of_param() -> tuple[Any, Any, AdamState]:
    p, g, state = one_leaf()
    return p, g, state._replace(step=p[3])


def steps_are_one_tensor() -> tuple[Any, Any, AdamState]:
    params = [torch.ones(3), torch.ones(2)]
    state = adam_init(params, AdamHparams(), per_leaf_step=True)
    return params, [torch.ones(3), torch.ones(2)], state._replace(step=[state.step[0], state.step[0]])


def expanded_param() -> tuple[Any, Any, AdamState]:
    p = torch.ones(1).expand(6)
    return p, torch.ones(6), adam_init(p, AdamHparams())


def self_overlapping_param() -> tuple[Any, Any, AdamState]:
    p = torch.arange(10.0).as_strided((4, 3), (2, 1))
    return p, torch.ones(4, 3), adam_init(p, AdamHparams())


def expanded_moment() -> tuple[Any, Any, AdamState]:
    p, g, state = one_leaf()
    return p, g, state._replace(exp_avg=torch.zeros(()).expand(6))


def conjugate_of_a_param() -> tuple[Any, Any, AdamState]:
    p = torch.ones(3, dtype=torch.complex64)
    params = [p, p.conj()]
    return params, [p.clone(), p.clone()], adam_init(params, AdamHparams())


def real_part_of_a_param() -> tuple[Any, Any, AdamState]:
    p = torch.ones(3, dtype=torch.complex64)
    params = [p, p.imag]
    return params, [p.clone(), torch.ones(3)], adam_init(params, AdamHparams())


OVERLAPS = [
    same_param_twice,
    overlapping_views,
    overlapping_strided_views,
    overlapping_columns,
    param_is_grad,
    param_overlaps_grad,
    grad_is_expanded_param,
    grad_is_param_of_another_dtype,
    param_is_moment,
    grad_is_moment,
    moment_is_moment,
    step_is_part_of_param,
    steps_are_one_tensor,
    expanded_param,
    self_overlapping_param,
    expanded_moment,
    conjugate_of_a_param,
    real_part_of_a_param,
]


@each_kernel
@pytest.mark.parametrize("make_overlap", OVERLAPS)
def test_memory_with_two_uses_is_not_donated(kernel: str, make_overlap: Callable[[], Any]) -> None:
    params, grads, state = make_overlap()
    before = snapshot((params, grads, state))
    with pytest.raises(RuntimeError, match=r"[Dd]onat.*Clone"):
        adam_update(params, grads, state, AdamHparams(), kernel=kernel, donate=True)
    assert_unchanged((params, grads, state), before)
    # Purely, the same arguments are as good as copies of them.
    got = adam_update(params, grads, state, AdamHparams(), kernel=kernel)
    expected = adam_update(*clone((params, grads, state)), AdamHparams(), kernel=kernel)
    torch.testing.assert_close(tensors_of(got), tensors_of(expected))
    assert_unchanged((params, grads, state), before)


@each_kernel
@pytest.mark.parametrize(
    "hparams",
    [
        lambda x: AdamHparams(lr=x),
        lambda x: AdamHparams(betas=(x, 0.9)),
        lambda x: AdamHparams(eps=x),
        lambda x: AdamHparams(weight_decay=x),
    ],
    ids=["lr", "beta1", "eps", "weight_decay"],
)
def test_a_hyperparameter_on_donated_memory_is_refused(kernel: str, hparams: Callable[[Tensor], AdamHparams]) -> None:
    p = torch.full((6,), 0.5)
    state = adam_init(p, AdamHparams())
    before = snapshot((p, state))
    with pytest.raises(RuntimeError, match=r"[Dd]onat.*hyperparameter"):
        adam_update(p, torch.ones(6), state, hparams(p[2]), kernel=kernel, donate=True)
    assert_unchanged((p, state), before)


@pytest.mark.parametrize(
    ("make_overlap", "names"),
    [
        (same_param_twice, ("params[0]", "params[1]")),
        (param_is_grad, ("params", "grads")),
        (param_is_moment, ("params", "state.exp_avg")),
        (moment_is_moment, ("state.exp_avg", "state.exp_avg_sq")),
        (steps_are_one_tensor, ("state.step[0]", "state.step[1]")),
        (self_overlapping_param, ("params", "overlaps itself")),
    ],
)
def test_the_refusal_names_both_tensors(make_overlap: Callable[[], Any], names: tuple[str, str]) -> None:
    with pytest.raises(RuntimeError, match="Cannot donate") as caught:
        adam_update(*make_overlap(), AdamHparams(), donate=True)
    for name in names:
        assert name in str(caught.value)


def flat_buffer() -> list[Tensor]:
    flat = torch.randn(20, generator=torch.Generator().manual_seed(2))
    return [flat[:6].view(2, 3), flat[6], flat[7:20]]


def interleaved_columns() -> list[Tensor]:
    w = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    return [w[:, :5], w[:, 5:]]


def even_and_odd() -> list[Tensor]:
    x = torch.randn(9, generator=torch.Generator().manual_seed(2))
    return [x[::2], x[1::2]]


def real_and_imaginary() -> list[Tensor]:
    x = torch.randn(7, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
    return [x.real, x.imag]


def checkerboard() -> list[Tensor]:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    return [w[i::2, j::2] for i in range(2) for j in range(2)]


def interleaved_strides() -> list[Tensor]:
    # Strides (3, 2) on shape (2, 2) reach 0, 2, 3 and 5: no element twice, although the rows interleave.
    x = torch.randn(6, generator=torch.Generator().manual_seed(2))
    return [x.as_strided((2, 2), (3, 2)), x.as_strided((2,), (3,), 1)]


def diagonal() -> list[Tensor]:
    w = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    return [w.diagonal(), w.diagonal(1), w.diagonal(-1)]


@each_kernel
@pytest.mark.parametrize(
    "views",
    [flat_buffer, interleaved_columns, even_and_odd, real_and_imaginary, checkerboard, interleaved_strides, diagonal],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_disjoint_views_of_one_buffer_are_donated(
    kernel: str, views: Callable[[], list[Tensor]], reverse: bool
) -> None:
    params = views()[:: -1 if reverse else 1]
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(p.shape, generator=generator) for p in params]
    state = adam_init(params, HPARAMS)
    expected = adam_update([p.clone() for p in params], grads, state, HPARAMS, kernel=kernel)
    pointers = [p.data_ptr() for p in params]
    got = adam_update(params, grads, state, HPARAMS, kernel=kernel, donate=True)
    torch.testing.assert_close(tensors_of(got), tensors_of(expected), rtol=1e-6, atol=1e-7)
    assert [p.data_ptr() for p in got[0]] == pointers


class View(NamedTuple):
    """A view of the buffer that a property is tried on, of elements of some bytes."""

    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, as is the offset
    offset: int

    @property
    def bytes(self) -> list[int]:
        """The addresses of all bytes, which it has several times if it overlaps itself."""
        places = [self.offset]
        for size, stride in zip(self.shape, self.strides, strict=True):
            places = [place + i * stride for place in places for i in range(size)]
        return [self.itemsize * place + i for place in places for i in range(self.itemsize)]

    def of(self, buffer: Tensor) -> Tensor:
        dtype = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.complex64}[self.itemsize]
        return buffer.view(dtype).as_strided(self.shape, self.strides, self.offset)


BUFFER_BYTES = 8 * 240


@st.composite
def any_views(draw: st.DrawFn) -> View:
    itemsize = draw(st.sampled_from((4, 1, 2, 8)))
    shape = draw(st.lists(st.sampled_from((2, 3, 1, 4)), max_size=3).map(tuple))
    strides = tuple(draw(st.sampled_from((1, 2, 3, 4, 6, 12, 13, 0))) for _ in shape)
    return View(itemsize, shape, strides, draw(st.integers(0, 30)))


@st.composite
def slices_of_a_box(draw: st.DrawFn) -> View:
    """Of a contiguous tensor of shape (4, 6, 10): what users cut out of a matrix or a stack of heads."""
    box = torch.empty((4, 6, 10), dtype=torch.uint8)
    for dim, size in enumerate(box.shape):
        start, step = draw(st.integers(0, size - 1)), draw(st.sampled_from((1, 1, 2, 3)))
        stop = draw(st.integers(start + 1, size))
        box = box[(slice(None),) * dim + (slice(start, stop, step),)]
    return View(draw(st.sampled_from((4, 8))), tuple(box.shape), box.stride(), box.storage_offset())


@LONG_PROPERTY
@given(st.lists(any_views() | slices_of_a_box(), min_size=1, max_size=5), st.integers(1, 5))
def test_overlap_is_found_just_where_two_tensors_share_a_byte(views: list[View], written: int) -> None:
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
    tensors = [view.of(buffer) for view in views]
    taken = [view.bytes for view in views]

    def conflict(i: int, j: int) -> bool:
        return len(set(taken[i])) < len(taken[i]) if i == j else not set(taken[i]).isdisjoint(taken[j])

    pairs = itertools.combinations_with_replacement(range(len(views)), 2)
    conflicts = {(i, j) for i, j in pairs if i < written and conflict(i, j)}
    found = find_overlap(tensors[:written], tensors[written:])
    assert found in conflicts if conflicts else found is None


PIECES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "rows": lambda w: [*w.split(10)],
    "columns": lambda w: [*w.split(32, dim=1)],
    "columns of unequal width": lambda w: [*w.split((1, 31, 7, 57), dim=1)],
    "single columns": lambda w: [*w.unbind(1)],
    "columns from several rows on": lambda w: [w[i : 60 + i, 24 * i : 24 * i + 24] for i in (2, 0, 3, 1)],
    "tiles": lambda w: [tile for rows in w.split(20) for tile in rows.split(36, dim=1)],
    "tiles beside a column": lambda w: [w[:, :10], w[:20, 10:50], w[20:50, 20:60], w[50:, 10:]],
    "bricks beside a column": lambda w: [w[:, 90:], w[:20, :30], w[:20, 40:70], w[20:40, 20:50]],
    "heads": lambda w: [*w.view(4, 3, 16, 32).unbind(1)],
    "columns of heads": lambda w: [x for y in w.view(4, 3, 16, 32).unbind(1) for x in y.split(20, dim=2)],
    "interleaved": lambda w: [w.view(-1)[i::3] for i in range(3)],
    "checkerboard": lambda w: [w[i::2, j::2] for i in range(2) for j in range(2)],
    "real and imaginary parts": lambda w: [*torch.view_as_real(torch.view_as_complex(w.view(-1, 2))).unbind(-1)],
    "transposed": lambda w: [*w.t().split(20)],
}
"""Pieces of a matrix, or of a stack of heads."""


@pytest.mark.parametrize("name", PIECES)
def test_arithmetic_alone_shows_that_pieces_of_a_matrix_are_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise AssertionError("looked at each byte")

    monkeypatch.setattr(donation, "_shared_byte", fail)
    pieces = PIECES[name](torch.zeros(64, 96))
    for order in (pieces, pieces[::-1]):
        assert find_overlap(order, ()) is None
        assert find_overlap(order[::2], order[1::2]) is None
    with pytest.raises(AssertionError, match="looked at each byte"):
        find_overlap(pieces, pieces[-1:])


def test_where_arithmetic_gives_up_each_byte_is_looked_at() -> None:
    box = torch.zeros((3,) * 10)
    corners = box[(slice(None, None, 2),) * 10]
    between = box[(*(slice(None, None, 2),) * 9, slice(1, 2))]
    assert find_overlap([corners, between], ()) is None
    assert find_overlap([corners], [between, corners[0]]) == (0, 2)


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_the_search_for_overlap_takes_each_span_a_fixed_number_of_times(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(donation, "_start", lambda interval: taken.append(1) or interval[0])
    assert find_overlap(torch.zeros(8, columns).unbind(1), ()) is None
    assert len(taken) <= 4 * columns


@each_kernel
def test_elements_between_donated_ones_are_left_alone(kernel: str) -> None:
    w = torch.arange(12.0).view(3, 4)
    param, state = w[:, 1:3], adam_init(w[:, 1:3], AdamHparams())
    adam_update(param, torch.ones(3, 2), state, AdamHparams(lr=0.1), kernel=kernel, donate=True)
    assert torch.equal(w[:, [0, 3]], torch.tensor([[0.0, 3.0], [4.0, 7.0], [8.0, 11.0]]))
    torch.testing.assert_close(w[:, 1:3], torch.tensor([[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]]) - 0.1)


@each_kernel
def test_donated_memory_may_stand_between_parts_of_a_gradient(kernel: str) -> None:
    flat = torch.arange(12.0)
    param, grad = flat[::2], flat[1::2]
    state = adam_init(param, AdamHparams())
    expected = adam_update(param.clone(), grad.clone(), state, AdamHparams(lr=0.1), kernel=kernel)
    got = adam_update(param, grad, state, AdamHparams(lr=0.1), kernel=kernel, donate=True)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    assert torch.equal(flat[1::2], torch.arange(1.0, 12.0, 2.0))


@each_kernel
def test_gradients_may_overlap_each_other(kernel: str) -> None:
    params = [torch.ones(3), torch.ones(3)]
    grad = torch.ones(1).expand(3)
    got, _ = adam_update(params, [grad, grad], adam_init(params, HPARAMS), HPARAMS, kernel=kernel, donate=True)
    assert torch.equal(got[0], got[1])


@each_kernel
def test_empty_leaves_overlap_nothing(kernel: str) -> None:
    empty = torch.empty(0)
    params = [empty, empty, torch.ones(2)]
    grads = [empty, empty, torch.ones(2)]
    got, _ = adam_update(params, grads, adam_init(params, HPARAMS), HPARAMS, kernel=kernel, donate=True)
    assert [p.shape for p in got] == [(0,), (0,), (2,)]


# A donated state is spent.


@each_kernel
@pytest.mark.parametrize("per_leaf_step", [False, True])
@pytest.mark.parametrize("donate_again", [False, True])
def test_a_donated_state_cannot_be_used_again(kernel: str, per_leaf_step: bool, donate_again: bool) -> None:
    params, grads, state, hparams = make(per_leaf_step=per_leaf_step)
    new_params, new_state = adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    before = snapshot((new_params, new_state, grads, state))
    for stale_params in (params, new_params):
        with pytest.raises(RuntimeError, match="donated"):
            adam_update(stale_params, grads, state, hparams, kernel=kernel, donate=donate_again)
    assert_unchanged((new_params, new_state, grads, state), before)
    adam_update(new_params, grads, new_state, hparams, kernel=kernel, donate=donate_again)


def test_one_spent_step_among_fresh_ones_is_noticed() -> None:
    params, grads, state, hparams = make(per_leaf_step=True)
    fresh = clone(state)
    adam_update(params, grads, state, hparams, donate=True)
    mixed = fresh._replace(step={**fresh.step, "scale": state.step["scale"]})
    with pytest.raises(RuntimeError, match=r"state\.step\['scale'\].*donated"):
        adam_update(params, grads, mixed, hparams)


def test_a_state_donated_without_leaves_is_spent_too() -> None:
    state = adam_init({}, AdamHparams())
    _, new_state = adam_update({}, {}, state, AdamHparams(), donate=True)
    assert new_state.step == 1
    with pytest.raises(RuntimeError, match="donated"):
        adam_update({}, {}, state, AdamHparams())


def test_a_copy_made_before_donation_stays_usable() -> None:
    params, grads, state, hparams = make()
    copy = clone((params, state))
    expected = adam_update(params, grads, state, hparams, donate=True)
    assert_same_bits(adam_update(copy[0], grads, copy[1], hparams), expected)


# Inference mode.


@each_kernel
def test_inference_tensors_are_donated_inside_inference_mode_only(kernel: str) -> None:
    with torch.inference_mode():
        params, grads, state, hparams = make()
    before = [x.clone() for x in tensors_of((params, state))]
    with pytest.raises(RuntimeError, match=r"[Dd]onat.*inference_mode"):
        adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
    assert all(torch.equal(x, y) for x, y in zip(tensors_of((params, state)), before, strict=True))
    expected = adam_update(params, grads, state, hparams, kernel=kernel)
    with torch.inference_mode():
        pointers = [x.data_ptr() for x in tensors_of((params, state))]
        got = adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
        assert_same_bits(got, expected)
        assert [x.data_ptr() for x in tensors_of(got)] == pointers


@each_kernel
def test_ordinary_tensors_are_donated_inside_inference_mode(kernel: str) -> None:
    params, grads, state, hparams = make()
    expected = adam_update(params, grads, state, hparams, kernel=kernel)
    with torch.inference_mode():
        got = adam_update(params, grads, state, hparams, kernel=kernel, donate=True)
        assert_same_bits(got, expected)


# A call that fails changes nothing.


def wrong_shape_last(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, {**grads, "scale": torch.ones(1)}, state, {}


def wrong_kernel(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, grads, state, {"kernel": "quick"}


def overlap_last(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, {**grads, "scale": params["scale"]}, state, {}


def none_grad(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, {**grads, "scale": None}, state, {}


def missing_leaf(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, {k: v for k, v in grads.items() if k != "scale"}, state, {}


def complex_grad(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, {**grads, "scale": grads["scale"].to(torch.complex64)}, state, {}


def integer_moment(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, grads, state._replace(max_exp_avg_sq={**state.exp_avg_sq, "scale": torch.tensor(1)}), {}


def bad_scale(params: Any, grads: Any, state: AdamState) -> tuple[Any, Any, AdamState, dict[str, Any]]:
    return params, grads, state, {"grad_scale": torch.ones(2)}


FAULTS = [
    wrong_shape_last,
    wrong_kernel,
    overlap_last,
    none_grad,
    missing_leaf,
    complex_grad,
    integer_moment,
    bad_scale,
]


@each_kernel
@pytest.mark.parametrize("break_call", FAULTS)
def test_a_failed_donation_changes_nothing(kernel: str, break_call: Callable[..., Any]) -> None:
    params, grads, state, hparams = make()
    expected = adam_update(params, grads, state, hparams, kernel=kernel)
    before = snapshot((params, grads, state))
    bad_params, bad_grads, bad_state, options = break_call(params, grads, state)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"scale|kernel"):
        adam_update(bad_params, bad_grads, bad_state, hparams, donate=True, **{"kernel": kernel, **options})
    assert_unchanged((params, grads, state), before)
    assert_same_bits(adam_update(params, grads, state, hparams, kernel=kernel, donate=True), expected)


# Running out of memory.


class OutOfMemory(TorchDispatchMode):
    """Fails in place of operation number `fatal` of those that make a tensor of more than one element."""

    def __init__(self, fatal: int) -> None:
        super().__init__()
        self.fatal = fatal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        makes_tensors = not any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns))
        if makes_tensors and any(x.numel() > 1 for x in tensors_of(out)):
            self.fatal -= 1
            if self.fatal < 0:
                raise MemoryError("injected")
        return out


def half(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


SHORT_OF_MEMORY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # hyperparameters, options of the update
    "coupled": ({"weight_decay": 0.1, "maximize": True, "amsgrad": True}, {}),
    "decoupled": ({"weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    "gaps": ({"weight_decay": 0.1, "maximize": True}, {}),
    "groups": ({"weight_decay": {"a": 0.1, "b": 0.0, "c": 0.0}, "decoupled_weight_decay": True}, {}),
    "grad_scale": ({"weight_decay": 0.1}, {"grad_scale": 2.0}),
    "tensor lr": ({"lr": torch.tensor(0.1)}, {"found_inf": 0.0}),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", SHORT_OF_MEMORY)
@pytest.mark.parametrize("precision", ["float32", "masters", "wide moments"])
@pytest.mark.parametrize("per_leaf_step", [False, True])
def test_a_donated_update_that_runs_out_of_memory_changes_nothing(
    kernel: Any, case: str, precision: str, per_leaf_step: bool
) -> None:
    numbers, options = SHORT_OF_MEMORY[case]
    hparams = AdamHparams(**numbers)
    torch.manual_seed(0)
    params = {"a": torch.randn(3, 5), "b": torch.randn(5, 4).T, "c": torch.randn(7)}
    grads = {"a": torch.randn(5, 3).T, "b": torch.randn(4, 5), "c": torch.randn(7)}
    params = params if precision == "float32" else torch_pytree.tree_map(half, params)
    if case == "gaps":
        params, grads = (torch_pytree.tree_map(strided, tree) for tree in (params, grads))
    init: dict[str, Any] = {
        "float32": {},
        "masters": {"master_params": True},
        "wide moments": {"moment_dtype": torch.float32},
    }[precision]
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step, **init)
    expected = adam_update(params, grads, state, hparams, kernel=kernel, **options)
    before = clone((params, grads, state))
    failures = 0
    while True:
        try:
            with OutOfMemory(failures):
                got = adam_update(params, grads, state, hparams, kernel=kernel, donate=True, **options)
            break
        except MemoryError:
            failures += 1
            assert_same_bits((params, grads, state), before)
    assert_same_bits(got, expected)
    # single takes one piece of memory for the roots, and foreach one a leaf; fused needs none for leaves of one layout.
    assert failures > 0 or kernel in ("auto", "fused")


@pytest.mark.parametrize("kernel", ["single", "foreach"])
def test_a_process_out_of_memory_keeps_what_it_was_to_donate(kernel: str) -> None:
    code = f"""
import resource, torch
from functional_adam import AdamHparams, adam_init, adam_update
hparams = AdamHparams(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)
params = {{"w": torch.ones(2**25, dtype=torch.bfloat16)}}
small, grads = {{"w": torch.ones(4)}}, {{"w": torch.ones(2**25)}}
adam_update(small, {{"w": torch.ones(4)}}, adam_init(small, hparams), hparams, kernel={kernel!r}, donate=True)
state = adam_init(params, hparams, master_params=True)
pages = int(open("/proc/self/statm").read().split()[0])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, hard))
try:
    adam_update(params, grads, state, hparams, kernel={kernel!r}, donate=True)
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    for tree, value in ((params, 1), (state.master_params, 1), (state.exp_avg, 0), (state.exp_avg_sq, 0)):
        assert bool((tree["w"] == value).all())
    params, state = adam_update(params, grads, state, hparams, kernel={kernel!r}, donate=True)
    print(state.step.item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["1.0"], done.stdout
