"""torch.compile, torch.export and make_fx take an update whole, once for all values, and compute what eager does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from functional_adam import AdamHparams, AdamState, adam_init, adam_update
from tests.builders import clone, tensors_of
from tests.strategies import in_layout, is_dense, random_tensor
from tests.tolerances import assert_close, assert_equal

# Inductor scripts a class of its own when it is first used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]

ALL_FLAGS = {"amsgrad": True, "maximize": True, "decoupled_weight_decay": True}


def random_like(tree: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch_pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), tree)


def make_tree(*, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)) -> dict[str, Any]:
    first, second = dtypes
    shapes = {"w": torch.empty(33, 5, dtype=first), "b": [torch.empty(7, dtype=second), torch.empty((), dtype=first)]}
    return random_like(shapes, seed=0)


def make_numbers(index: int = 0, **flags: bool) -> AdamHparams:
    """Hyperparameters of 0-dim tensors, others for each `index`."""
    values = (0.1 / (index + 1), 0.9 - 0.1 * index, 0.99 - 0.05 * index, 1e-8 * 10**index, 0.01 * index)
    lr, beta1, beta2, eps, weight_decay = (torch.tensor(value, dtype=torch.float64) for value in values)
    return AdamHparams(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **flags)


def make_training() -> tuple[dict[str, Tensor], Callable[..., Any], list[tuple[Tensor, Tensor]]]:
    """Parameters, a train step that takes its hyperparameters as an argument, and data for each of its calls."""
    params = random_like({"hidden": torch.empty(3, 5), "out": torch.empty(5)}, seed=0)

    def train_step(params: Any, state: AdamState, hparams: AdamHparams, x: Tensor, y: Tensor) -> Any:
        grads = grad(lambda p: (((x @ p["hidden"]).tanh() @ p["out"] - y) ** 2).mean())(params)
        return adam_update(params, grads, state, hparams)

    return params, train_step, [random_like((torch.empty(8, 3), torch.empty(8)), seed) for seed in range(1, 6)]


# torch.compile.


def test_a_train_step_compiled_by_inductor_equals_eager_and_changes_no_input() -> None:
    params, train_step, batches = make_training()
    compiled, hparams = torch.compile(train_step, fullgraph=True), make_numbers(1, **ALL_FLAGS)
    state = adam_init(params, hparams)
    for batch in batches[:3]:
        given = params, state, hparams, *batch
        before = clone(given)
        got = compiled(*given)
        assert_equal(given, before)
        assert_close(got, train_step(*given))
        params, state = got


def test_half_types_compiled_by_inductor_differ_from_eager_by_a_rounding() -> None:
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)
    params = make_tree(dtypes=(torch.bfloat16, torch.float16))
    params["b"].append(torch.zeros(3, dtype=torch.float16))
    state = adam_init(params, hparams)
    grads = random_like(params, 1)
    grads["b"][-1].zero_()  # in float16 eps alone would be 0
    got = torch.compile(adam_update, fullgraph=True)(params, grads, state, hparams)
    assert_close(got, adam_update(params, grads, state, hparams))
    assert torch.equal(got[0]["b"][-1], params["b"][-1])


def test_a_compiled_update_with_every_option_equals_eager() -> None:
    compiled = torch.compile(adam_update, fullgraph=True, backend="aot_eager")
    hparams = AdamHparams(lr=0.1, weight_decay=0.1, **ALL_FLAGS)
    params = make_tree(dtypes=(torch.complex64, torch.float64))
    state = adam_init(params, hparams, per_leaf_step=True)
    for seed, found_inf in ((1, 0.0), (2, float("nan")), (3, 1.0), (4, 0.0)):
        grads = random_like(params, seed)
        grads["b"][1] = None
        options = {"found_inf": torch.tensor(found_inf), "grad_scale": torch.tensor(float(2**seed))}
        got = compiled(params, grads, state, hparams, **options)
        assert_close(got, adam_update(params, grads, state, hparams, **options))
        if found_inf:
            assert_equal(got, (params, state))
        params, state = got
    assert [state.step["w"], *state.step["b"]] == [2.0, 2.0, 0.0]


def test_one_compilation_of_a_train_step_serves_every_value() -> None:
    params, train_step, batches = make_training()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(train_step, fullgraph=True, backend=counter)
    got = expected = (params, adam_init(params, AdamHparams()))
    for index, batch in enumerate(batches):
        hparams = make_numbers(index)
        got, expected = compiled(*got, hparams, *batch), train_step(*expected, hparams, *batch)
        assert_close(got, expected)
    # Another step, loaded and not counted up to.
    got = (got[0], got[1]._replace(step=torch.tensor(1000.0)))
    assert_close(compiled(*got, hparams, *batch), train_step(*got, hparams, *batch))
    assert counter.frame_count == 1


def test_one_dynamic_compilation_serves_every_size() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(adam_update, fullgraph=True, backend=counter, dynamic=True)
    hparams = make_numbers()
    for size in (5, 8, 13):
        params = {"w": torch.linspace(-1, 1, size), "b": torch.linspace(0, 1, size * 3).reshape(size, 3)}
        given = params, random_like(params, size), adam_init(params, hparams), hparams
        assert_close(compiled(*given), adam_update(*given))
    assert counter.frame_count == 1


def test_derivatives_of_a_compiled_run_equal_those_of_eager() -> None:
    # The first gradient is 0 in one place, so that its moments vanish there.
    start = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    lr, beta2 = torch.tensor(0.1, requires_grad=True), torch.tensor(0.9, requires_grad=True)

    def final_loss(start: Tensor, lr: Tensor, beta2: Tensor) -> Tensor:
        hparams = AdamHparams(lr=lr, betas=(0.8, beta2), eps=1e-3)
        params, state = start, adam_init(start, hparams)
        for _ in range(2):
            params, state = adam_update(params, 2 * params, state, hparams)
        return (params**2).sum()

    compiled = torch.compile(final_loss, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(start, lr, beta2), (start, lr, beta2)) for f in (compiled, final_loss))
    assert all(x.abs().max() > 0 for x in expected)
    assert_close(got, expected)


# torch.export and make_fx.


class Update:
    """An update of a state that is a dict, as torch.export can take it."""

    def __init__(self, **flags: bool) -> None:
        self.flags = flags

    def __call__(self, params: Any, grads: Any, state: dict[str, Any], numbers: dict[str, Tensor]) -> Any:
        lr, beta1, beta2 = (numbers[name] for name in ("lr", "beta1", "beta2"))
        hparams = AdamHparams(lr=lr, betas=(beta1, beta2), weight_decay=0.1, **self.flags)
        params, new_state = adam_update(params, grads, AdamState(**state), hparams)
        return params, {name: getattr(new_state, name) for name in state}


def export(function: Callable[..., Any], *given: Any, strict: bool = False) -> Callable[..., Any]:
    class Module(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return function(*arguments)

    return torch.export.export(Module(), given, strict=strict).module()


RECORDERS: dict[str, Callable[..., Callable[..., Any]]] = {
    "compile": lambda function, *_: torch.compile(function, fullgraph=True, backend="eager"),
    "export": export,
    "strict_export": partial(export, strict=True),
    "make_fx": lambda function, *given: make_fx(function)(*given),
}


@pytest.mark.parametrize("how", ["compile", "export", "make_fx"])
def test_numbers_in_trees_are_recorded_like_others(how: str) -> None:
    def run(params: Any, grads: Any, first: Tensor, other: Any) -> Any:
        hparams = AdamHparams(lr={"w": first, "b": other}, weight_decay={"w": 0.0, "b": [0.1, 0.3]})
        params, state = adam_update(params, grads, adam_init(params, hparams), hparams)
        return params, state.step, state.exp_avg

    params, first = make_tree(), torch.tensor(0.1)
    recorded = RECORDERS[how](lambda p, g, x: run(p, g, x, 0.2), params, random_like(params, 1), first)
    for seed in (1, 2, 3):
        given = params, random_like(params, seed), first * seed
        assert_close(recorded(*given), run(*given, 0.2))
    with pytest.raises(Exception, match=r"hparams\.lr is 'a little' \(str\)\. Expected a number"):
        RECORDERS[how](lambda p, g, x: run(p, g, x, "a little"), *given)(*given)


@pytest.mark.parametrize("is_ensemble", [False, True])
def test_an_exported_update_equals_eager_for_other_values(is_ensemble: bool) -> None:
    update, params = Update(**ALL_FLAGS), make_tree()
    state = adam_init(params, AdamHparams(**ALL_FLAGS))._asdict()
    del state["master_params"]
    numbers = {"lr": torch.tensor(0.1), "beta1": torch.tensor(0.9), "beta2": torch.tensor(0.99)}
    if is_ensemble:
        update = vmap(update)
        given = params, state, numbers
        params, state, numbers = torch_pytree.tree_map(lambda x: torch.stack([x, 0.9 * x, 0.8 * x]), given)
    exported = export(update, params, random_like(params, 1), state, numbers, strict=not is_ensemble)
    for seed in (1, 2, 3):
        numbers = {name: number * 0.9 for name, number in numbers.items()}
        given = params, random_like(params, seed), state, numbers
        before = clone(given)
        got = exported(*given)
        assert_equal(given, before)
        assert_close(got, update(*given))
        params, state = got
    assert (state["step"] == 3.0).all()


def test_two_compilations_serve_every_size_of_every_layout() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adam_update, fullgraph=True, backend=counter)
    hparams = AdamHparams(lr=0.1, weight_decay=0.1)
    layouts = ("transposed", "gaps", "expanded", "size_one_stride")
    for size in (3, 5, 7):
        params, grads, exp_avg = (
            {x: in_layout(random_tensor((2, size, 4), torch.float32, seed), x) for x in layouts} for seed in range(3)
        )
        state = adam_init(params, hparams)._replace(exp_avg=exp_avg)
        got, expected = (update(params, grads, state, hparams) for update in (compiled, adam_update))
        assert_close(got, expected)
        for x, y in zip(tensors_of(got), tensors_of(expected), strict=True):
            assert x.stride() == y.stride() or not is_dense(y)
    assert counter.frame_count == 2


# Donations.


def donated(params: Any, grads: Any, state: AdamState, lr: Tensor) -> Any:
    return adam_update(params, grads, state, AdamHparams(lr=lr), donate=True)


def call_on(*parts: slice) -> tuple[Any, Any, AdamState, Tensor]:
    """Arguments of `donated`, whose parameters are parts of one tensor."""
    params = dict(zip("ab", map(torch.ones(100).__getitem__, parts), strict=True))
    return params, random_like(params, 1), adam_init(params, AdamHparams()), torch.tensor(0.1)


APART = (slice(40), slice(60, 100))


def test_a_donation_compiled_by_inductor_stores_into_the_given_buffers() -> None:
    compiled = torch.compile(donated, fullgraph=True)
    params, _, state, lr = call_on(*APART)
    flat, pure = params["a"]._base, clone((params, state))
    pointers = [x.data_ptr() for x in tensors_of((params, state))]
    for seed in (1, 2, 3):
        grads = random_like(params, seed)
        before, given = clone(grads), (params, state)
        pure = adam_update(pure[0], grads, pure[1], AdamHparams(lr=lr))
        params, state = compiled(params, grads, state, lr)
        assert_close((params, state), pure)
        assert_equal(given, (params, state))
        assert_equal(grads, before)
        assert [x.data_ptr() for x in tensors_of((params, state))] == pointers
    assert torch.equal(flat[40:60], torch.ones(20))
    # The same graph on other memory.
    given = call_on(APART[0], slice(30, 70))
    with pytest.raises(RuntimeError, match=r"Cannot donate params\['a'\]: it shares memory with params\['b'\]"):
        compiled(*given)
    assert_equal(given, (*call_on(*APART)[:1], *given[1:]))


def test_a_compiled_donation_of_one_tensor_in_two_places_raises_and_changes_nothing() -> None:
    compiled = torch.compile(donated, fullgraph=True, backend="aot_eager")
    params, grads, state, lr = call_on(*APART)
    compiled(*clone((params, grads, state, lr)))  # the graph is there; what it runs on is other memory
    tied = {"a": params["a"], "b": params["a"]}
    moments = state._replace(exp_avg_sq={**state.exp_avg_sq, "b": state.exp_avg["b"]})
    for given, match in (
        ((tied, grads, state, lr), r"params\['a'\]: it shares memory with params\['b'\]"),
        ((params, {**grads, "b": params["b"]}, state, lr), r"params\['b'\]: it shares memory with grads\['b'\]"),
        ((params, grads, moments, lr), r"state.exp_avg\['b'\]: it shares memory with state.exp_avg_sq\['b'\]"),
        ((params, grads, state, state.step), "state.step: it shares memory with a hyperparameter"),
    ):
        before = clone(given)
        with pytest.raises(RuntimeError, match=f"Cannot donate {match}"):
            compiled(*given)
        assert_equal(given, before)


@pytest.mark.parametrize("how", ["export", "strict_export", "make_fx"])
def test_a_donation_is_refused_in_a_graph_that_outlives_the_process(how: str) -> None:
    given = call_on(*APART)
    before = clone(given)
    with pytest.raises(Exception, match="Cannot donate in a graph that is exported or traced"):
        RECORDERS[how](donated, *given)
    assert_equal(given, before)
