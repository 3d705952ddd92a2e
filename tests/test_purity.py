"""An update changes nothing that it was given, shares no memory with it, and gives the same bits every time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import (
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
from tests.strategies import in_layout

SHAPES = ((5, 7), (7,), (), (0, 3), (2, 3, 4, 5))
Change = Callable[[Tensor], Tensor | None]


def make(
    *,
    param: Change = Tensor.clone,
    grad: Change = Tensor.clone,
    moment: Change = Tensor.clone,
    grad_scale: Any = None,
    found_inf: Any = None,
    hparams: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> dict[str, Any]:
    """Arguments in the middle of training; `param`, `grad` and `moment` turn a fresh leaf into the one to use."""
    call = make_call(SHAPES, hparams=AdamHparams(**{"lr": 0.1, **hparams}), **options)
    moments = torch_pytree.tree_map(moment, tuple(call.state[1:]))
    return {
        "params": torch_pytree.tree_map(param, call.params),
        "grads": torch_pytree.tree_map(grad, call.grads),
        "state": AdamState(call.state.step, *moments),
        **clone({"hparams": call.hparams, "grad_scale": grad_scale, "found_inf": found_inf}),
    }


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


channels_last, expanded = (partial(in_layout, layout=layout) for layout in ("channels_last", "expanded"))


def none_for_vectors(x: Tensor) -> Tensor | None:
    return None if x.dim() == 1 else x.clone()


PER_LEAF, MASTERS = {"per_leaf_step": True}, {"master_params": True, "moment_dtype": torch.float32}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "coupled": {"hparams": {"weight_decay": 0.1, "amsgrad": True, "maximize": True}},
    "decoupled": {"hparams": {"weight_decay": 0.1, "decoupled_weight_decay": True}},
    "zero_lr": {"hparams": {"lr": 0.0}},
    "tensor_hparams": {"hparams": {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.8), torch.tensor(0.9))}},
    "tensor_eps": {"hparams": {"eps": torch.tensor(1e-6)}},
    "grad_scale": {"grad_scale": 8.0},
    "grad_scale_tensor": {"grad_scale": torch.tensor(8.0, dtype=torch.float64), "found_inf": torch.tensor(False)},
    "found_inf_zero": {"found_inf": torch.tensor(0.0)},
    "found_inf_nan": {"found_inf": torch.tensor(float("nan"))},
    "found_inf_true": {"found_inf": True},
    "per_leaf_step": PER_LEAF,
    "none_grads": {**PER_LEAF, "grad": none_for_vectors, "hparams": {"amsgrad": True}},
    "all_none_grads": {**PER_LEAF, "grad": lambda _: None},
    "none_grads_found_inf": {**PER_LEAF, "grad": none_for_vectors, "found_inf": True},
    "masters": {"dtype": torch.bfloat16, **MASTERS, "hparams": {"amsgrad": True}},
    "masters_found_inf": {"dtype": torch.float16, **MASTERS, "found_inf": torch.tensor(1.0)},
    "masters_found_nothing": {"dtype": torch.bfloat16, **MASTERS, "found_inf": torch.tensor(0.0)},
    "masters_none_grads": {"dtype": torch.bfloat16, **MASTERS, **PER_LEAF, "grad": none_for_vectors},
    "bfloat16_moments": {"moment_dtype": torch.bfloat16},
    "float64_moments": {"moment_dtype": torch.float64, "found_inf": torch.tensor(0.0)},
    "complex": {"dtype": torch.complex64, "hparams": {"amsgrad": True}, "grad_scale": 2.0},
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
    "expanded_grads": {"grad": expanded, "hparams": {"weight_decay": 0.1, "maximize": True}},
    "parameters": {"param": lambda x: nn.Parameter(x.clone())},
    "parameters_found_inf": {"param": lambda x: nn.Parameter(x.clone()), "found_inf": True},
    "parameters_none_grads": {**PER_LEAF, "param": lambda x: nn.Parameter(x.clone()), "grad": none_for_vectors},
}

each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@each_kernel
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_update_gives_the_same_bits_in_its_own_memory_and_touches_nothing(kernel: str, case: str) -> None:
    given, copy = make(**CASES[case]), make(**CASES[case])
    with untouched(given):
        result = adam_update(**given, kernel=kernel)
        outputs = storages(result)
        assert outputs
        assert len({*outputs}) == len(outputs)
        assert {*outputs}.isdisjoint(storages(given))
        assert_same_bits(adam_update(**copy, kernel=kernel), result)
        # The state is still the same after its successor was used, and after that was donated.
        successor = {"params": result[0], "grads": given["grads"], "state": result[1], "hparams": given["hparams"]}
        adam_update(**successor, kernel=kernel)
        assert_same_bits(adam_update(**given, kernel=kernel), result)
        adam_update(**successor, kernel=kernel, donate=True)
        assert_same_bits(adam_update(**given, kernel=kernel), adam_update(**copy, kernel=kernel))
    old, structure = torch_pytree.tree_flatten((given["params"], given["state"]))
    new, new_structure = torch_pytree.tree_flatten(adam_update(**given, kernel=kernel))
    assert new_structure == structure
    # A clone keeps the strides of a dense tensor and fills the gaps of any other.
    expected = [(Tensor, False, x.shape, x.dtype, x.device, x.clone().stride()) for x in old]
    assert [(type(x), x.requires_grad, x.shape, x.dtype, x.device, x.stride()) for x in new] == expected


@each_kernel
@pytest.mark.parametrize("case", [case for case in CASES if case != "expanded_params"])
@torch.no_grad()
def test_donation_gives_the_same_bits_in_the_memory_given_and_leaves_what_is_only_read(kernel: str, case: str) -> None:
    # torch's fused kernel would write the unscaled gradients back.
    given = make(**CASES[case])
    expected = adam_update(**given, kernel=kernel)
    old = tensors_of((given["params"], given["state"][1:]))
    places, versions = [(x.data_ptr(), x.stride()) for x in old], [x._version for x in old]
    with untouched([x for name, x in given.items() if name not in ("params", "state")]):
        params, state = adam_update(**given, kernel=kernel, donate=True)
    new = tensors_of((params, state[1:]))
    assert [(x.data_ptr(), x.stride()) for x in new] == places
    assert all(x._version > version for x, version in zip(old, versions, strict=True))
    assert {type(x) for x in new} == {Tensor}
    assert_same_bits((params, state), expected)


@each_kernel
def test_an_empty_tree_counts_its_updates_without_touching_the_state(kernel: str) -> None:
    state = adam_init({}, AdamHparams())
    with untouched(state):
        params, new_state = adam_update({}, {}, state, AdamHparams(), kernel=kernel)
    assert params == {}
    assert new_state.step == 1
    assert new_state.step.data_ptr() != state.step.data_ptr()


def test_initial_state_has_the_layout_of_params_and_shares_no_memory_with_them() -> None:
    params = make(param=channels_last)["params"]
    with untouched(params):
        state = adam_init(params, AdamHparams(amsgrad=True), per_leaf_step=True)
    pointers = storages((params, state))
    assert len({*pointers}) == len(pointers)
    strides = [x.stride() for x in tensors_of(params)]
    assert [[x.stride() for x in tensors_of(moment)] for moment in state[1:4]] == [strides] * 3


@pytest.mark.parametrize("watched", ["autograd", "grad", "vmap"])
def test_a_leaf_without_gradient_is_copied_under_a_transform_too(watched: str) -> None:
    params, hparams = {"a": torch.ones(2, 3), "b": torch.full((2, 3), 2.0)}, AdamHparams(lr=0.1)

    def step(params: Any) -> Any:
        state = adam_init(params, hparams, per_leaf_step=True)
        return adam_update(params, {"a": torch.ones(params["a"].shape), "b": None}, state, hparams)[0]

    def loss(params: Any) -> tuple[Tensor, Any]:
        new = step(params)
        return new["a"].sum() + new["b"].sum(), new

    if watched == "vmap":
        new = torch.func.vmap(step)(params)
    elif watched == "grad":
        gradient, new = torch.func.grad(loss, has_aux=True)(params)
        assert torch.equal(gradient["b"], torch.ones(2, 3))
    else:
        total, new = loss({name: x.requires_grad_() for name, x in params.items()})
        assert torch.equal(torch.autograd.grad(total, [*params.values()])[1], torch.ones(2, 3))
    assert torch.equal(new["b"], params["b"])
    assert storages(new["b"]) != storages(params["b"])


@each_kernel
@pytest.mark.parametrize("options", [{}, {"moment_dtype": torch.bfloat16, "per_leaf_step": True}], ids=str)
def test_an_update_in_runs_that_fit_the_cache_is_the_update(kernel: Any, options: dict[str, Any]) -> None:
    """Small leaves stand before, between and after leaves that take more than one run."""
    hparams = AdamHparams(lr=0.1, amsgrad=True, weight_decay=0.1)
    call = make_call(((5,), (2**19 + 3,), (7, 3), (2**19 - 1,), (3, 2**19), ()), hparams=hparams, **options)
    before = snapshot(call)
    pure = adam_update(*call, kernel=kernel)
    assert_unchanged(call, before)
    assert_same_bits(pure, adam_update(*clone(call), kernel=kernel, donate=True))
