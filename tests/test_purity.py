"""An update changes nothing that it was given, shares no memory with it, and gives the same bits every time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from functional_adam import AdamHparams, AdamState, adam_init, adam_update

KERNELS = ("auto", "single", "foreach", "fused")


class Call(NamedTuple):
    """The arguments of one `adam_update`."""

    params: Any
    grads: Any
    state: AdamState
    hparams: AdamHparams
    options: dict[str, Any]

    def run(self, kernel: str, **options: Any) -> tuple[Any, AdamState]:
        return adam_update(*self[:4], kernel=kernel, **{**self.options, **options})

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_of(self)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> Tensor:
    """All bytes of the storage below a tensor, those that the tensor steps over included."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def fingerprint(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    """All that a write to a tensor can change, except its version counter, which `increment_version` may not see."""
    return [(x.data_ptr(), x.untyped_storage().data_ptr(), x.shape, x.stride(), x.requires_grad) for x in tensors]


def assert_untouched(tensors: list[Tensor], run: Callable[[], Any]) -> Any:
    """Run, and compare values, version counters and memory of `tensors` before and after."""
    with torch.no_grad():
        memory = [memory_of(x).clone() for x in tensors]
    versions, prints = [x._version for x in tensors], fingerprint(tensors)
    result = run()
    assert [x._version for x in tensors] == versions
    assert fingerprint(tensors) == prints
    for tensor, before in zip(tensors, memory, strict=True):
        assert torch.equal(memory_of(tensor), before)
    return result


def assert_same_bits(got: Any, expected: Any) -> None:
    rows = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert rows
    for a, b in rows:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def make_params(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {"layer": [randn(5, 7), randn(7)], "scale": randn(()), "empty": randn(0, 3), "image": (randn(2, 3, 4, 5),)}


def make_call(
    *,
    dtype: torch.dtype = torch.float32,
    hparams: AdamHparams | None = None,
    per_leaf_step: bool = False,
    param: Callable[[Tensor], Tensor] = Tensor.clone,
    grad: Callable[[Tensor], Tensor | None] = Tensor.clone,
    moment: Callable[[Tensor], Tensor] = Tensor.clone,
    **options: Any,
) -> Call:
    """A call in the middle of training; `param`, `grad` and `moment` turn a fresh leaf into the one to use."""
    generator = torch.Generator().manual_seed(0)
    hparams = hparams or AdamHparams(lr=0.1)
    raw = make_params(generator, dtype)
    params = torch_pytree.tree_map(param, raw)
    grads = torch_pytree.tree_map(lambda x: grad(torch.randn(x.shape, generator=generator, dtype=dtype)), raw)
    state = adam_init(params, hparams, per_leaf_step=per_leaf_step)

    def filled(tree: Any) -> Any:
        return torch_pytree.tree_map(
            lambda x: moment(torch.rand(x.shape, generator=generator, dtype=dtype).to(x.dtype)), tree
        )

    state = state._replace(
        step=torch_pytree.tree_map(lambda x: x + 3, state.step),
        exp_avg=filled(state.exp_avg),
        exp_avg_sq=filled(state.exp_avg_sq),
        max_exp_avg_sq=filled(state.max_exp_avg_sq),
    )
    return Call(params, grads, state, hparams, options)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() >= 2 else x.clone()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.clone()


def strided(x: Tensor) -> Tensor:
    """The same values with a gap after each element."""
    wide = torch.full((*x.shape, 2), 7.0, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def expanded(x: Tensor) -> Tensor:
    return x.reshape(-1)[:1].reshape((1,) * x.dim()).expand(x.shape) if x.numel() else x.clone()


def none_for_vectors(x: Tensor) -> Tensor | None:
    return None if x.dim() == 1 else x.clone()


CASES: dict[str, Callable[[], Call]] = {
    "plain": lambda: make_call(),
    "coupled": lambda: make_call(hparams=AdamHparams(lr=0.1, weight_decay=0.1)),
    "decoupled": lambda: make_call(hparams=AdamHparams(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)),
    "amsgrad": lambda: make_call(hparams=AdamHparams(lr=0.1, amsgrad=True)),
    "maximize": lambda: make_call(hparams=AdamHparams(lr=0.1, maximize=True)),
    "zero_lr": lambda: make_call(hparams=AdamHparams(lr=0.0)),
    "tensor_hparams": lambda: make_call(
        hparams=AdamHparams(lr=torch.tensor(0.1), betas=(torch.tensor(0.8), torch.tensor(0.9)), eps=torch.tensor(1e-6))
    ),
    "grad_scale": lambda: make_call(grad_scale=8.0),
    "grad_scale_tensor": lambda: make_call(grad_scale=torch.tensor(8.0)),
    "found_inf_zero": lambda: make_call(found_inf=torch.tensor(0.0)),
    "found_inf_one": lambda: make_call(found_inf=torch.tensor(1.0)),
    "found_inf_nan": lambda: make_call(found_inf=torch.tensor(float("nan"))),
    "found_inf_false": lambda: make_call(found_inf=False),
    "found_inf_true": lambda: make_call(found_inf=True),
    "found_inf_bool_tensor": lambda: make_call(found_inf=torch.tensor(True)),
    "everything": lambda: make_call(
        hparams=AdamHparams(lr=0.1, weight_decay=0.1, amsgrad=True, maximize=True),
        grad_scale=torch.tensor(8.0, dtype=torch.float64),
        found_inf=torch.tensor(False),
        per_leaf_step=True,
    ),
    "per_leaf_step": lambda: make_call(per_leaf_step=True),
    "none_grads": lambda: make_call(per_leaf_step=True, grad=none_for_vectors, hparams=AdamHparams(amsgrad=True)),
    "all_none_grads": lambda: make_call(per_leaf_step=True, grad=lambda _: None),
    "none_grads_found_inf": lambda: make_call(per_leaf_step=True, grad=none_for_vectors, found_inf=True),
    "complex": lambda: make_call(dtype=torch.complex64, hparams=AdamHparams(amsgrad=True), grad_scale=2.0),
    "conjugated_grads": lambda: make_call(dtype=torch.complex64, grad=lambda x: x.conj()),
    "negated_grads": lambda: make_call(grad=lambda x: torch.complex(x, x).conj().imag),
    "bfloat16": lambda: make_call(dtype=torch.bfloat16),
    "float16": lambda: make_call(dtype=torch.float16),
    "float64": lambda: make_call(dtype=torch.float64),
    "bfloat16_grads": lambda: make_call(grad=lambda x: x.bfloat16()),
    "float64_grads": lambda: make_call(grad=lambda x: x.double(), grad_scale=2.0),
    "bfloat16_params": lambda: make_call(param=lambda x: x.bfloat16(), moment=lambda x: x.float()),
    "transposed_params": lambda: make_call(param=transposed),
    "channels_last_params": lambda: make_call(param=channels_last, moment=channels_last),
    "channels_last_grads": lambda: make_call(grad=channels_last, grad_scale=2.0),
    "strided_params": lambda: make_call(param=strided),
    "strided_grads": lambda: make_call(grad=strided),
    "expanded_params": lambda: make_call(param=expanded),
    "expanded_grads": lambda: make_call(grad=expanded, hparams=AdamHparams(weight_decay=0.1, maximize=True)),
    "parameters": lambda: make_call(param=lambda x: nn.Parameter(x.clone(), requires_grad=False)),
}

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_case = pytest.mark.parametrize("case", CASES)


@each_kernel
@each_case
def test_inputs_are_untouched(kernel: str, case: str) -> None:
    call = CASES[case]()
    assert_untouched(call.tensors, lambda: call.run(kernel))


@each_kernel
@each_case
def test_outputs_share_no_memory_with_inputs_nor_with_each_other(kernel: str, case: str) -> None:
    call = CASES[case]()
    given = {x.untyped_storage().data_ptr() for x in call.tensors if x.numel()}
    outputs = [x.untyped_storage().data_ptr() for x in tensors_of(call.run(kernel)) if x.numel()]
    assert outputs
    assert given.isdisjoint(outputs)
    assert len(set(outputs)) == len(outputs)


@each_kernel
@each_case
def test_donating_the_outputs_leaves_the_inputs_alone(kernel: str, case: str) -> None:
    call = CASES[case]()
    params, state = call.run(kernel)
    assert_untouched(
        call.tensors, lambda: call._replace(params=params, state=state, options={}).run(kernel, donate=True)
    )


@each_kernel
@each_case
def test_two_calls_give_the_same_bits(kernel: str, case: str) -> None:
    call = CASES[case]()
    assert_same_bits(call.run(kernel), call.run(kernel))


@each_kernel
@each_case
def test_two_calls_into_copies_of_the_inputs_give_the_same_bits(kernel: str, case: str) -> None:
    assert_same_bits(CASES[case]().run(kernel), CASES[case]().run(kernel))


@each_kernel
@pytest.mark.parametrize("case", [case for case in CASES if case != "expanded_params"])
def test_what_is_only_read_is_untouched_by_donation(kernel: str, case: str) -> None:
    call = CASES[case]()
    read_only = tensors_of((call.grads, call.hparams, call.options))
    assert_untouched(read_only, lambda: call.run(kernel, donate=True))


@each_kernel
@pytest.mark.parametrize("donate", [False, True])
def test_grads_are_not_unscaled_in_place(kernel: str, donate: bool) -> None:
    # torch's fused kernel writes the unscaled gradients back.
    call = make_call(grad_scale=torch.tensor(1024.0))
    expected = [x.clone() for x in tensors_of(call.grads)]
    call.run(kernel, donate=donate)
    for grad, before in zip(tensors_of(call.grads), expected, strict=True):
        assert torch.equal(grad, before)


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_the_state_that_came_in_gives_the_same_result_after_its_successor_was_used(kernel: str, case: str) -> None:
    call = CASES[case]()
    first = call.run(kernel)
    call._replace(params=first[0], state=first[1]).run(kernel)
    assert_same_bits(call.run(kernel), first)


@each_kernel
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"found_inf": True}, {"grad": none_for_vectors}], ids=["plain", "found_inf", "none_grads"]
)
def test_parameters_come_back_as_plain_tensors(kernel: str, donate: bool, options: dict[str, Any]) -> None:
    call = make_call(param=lambda x: nn.Parameter(x.clone()), per_leaf_step=True, **options)
    with torch.no_grad():
        params, state = assert_untouched([] if donate else call.tensors, lambda: call.run(kernel, donate=donate))
    for tensor in tensors_of((params, state)):
        assert type(tensor) is Tensor
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    for tensor in tensors_of(call.params):
        assert type(tensor) is nn.Parameter
        assert tensor.requires_grad


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_shapes_dtypes_and_structure_are_a_fixed_point(kernel: str, case: str) -> None:
    call = CASES[case]()
    params, state = call.run(kernel)
    old, new = (torch_pytree.tree_flatten(tree) for tree in ((call.params, call.state), (params, state)))
    assert old[1] == new[1]
    for before, after in zip(old[0], new[0], strict=True):
        assert (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
        # A clone keeps the strides of a dense tensor and fills the gaps of any other.
        assert after.stride() == before.clone().stride()


@each_kernel
def test_an_empty_tree_counts_its_updates_without_touching_the_state(kernel: str) -> None:
    state = adam_init({}, AdamHparams())
    params, new_state = assert_untouched([state.step], lambda: adam_update({}, {}, state, AdamHparams(), kernel=kernel))
    assert params == {}
    assert new_state.step == 1
    assert new_state.step.data_ptr() != state.step.data_ptr()


def test_initial_state_shares_no_memory_with_params() -> None:
    params = make_params(torch.Generator().manual_seed(0))
    state = assert_untouched(
        tensors_of(params), lambda: adam_init(params, AdamHparams(amsgrad=True), per_leaf_step=True)
    )
    pointers = [x.untyped_storage().data_ptr() for x in tensors_of((params, state)) if x.numel()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("watched", ["autograd", "grad", "vmap"])
def test_a_leaf_without_gradient_is_copied_under_a_transform_too(watched: str):
    params = {"a": torch.ones(3), "b": torch.full((3,), 2.0)}
    hparams = AdamHparams(lr=0.1)
    results: list[Any] = []

    def step(p: Any) -> torch.Tensor:
        state = adam_init(params, hparams, per_leaf_step=True)
        new, _ = adam_update(p, {"a": torch.ones(3), "b": None}, state, hparams)
        results.append(new["b"])
        return new["a"].sum() + new["b"].sum()

    if watched == "autograd":
        leaf = {name: x.clone().requires_grad_() for name, x in params.items()}
        step(leaf).backward()
        assert results[0].untyped_storage().data_ptr() != leaf["b"].untyped_storage().data_ptr()
        assert torch.equal(leaf["b"].grad, torch.ones(3))
    elif watched == "grad":
        gradient = torch.func.grad(step)(params)
        assert torch.equal(gradient["b"], torch.ones(3))
    else:
        stacked = {name: torch.stack([x, x]) for name, x in params.items()}
        states = torch.func.vmap(lambda p: adam_init(p, hparams, per_leaf_step=True))(stacked)
        new, _ = torch.func.vmap(lambda p, g, s: adam_update(p, {"a": g, "b": None}, s, hparams), in_dims=(0, 0, 0))(
            stacked, torch.ones(2, 3), states
        )
        assert torch.equal(new["b"], stacked["b"])
        assert new["b"].untyped_storage().data_ptr() != stacked["b"].untyped_storage().data_ptr()
