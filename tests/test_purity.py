"""An update changes nothing that it was given, shares no memory with it, and gives the same bits every time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import (
    Call,
    assert_same_bits,
    assert_unchanged,
    clone,
    make_call,
    snapshot,
    strided,
    tensors_of,
    transposed,
)
from tests.oracles import KERNELS

SHAPES = ((5, 7), (7,), (), (0, 3), (2, 3, 4, 5))
Change = Callable[[Tensor], Tensor | None]


class Given(NamedTuple):
    """All that one `adam_update` is given."""

    call: Call
    options: dict[str, Any]

    def run(self, kernel: str, **options: Any) -> tuple[Any, AdamState]:
        return adam_update(*self.call, kernel=kernel, **self.options, **options)


def make(
    *,
    dtype: torch.dtype = torch.float32,
    per_leaf_step: bool = False,
    param: Change = Tensor.clone,
    grad: Change = Tensor.clone,
    moment: Change = Tensor.clone,
    grad_scale: Any = None,
    found_inf: Any = None,
    **hparams: Any,
) -> Given:
    """Arguments in the middle of training; `param`, `grad` and `moment` turn a fresh leaf into the one to use."""
    hparams = {"lr": 0.1, **clone(hparams)}
    call = make_call(SHAPES, hparams=AdamHparams(**hparams), dtype=dtype, per_leaf_step=per_leaf_step)
    moments = torch_pytree.tree_map(moment, tuple(call.state[1:]))
    call = call._replace(
        params=torch_pytree.tree_map(param, call.params),
        grads=torch_pytree.tree_map(grad, call.grads),
        state=AdamState(call.state.step, *moments),
    )
    return Given(call, clone({"grad_scale": grad_scale, "found_inf": found_inf}))


@contextmanager
def untouched(tree: Any) -> Iterator[None]:
    """What happens within changes no tensor of `tree`, nor the memory that one steps over."""
    tensors = tensors_of(tree)
    memory = [torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()) for x in tensors]
    before, flags = snapshot((tensors, memory)), [x.requires_grad for x in tensors]
    yield
    assert_unchanged((tensors, memory), before)
    assert [x.requires_grad for x in tensors] == flags


def storages(tree: Any) -> list[int]:
    """The addresses of the storages of all tensors that have elements."""
    return [x.untyped_storage().data_ptr() for x in tensors_of(tree) if x.numel()]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.clone()


def expanded(x: Tensor) -> Tensor:
    return x.reshape(-1)[:1].reshape((1,) * x.dim()).expand(x.shape) if x.numel() else x.clone()


def none_for_vectors(x: Tensor) -> Tensor | None:
    return None if x.dim() == 1 else x.clone()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "zero_lr": {"lr": 0.0},
    "tensor_hparams": {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.8), torch.tensor(0.9))},
    "tensor_eps": {"eps": torch.tensor(1e-6)},
    "grad_scale": {"grad_scale": 8.0},
    "grad_scale_tensor": {"grad_scale": torch.tensor(8.0)},
    "found_inf_zero": {"found_inf": torch.tensor(0.0)},
    "found_inf_one": {"found_inf": torch.tensor(1.0)},
    "found_inf_nan": {"found_inf": torch.tensor(float("nan"))},
    "found_inf_false": {"found_inf": False},
    "found_inf_true": {"found_inf": True},
    "found_inf_bool_tensor": {"found_inf": torch.tensor(True)},
    "everything": {
        "weight_decay": 0.1,
        "amsgrad": True,
        "maximize": True,
        "grad_scale": torch.tensor(8.0, dtype=torch.float64),
        "found_inf": torch.tensor(False),
        "per_leaf_step": True,
    },
    "per_leaf_step": {"per_leaf_step": True},
    "none_grads": {"per_leaf_step": True, "grad": none_for_vectors, "amsgrad": True},
    "all_none_grads": {"per_leaf_step": True, "grad": lambda _: None},
    "none_grads_found_inf": {"per_leaf_step": True, "grad": none_for_vectors, "found_inf": True},
    "complex": {"dtype": torch.complex64, "amsgrad": True, "grad_scale": 2.0},
    "conjugated_grads": {"dtype": torch.complex64, "grad": Tensor.conj},
    "negated_grads": {"grad": lambda x: torch.complex(x, x).conj().imag},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "bfloat16_grads": {"grad": Tensor.bfloat16},
    "float64_grads": {"grad": Tensor.double, "grad_scale": 2.0},
    "bfloat16_params": {"param": Tensor.bfloat16},
    "transposed_params": {"param": transposed},
    "channels_last_params": {"param": channels_last, "moment": channels_last},
    "channels_last_grads": {"grad": channels_last, "grad_scale": 2.0},
    "strided_params": {"param": strided},
    "strided_grads": {"grad": strided},
    "expanded_params": {"param": expanded},
    "expanded_grads": {"grad": expanded, "weight_decay": 0.1, "maximize": True},
    "parameters": {"param": lambda x: nn.Parameter(x.clone(), requires_grad=False)},
}

each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_an_update_gives_the_same_bits_in_its_own_memory_and_touches_nothing(kernel: str, case: str) -> None:
    given, copy = make(**CASES[case]), make(**CASES[case])
    with untouched(given):
        result = given.run(kernel)
        outputs = storages(result)
        assert outputs
        assert len({*outputs}) == len(outputs)
        assert {*outputs}.isdisjoint(storages(given))
        assert_same_bits(copy.run(kernel), result)
        # The state is still the same after its successor was used, and after that was donated.
        successor = given.call._replace(params=result[0], state=result[1])
        adam_update(*successor, kernel=kernel)
        assert_same_bits(given.run(kernel), result)
        adam_update(*successor, kernel=kernel, donate=True)
        assert_same_bits(given.run(kernel), copy.run(kernel))


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_shapes_dtypes_and_structure_are_a_fixed_point(kernel: str, case: str) -> None:
    given = make(**CASES[case])
    old, structure = torch_pytree.tree_flatten((given.call.params, given.call.state))
    new, new_structure = torch_pytree.tree_flatten(given.run(kernel))
    assert new_structure == structure
    # A clone keeps the strides of a dense tensor and fills the gaps of any other.
    expected = [(x.shape, x.dtype, x.device, x.clone().stride()) for x in old]
    assert [(x.shape, x.dtype, x.device, x.stride()) for x in new] == expected


@each_kernel
@pytest.mark.parametrize("case", [case for case in CASES if case != "expanded_params"])
def test_what_is_only_read_is_untouched_by_donation(kernel: str, case: str) -> None:
    # torch's fused kernel would write the unscaled gradients back.
    given = make(**CASES[case])
    with untouched((given.call.grads, given.call.hparams, given.options)):
        given.run(kernel, donate=True)


@each_kernel
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"found_inf": True}, {"grad": none_for_vectors}], ids=["plain", "found_inf", "none_grads"]
)
def test_parameters_come_back_as_plain_tensors(kernel: str, donate: bool, options: dict[str, Any]) -> None:
    given = make(param=lambda x: nn.Parameter(x.clone()), per_leaf_step=True, **options)
    with torch.no_grad(), untouched(() if donate else given):
        result = given.run(kernel, donate=donate)
    assert {type(x) for x in tensors_of(result)} == {Tensor}
    assert not any(x.requires_grad or x.grad_fn for x in tensors_of(result))
    assert {(type(x), x.requires_grad) for x in tensors_of(given.call.params)} == {(nn.Parameter, True)}


@each_kernel
def test_an_empty_tree_counts_its_updates_without_touching_the_state(kernel: str) -> None:
    state = adam_init({}, AdamHparams())
    with untouched(state):
        params, new_state = adam_update({}, {}, state, AdamHparams(), kernel=kernel)
    assert params == {}
    assert new_state.step == 1
    assert new_state.step.data_ptr() != state.step.data_ptr()


def test_initial_state_shares_no_memory_with_params() -> None:
    params = make().call.params
    with untouched(params):
        state = adam_init(params, AdamHparams(amsgrad=True), per_leaf_step=True)
    pointers = storages((params, state))
    assert len({*pointers}) == len(pointers)


@pytest.mark.parametrize("watched", ["autograd", "grad", "vmap"])
def test_a_leaf_without_gradient_is_copied_under_a_transform_too(watched: str) -> None:
    params = {"a": torch.ones(3), "b": torch.full((3,), 2.0)}
    hparams = AdamHparams(lr=0.1)

    def init(params: Any) -> AdamState:
        return adam_init(params, hparams, per_leaf_step=True)

    def step(params: Any, state: AdamState) -> Any:
        return adam_update(params, {"a": torch.ones(3), "b": None}, state, hparams)[0]

    def loss(params: Any) -> tuple[Tensor, Any]:
        new = step(params, init(params))
        return new["a"].sum() + new["b"].sum(), new

    if watched == "vmap":
        params = {name: torch.stack([x, x]) for name, x in params.items()}
        new = torch.func.vmap(step)(params, torch.func.vmap(init)(params))
    else:
        if watched == "grad":
            gradient, new = torch.func.grad(loss, has_aux=True)(params)
        else:
            params = {name: x.requires_grad_() for name, x in params.items()}
            total, new = loss(params)
            gradient = dict(zip(params, torch.autograd.grad(total, [*params.values()]), strict=True))
        assert torch.equal(gradient["b"], torch.ones(3))
    assert torch.equal(new["b"], params["b"])
    assert storages(new["b"]) != storages(params["b"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"moment_dtype": torch.bfloat16}, {"per_leaf_step": True}], ids=str)
def test_an_update_in_runs_that_fit_the_cache_is_the_update(kernel: Any, options: dict[str, Any]) -> None:
    """Small leaves stand before, between and after leaves that take more than one run."""
    hparams = AdamHparams(lr=0.1, amsgrad=True, weight_decay=0.1)
    call = make_call(((5,), (2**19 + 3,), (7, 3), (2**19 - 1,), (3, 2**19), ()), hparams=hparams, **options)
    before = snapshot(call)
    pure = adam_update(*call, kernel=kernel)
    assert_unchanged(call, before)
    assert_same_bits(pure, adam_update(*clone(call), kernel=kernel, donate=True))
