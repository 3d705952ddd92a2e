"""Long random programs: whatever is done to a run, in whatever order, it stays the run of the NumPy oracle.

`HYPOTHESIS_PROFILE=long` runs many more of them, from fresh seeds.
"""

import io
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import safetensors.torch
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from functional_adam import (
    AdamHparams,
    AdamState,
    adam_init,
    adam_update,
    from_torch_state_dict,
    state_from_dict,
    state_to_dict,
    to_torch_state_dict,
)
from tests.builders import KERNELS_AND_AUTO, assert_same_bits, assert_unchanged, clone, snapshot, tensors_of
from tests.oracles import numpy_adam
from tests.soak import grown, soak
from tests.strategies import IS_LONG, PROPERTY, in_layout, layouts, random_tensor, seeds
from tests.tolerances import TOLERANCES

ROOT = Path(__file__).parent.parent
SHAPES = ((), (3,), (2, 3), (2, 3, 2), (0,), (5, 1))
DENSE_LAYOUTS = ("contiguous", "transposed", "channels_last", "offset")
KERNELS = st.sampled_from(KERNELS_AND_AUTO)
SKIPS = (1, 1.0, True, math.nan, math.inf, -math.inf, torch.tensor(1.0), torch.tensor(2.0), torch.tensor(math.nan))
SKIPS = (*SKIPS, torch.tensor(True), torch.tensor(3), torch.tensor(math.inf, dtype=torch.float64))
RUNS_ON = (None, 0, 0.0, False, torch.tensor(0.0), torch.tensor(False))
CHOICES: dict[str, tuple[Any, ...]] = {
    "lr": (0.01, 0.0, 0.1, 1e-3),
    "betas": ((0.9, 0.999), (0.0, 0.0), (0.5, 0.9), (0.9, 0.0)),
    "eps": (1e-8, 1e-3, 1e-6, 0.1),
    "weight_decay": (0.0, 0.1, 0.5, 0.01),
}
SCALES = (None, 1.0, 4, torch.tensor(2.0), torch.tensor(0.5, dtype=torch.float64))


@dataclass(frozen=True)
class Form:
    """A tree of parameters, and one of numbers that is a prefix of it. Leaves of the first are optree's, in order."""

    count: int
    tree: Callable[..., Any]
    prefix: Callable[[Any, Any], Any]
    names: tuple[str, ...]  # of the leaves, as torch.optim may know them
    inserted: tuple[int, ...]  # the leaves, as `parameters()` would have them


FORMS = (
    Form(1, lambda x: x, lambda x, _: x, ("x",), (0,)),
    Form(
        *(3, lambda x, y, z: {"w": z, "layer": {"2": y, "10": x}}, lambda x, y: {"w": x, "layer": y}),
        *(("layer.10", "layer.2", "w"), (2, 1, 0)),
    ),
    Form(3, lambda x, y, z: [x, (y, z)], lambda x, y: [x, y], ("x", "y", "z"), (0, 1, 2)),
)

Numbers = dict[str, Any]  # keyword arguments of the oracle


class Leaf(NamedTuple):
    """What the oracle knows of a leaf, in float64."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: float

    def next(self, grad: Tensor, numbers: Numbers, grad_scale: float | None = None) -> "Leaf":
        new = numpy_adam(self.param, grad, *self[1:], **numbers, grad_scale=grad_scale)
        return Leaf(*(None if x is None else torch.from_numpy(x) for x in new[:4]), step=new.step)


def described(tree: Any) -> list[tuple[Any, ...]]:
    return [(x.dtype, x.shape, x.stride(), x.device, type(x), x.requires_grad) for x in tensors_of(tree)]


class Program(RuleBasedStateMachine):
    """One run: `params`, `state` and `hparams` of the package, `leaves` and `numbers` of the oracle."""

    @initialize(
        form=st.sampled_from(FORMS),
        dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.complex64)),
        flags=st.fixed_dictionaries(dict.fromkeys(("amsgrad", "maximize", "decoupled_weight_decay"), st.booleans())),
        per_leaf_step=st.booleans(),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=3, max_size=3),
        layout=st.sampled_from(DENSE_LAYOUTS),
        seed=seeds,
    )
    def begin(self, form: Form, dtype: torch.dtype, **drawn: Any) -> None:
        flags, seed, layout = drawn["flags"], drawn["seed"], drawn["layout"]
        self.form, self.dtype, self.flags = form, dtype, flags
        self.has_masters = dtype is torch.bfloat16
        leaves = [
            in_layout(random_tensor(s, dtype, seed + i), layout) for i, s in enumerate(drawn["shapes"][: form.count])
        ]
        self.params = form.tree(*leaves)
        self.hparams = AdamHparams(lr=0.01, **flags)
        start = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        self.numbers: list[Numbers] = [{**start, **flags}] * form.count
        wide = {"master_params": True, "moment_dtype": torch.float32} if self.has_masters else {}
        self.state = adam_init(self.params, self.hparams, per_leaf_step=drawn["per_leaf_step"], **wide)
        exact = [x.to(torch.complex128 if dtype.is_complex else torch.float64, copy=True) for x in leaves]
        self.leaves = [
            Leaf(x, *[torch.zeros_like(x)] * 2, torch.zeros_like(x) if flags["amsgrad"] else None, 0.0) for x in exact
        ]
        self.kept: list[tuple[Tensor, Any]] = []  # what nothing may change any more, and a snapshot of it
        self.form_now = described((self.params, self.state))

    # What all rules do.

    @property
    def is_step_shared(self) -> bool:
        return isinstance(self.state.step, Tensor) and self.form.count > 1

    @property
    def spec(self) -> optree.PyTreeSpec:
        return optree.tree_structure(self.params)

    def set_hparams(self, **changes: tuple[Any, list[Any]]) -> None:
        """Take over changes, each as the package and as the oracle has it, leaf by leaf."""
        for name, (ours, theirs) in changes.items():
            self.hparams = replace(self.hparams, **{name: ours})
            self.numbers = [{**n, name: x} for n, x in zip(self.numbers, theirs, strict=True)]

    def gradients(self, seed: int, layout: str) -> list[Tensor]:
        return [
            in_layout(random_tensor(x.shape, self.dtype, seed + i), layout)
            for i, x in enumerate(optree.tree_leaves(self.params))
        ]

    def expect(self, grads: Sequence[Tensor | None], grad_scale: Any = None) -> None:
        scale = None if grad_scale is None else float(grad_scale)
        self.leaves = [
            leaf if grad is None else leaf.next(grad, numbers, scale)
            for leaf, grad, numbers in zip(self.leaves, grads, self.numbers, strict=True)
        ]

    def update(self, grads: Sequence[Tensor | None], *, donate: bool = False, **options: Any) -> None:
        tree: Any = self.spec.unflatten(grads)
        params, state = self.params, self.state
        kept = tensors_of((tree, () if donate else (params, state)))
        self.kept = [*self.kept, *zip(kept, snapshot(kept), strict=True)][-60:]
        self.params, self.state = adam_update(params, tree, state, self.hparams, donate=donate, **options)
        if donate:
            assert [x.data_ptr() for x in tensors_of(params)] == [x.data_ptr() for x in tensors_of(self.params)]
            with pytest.raises(RuntimeError, match=r"state\.step.* is empty: this state was donated"):
                adam_update(self.params, tree, state, self.hparams)

    # The rules.

    @rule(
        kernel=KERNELS,
        seed=seeds,
        layout=layouts(),
        donate=st.booleans(),
        grad_scale=st.sampled_from(SCALES),
        found_inf=st.sampled_from(RUNS_ON),
        mask=st.just([True] * 3) | st.lists(st.booleans(), min_size=3, max_size=3),
    )
    def step(self, seed: int, layout: str, grad_scale: Any, mask: list[bool], **options: Any) -> None:
        grads = [
            g if here or self.is_step_shared else None
            for g, here in zip(self.gradients(seed, layout), mask, strict=False)
        ]
        self.update(grads, grad_scale=grad_scale, **options)
        self.expect(grads, grad_scale)

    @rule(kernel=KERNELS, seed=seeds, donate=st.booleans(), found_inf=st.sampled_from(SKIPS))
    def skip(self, kernel: str, seed: int, donate: bool, found_inf: Any) -> None:
        grads = [x * math.nan for x in self.gradients(seed, "contiguous")]
        before = clone((self.params, self.state))
        self.update(grads, donate=donate, kernel=kernel, found_inf=found_inf)
        assert_same_bits((self.params, self.state), before)

    @rule(
        kernel=KERNELS,
        seed=seeds,
        members=st.integers(1, 3),
        chosen=st.integers(0, 2),
        count=st.integers(1, 2),
        maps_lr=st.booleans(),
        layout=st.sampled_from(DENSE_LAYOUTS),
    )
    def step_stacked(self, kernel: str, seed: int, members: int, chosen: int, **drawn: Any) -> None:
        """Copies of the run as members of a batch, each with its own gradients, and one of them taken out."""

        def stack(trees: Sequence[Any]) -> Any:
            return optree.tree_map(lambda *xs: torch.stack(xs), *trees)

        params, state = stack([self.params] * members), stack([self.state] * members)
        rates = torch.linspace(0.01, 0.03, members, dtype=torch.float64)
        if maps_lr := drawn["maps_lr"]:
            rate = rates[chosen % members].item()
            self.set_hparams(lr=(rate, [rate] * self.form.count))
        for i in range(drawn["count"]):
            all_grads = [self.gradients(seed + 10 * i + j, drawn["layout"]) for j in range(members)]
            grads = stack([self.spec.unflatten(grads) for grads in all_grads])

            def one(p: Any, g: Any, s: AdamState, lr: Any) -> Any:
                hparams = replace(self.hparams, lr=lr) if maps_lr else self.hparams
                return adam_update(p, g, s, hparams, kernel=kernel)

            params, state = torch.func.vmap(one)(params, grads, state, rates)
            self.expect(all_grads[chosen % members])
        self.params, self.state = optree.tree_map(lambda x: x[chosen % members].clone(), (params, state))
        self.form_now = described((self.params, self.state))

    @rule(to_safetensors=st.booleans())
    def save_and_load(self, to_safetensors: bool) -> None:
        flat = state_to_dict(self.state)
        if to_safetensors:
            flat = safetensors.torch.load(safetensors.torch.save(flat))
        else:
            file = io.BytesIO()
            torch.save(flat, file)
            file.seek(0)
            flat = torch.load(file, weights_only=True)
        loaded = state_from_dict(flat, self.params, self.hparams)
        assert_same_bits(loaded, self.state)
        self.state = loaded

    @precondition(lambda self: not self.has_masters)
    @rule(seed=seeds, count=st.integers(0, 2), foreach=st.booleans())
    def visit_torch(self, seed: int, count: int, foreach: bool) -> None:
        """The run goes on in torch.optim, and comes back."""
        leaves = [x.detach().clone().requires_grad_() for x in optree.tree_leaves(self.params)]
        groups: dict[str, list[int]] = {}
        for i in self.form.inserted:
            groups.setdefault(repr(self.numbers[i]), []).append(i)
        named = [{"params": [(self.form.names[i], leaves[i]) for i in group]} for group in groups.values()]
        kind = torch.optim.AdamW if self.flags["decoupled_weight_decay"] else torch.optim.Adam
        # torch.optim takes no other tensors, and this one by the single kernel only.
        count = 0 if tensors_of((self.hparams.eps, self.hparams.weight_decay)) else count
        foreach = foreach and not tensors_of(self.hparams.lr)
        optimizer = kind(named, foreach=foreach)
        state_dict = to_torch_state_dict(self.params, self.state, self.hparams)
        for group in state_dict["param_groups"]:
            group["foreach"] = foreach
        optimizer.load_state_dict(state_dict)
        for i in range(count):
            grads = self.gradients(seed + i, "contiguous")
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad
            optimizer.step()
            self.expect(grads)
        self.params = self.spec.unflatten([x.detach() for x in leaves])
        self.state, self.hparams = from_torch_state_dict(self.params, optimizer.state_dict())
        self.form_now = described((self.params, self.state))

    @rule(name=st.sampled_from([*CHOICES]), values=st.tuples(*[st.integers(0, 3)] * 2), how=st.integers(0, 2))
    def change_number(self, name: str, values: tuple[int, int], how: int) -> None:
        one, two = (CHOICES[name][i] for i in values)
        ours, theirs = one, [one] * self.form.count
        if how == 1 and name != "betas":
            ours = torch.tensor(one, dtype=torch.float64)
        if how == 2 and name != "betas" and self.form.count > 1:
            ours = self.form.prefix(one, two)
            theirs = optree.tree_leaves(optree.tree_broadcast_prefix(ours, self.params))
        self.set_hparams(**{name: (ours, theirs)})

    @rule(kernel=KERNELS, seed=seeds, layout=layouts())
    def step_under_autograd(self, kernel: str, seed: int, layout: str) -> None:
        grads = self.gradients(seed, layout)
        watched = optree.tree_map(lambda x: x.detach().clone().requires_grad_(), (self.params, self.state[1:]))
        state = AdamState(self.state.step, *watched[1])
        params, state = adam_update(watched[0], self.spec.unflatten(grads), state, self.hparams, kernel=kernel)
        torch.stack([x.abs().sum().double() for x in tensors_of(params)]).sum().backward()
        given = tensors_of(watched[1][:1] if self.has_masters else watched)
        assert all(x.grad is not None and x.grad.isfinite().all() for x in given[: self.form.count])
        self.params, self.state = optree.tree_map(torch.detach, (params, state))
        self.expect(grads)

    @rule(kernel=KERNELS, seed=seeds, rate=st.sampled_from((0.01, 0.1)))
    def step_with_slope(self, kernel: str, seed: int, rate: float) -> None:
        """An update is linear in lr, so that its derivative is the change of the parameter, divided by lr."""
        grads = self.gradients(seed, "contiguous")
        self.set_hparams(lr=(rate, [rate] * self.form.count))

        def update(lr: Tensor) -> tuple[Any, Any]:
            tree: Any = self.spec.unflatten(grads)
            new = adam_update(self.params, tree, self.state, replace(self.hparams, lr=lr), kernel=kernel)
            return new[1].master_params if self.has_masters else new[0], new

        lr, old = torch.tensor(rate, dtype=torch.float64), self.leaves
        _, slopes, (self.params, self.state) = torch.func.jvp(update, (lr,), (torch.ones_like(lr),), has_aux=True)
        self.expect(grads)
        for slope, before, after in zip(optree.tree_leaves(slopes), old, self.leaves, strict=True):
            self.assert_close(slope, (after.param - before.param) / rate, 1 / rate)

    # What holds after each rule.

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        steps = optree.tree_leaves(self.state.step)
        steps = steps * self.form.count if self.is_step_shared else steps
        assert [x.item() for x in steps] == [leaf.step for leaf in self.leaves]
        exact = self.state.master_params if self.has_masters else self.params
        assert (self.state.max_exp_avg_sq == ()) is not self.flags["amsgrad"]
        columns = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + self.flags["amsgrad"]]
        for name, tree in {"param": exact, **{name: getattr(self.state, name) for name in columns}}.items():
            for actual, leaf in zip(optree.tree_leaves(tree), self.leaves, strict=True):
                self.assert_close(actual, getattr(leaf, name))
        if self.has_masters:
            for param, master in zip(*map(optree.tree_leaves, (self.params, exact)), strict=True):
                assert torch.equal(param, master.to(torch.bfloat16))

    @invariant()
    def keeps_its_form(self) -> None:
        assert described((self.params, self.state)) == self.form_now

    @invariant()
    def leaves_the_past_alone(self) -> None:
        assert_unchanged([x for x, _ in self.kept], [before for _, before in self.kept])

    def assert_close(self, actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
        # Each update adds no more than its own error: the moments forget, the parameters sum up.
        rtol, atol = TOLERANCES[torch.float32 if self.has_masters else self.dtype.to_real()]
        count = factor * (1 + max(leaf.step for leaf in self.leaves))
        wide = expected.dtype
        torch.testing.assert_close(actual.detach().to(wide), expected, rtol=rtol * count, atol=atol * count)


TestPrograms = Program.TestCase
TestPrograms.settings = settings(
    PROPERTY, max_examples=1500 if IS_LONG else 50, stateful_step_count=50 if IS_LONG else 40
)


def test_a_leak_of_one_object_a_step_is_seen() -> None:
    kept: list[Tensor] = []
    assert "objects" in grown([*soak(1000, 2, lambda: kept.append(torch.zeros(())))])


def test_memory_stays_flat_without_asserts_and_docstrings_too() -> None:
    """The soak raises by itself if a wrong call goes through."""
    command = [sys.executable, "-OO", "-W", "error", "-m", "tests.soak", "--steps", "2000", "--samples", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing has grown." in done.stdout
