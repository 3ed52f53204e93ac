"""Master weights: from one number of bits to another, where somebody changes the weights, and as
such."""

import copy
from typing import Any

import pytest
import torch
from support.storing import (
    BF16,
    CHOICES,
    F16,
    F32,
    LAID,
    SHAPES,
    Choice,
    every_pair,
    masters_of,
    rounded,
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
from torch import nn
from torch.optim import Optimizer

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
MASTERS = {name: choice for name, choice in CHOICES.items() if choice.masters}
with_masters = pytest.mark.parametrize("choice", MASTERS.values(), ids=MASTERS)


# -- in checkpoints ---------------------------------------------------------------------------


def test_masters_of_fewer_and_fewer_bits() -> None:
    start = fusedopt.AdamW(make_params(BF16, SHAPES), master_bits=32)
    step(start, range(5))
    exact = masters_of(start)
    fewer = fusedopt.AdamW(clone_params(params_of(start)), master_bits=24)
    fewer.load_state_dict(saved(start))
    for a, b, p in zip(masters_of(fewer), exact, params_of(fewer), strict=True):
        # The remainder of a master half-way between two parameters has no room above 127 / 128.
        assert bool(((a - b).abs() <= 2**-15 * b.abs()).all())
        assert_same_bits(p.detach(), rounded(b, BF16))
    # What has 24 bits, has 32.
    more = fusedopt.AdamW(clone_params(params_of(fewer)), master_bits=32)
    more.load_state_dict(saved(fewer))
    assert_same_bits(masters_of(more), masters_of(fewer))
    none = fusedopt.AdamW(clone_params(params_of(fewer)))
    none.load_state_dict(saved(fewer))
    assert_same_bits(params_of(none), params_of(fewer))
    assert not any("master_remainder" in state for state in states_of(none))
    for optimizer in (fewer, more, none):
        step(optimizer, range(5, 8))


@pytest.mark.parametrize("choice", ["bfloat16-32", "bfloat16-24", "float16-32"])
def test_a_checkpoint_without_masters(choice: str) -> None:
    """The parameters are their own masters."""
    start = fusedopt.AdamW(CHOICES[choice].params(SHAPES))
    step(start, range(3))
    optimizer = fusedopt.AdamW(clone_params(params_of(start)), **CHOICES[choice].options)
    optimizer.load_state_dict(saved(start))
    assert_same_bits(masters_of(optimizer), [p.detach().float() for p in params_of(start)])
    step(optimizer, [3])


def test_masters_change_with_the_dtype_of_the_parameter() -> None:
    """From float16 to bfloat16 and back; each is as near as its bits allow."""
    start = fusedopt.SGD(make_params(F16, SHAPES), lr=0.1, master_bits=32)
    step(start, range(3))
    params = [nn.Parameter(rounded(m, BF16)) for m in masters_of(start)]
    there = fusedopt.SGD(params, lr=0.1, master_bits=32)
    there.load_state_dict(saved(start))
    assert_same_bits(masters_of(there), masters_of(start))
    # What the remainder was of is gone then.
    back = fusedopt.SGD([nn.Parameter(m.half()) for m in masters_of(start)], master_bits=32)
    back.load_state_dict(saved(there))
    assert_same_bits(masters_of(back), [p.detach().float() for p in params_of(back)])
    step(back, [3])


# -- weights that somebody changes ------------------------------------------------------------


@with_masters
@pytest.mark.parametrize("how", ["copy_", "load_state_dict", "data", "swap", "new memory"])
def test_changed_weights_are_their_own_masters(choice: Choice, how: str) -> None:
    """And all goes on as from these weights."""
    model = nn.Linear(33, 17).to(choice.param)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.125, **choice.options)
    step(optimizer, range(3))
    torch.manual_seed(5)
    other = nn.Linear(33, 17).to(choice.param)
    new = [p.detach().clone() for p in other.parameters()]
    params = params_of(optimizer)
    with torch.no_grad():
        if how == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif how == "swap":
            for p, value in zip(params, new, strict=True):
                torch.utils.swap_tensors(p, nn.Parameter(value.clone()))
        for p, value in zip(params, new, strict=True):
            if how == "copy_":
                p.copy_(value)
            elif how == "data":
                p.data.copy_(value)
            elif how == "new memory":
                p.data = value.clone()
    unit = 0.0
    if how == "data" and choice.param == BF16:  # which nobody is told of
        unit = 2.0**-8
    for p, master, value in zip(params, masters_of(optimizer), new, strict=True):
        assert_same_bits(p.detach(), value)
        assert bool(((master - value.float()).abs() <= unit * value.float().abs()).all())
    fresh = fusedopt.SGD([nn.Parameter(v.clone()) for v in new], lr=0.125, **choice.options)
    for optimizer_ in (optimizer, fresh):
        step(optimizer_, [3])
    for a, b, value in zip(masters_of(optimizer), masters_of(fresh), new, strict=True):
        limit = unit * value.float().abs() + (0 if unit == 0 else 2**-20)
        assert bool(((a - b).abs() <= limit).all())


@with_masters
def test_what_is_saved_after_a_change(choice: Choice) -> None:
    """Masters of the new weights, in copies as well as in checkpoints."""
    optimizer = fusedopt.AdamW(choice.params(SHAPES), **choice.options)
    step(optimizer, range(3))
    with torch.no_grad():
        params_of(optimizer)[0].mul_(-2)
    resumed = fusedopt.AdamW(clone_params(params_of(optimizer)), **choice.options)
    resumed.load_state_dict(saved(optimizer))
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, resumed, twin):
        assert_same_bits(masters_of(each)[0], params_of(each)[0].detach().float())
        step(each, range(3, 5))
    assert_equal(resumed, optimizer)
    assert_equal(twin, optimizer)


@with_masters
def test_one_parameter_changed_of_several(choice: Choice) -> None:
    optimizer, twin = (fusedopt.AdamW(choice.params(SHAPES), **choice.options) for _ in range(2))
    for each in (optimizer, twin):
        step(each, range(3))
    with torch.no_grad():
        params_of(optimizer)[1].add_(1)
    before = [*masters_of(twin)]
    for i, master in enumerate(masters_of(optimizer)):
        if i != 1:
            assert_same_bits(master, before[i])
    for each in (optimizer, twin):
        step(each, [3])
    for i, (p, q) in enumerate(zip(masters_of(optimizer), masters_of(twin), strict=True)):
        if i != 1:
            assert_same_bits(p, q)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("steps", [0, 2])
@with_masters
def test_the_order_of_loading_does_not_matter(choice: Choice, order: str, steps: int) -> None:
    def build() -> tuple[nn.Module, Optimizer]:
        model = nn.Linear(33, 17).to(choice.param)
        return model, fusedopt.AdamW(model.parameters(), lr=0.01, **choice.options)

    model, optimizer = build()
    step(optimizer, range(3))
    of_model = copy.deepcopy(model.state_dict())
    of_optimizer = saved(optimizer)
    torch.manual_seed(9)
    other, resumed = build()
    step(resumed, range(30, 30 + steps))
    if order == "model first":
        other.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    if order == "optimizer first":
        other.load_state_dict(of_model)
    for each in (optimizer, resumed):
        step(each, range(3, 6))
    assert_equal(resumed, optimizer)
    assert_same_bits(masters_of(resumed), masters_of(optimizer))


# -- masters as such --------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("steps", [0, 2])
def test_master_params_there_and_back(case: Case, choice: Choice, steps: int) -> None:
    """Weights and what is stored beside them are what they were, to the last bit."""
    start = case.ours(choice.params(SHAPES), **case.options, **choice.options)
    step(start, range(3))
    masters = masters_of(start)
    for p, master in zip(params_of(start), masters, strict=True):
        assert master.dtype == F32 and master.shape == p.shape and not master.requires_grad
        if not choice.masters:
            assert_same_bits(master, p.detach().float())
    other = case.ours(choice.params(SHAPES, seed=4), **case.options, **choice.options)
    step(other, range(steps))
    other.load_master_params(masters)
    assert_same_bits(params_of(other), params_of(start))
    assert_same_bits(masters_of(other), masters)
    # Copies: neither belongs to the other.
    for master in masters:
        master.fill_(7)
    assert_same_bits(masters_of(other), masters_of(start))
    masters = masters_of(start)
    other.load_state_dict(saved(start))
    other.load_master_params(iter(masters))
    for each in (start, other):
        step(each, range(3, 5))
    assert_equal(other, start)


@pytest.mark.parametrize("how", LAID)
@with_masters
def test_masters_of_parameters_in_any_layout(choice: Choice, how: str) -> None:
    def build(seed: int) -> Optimizer:
        values = choice.params(((4, 3, 5, 6),), seed)
        params = [nn.Parameter(LAID[how](p.detach())) for p in values]
        return fusedopt.SGD(params, lr=0.1, **choice.options)

    start, other = build(0), build(1)
    for optimizer in (start, other):
        step(optimizer, range(3))
    other.load_master_params(masters_of(start))
    for _ in range(2):
        assert_same_bits(params_of(other), params_of(start))
        assert_same_bits(masters_of(other), masters_of(start))
        for optimizer in (start, other):
            step(optimizer, [3])


@with_masters
def test_weights_changed_after_masters_were_loaded(choice: Choice) -> None:
    """They win, as at any other time."""
    optimizer = fusedopt.AdamW(choice.params(SHAPES), **choice.options)
    step(optimizer, range(2))
    optimizer.load_master_params(masters_of(optimizer))
    with torch.no_grad():
        params_of(optimizer)[0].fill_(3)
    assert bool((masters_of(optimizer)[0] == 3).all())


@with_masters
def test_any_float32_is_a_master(choice: Choice) -> None:
    """Ties, the largest numbers, denormals, Inf and NaN; before the first step as well."""
    odd = [0.0, -0.0, 1 + 2**-8, 1 - 2**-9, -1 - 2**-8, 3.39e38, 3.4e38, -3.4e38, 1e-40, 1e-45]
    values = torch.tensor([*odd, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 6e-8, 2e-8])
    random = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32).view(F32)
    values = torch.cat([values, random[random.isfinite()], torch.randn(1000)])
    if choice.options["master_bits"] == 24:
        whole = (values.view(torch.int32) & -256).view(F32)
        values = torch.where(values.isfinite(), whole, values)
    p = nn.Parameter(torch.zeros(len(values), dtype=choice.param))
    optimizer = fusedopt.SGD([p], lr=0.0, **choice.options)
    for _ in range(2):
        optimizer.load_master_params([values])
        (masters,) = masters_of(optimizer)
        nan = values.isnan()
        assert_same_bits(masters[~nan], values[~nan])
        assert bool(masters[nan].isnan().all())
        assert_same_bits(p.detach()[~nan], rounded(values, choice.param)[~nan])
        # A step by nothing leaves all as it is.
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert_same_bits(masters_of(optimizer)[0][~nan], values[~nan])


def test_masters_of_other_dtypes() -> None:
    params = [
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
        nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(3, dtype=BF16)),
    ]
    optimizer = fusedopt.AdamW(params)
    masters = masters_of(optimizer)
    assert [m.dtype for m in masters] == [torch.float64, torch.complex64, F32, F32]
    optimizer.load_master_params([m * 2 for m in masters])
    for p, master in zip(params, masters, strict=True):
        assert bool((p == 2).all()) and bool((master == 1).all())


@with_masters
def test_float64_masters_are_rounded(choice: Choice) -> None:
    optimizer = fusedopt.AdamW(choice.params([(100,)]), **choice.options)
    exact = torch.randn(100, dtype=torch.float64)
    optimizer.load_master_params([exact])
    other = fusedopt.AdamW(choice.params([(100,)]), **choice.options)
    other.load_master_params([exact.float()])
    assert_same_bits(masters_of(optimizer), masters_of(other))


@every_class
@pytest.mark.parametrize("steps", [0, 2])
def test_masters_that_do_not_fit(case: Case, steps: int) -> None:
    optimizer = case.ours(make_params(BF16), **case.options, master_bits=32)
    step(optimizer, range(steps))
    good = masters_of(optimizer)
    bad: dict[str, tuple[Any, str]] = {
        "fewer": (good[:-1], "5 tensors.*6 parameters"),
        "more": ([*good, good[0]], "7 tensors.*6 parameters"),
        "none": ([], "0 tensors.*6 parameters"),
        "another shape": ([*good[:2], torch.ones(3), *good[3:]], "parameter 2 of group 0"),
        "a transposed one": ([good[0].T, *good[1:]], r"\(7, 33\).*parameter 0 of group 0.*33, 7"),
        "a list": ([[1.0], *good[1:]], "list.*parameter 0 of group 0"),
        "None": ([*good[:5], None], "NoneType.*parameter 5 of group 0"),
    }
    before = snapshot(optimizer)
    for masters, match in bad.values():
        with pytest.raises(ValueError, match=f"{case.ours.__name__}: load_master_params.*{match}"):
            optimizer.load_master_params(masters)
        assert_unchanged(optimizer, before)
        assert_same_bits(masters_of(optimizer), good)
    step(optimizer, range(steps, steps + 1))
