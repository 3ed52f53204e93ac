"""What a step computes with masters and with states of fewer bits."""

from typing import Any

import pytest
import torch
from support.cases import (
    SMALL_LAYOUTS,
    Data,
    Groups,
    bits,
    expected,
    harsh,
    realistic,
    reals,
    train,
)
from support.optimizers import ROWS, Row
from support.storing import (
    BF16,
    F16,
    F32,
    INT8,
    PAIRS,
    SHAPES,
    Choice,
    decoded,
    masters_of,
    rounded,
    step,
)
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_same_bits,
    make_params,
    params_of,
    set_grads,
    states_of,
)
from torch import Tensor, nn

import fusedopt
from fusedopt._formats import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 50
every_case = pytest.mark.parametrize("case", EVERY_CASE, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


# -- masters ----------------------------------------------------------------------------------


def groups_of(row: Row, torchs: bool = False) -> Groups:
    """A group for each set of options, or each that torch has."""
    sets = [o for o in row.option_sets.values() if not torchs or row.counterpart_has(o)]
    return Groups(sets, [SMALL_LAYOUTS] * len(sets))


@pytest.mark.parametrize("make", [realistic, harsh])
@pytest.mark.parametrize("grad", ["same", "float32"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@every_row
def test_a_master_of_32_bits_is_a_float32_parameter(
    row: Row, dtype: torch.dtype, grad: str, make: Any
) -> None:
    """Bit for bit, whatever the gradients are; and the parameter is the master rounded."""
    groups = groups_of(row)
    data: Data = make(dtype, dtype if grad == "same" else F32, groups.total, STEPS)
    ours = train(row.ours, groups, data, master_bits=32)
    plain = train(row.ours, groups, data.to(F32, F32))
    masters = reals(masters_of(ours.optimizer))
    assert_same_bits(bits(masters), bits(plain.values["param"]))
    assert_same_bits(bits(ours.values["param"]), bits(rounded(masters, dtype)))
    extra = {"master_remainder"} if dtype == BF16 else {"master"}
    assert ours.values.keys() == plain.values.keys() | extra
    for key in plain.values.keys() - {"param"}:
        assert_same_bits(bits(ours.values[key]), bits(plain.values[key]))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@every_row
def test_masters_against_torch(row: Row, dtype: torch.dtype) -> None:
    """As near to torch's float32 training as two equally exact results are."""
    groups = groups_of(row, torchs=True)
    data = realistic(dtype, dtype, groups.total, STEPS)
    ours = train(row.ours, groups, data, master_bits=32)
    wide = data.to(F32, F32)
    theirs = train(row.counterpart, groups, wide, foreach=False).wide()["param"]
    reference = expected(row, groups, wide)["param"]
    masters = reals(masters_of(ours.optimizer)).double().numpy()
    assert abs(masters - theirs).max() <= 2.1 * abs(theirs - reference).max()
    assert abs(masters - reference).mean() <= 1.05 * abs(theirs - reference).mean()


def to_24_bits(values: Tensor) -> Tensor:
    """A float32 rounded to 16 bits of precision, ties away from zero."""
    whole = (values.view(torch.int32).long() + 0x80) & 0xFFFFFF00
    return torch.where(whole >= 2**31, whole - 2**32, whole).int().view(F32)


@every_case
def test_a_master_of_24_bits_is_rounded_in_every_step(case: Case) -> None:
    """To the last bit; so that 50 steps lead away by 50 half distances at most."""
    ours = case.ours(make_params(BF16, SHAPES), **case.options, master_bits=24)
    exact = case.ours(make_params(BF16, SHAPES), **case.options, master_bits=32)
    again = case.ours([p.detach().float() for p in params_of(ours)], **case.options)
    largest = [p.detach().float().abs() for p in params_of(ours)]
    for number in range(STEPS):
        with torch.no_grad():
            for p, master in zip(params_of(again), masters_of(ours), strict=True):
                p.copy_(master)
        step(ours, [number])
        step(exact, [number])
        for p, q in zip(params_of(again), params_of(ours), strict=True):
            p.grad = q.grad.float()
        again.step()
        masters = masters_of(ours)
        for p, q, master in zip(params_of(again), params_of(ours), masters, strict=True):
            assert_same_bits(to_24_bits(p.detach()), master)
            assert_same_bits(q.detach(), rounded(master, BF16))
        largest = [
            torch.maximum(a, b.abs()) for a, b in zip(largest, masters_of(exact), strict=True)
        ]
    for a, b, size in zip(masters_of(ours), masters_of(exact), largest, strict=True):
        assert bool(((a - b).abs() <= STEPS * 2**-16 * size).all())
    for state in states_of(ours):
        assert state["master_remainder"].dtype == torch.int8


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_masters_move_where_parameters_stand_still(dtype: torch.dtype) -> None:
    """A hundred steps, each of a hundredth of the distance to the next number."""
    p, q = (nn.Parameter(torch.ones(1000, dtype=dtype)) for _ in range(2))
    ours, plain = fusedopt.SGD([p], lr=1.0, master_bits=32), fusedopt.SGD([q], lr=1.0)
    for number in range(200):
        p.grad = q.grad = torch.full_like(p, torch.finfo(dtype).eps / 64)
        ours.step()
        plain.step()
        assert_same_bits(p.detach(), rounded(masters_of(ours)[0], dtype)), number
    assert bool((q == 1).all())
    assert bool((p == 1 - torch.finfo(dtype).eps * 200 / 64).all())


# -- states of fewer bits ---------------------------------------------------------------------


FEWER = {"int8": INT8, "bfloat16": {"state_dtype": BF16}}


# By how much a state is rounded at the top of its block: half a distance between codes, of which an
# octave has 16, or between bfloat16s. Errors of single steps are nearly independent, so that the
# parameters are off by about as much of the way that they have gone, and by a few times that where
# values are small, or chance will have it.
ROUNDING = {"int8": 2**-5, "bfloat16": 2**-8}


def calm_gradients(size: int, steps: int) -> Tensor:
    """Of unlike size: over a decade in each block."""
    random = torch.Generator().manual_seed(3)
    scale = 10 ** -torch.rand(size, generator=random)
    return torch.randn(steps, size, generator=random) * scale


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{case}-{kind}")
        for kind, options in FEWER.items()
        for case in EVERY_CASE
        if Choice(F32, options).suits(case.row, case.options)
    ],
)
def test_parameters_go_the_same_way(case: Case, kind: str) -> None:
    start = torch.zeros(5000)
    p, q = (nn.Parameter(start.clone()) for _ in range(2))
    ours, plain = case.ours([p], **case.options, **FEWER[kind]), case.ours([q], **case.options)
    way = torch.zeros_like(start)
    for grad in calm_gradients(5000, STEPS):
        before = q.detach().clone()
        p.grad = q.grad = grad
        ours.step()
        plain.step()
        way += (q.detach() - before).abs()
    apart = (p - q).detach().abs() / way
    assert float(apart.mean()) <= ROUNDING[kind]
    # Each state is rounded.
    most = max(4, len(case.state_keys)) * ROUNDING[kind]
    assert case.row.turns or float(apart.max()) <= most


@pytest.mark.parametrize("kind", FEWER)
@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_averages_of_squares_do_not_drift(name: str, kind: str) -> None:
    """A step moves them by a thousandth, which no code can tell apart, and yet they get there."""
    options: dict[str, Any] = {"lr": 0.0}
    options |= {"betas": (0.9, 0.999)} if name == "AdamW" else {"alpha": 0.999}
    key = "exp_avg_sq" if name == "AdamW" else "square_avg"
    p, q = (nn.Parameter(torch.zeros(20000)) for _ in range(2))
    ours = getattr(fusedopt, name)([p], **options, **FEWER[kind])
    plain = getattr(fusedopt, name)([q], **options)
    for number, grad in enumerate(calm_gradients(20000, 500), start=1):
        p.grad = q.grad = grad
        ours.step()
        plain.step()
        if number in (100, 500):
            state = ours.state[p]
            value = decoded(state, key, p, True) if kind == "int8" else state[key].float()
            exact = plain.state[q][key]
            assert float(value.mean()) == pytest.approx(float(exact.mean()), rel=0.01)
            # And small ones as well as large ones.
            ratio = value / exact
            small = exact < exact.median()
            assert float(ratio[small].mean()) == pytest.approx(1, abs=0.02)
            assert float(ratio[~small].mean()) == pytest.approx(1, abs=0.02)


def test_the_largest_of_a_block_keeps_its_sign_and_size() -> None:
    """It defines the scale, and a code that it does not fit into would be another number."""
    grads = torch.randn(500 * 256)
    p = nn.Parameter(torch.zeros_like(grads))
    optimizer = fusedopt.SGD([p], lr=0.0, momentum=0.9, state_dtype="int8")
    p.grad = grads
    optimizer.step()
    value = decoded(optimizer.state[p], "momentum_buffer", p, False)
    blocks = grads.view(-1, 256)
    where = blocks.abs().argmax(1, keepdim=True)
    ratio = value.view(-1, 256).gather(1, where) / blocks.gather(1, where)
    assert bool(((ratio - 1).abs() <= 1 / 32).all()), ratio.aminmax()
    # And all others within half a distance, which is a 16th in the highest four octaves of a block,
    # and double that in each four below.
    octaves = (blocks.abs().amax(1, keepdim=True) * 64 / 63 / blocks.abs()).log2()
    relative = 2.0 ** (torch.floor(octaves / 4) - 4)
    wide = octaves < 16
    apart = (value.view(-1, 256) / blocks - 1).abs()
    assert bool((apart <= relative)[wide].all())


# -- what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("case", "choice"),
    # In the norm of a whole parameter, what is not finite is everybody's.
    [p for p in PAIRS if p.values[1].codes and p.values[0].row.name not in ("lamb", "lars")],
)
def test_what_is_not_finite_reaches_no_other_element(
    case: Case, choice: Choice, bad: float
) -> None:
    """The scale of its block is that of the finite ones; the others do not change by a bit."""
    ours, plain = (
        case.ours(choice.params([(1000,)]), **case.options, **choice.options) for _ in range(2)
    )
    for number in range(6):
        for optimizer in (ours, plain):
            p = params_of(optimizer)[0]
            set_grads([p], number)
            p.grad[300] = bad if optimizer is ours and number == 2 else 0
            optimizer.step()
    ill = torch.arange(1000) == 300
    a, b = params_of(ours)[0].detach(), params_of(plain)[0].detach()
    assert not a[ill].isfinite().any()
    assert_same_bits(a[~ill], b[~ill])
    mine, theirs = states_of(ours)[0], states_of(plain)[0]
    for key in mine:
        if key.endswith("_scale"):
            assert_same_bits(mine[key].abs(), theirs[key].abs())
            remembers = key.removesuffix("_scale") not in case.row.made_anew
            assert (mine[key] < 0).nonzero().flatten().tolist() == [1] * remembers
        elif key.endswith("_code"):
            assert int((mine[key] != theirs[key]).sum()) <= 1
        elif key not in NUMBERS:
            assert_same_bits(mine[key][~ill], theirs[key][~ill])
