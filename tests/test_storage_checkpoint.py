"""Checkpoints of codes, masters and random rounding: to the last bit, from one choice of storage to
another, and damaged; and what happens to masters where somebody changes the weights."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from storing import (
    BF16,
    CHOICES,
    F16,
    F32,
    INT8,
    PAIRS,
    SHAPES,
    Choice,
    every_pair,
    masters_of,
    rounded,
    step,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from training import (
    RICHEST,
    Case,
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    clone_params,
    make_params,
    params_of,
    snapshot,
    states_of,
)

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
with_codes = pytest.mark.parametrize(("case", "choice"), [p for p in PAIRS if p.values[1].codes])
MASTERS = {name: choice for name, choice in CHOICES.items() if choice.masters}
with_masters = pytest.mark.parametrize("choice", MASTERS.values(), ids=MASTERS)


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """The state_dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
    for key, value in choice.options.items():
        assert optimizer.param_groups[0][key] == value
    assert optimizer.param_groups[0]["master_bits"] is None
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
            if key == "step" or not b[key].numel():
                assert_same_bits(a[key], b[key])
                continue
            largest = float(b[key].abs().max())
            relative = 2.0**-4 if codes else 2.0**-8
            small = b[key].abs() < largest / 16
            apart = (a[key].float() - b[key].float()).abs()
            assert bool((apart <= relative * b[key].abs())[~small].all()), key
            assert bool((apart <= relative * largest / 16)[small].all()), key


@pytest.mark.parametrize("params", [F32, BF16], ids=str)
@with_codes
def test_from_torch(case: Case, choice: Choice, params: torch.dtype) -> None:
    if choice.param != params:
        return
    start = case.theirs(make_params(params, SHAPES), **case.options)
    step(start, range(3))
    optimizer = make(case, choice, clone_params(params_of(start)))
    optimizer.load_state_dict(saved(start))
    wide = [{k: v.float() for k, v in state.items()} for state in states_of(start)]
    for state in wide:
        if "step" not in state and choice.stochastic:
            state["step"] = torch.tensor(0.0)
    assert_near(case, optimizer, wide, codes=True)
    step(optimizer, range(3, 5))
    for state in states_of(optimizer):
        assert any(key.endswith("_code") for key in state)
        assert not state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg"}


@pytest.mark.parametrize("to", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("of", ["float32", "bfloat16", "int8"])
@every_class
def test_states_are_converted(case: Case, of: str, to: str) -> None:
    """Either way, and no more than once: converting back what has not changed is exact."""
    case = next(p.values[0] for p in PAIRS if p.values[0].ours is case.ours and p.values[1].codes)
    kinds: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16": {"state_dtype": BF16},
        "int8": INT8,
    }
    start = case.ours(make_params(shapes=SHAPES), **case.options, **kinds[of])
    step(start, range(3))
    other = case.ours(clone_params(params_of(start)), **case.options, **kinds[to])
    other.load_state_dict(saved(start))
    assert_near(case, other, plain_state(case, start, F32), codes=to == "int8")
    if of == to:
        assert_equal(other, start)
    wide = case.ours(clone_params(params_of(start)), **case.options)
    wide.load_state_dict(saved(other))
    again = case.ours(clone_params(params_of(start)), **case.options, **kinds[to])
    again.load_state_dict(saved(wide))
    for mine, theirs in zip(plain_state(case, again, F32), states_of(wide), strict=True):
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=2**-4, atol=1e-6)
    step(other, range(3, 5))
    for state in states_of(other):
        for key, value in state.items():
            assert key != "step" or float(value) == 5
            assert (key.endswith(("_code", "_scale")) or key == "step") == (
                to == "int8" or key == "step"
            )


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
    back = fusedopt.SGD([nn.Parameter(m.half()) for m in masters_of(start)], master_bits=32)
    back.load_state_dict(saved(there))
    step(back, [3])


LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda p: p.contiguous(),
    "channels_last": lambda p: p.contiguous(memory_format=torch.channels_last),
    "transposed": lambda p: p.mT.contiguous().mT,
    "gaps": lambda p: torch.stack([p, p], -1)[..., 0],
}


@pytest.mark.parametrize("to", LAID)
@pytest.mark.parametrize("of", LAID)
@pytest.mark.parametrize("way", ["load", "live"])
@with_codes
def test_another_order_in_memory(case: Case, choice: Choice, of: str, to: str, way: str) -> None:
    """Codes are made anew in it; a state stays with its element, up to half a distance."""
    if choice.param == F16 or choice.stochastic:
        return
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
        start._make_plan()
    dense = {"contiguous": "contiguous", "gaps": "contiguous"}
    if dense.get(of, of) == dense.get(to, to) and way == "load":
        assert_equal(other, start)
    assert_near(case, other, before, codes=True)
    step(other, [3])
    for p, state in zip(params_of(other), states_of(other), strict=True):
        if not p.is_contiguous() and to != "gaps":
            assert state["code_stride"].tolist() == list(p.stride())
        else:
            assert "code_stride" not in state


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
@every_class
@pytest.mark.parametrize("steps", [0, 2])
def test_damaged(case: Case, end: str, damage: ANY, steps: int) -> None:
    """Refused before anything was changed, and the message names optimizer and parameter."""
    case = next(p.values[0] for p in PAIRS if p.values[0].ours is case.ours and p.values[1].codes)
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


@with_codes
def test_torch_does_not_take_codes(case: Case, choice: Choice) -> None:
    """It looks for states by their names, and does not find them."""
    optimizer = make(case, choice)
    step(optimizer, range(2))
    theirs = case.theirs(clone_params(params_of(optimizer)), **case.options)
    theirs.load_state_dict(saved(optimizer))
    if case.ours is fusedopt.SGD:
        # SGD looks for nothing, and starts anew.
        assert all("momentum_buffer" not in state for state in states_of(theirs))
        return
    before = [p.detach().clone() for p in params_of(theirs)]
    with pytest.raises(KeyError):
        step(theirs, [2])
    assert_same_bits([p.detach() for p in params_of(theirs)], before)


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
        params_of(optimizer)[0].mul_(0.5).add_(1)
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
    start = make(case, choice)
    step(start, range(3))
    masters = masters_of(start)
    for p, master in zip(params_of(start), masters, strict=True):
        assert master.dtype == F32 and master.shape == p.shape and not master.requires_grad
        if not choice.masters:
            assert_same_bits(master, p.detach().float())
    other = make(case, choice, choice.params(SHAPES, seed=4))
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
