"""Code in the shape of optax and TorchOpt runs, and gives what `adam_update` gives and what they give."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from functional_adam import AdamHparams, AdamState, adam_init, adam_update, transformation
from tests.builders import assert_unchanged, snapshot, tensors_of
from tests.oracles import KERNELS
from tests.strategies import Pair, random_tensor
from tests.tolerances import assert_close, assert_equal, assert_within_roundings

START = [1.0, -2.0, 0.5]
GRADIENTS = [[0.5, -1.0, 2.0], [-0.25, 3.0, 0.125], [1.5, 0.0, -4.0]]
STRONG = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}

# Three steps from START by GRADIENTS in float64. Those of TorchOpt 0.7.3, a block for each row of OPTIONS, were made by
#     opt = torchopt.adam(lr=0.1); state = opt.init(p)
#     u, state = opt.update(g, state, params=p, inplace=False); p = torchopt.apply_updates(p, u, inplace=False)
# It corrects the bias in float32, so that it has single precision only. Those of optax 0.2.8 with jax_enable_x64 are of
# optax.adam(0.1), optax.adam(0.1, b1=0.8, b2=0.95, eps=1e-3), optax.adamw(0.1, weight_decay=0.25), optax.amsgrad(0.1).
OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.1},
    {**STRONG, "weight_decay": 0.25},
    {"lr": 0.1, "weight_decay": 0.25, "maximize": True},
    {"lr": 0.1, "weight_decay": 0.25, "decoupled_weight_decay": True},
    {"lr": 0.1},
    STRONG,
    {"lr": 0.1, "weight_decay": 0.25, "decoupled_weight_decay": True},
]
TORCHOPT = """
0.9000006695739081 -1.9000006685739212 0.40000066807392776
0.8733672343001083 -1.949419154373124 0.3284820701281142
0.8063174222121476 -1.9876200326618725 0.36086545380085283

0.9001331379505456 -1.900066604390288 0.4000470188212388
0.8392589282148374 -1.9352797781021902 0.3284130981708065
0.7582561919641867 -1.949096881744876 0.3656975408728026

1.0999993284261183 -2.0999993304260918 0.5999993318927394
1.0616046494555627 -2.035728615290068 0.666005947458657
1.1067626148900906 -1.9775030477596565 0.6286659443748942

0.8750006695739081 -1.8500006685739212 0.3875006680739278
0.8264922175607606 -1.853169137658776 0.30629455342626605
0.7387801000337809 -1.845040787506055 0.33102057326334805
"""
OPTAX = """
0.900000002 -1.900000001 0.4000000005
0.8733662987078463 -1.9494189841087441 0.3284806828461567
0.8063162429161115 -1.9876200012449847 0.3608641842217289

0.9001996007984032 -1.9000999000999002 0.40004997501249373
0.8790077150778428 -1.9541832673449615 0.331589375379866
0.8086537485585492 -1.9937858780011937 0.3725112616959689

0.8750000019999999 -1.850000001 0.3875000005
0.8264912986578463 -1.8531689840837442 0.3062931828336567
0.7387789603996653 -1.8450407766178911 0.33101935463838744

0.900000002 -1.900000001 0.4000000005
0.8789473708421052 -1.9494189841087441 0.3493421060164474
0.8118973150503703 -1.9806021800924904 0.38172560739201955
"""
NUMBERS = torch.tensor([float(x) for x in (TORCHOPT + OPTAX).split()], dtype=torch.float64).view(8, 3, 3)

DECAYS = {
    "none": {},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "all": {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
}
every_decay = pytest.mark.parametrize("options", DECAYS.values(), ids=DECAYS)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
modes = pytest.mark.parametrize("inplace", [False, True], ids=["pure", "inplace"])


def tree(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    w, x, y = (random_tensor(shape, dtype, seed + i) for i, shape in enumerate([(3, 2), (), (5,)]))
    return {"w": w, "layers": [Pair(x, y), None]}


def addresses(given: Any) -> set[int]:
    return {x.data_ptr() for x in tensors_of(given)}


def trajectory(options: dict[str, Any], *, inplace: bool) -> list[Tensor]:
    optimizer, params = transformation.adam(**options), torch.tensor(START, dtype=torch.float64)
    state = optimizer.init(params)
    found: list[Tensor] = []
    for grads in torch.tensor(GRADIENTS, dtype=torch.float64):
        updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
        params = transformation.apply_updates(params, updates, inplace=inplace)
        found.append(params.clone())
    return found


@modes
def test_numbers_are_those_of_torchopt_and_optax(inplace: bool) -> None:
    for row, options in enumerate(OPTIONS):
        precision = torch.float32 if row < 4 else torch.float64
        assert_close(trajectory(options, inplace=inplace), [*NUMBERS[row]], precision)
    # Amsgrad is that of torch: the first step has nothing to take a maximum of; later ones of optax differ in length.
    found = trajectory({"lr": 0.1, "amsgrad": True}, inplace=inplace)
    assert_close(found[0], NUMBERS[-1, 0])
    assert (found[1] - NUMBERS[-1, 1]).abs().max() > 1e-3


@every_kernel
@every_decay
@modes
def test_applied_updates_are_what_adam_update_gives(kernel: Any, options: dict[str, Any], inplace: bool) -> None:
    hparams = AdamHparams(lr=0.05, **options)
    optimizer = transformation.adam(lr=0.05, **options, kernel=kernel)
    params, expected = tree(0), tree(0)
    state, expected_state = optimizer.init(params), adam_init(params, hparams)
    for seed in (10, 20, 30):
        expected, expected_state = adam_update(expected, tree(seed), expected_state, hparams, kernel=kernel)
        updates, state = optimizer.update(tree(seed), state, params, inplace=inplace)
        params = transformation.apply_updates(params, updates, inplace=inplace)
        assert_equal(state, expected_state) if not options else assert_close(state, expected_state)
    # The leaf of 0 dimensions comes near 0, where a rounding of the old value counts for more.
    assert_close(params, expected)
    assert_within_roundings(params["w"], expected["w"], 8)


def test_updates_need_no_parameters_without_weight_decay() -> None:
    optimizer = transformation.adam(lr=0.05)
    state = optimizer.init(tree(0))
    expected = optimizer.update(tree(1), state, tree(0))
    assert_equal(optimizer.update(tree(1), state), expected)
    assert_equal(optimizer.update(tree(1), state, None), expected)
    assert isinstance(expected[1], AdamState)


def test_updates_keep_what_the_sum_rounds_away() -> None:
    optimizer = transformation.adam(lr=1e-9)
    params = torch.full((4,), 1e3)
    updates, _ = optimizer.update(torch.ones(4), optimizer.init(params), params)
    assert_within_roundings(updates, torch.full((4,), -1e-9), 4)
    assert_equal(transformation.apply_updates(params, updates), params)


@every_decay
def test_pure_updates_change_nothing_and_those_in_place_state_and_parameters(options: dict[str, Any]) -> None:
    optimizer = transformation.adam(**options)
    params = optree.tree_map(torch.nn.Parameter, tree(0))
    grads, state = tree(1), optimizer.init(params)
    given = tree(0), grads, state
    before, memory, before_grads = snapshot(given), addresses((params, state)), snapshot(grads)
    expected_updates, expected_state = optimizer.update(grads, state, given[0])
    expected = transformation.apply_updates(given[0], expected_updates)
    assert_unchanged(given, before)
    assert addresses(given).isdisjoint(addresses((expected_updates, expected_state, expected)))

    updates, new_state = optimizer.update(grads, state, params, inplace=True)
    assert_equal(optree.tree_map(torch.Tensor.detach, params), tree(0))
    assert transformation.apply_updates(params, updates, inplace=True) is params
    assert new_state is state
    assert_equal(state, expected_state)
    assert_equal(optree.tree_map(torch.Tensor.detach, params), expected)
    assert_unchanged(grads, before_grads)
    assert addresses((params, state)) == memory
    assert all(x.is_leaf and x.requires_grad for x in optree.tree_leaves(params))
    # A caller who drops the returned state goes on with the one that was given.
    optimizer.update(grads, state, params, inplace=True)
    assert state.step.item() == 2


@modes
def test_a_list_may_stand_for_a_tuple_at_the_root(inplace: bool) -> None:
    optimizer, params, grads = transformation.adam(weight_decay=0.1), [tree(0), tree(5)], (tree(10), tree(15))
    expected = optimizer.update([*grads], optimizer.init(params), params)
    expected_new = transformation.apply_updates(params, expected[0])
    updates, state = optimizer.update(grads, optimizer.init(params), params, inplace=inplace)
    assert type(updates) is tuple
    assert_equal(([*updates], state), expected)
    assert_equal([*transformation.apply_updates((*params,), updates, inplace=inplace)], expected_new)


def test_updates_are_differentiable_and_mapped() -> None:
    """By the parameter, the gradient and the learning rate, each member with its own."""
    rates = torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64)
    given = rates, *(random_tensor((3, 4), torch.float64, seed) for seed in (0, 1))

    def after(lr: Tensor, p: Tensor, g: Tensor) -> Tensor:
        optimizer = transformation.adam(lr=lr, weight_decay=0.1)
        updates, _ = optimizer.update(g, optimizer.init(p), p)
        return transformation.apply_updates(p, updates).square().sum()

    def expected(lr: Tensor, p: Tensor, g: Tensor) -> Tensor:
        hparams = AdamHparams(lr=lr, weight_decay=0.1)
        return adam_update(p, g, adam_init(p, hparams), hparams)[0].square().sum()

    found = vmap(grad_and_value(after, argnums=(0, 1, 2)))(*given)
    alone = [grad_and_value(expected, argnums=(0, 1, 2))(*(x[i] for x in given)) for i in range(3)]
    assert_close(found, optree.tree_map(lambda *xs: torch.stack(xs), *alone))
    assert all(bool((x != 0).all()) for x in optree.tree_leaves(found))


@modes
def test_leaves_without_gradient_stand_still(inplace: bool) -> None:
    optimizer = transformation.adam(per_leaf_step=True)
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    updates, state = optimizer.update({"a": torch.ones(2), "b": None}, optimizer.init(params), inplace=inplace)
    assert_equal(updates["b"], torch.zeros(2))
    assert {key: step.item() for key, step in state.step.items()} == {"a": 1, "b": 0}
    new = transformation.apply_updates(params, {"a": updates["a"], "b": None}, inplace=inplace)
    assert_equal(new["b"], torch.ones(2))


@modes
@every_decay
def test_dtypes_stay(options: dict[str, Any], inplace: bool) -> None:
    optimizer, params = transformation.adam(**options), tree(0, torch.bfloat16)
    wide = optimizer.init(tree(0))  # moments in float32
    updates, state = optimizer.update(tree(1), wide, params, inplace=inplace)
    new = transformation.apply_updates(params, updates, inplace=inplace)
    newer = transformation.apply_updates(params, optree.tree_map(Tensor.float, updates))
    assert {x.dtype for x in optree.tree_leaves((updates, new, newer))} == {torch.bfloat16}
    assert {x.dtype for x in optree.tree_leaves(state)} == {torch.float32}


ONES, OPTIMIZER = torch.ones(2), transformation.adam()
ONE, BOTH, NONE = {"a": ONES}, {"a": ONES, "b": ONES}, {"a": ONES, "b": None}
MASTERS = adam_init(ONES.bfloat16(), AdamHparams(), master_params=True)
TRACKED = torch.ones(2, requires_grad=True)
DECAY, TENSOR_DECAY = (transformation.adam(weight_decay=x) for x in (0.1, torch.tensor(0.1)))
COMPLEX = r"^updates\['a'\] is of torch.complex64, but params\['a'\] is of torch.float32"
NO_GRADIENT = r"^grads\['b'\] is None, .* transformation.adam\(..., per_leaf_step=True\)"
FAULTS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: transformation.adam(lr=-1.0), ValueError, r"^Invalid learning rate: -1"),
    (lambda: transformation.adam(kernel="slow"), ValueError, r"^kernel is 'slow'"),
    (lambda: transformation.adam(AdamHparams()), TypeError, r"^hparams.lr is an AdamHparams. Expected a number"),
    (lambda: transformation.adam(lr=lambda _: 0.1), TypeError, r"^hparams.lr is <function"),
    (lambda: OPTIMIZER.update(ONE, OPTIMIZER.init(BOTH)), ValueError, r"grads lacks \['b'\]"),
    (lambda: OPTIMIZER.update(ONES, MASTERS, ONES), ValueError, r"^state.master_params is given"),
    (lambda: OPTIMIZER.update(TRACKED, OPTIMIZER.init(ONES), inplace=True), RuntimeError, r"^Cannot donate"),
    (lambda: OPTIMIZER.update(NONE, OPTIMIZER.init(BOTH)), ValueError, NO_GRADIENT),
    (lambda: OPTIMIZER.update(NONE, OPTIMIZER.init(BOTH), inplace=True), ValueError, NO_GRADIENT),
    (lambda: DECAY.update(ONES, DECAY.init(ONES)), ValueError, r"^params is None, but weight_decay is"),
    (lambda: TENSOR_DECAY.update(ONES, DECAY.init(ONES)), ValueError, r"^params is None, but weight_decay is"),
    (lambda: transformation.apply_updates(ONE, [ONES]), ValueError, r"^updates is of type list, but params .* dict"),
    (lambda: transformation.apply_updates(ONE, {"a": ONES.cfloat()}), TypeError, COMPLEX),
]


@pytest.mark.parametrize(("call", "error", "match"), FAULTS, ids=[match for *_, match in FAULTS])
def test_wrong_calls_say_what_is_wrong(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("case", ["overlaps itself", r"shares memory with params\[2\]"])
def test_updates_in_place_refuse_leaves_that_overlap_and_write_nothing(case: str) -> None:
    leaf = torch.ones(3)
    params = [torch.ones(0), leaf, leaf if "shares" in case else torch.ones(1).expand(3)]
    with pytest.raises(RuntimeError, match=case):
        transformation.apply_updates(params, [torch.ones_like(x) for x in params], inplace=True)
    assert leaf.tolist() == [1.0] * 3
