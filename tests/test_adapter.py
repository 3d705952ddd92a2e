"""The adapters are torch's functional Adam and torch.optim.Adam in one, without what the former gets wrong."""

import copy
import inspect
import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau

from functional_adam import _FunctionalAdam, _FunctionalAdamW
from tests.builders import assert_unchanged, snapshot
from tests.oracles import torch_adam
from tests.strategies import random_tensor
from tests.test_cuda_path import CopyByOp, Recorder
from tests.tolerances import assert_close, assert_equal

# The adapter's flags by the kernel that they choose.
FLAGS: dict[str, dict[str, bool]] = {"single": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
TWINS = [(_FunctionalAdam, torch.optim.Adam), (_FunctionalAdamW, torch.optim.AdamW)]
SHAPES = ((5, 7), (7,), (), (2, 3, 4, 5), (0, 3))

each_kernel = pytest.mark.parametrize("kernel", FLAGS)
each_twin = pytest.mark.parametrize(("adapter", "optimizer_class"), TWINS, ids=["Adam", "AdamW"])

# torch's fused kernel takes no complex numbers.
RUNS: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {},
    torch.float64: {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    torch.bfloat16: {"amsgrad": True, "maximize": True, "lr": 0.1, "weight_decay": 0.1},
    torch.complex64: {"lr": 0.1},
}


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(random_tensor(shape, dtype, i)) for i, shape in enumerate(SHAPES)]


def make_grads(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random_tensor(shape, dtype, 100 * (step + 1) + i) for i, shape in enumerate(SHAPES)]


def tensors_in(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """All that a step may change: parameters and their states."""
    return [*params, *(x for p in params if p in optimizer.state for x in optimizer.state[p].values())]


def update(optimizer: Any, params: Sequence[Tensor], grads: Sequence[Tensor | None], way: str) -> None:
    """One update, in one of three ways, of which torch.optim has "grad" alone."""
    if way == "step":
        optimizer.step(gradients=grads)
        return
    for param, grad in zip(params, grads, strict=True):
        if way == "step_param":
            optimizer.step_param(param, grad)
        else:
            param.grad = None if grad is None else grad.clone()
    if way == "grad":
        optimizer.step()


def train(make: Callable[..., Any], gradients: Sequence[Any], way: str = "step", **options: Any) -> Any:
    """An optimizer of new parameters that has taken all steps, and these parameters."""
    params = make_params(gradients[0][-1].dtype)
    optimizer = make(params, **options)
    for grads in gradients:
        update(optimizer, params, grads, way)
    return optimizer, params


def assert_same_params(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert_equal([p.detach() for p in got], [p.detach() for p in expected])


def assert_same_state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], expected: Any) -> None:
    assert_same_params(params, expected.params)
    for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_equal([optimizer.state[p].get(name) for p in params], getattr(expected, name))


# Trajectories.


@each_kernel
@each_twin
@pytest.mark.parametrize("dtype", RUNS, ids=str)
def test_trajectory_is_that_of_torch_optim(adapter: Any, optimizer_class: Any, kernel: str, dtype: torch.dtype) -> None:
    is_approximate = dtype.is_complex and kernel == "fused"
    gradients = [[g if (s + i) % 3 else None for i, g in enumerate(make_grads(s, dtype))] for s in (1, 2, 3, 4)]
    reference = "single" if is_approximate else kernel
    expected = torch_adam(make_params(dtype), gradients, RUNS[dtype], reference, optimizer_class=optimizer_class)
    for way in ("step", "step_param", "grad"):
        optimizer, params = train(adapter, gradients, way, **RUNS[dtype], **FLAGS[kernel])
        if is_approximate:
            assert_close([p.detach() for p in params], expected.params)
        else:
            assert_same_state(optimizer, params, expected)


@pytest.mark.parametrize("adapter", dict(TWINS))
def test_signature_trajectory_and_attributes_are_those_of_torchs_functional_class(adapter: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its classes
        from torch.distributed.optim import functional_adam, functional_adamw
    torchs_class = getattr(functional_adamw if adapter is _FunctionalAdamW else functional_adam, adapter.__name__)
    signatures = (inspect.signature(x).parameters.values() for x in (adapter, torchs_class))
    ours, theirs = ([(p.name, p.default) for p in x] for x in signatures)
    assert ours == theirs
    params, expected = make_params(), [p.detach() for p in make_params()]
    with pytest.warns(DeprecationWarning, match="TorchScript"):
        reference = torchs_class(expected, 0.1, (0.8, 0.95), 1e-6, 0.1, True, True, True, False)
    optimizer = adapter(params, 0.1, (0.8, 0.95), 1e-6, 0.1, True, True, True, False)
    for step in range(4):
        for one in (optimizer, reference):
            if step == 2:
                one.maximize = one.foreach = False
            one.step(make_grads(step))
        assert_same_params(params, expected)


def test_objects_and_memory_are_kept_and_grad_mode_does_not_matter() -> None:
    optimizer, params = train(_FunctionalAdam, [make_grads(0)], amsgrad=True)
    tensors = tensors_in(optimizer, params)
    pointers = [x.data_ptr() for x in tensors]
    state = optimizer.state_dict()["state"]
    with torch.enable_grad():
        optimizer.step([grad.requires_grad_() for grad in make_grads(1)])
    assert all(x is y for x, y in zip(tensors, tensors_in(optimizer, params), strict=True))
    assert [x.data_ptr() for x in tensors] == pointers
    assert all(x.is_leaf and x.requires_grad is isinstance(x, nn.Parameter) for x in tensors)
    # A state_dict taken before sees the new values, as torch.optim's does.
    assert all(optimizer.state[p] is state[i] for i, p in enumerate(params))
    assert_equal([row["step"] for row in state.values()], [torch.tensor(2.0)] * len(params))


def test_closure_is_run_with_grad_and_its_loss_returned() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = _FunctionalAdam([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 2.0
        assert_close(weight, torch.full((2,), 0.9))
        assert optimizer.step(closure=closure).item() == pytest.approx(1.62)


# Unknown parameters.


@each_kernel
def test_parameters_that_the_constructor_never_saw_are_updated(kernel: str) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        _FunctionalAdam([])
    with pytest.raises(TypeError, match=r"should be an iterable of Tensors or dicts, but got torch\.FloatTensor"):
        _FunctionalAdam(torch.ones(2))
    options = {"lr": 0.1, "amsgrad": True}
    optimizer = _FunctionalAdam([], **options, **FLAGS[kernel], _allow_empty_param_list=True)
    params, gradients = make_params(), [make_grads(step) for step in range(3)]
    for grads in gradients:
        update(optimizer, params, grads, "step_param")
    assert_same_state(optimizer, params, torch_adam(make_params(), gradients, options, kernel))
    with pytest.raises(RuntimeError, match="state for 5 parameters that are in no group"):
        optimizer.state_dict()
    optimizer.add_param_group({"params": params})
    assert sorted(optimizer.state_dict()["state"]) == list(range(len(params)))


# Failures change nothing.

FAULTS: list[tuple[Any, type[Exception], str]] = [
    (torch.ones(1), ValueError, r"grads\[1\] has shape \(1,\), but params\[1\] has shape \(7,\)"),
    (torch.eye(7).to_sparse()[0], TypeError, r"grads\[1\] has the layout torch.sparse_coo"),
    (torch.ones(7, dtype=torch.complex64), TypeError, r"grads\[1\] is of torch.complex64"),
]
WRONG_LISTS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, r"^gradients has length 0, but the optimizer has 5 parameters"),
    ([torch.ones(1)] * 6, ValueError, r"^gradients has length 6, but the optimizer has 5 parameters"),
    (torch.ones(5), TypeError, r"gradients is of type Tensor\. Expected a list"),
    # Beside a closure, a function is no closure.
    (lambda: 0.0, TypeError, r"gradients is of type function\. Expected a list"),
]


@each_kernel
@pytest.mark.parametrize("is_first", [True, False])
def test_a_step_that_fails_or_has_no_gradient_changes_nothing(kernel: str, is_first: bool) -> None:
    params = make_params()
    split = params if is_first else [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = _FunctionalAdam(split, lr=0.1, **FLAGS[kernel])
    gradients = [make_grads(1)] if is_first else [make_grads(0), make_grads(1)]
    for grads in gradients[:-1]:
        optimizer.step(grads)
    # Versions too stay as they are, so that a pending backward still works.
    before = snapshot(tensors_in(optimizer, params))
    for bad, error, match in FAULTS:
        with pytest.raises(error, match=match):
            optimizer.step([bad if i == 1 else grad for i, grad in enumerate(make_grads(1))])
        with pytest.raises(error, match=match.replace(r"\[1\]", r"\[0\]")):
            optimizer.step_param(params[1], bad)
    for bad, error, match in WRONG_LISTS:
        with pytest.raises(error, match=match):
            optimizer.step(bad, (lambda: 1.0) if callable(bad) else None)
    optimizer.step([None] * len(params))
    optimizer.step()
    optimizer.step_param(params[0], None)
    assert_unchanged(tensors_in(optimizer, params), before)
    assert len(optimizer.state) == (0 if is_first else len(params))
    optimizer.step(gradients[-1])
    assert_same_params(params, torch_adam(make_params(), gradients, {"lr": 0.1}, kernel).params)


def test_groups_that_share_memory_or_have_a_wrong_state_are_refused_before_any_changes() -> None:
    a, b = torch.ones(2), torch.ones(2)
    optimizer = _FunctionalAdam([{"params": [a]}, {"params": [b]}])
    with pytest.raises(RuntimeError, match=r"params\[0\]: it shares memory with grads\[1\]"):
        optimizer.step([torch.ones(2), a])
    assert a.tolist() == b.tolist() == [1.0, 1.0]
    optimizer.step([torch.ones(2), torch.ones(2)])
    before = snapshot(a)
    optimizer.param_groups[1]["amsgrad"] = True
    with pytest.raises(TypeError, match=r"state.max_exp_avg_sq\[1\] is of type NoneType"):
        optimizer.step([torch.ones(2), torch.ones(2)])
    optimizer.param_groups[1]["amsgrad"] = False
    optimizer.state[b]["step"].fill_(-1)
    with pytest.raises(ValueError, match=r"state.step.* is -1"):
        optimizer.step([torch.ones(2), torch.ones(2)])
    assert_unchanged(a, before)


@each_twin
def test_bad_hyperparameters_are_refused_in_torchs_words(adapter: Any, optimizer_class: Any) -> None:
    for options, error, match in (
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot be `True` together"),
    ):
        with pytest.raises(error, match=match) as theirs:
            optimizer_class(make_params(), **options)
        for given, more in ((make_params(), options), ([{"params": make_params(), **options}], {})):
            with pytest.raises(error, match=match) as ours:
                adapter(given, **more)
            assert str(ours.value).startswith(str(theirs.value))


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas[0]", "betas[1]"])
def test_a_tensor_of_other_than_one_element_is_refused_in_torchs_words(name: str) -> None:
    params = make_params()
    before = snapshot(params)
    for shape in ((2,), (0,), (2, 1)):
        number = torch.full(shape, 0.5)
        options = {"betas[0]": {"betas": (number, 0.9)}, "betas[1]": {"betas": (0.9, number)}}.get(name, {name: number})
        optimizer = _FunctionalAdam(params)
        optimizer.defaults.update(options)
        for call in (
            lambda given=options: _FunctionalAdam(params, **given),
            lambda given=options: _FunctionalAdam([{"params": params, **given}]),
            lambda optimizer=optimizer: optimizer.step(make_grads(0)),
        ):
            match = rf"^Tensor {re.escape(name)} must be 1-element, but it has shape {re.escape(str(shape))}"
            with pytest.raises(ValueError, match=match):
                call()
        assert not optimizer.state
    assert_unchanged(params, before)
    with pytest.raises(ValueError, match=r"^Tensor lr must be 1-element$"):
        torch.optim.Adam(params, lr=number)
    with pytest.raises(TypeError, match=r"hparams.lr has the layout torch.sparse_coo"):
        _FunctionalAdam(params, lr=torch.ones(1).to_sparse())


@each_kernel
def test_a_tensor_of_one_element_is_a_number_in_any_shape(kernel: str) -> None:
    numbers: dict[str, Any] = {"lr": 0.5, "eps": 2**-10, "weight_decay": 0.25, "betas": (0.5, 0.75)}
    gradients = [make_grads(step) for step in range(2)]
    _, expected = train(_FunctionalAdam, gradients, **numbers, **FLAGS[kernel])
    for shape in ((), (1,), (1, 1)):
        tensors = optree.tree_map(lambda x, shape=shape: torch.full(shape, x), numbers)
        optimizer, params = train(_FunctionalAdam, gradients, **tensors, **FLAGS[kernel])
        assert optimizer.param_group["lr"] is tensors["lr"]
        assert_same_params(params, expected)


# Hyperparameters come from the groups.


@each_twin
@pytest.mark.parametrize("way", ["step", "step_param"])
def test_groups_and_schedulers_are_those_of_torch_optim(adapter: Any, optimizer_class: Any, way: str) -> None:
    def train_groups(make: Any, make_scheduler: Any, way: str) -> list[nn.Parameter]:
        params = make_params()
        first = {"params": params[:2], "lr": 0.1, "weight_decay": 0.1}
        optimizer = make([first, {"params": params[2:], "betas": (0.5, 0.6), "amsgrad": True, "maximize": True}])
        scheduler = make_scheduler(optimizer)
        for step in range(4):
            update(optimizer, params, make_grads(step), way)
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert optimizer.param_groups[0]["lr"] != 0.1
        return params

    for make_scheduler in (partial(CosineAnnealingLR, T_max=3), partial(ReduceLROnPlateau, patience=0)):
        expected = train_groups(partial(optimizer_class, foreach=False), make_scheduler, "grad")
        assert_same_params(train_groups(adapter, make_scheduler, way), expected)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "foreach", "fused"])
@pytest.mark.parametrize("copied", [False, True])
def test_what_is_set_in_defaults_or_as_a_flag_takes_effect_in_all_groups(copied: bool, flag: str) -> None:
    optimizer = _FunctionalAdam([{"params": make_params()[:2]}, {"params": make_params()[2:]}])
    if copied:
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    numbers: dict[str, Any] = {"lr": 0.5, "betas": (0.9, 0.25), "eps": 0.1, "weight_decay": 0.2}
    optimizer.defaults.update({**numbers, "betas": (0.5, 0.5)})
    optimizer.defaults["beta1"] = 0.9
    assert optimizer.param_group["betas"] == (0.9, 0.5)
    optimizer.defaults["beta2"] = 0.25
    assert (optimizer.defaults["beta1"], optimizer.defaults["beta2"]) == numbers["betas"]
    with pytest.raises(KeyError, match="beta3"):
        optimizer.defaults["beta3"]
    assert getattr(optimizer, flag) is False
    setattr(optimizer, flag, True)
    assert getattr(optimizer, flag) is True
    expected = {**numbers, "amsgrad": False, "maximize": False, "foreach": False, "fused": False, flag: True}
    for group in optimizer.param_groups:
        assert {name: group[name] for name in expected} == expected
    optimizer.step(make_grads(0))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert_same_params(params, train(_FunctionalAdam, [make_grads(0)], **expected)[1])
    optimizer.foreach = optimizer.fused = True
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        optimizer.step(make_grads(0))


# State that travels.


@each_twin
@each_kernel
def test_state_dicts_are_exchanged_with_torch_optim(adapter: Any, optimizer_class: Any, kernel: str) -> None:
    gradients = [make_grads(step) for step in range(6)]
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}
    params = make_params()
    # Ours, torch's and ours take two steps each, and hand on through a file.
    optimizer = adapter(params, **options, **FLAGS[kernel])
    for step, grads in enumerate(gradients):
        if step in (2, 4):
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            optimizer = (optimizer_class if step == 2 else adapter)(params, lr=1.0)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        update(optimizer, params, grads, "grad")
    expected = torch_adam(make_params(), gradients, options, kernel, optimizer_class=optimizer_class)
    assert_same_state(optimizer, params, expected)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)], ids=str)
def test_state_dicts_of_others_are_read(step: Any) -> None:
    optimizer, params = train(_FunctionalAdam, [make_grads(0)])
    state_dict = copy.deepcopy(optimizer.state_dict())
    for row in state_dict["state"].values():
        row["step"] = step
    for name in ("amsgrad", "maximize", "foreach", "fused", "decoupled_weight_decay"):  # which older ones lack
        del state_dict["param_groups"][0][name]
    optimizer.load_state_dict(state_dict)
    optimizer.step(make_grads(1))
    assert_equal([optimizer.state[p]["step"] for p in params], [torch.tensor(4.0)] * len(params))
    # Decoupled decay comes from either side.
    for adapter, optimizer_class in ((_FunctionalAdamW, torch.optim.Adam), (_FunctionalAdam, torch.optim.AdamW)):
        optimizer = adapter(make_params())
        optimizer.load_state_dict(optimizer_class(make_params()).state_dict())
        assert optimizer.param_group["decoupled_weight_decay"] is True


@pytest.mark.parametrize("adapter", dict(TWINS))
def test_copies_go_on_by_themselves(adapter: Any) -> None:
    params = make_params()
    optimizer = adapter([{"params": params, "lr": 0.1}], amsgrad=True, foreach=True)
    scheduler = ExponentialLR(optimizer, 0.5)
    optimizer.step(make_grads(0))
    scheduler.step()
    twins = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    before = snapshot(tensors_in(optimizer, params))
    for twin in twins:
        twin.step(make_grads(1))
    assert_unchanged(tensors_in(optimizer, params), before)
    optimizer.step(make_grads(1))
    for twin in twins:
        assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        assert twin.param_group["lr"] == 0.05
        assert_same_params(twin.param_group["params"], params)


# Threads.


@each_kernel
def test_threads_may_step_different_parameters_at_once(kernel: str) -> None:
    def tensors(seed: int) -> list[Tensor]:
        return [random_tensor((1 + i % 7,), torch.float32, seed + i) for i in range(48)]

    gradients = [tensors(1000 + 100 * step) for step in range(5)]
    expected = torch_adam(tensors(0), gradients, {"lr": 0.1}, kernel)
    ours = tensors(0)
    optimizer = _FunctionalAdam([], lr=0.1, _allow_empty_param_list=True, **FLAGS[kernel])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can, so that a race shows
    try:
        with ThreadPoolExecutor(16) as pool:
            for grads in gradients:
                list(pool.map(optimizer.step_param, ours, grads))
    finally:
        sys.setswitchinterval(interval)
    assert_same_state(optimizer, ours, expected)


# Accelerators.


@each_kernel
def test_flags_choose_the_kernel_and_steps_of_cuda_parameters_live_on_the_device(kernel: str) -> None:
    with FakeTensorMode(), CopyByOp(), Recorder() as recorder:
        weight = torch.ones(3, device="cuda")
        optimizer = _FunctionalAdam([weight], **FLAGS[kernel])
        optimizer.step([torch.ones(3, device="cuda")])
        assert {x.device.type for x in optimizer.state[weight].values()} == {"cuda"}
        # ZeRO puts loaded steps on the CPU.
        optimizer.state[weight]["step"] = torch.ones(())
        optimizer.step([torch.ones(3, device="cuda")])
        assert optimizer.state[weight]["step"].device.type == "cuda"
    assert ("_fused_adam_" in recorder.counts) == (kernel == "fused")
    assert any(name.startswith("_foreach_") for name in recorder.counts) == (kernel == "foreach")


@pytest.mark.cuda
@each_kernel
@each_twin
def test_cuda_trajectory_is_that_of_torch_optim(adapter: Any, optimizer_class: Any, kernel: str) -> None:
    gradients = [[g.cuda() for g in make_grads(step)] for step in range(4)]
    start = [p.detach().cuda() for p in make_params()]
    how = {"optimizer_class": optimizer_class, "capturable": kernel != "fused"}
    expected = torch_adam(start, gradients, {"lr": 0.1}, kernel, **how)
    params = [p.clone() for p in start]
    optimizer = adapter(params, lr=0.1, **FLAGS[kernel])
    for grads in gradients:
        optimizer.step(grads)
    (assert_equal if kernel == "fused" else assert_close)(params, expected.params)
    assert all(optimizer.state[p]["step"].is_cuda for p in params)
