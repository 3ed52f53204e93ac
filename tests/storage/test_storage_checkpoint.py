"""Checkpoints of codes, masters and random rounding: to the last bit, from one choice of storage to
another, and damaged."""

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from support.storing import (
    BF16,
    CHOICES,
    F32,
    INT8,
    LAID,
    PAIRS,
    RICHEST_IN_CODES,
    SHAPES,
    Choice,
    every_pair,
    masters_of,
    step,
)
from support.training import (
    RICHEST,
    Case,
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    clone_params,
    make_params,
    params_of,
    saved,
    snapshot,
    states_of,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt
from fusedopt._formats import NUMBERS

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_class_in_codes = pytest.mark.parametrize("case", RICHEST_IN_CODES, ids=str)
WITH_CODES = [p for p in PAIRS if p.values[1].codes]
with_codes = pytest.mark.parametrize(("case", "choice"), WITH_CODES)


def make(case: Case, choice: Choice, params: Any = None, **options: Any) -> Optimizer:
    params = choice.params(SHAPES) if params is None else params
    return case.ours(params, **case.options, **choice.options, **options)


def loaded(case: Case, choice: Choice, start: Optimizer, **options: Any) -> Optimizer:
    """Another optimizer over copies of the parameters, with this one's checkpoint."""
    optimizer = make(case, choice, clone_params(params_of(start)), **options)
    optimizer.load_state_dict(saved(start))
    return optimizer


# -- to the last bit --------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_resumes_to_the_last_bit(case: Case, choice: Choice, flat: bool) -> None:
    optimizer = make(case, choice)
    step(optimizer, range(3))
    resumed = loaded(case, choice, optimizer, flat=flat)
    assert_equal(resumed, optimizer)
    assert_same_bits(masters_of(resumed), masters_of(optimizer))
    for number in range(3, 6):
        step(optimizer, [number])
        for p, q in zip(params_of(resumed), params_of(optimizer), strict=True):
            p.grad.copy_(q.grad) if flat else setattr(p, "grad", q.grad.clone())
        resumed.step()
    assert_equal(resumed, optimizer)
    assert_same_bits(masters_of(resumed), masters_of(optimizer))


@every_pair
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_go_on_alike(
    case: Case, choice: Choice, copied: Callable[[Optimizer], Optimizer], steps: int
) -> None:
    optimizer = make(case, choice)
    step(optimizer, range(steps))
    twin = copied(optimizer)
    assert_equal(twin, optimizer)
    for each in (optimizer, twin):
        step(each, range(steps, steps + 3))
    assert_equal(twin, optimizer)
    assert_same_bits(masters_of(twin), masters_of(optimizer))


@every_pair
def test_a_checkpoint_of_its_own(case: Case, choice: Choice) -> None:
    """state_dict() is live; saving, and loading it back, changes nothing."""
    optimizer, twin = make(case, choice), make(case, choice)
    for each in (optimizer, twin):
        step(each, range(2))
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin):
        step(each, range(2, 4))
    assert_equal(optimizer, twin)


@with_codes
def test_the_state_is_not_the_callers(case: Case, choice: Choice) -> None:
    optimizer = make(case, choice)
    step(optimizer, range(2))
    state_dict = saved(optimizer)
    other = make(case, choice, clone_params(params_of(optimizer)))
    other.load_state_dict(state_dict)
    step(other, [2])
    step(optimizer, [2])
    for values in state_dict["state"].values():
        for value in values.values():
            value.fill_(3)
    step(other, [3])
    step(optimizer, [3])
    assert_equal(other, optimizer)


@every_class
def test_the_seed_is_in_the_checkpoint(case: Case) -> None:
    """It decides how the steps to come are rounded, whatever the constructor was told."""
    choice = Choice(BF16, {"rounding": "stochastic", "seed": 12345})
    optimizer = make(case, choice)
    step(optimizer, range(2))
    assert optimizer.state_dict()["param_groups"][0]["seed"] == 12345
    other = case.ours(clone_params(params_of(optimizer)), **case.options, rounding="stochastic")
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["seed"] == 12345
    unlike = case.ours(clone_params(params_of(optimizer)), **case.options, rounding="stochastic")
    state_dict = saved(optimizer)
    state_dict["param_groups"][0]["seed"] = 1
    unlike.load_state_dict(state_dict)
    for each in (optimizer, other, unlike):
        step(each, range(2, 5))
    assert_equal(other, optimizer)
    assert not torch.equal(params_of(unlike)[0], params_of(optimizer)[0])


@every_class
def test_how_an_instance_stores_is_its_own_choice(case: Case) -> None:
    choice = Choice(BF16, {"rounding": "stochastic", "state_dtype": BF16, "min_8bit_size": 7})
    optimizer = make(case, choice)
    plain = case.ours(choice.params(SHAPES), **case.options, master_bits=24)
    step(plain, range(2))
    optimizer.load_state_dict(saved(plain))
    for key, value in {**choice.options, "state_dtype": "bfloat16"}.items():
        assert optimizer.param_groups[0][key] == value
    assert "master_bits" not in optimizer.param_groups[0]
    step(optimizer, range(2, 4))


# -- from one choice to another ---------------------------------------------------------------


def plain_state(case: Case, optimizer: Optimizer, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The states in float32, as an optimizer without any choice of storage gets them."""
    plain = case.ours([p.detach().to(dtype) for p in params_of(optimizer)], **case.options)
    plain.load_state_dict(saved(optimizer))
    return states_of(plain)


def assert_near(case: Case, ours: Optimizer, theirs: list[dict[str, Any]], codes: bool) -> None:
    """Up to half a distance between the codes: a 16th in the highest octaves of a block, and ever
    more below, so that in the end it is what the smallest code stands for."""
    mine = plain_state(case, ours, F32)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key in NUMBERS or not b[key].numel():
                assert_same_bits(a[key], b[key])
                continue
            largest = float(b[key].abs().max())
            relative = 2.0**-4 if codes else 2.0**-8
            small = b[key].abs() < largest / 16
            apart = (a[key].float() - b[key].float()).abs()
            assert bool((apart <= relative * b[key].abs())[~small].all()), key
            assert bool((apart <= relative * largest / 16)[small].all()), key


@with_codes
def test_from_torch(case: Case, choice: Choice) -> None:
    start = case.counterpart(make_params(shapes=SHAPES), **case.options)
    step(start, range(3))
    params = [nn.Parameter(p.detach().to(choice.param)) for p in params_of(start)]
    optimizer = make(case, choice, params)
    optimizer.load_state_dict(saved(start))
    assert_near(case, optimizer, states_of(start), codes=True)
    step(optimizer, range(3, 5))
    for state in states_of(optimizer):
        assert any(key.endswith("_code") for key in state)
        assert not state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg"}


KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": BF16},
    "int8": INT8,
}


@pytest.mark.parametrize(
    ("case", "of", "to"),
    [
        pytest.param(case, of, to, id=f"{case}-{of}-{to}")
        for case, of, to in product(RICHEST, KINDS, KINDS)
        if case in RICHEST_IN_CODES or "int8" not in (of, to)
    ],
)
def test_states_are_converted(case: Case, of: str, to: str) -> None:
    """Either way, and no more than once: converting back what has not changed is exact."""
    if case in RICHEST_IN_CODES:
        case = next(p.values[0] for p in WITH_CODES if p.values[0].ours is case.ours)
    start = case.ours(make_params(shapes=SHAPES), **case.options, **KINDS[of])
    step(start, range(3))
    other = case.ours(clone_params(params_of(start)), **case.options, **KINDS[to])
    other.load_state_dict(saved(start))
    assert_near(case, other, plain_state(case, start, F32), codes=to == "int8")
    if of == to:
        assert_equal(other, start)
    wide = case.ours(clone_params(params_of(start)), **case.options)
    wide.load_state_dict(saved(other))
    again = case.ours(clone_params(params_of(start)), **case.options, **KINDS[to])
    again.load_state_dict(saved(wide))
    for mine, theirs in zip(plain_state(case, again, F32), states_of(wide), strict=True):
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=2**-4, atol=1e-6)
    step(other, range(3, 5))
    for state in states_of(other):
        for key, value in state.items():
            assert key != "step" or float(value) == 5
            assert (key.endswith(("_code", "_scale", "_stride")) or key in NUMBERS) == (
                to == "int8" or key in NUMBERS
            )


@pytest.mark.parametrize("to", LAID)
@pytest.mark.parametrize("of", LAID)
@pytest.mark.parametrize("way", ["load", "live"])
@pytest.mark.parametrize(
    ("case", "choice"), [p for p in PAIRS if p.id.startswith(("float32-int8", "bfloat16-24-int8"))]
)
def test_another_order_in_memory(case: Case, choice: Choice, of: str, to: str, way: str) -> None:
    """Codes are made anew in it; a state stays with its element, up to half a distance."""
    values = choice.params(((4, 3, 5, 6), (3, 200, 2, 1)))
    params = [nn.Parameter(LAID[of](p.detach())) for p in values]
    start = make(case, choice, params)
    step(start, range(3))
    before = plain_state(case, start, F32)
    moved = [LAID[to](p.detach()) for p in params]
    if way == "load":
        other = make(case, choice, [nn.Parameter(p) for p in moved])
        other.load_state_dict(saved(start))
    else:
        other = start
        with torch.no_grad():
            for p, q in zip(params, moved, strict=True):
                p.data = q
        start._make_plan(start.state)
    dense = {"contiguous": "contiguous", "gaps": "contiguous"}
    if dense.get(of, of) == dense.get(to, to) and way == "load":
        assert_equal(other, start)
    assert_near(case, other, before, codes=True)
    step(other, [3])
    for p, state in zip(params_of(other), states_of(other), strict=True):
        if p.dim() < 2:
            assert "code_stride" not in state
        else:
            strides = zip(p.shape, state["code_stride"], torch.empty_like(p).stride(), strict=True)
            assert all(size == 1 or stored == stride for size, stored, stride in strides)


# -- damaged checkpoints ----------------------------------------------------------------------


def half_a_block(values: dict[str, Tensor], key: str) -> Tensor:
    return values[key].flatten()[: values[key].numel() // 2].clone()


def with_first(value: float) -> Callable[[dict[str, Tensor], str], Tensor]:
    def damage(values: dict[str, Tensor], key: str) -> Tensor:
        damaged = values[key].clone()
        damaged.view(-1)[0] = value
        return damaged

    return damage


ANY = Callable[[dict[str, Any], str], Any]
DAMAGES: dict[str, tuple[str, ANY]] = {
    "codes of another shape": ("_code", half_a_block),
    "flat codes": ("_code", lambda values, key: values[key].flatten()),
    "signed codes": ("_code", lambda values, key: values[key].to(torch.int8)),
    "codes that are floats": ("_code", lambda values, key: values[key].float()),
    "no codes": ("_code", lambda values, key: None),
    "codes that are a list": ("_code", lambda values, key: [0]),
    "scales of another shape": ("_scale", half_a_block),
    "scales in bfloat16": ("_scale", lambda values, key: values[key].bfloat16()),
    "no scales": ("_scale", lambda values, key: None),
    "a scale that is Inf": ("_scale", with_first(torch.inf)),
    "a scale that is NaN": ("_scale", with_first(torch.nan)),
    "strides of another shape": ("code_stride", half_a_block),
    "strides of another tensor": ("code_stride", lambda values, key: torch.tensor([1, 1, 1, 1])),
    "negative strides": ("code_stride", lambda values, key: -values[key]),
    "strides that are floats": ("code_stride", lambda values, key: values[key].float()),
    "remainders of another shape": ("master_remainder", half_a_block),
    "remainders that are floats": ("master_remainder", lambda values, key: values[key].float()),
    "remainders of 64 bits": ("master_remainder", lambda values, key: values[key].long()),
}


@pytest.mark.parametrize(("end", "damage"), DAMAGES.values(), ids=DAMAGES)
@every_class_in_codes
@pytest.mark.parametrize("steps", [0, 2])
def test_damaged(case: Case, end: str, damage: ANY, steps: int) -> None:
    """Refused before anything was changed, and the message names optimizer and parameter."""
    case = next(p.values[0] for p in WITH_CODES if p.values[0].ours is case.ours)
    choice = CHOICES["bfloat16-24-int8"]

    def params() -> list[nn.Parameter]:
        last = torch.channels_last
        made = choice.params(((5, 100), (4, 3, 5, 6)))
        return [made[0], nn.Parameter(made[1].detach().contiguous(memory_format=last))]

    start = make(case, choice, params())
    step(start, range(2))
    state_dict = saved(start)
    values = state_dict["state"][1]
    key = next(key for key in values if key.endswith(end))
    damaged = damage(values, key)
    if damaged is None:
        del values[key]
    else:
        values[key] = damaged
    optimizer = make(case, choice, params())
    step(optimizer, range(5, 5 + steps))
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer.load_state_dict(state_dict)
    for part in (case.ours.__name__, "parameter 1 of group 0", key.removesuffix("_scale")[:8]):
        assert part in str(caught.value)
    assert_unchanged(optimizer, before)
    step(optimizer, [7])


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, "1", None])
@every_class
def test_a_seed_that_is_none(case: Case, seed: Any) -> None:
    optimizer = case.ours(make_params(BF16), **case.options, rounding="stochastic", seed=3)
    step(optimizer, range(2))
    state_dict = saved(optimizer)
    state_dict["param_groups"][0]["seed"] = seed
    before = snapshot(optimizer)
    match = f"{case.ours.__name__}: parameter 0 of group 0.*seed={seed!r}"
    with pytest.raises((TypeError, ValueError), match=match):
        optimizer.load_state_dict(state_dict)
    assert_unchanged(optimizer, before)
    step(optimizer, [2])


def test_options_that_do_not_go_with_the_storage() -> None:
    """The storage is the instance's, the options are the checkpoint's: refused as in a
    constructor."""
    centered = fusedopt.RMSprop(make_params(), centered=True)
    optimizer = fusedopt.RMSprop(make_params(), **INT8)
    for each in (centered, optimizer):
        step(each, range(2))
    before = snapshot(optimizer)
    match = r'RMSprop: parameter 0 of group 0.*"int8" with centered=True'
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved(centered))
    assert_unchanged(optimizer, before)
    step(optimizer, [2])


@pytest.mark.parametrize(("case", "choice"), [p for p in WITH_CODES if p.values[0].row.theirs])
def test_torch_does_not_take_codes(case: Case, choice: Choice) -> None:
    """It looks for states by their names, and does not find them."""
    optimizer = make(case, choice)
    step(optimizer, range(2))
    theirs = case.row.theirs(clone_params(params_of(optimizer)), **case.options)
    theirs.load_state_dict(saved(optimizer))
    if case.ours is fusedopt.SGD:
        # SGD looks for nothing, and starts anew.
        assert all("momentum_buffer" not in state for state in states_of(theirs))
        return
    before = [p.detach().clone() for p in params_of(theirs)]
    with pytest.raises(KeyError):
        step(theirs, [2])
    assert_same_bits([p.detach() for p in params_of(theirs)], before)
