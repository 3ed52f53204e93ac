"""States of fewer bits, masters and random rounding: what they compute, and what is refused."""

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
from support.optimizers import ROWS, Options, Row
from support.storing import (
    BF16,
    CHOICES,
    F16,
    F32,
    INT8,
    PAIRS,
    SHAPES,
    Choice,
    decoded,
    every_pair,
    masters_of,
    rounded,
    step,
)
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_same_bits,
    assert_unchanged,
    clone_params,
    make_params,
    params_of,
    set_grads,
    snapshot,
    states_of,
)
from support.training import (
    train as train_on,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt

STEPS = 50

every_case = pytest.mark.parametrize("case", EVERY_CASE, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- masters ----------------------------------------------------------------------------------


def groups_of(row: Row, torchs: bool = False) -> Groups:
    """A group for each set of options, or each that torch has."""
    sets = [o for o in row.option_sets.values() if not torchs or row.has_equal_in_torch(o)]
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
    theirs = train(row.theirs, groups, wide, foreach=False).wide()["param"]
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
        if Choice(F32, options).suits(case.options)
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
    assert float(apart.mean()) <= ROUNDING[kind] and float(apart.max()) <= 4 * ROUNDING[kind]


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


# -- NaN and Inf ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("case", "choice"), [p for p in PAIRS if p.values[1].codes])
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
            assert (mine[key] < 0).nonzero().flatten().tolist() == [1]
        elif key.endswith("_code"):
            assert int((mine[key] != theirs[key]).sum()) <= 1
        elif key != "step":
            assert_same_bits(mine[key][~ill], theirs[key][~ill])


# -- random rounding --------------------------------------------------------------------------


def on_their_way(change: float, steps: int, size: int = 1 << 16, **options: Any) -> Optimizer:
    """Ones, each moved by this much in each step."""
    p = nn.Parameter(torch.ones(size, dtype=BF16))
    optimizer = fusedopt.SGD([p], lr=1.0, **options)
    for _ in range(steps):
        p.grad = torch.full_like(p, -change)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("change", [2.0**-12, -(2.0**-12), 2.0**-10, 2.0**-15])
def test_the_mean_of_many_small_steps(change: float) -> None:
    """It is right, within five times its deviation, where rounding to nearest stays at one."""
    steps, size, distance = 64, 1 << 16, 2.0**-7 if change > 0 else 2.0**-8
    assert bool((params_of(on_their_way(change, steps))[0] == 1).all())
    p = params_of(on_their_way(change, steps, rounding="stochastic"))[0].detach().double()
    deviation = (steps * abs(change) * distance / size) ** 0.5
    assert abs(float(p.mean()) - 1 - steps * change) < 5 * deviation


@pytest.mark.parametrize("parts", [1, 5, 8, 15])
def test_a_neighbour_is_taken_as_often_as_it_is_near(parts: int) -> None:
    p = params_of(on_their_way(parts / 16 * 2**-7, 1, rounding="stochastic"))[0].detach()
    up = p == 1 + 2**-7
    assert bool((up | (p == 1)).all())
    share, size = parts / 16, p.numel()
    assert abs(float(up.double().mean()) - share) < 5 * (share * (1 - share) / size) ** 0.5


def test_what_needs_no_rounding_stays() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38])
    p = nn.Parameter(values.to(BF16).repeat(200))
    before = p.detach().clone()
    optimizer = fusedopt.SGD([p], lr=0.0, rounding="stochastic")
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert_same_bits(bits(p.detach()), bits(before))


def noise(optimizer: Optimizer) -> list[Tensor]:
    """Which elements are rounded up half-way between two numbers, in the next step."""
    result = []
    with torch.no_grad():
        for p in params_of(optimizer):
            p.fill_(1)
            p.grad = torch.full_like(p, -(2.0**-8))
    optimizer.step()
    for p in params_of(optimizer):
        assert bool(((p == 1) | (p == 1 + 2**-7)).all())
        result.append((p != 1).flatten())
    return result


def assert_unlike(a: Tensor, b: Tensor) -> None:
    """They agree by chance: in a half of the elements, within five times the deviation."""
    agree = float((a == b).double().mean())
    assert abs(agree - 0.5) < 2.5 * a.numel() ** -0.5, agree


def random_sgd(count: int = 1, size: int = 1 << 14, seed: int = 0, **options: Any) -> Optimizer:
    params = [nn.Parameter(torch.ones(size, dtype=BF16)) for _ in range(count)]
    return fusedopt.SGD(params, lr=1.0, rounding="stochastic", seed=seed, **options)


def test_noise_differs_by_parameter_step_and_seed() -> None:
    ours = random_sgd(3)
    first, second = noise(ours), noise(ours)
    other = noise(random_sgd(3, seed=1))
    far = noise(random_sgd(3, seed=2**64 - 1))
    everything = [*first, *second, *other, *far]
    for i, a in enumerate(everything):
        for b in everything[:i]:
            assert_unlike(a, b)
    again = random_sgd(3)
    assert_same_bits(noise(again), first)
    assert_same_bits(noise(again), second)


@pytest.mark.parametrize("distance", [1, 2, 16, 64, 127, 128, 129, 255, 256, 257, 512, 4096])
def test_noise_differs_by_element(distance: int) -> None:
    (drawn,) = noise(random_sgd(size=1 << 17))
    assert_unlike(drawn[distance:], drawn[:-distance])


def test_noise_depends_on_the_position_only() -> None:
    """Not on the groups, the sizes of others, or whether these have gradients."""
    alone = noise(random_sgd())[0]
    params = [nn.Parameter(torch.ones(n, dtype=BF16)) for n in (1 << 14, 77, 300)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    among = fusedopt.SGD(groups, lr=1.0, rounding="stochastic")
    params[0].grad = torch.full_like(params[0], -(2.0**-8))
    among.step()
    assert_same_bits(params[0] != 1, alone)
    second = [nn.Parameter(torch.ones(n, dtype=BF16)) for n in (5, 1 << 14)]
    assert_unlike(noise(fusedopt.SGD(second, lr=1.0, rounding="stochastic"))[1], alone)


@every_class
def test_what_random_rounding_leaves_alone(case: Case) -> None:
    """States are those of rounding to nearest, where the parameter does not count in them."""
    options = {**case.options, "weight_decay": 0.0}
    ours = case.ours(make_params(BF16), **options, rounding="stochastic")
    plain = case.ours(make_params(BF16), **options)
    step(ours, range(5))
    step(plain, range(5))
    for mine, theirs in zip(states_of(ours), states_of(plain), strict=True):
        assert mine.keys() == theirs.keys() | {"step"}
        assert float(mine["step"]) == 5
        for key in theirs:
            assert_same_bits(mine[key], theirs[key])
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-5, atol=2**-5)


# -- which parameters, and what is refused ----------------------------------------------------


@every_class
def test_small_parameters_have_float32_states(case: Case) -> None:
    case = next(p.values[0] for p in PAIRS if p.values[0].ours is case.ours and p.values[1].codes)
    shapes = ((4095,), (4096,), (64, 64), ())
    optimizer = case.ours(make_params(shapes=shapes), **case.options, state_dtype="int8")
    step(optimizer, range(2))
    for state, coded in zip(states_of(optimizer), (False, True, True, False), strict=True):
        for key, value in state.items():
            assert not coded or key == "step" or key.endswith(("_code", "_scale"))
            assert coded or value.dtype == F32
            assert not key.endswith("_code") or value.dtype == torch.uint8
            assert not key.endswith("_code") or tuple(value.shape) == (16, 256)
            assert not key.endswith("_scale") or tuple(value.shape) == (16,)


@every_class
def test_a_group_has_its_own_storage(case: Case) -> None:
    case = next(p.values[0] for p in PAIRS if p.values[0].ours is case.ours and p.values[1].codes)
    names = ["bfloat16-24", "bfloat16-int8", "bfloat16-random", "float16-32", "float32-bfloat16"]
    choices = [CHOICES[name] for name in names]
    together = case.ours(
        [
            {"params": choice.params(SHAPES), "master_bits": None, **choice.options}
            for choice in choices
        ],
        **case.options,
        master_bits=32,
    )
    apart = [case.ours(c.params(SHAPES), **case.options, **c.options) for c in choices]
    for number in range(4):
        for optimizer in apart:
            step(optimizer, [number])
        for p, q in zip(params_of(together), sum(map(params_of, apart), []), strict=True):
            p.grad = q.grad
        together.step()
    plain = [i for i, name in enumerate(names) if "random" not in name]  # noise is by position
    for group in plain:
        params = together.param_groups[group]["params"]
        assert_same_bits(params, params_of(apart[group]))
        assert_same_bits([together.state[p] for p in params], states_of(apart[group]))


C64 = torch.complex64
SENSELESS: dict[str, tuple[torch.dtype, Options, list[str]]] = {
    "master of float32": (F32, {"master_bits": 32}, ["master_bits=32", "float32", "None"]),
    "master of float64": (torch.float64, {"master_bits": 24}, ["master_bits=24", "None"]),
    "master of complex": (C64, {"master_bits": 32}, ["master_bits=32", "complex64", "None"]),
    "24 bits of float16": (F16, {"master_bits": 24}, ["master_bits=24", "float16", "32"]),
    "16 bits": (BF16, {"master_bits": 16}, ["master_bits=16", "None", "32", "24"]),
    "true bits": (BF16, {"master_bits": True}, ["master_bits=True", "None", "32", "24"]),
    "text for bits": (BF16, {"master_bits": "32"}, ["master_bits='32'", "None", "32", "24"]),
    "master, float16 states": (
        F16,
        {"master_bits": 32, "state_dtype": F16},
        ["float16", "float32"],
    ),
    "codes for float64": (torch.float64, INT8, ['"int8"', "float64", "None"]),
    "codes for complex": (C64, INT8, ['"int8"', "complex64", "None"]),
    "unknown text": (F32, {"state_dtype": "int4"}, ["'int4'", '"int8"', "float32"]),
    "int8 as a dtype": (F32, {"state_dtype": torch.int8}, ["torch.int8", '"int8"', "float32"]),
    "no dtype": (F32, {"state_dtype": 8}, ["state_dtype=8", '"int8"', "float32"]),
    "a list": (F32, {"state_dtype": []}, ["state_dtype=[]", '"int8"', "float32"]),
    "bfloat16 for complex": (C64, {"state_dtype": BF16}, ["bfloat16", "complex64", "float32"]),
    "float16 for bfloat16": (BF16, {"state_dtype": F16}, ["float16", "bfloat16", "float32"]),
    "random and a master": (
        BF16,
        {"rounding": "stochastic", "master_bits": 32},
        ['"stochastic"', "master_bits=32", "one of"],
    ),
    "random float32": (F32, {"rounding": "stochastic"}, ["float32", '"nearest"']),
    "random float16": (F16, {"rounding": "stochastic"}, ["float16", '"nearest"']),
    "unknown rounding": (BF16, {"rounding": "up"}, ["rounding='up'", '"nearest"', '"stochastic"']),
    "no rounding": (BF16, {"rounding": None}, ["rounding=None", '"nearest"', '"stochastic"']),
    "negative size": (F32, {**INT8, "min_8bit_size": -1}, ["min_8bit_size=-1", "number"]),
    "half a size": (F32, {**INT8, "min_8bit_size": 0.5}, ["min_8bit_size=0.5", "number"]),
    "negative seed": (BF16, {"seed": -1}, ["seed=-1", "2**64"]),
    "large seed": (BF16, {"seed": 2**64}, [f"seed={2**64}", "2**64"]),
    "half a seed": (BF16, {"seed": 0.5}, ["seed=0.5", "integer"]),
    "true seed": (BF16, {"seed": True}, ["seed=True", "integer"]),
}
senseless = pytest.mark.parametrize(
    ("dtype", "options", "parts"), SENSELESS.values(), ids=SENSELESS
)


@every_class
@senseless
def test_senseless_choices(
    case: Case, dtype: torch.dtype, options: Options, parts: list[str]
) -> None:
    """They are refused before anything was made, and the message says what to use instead."""
    params = make_params(dtype)
    common = {**case.options, "centered": False} if "centered" in case.options else case.options
    with pytest.raises((TypeError, ValueError)) as caught:
        case.ours([{"params": params[:1]}, {"params": params[1:], **options}], **common)
    for part in (case.ours.__name__, "parameter 0 of group 1", *parts):
        assert part in str(caught.value)
    with pytest.raises((TypeError, ValueError)) as caught:
        case.ours([("weight", params[0])], **common, **options)
    for part in (case.ours.__name__, "parameter 'weight'", *parts):
        assert part in str(caught.value)
    optimizer = case.ours(make_params(), **common)
    train_on(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer.add_param_group({"params": params, **options})
    for part in (case.ours.__name__, "parameter 0 of group 1", *parts):
        assert part in str(caught.value)
    assert_unchanged(optimizer, before)
    train_on(optimizer, [2])


def test_codes_for_centered_rmsprop() -> None:
    params = make_params()
    match = r'RMSprop: parameter 0 of group 0.*"int8" with centered=True.*torch\.float32'
    with pytest.raises(ValueError, match=match):
        fusedopt.RMSprop(params, centered=True, state_dtype="int8")
    optimizer = fusedopt.RMSprop(params[:1], state_dtype="int8")
    with pytest.raises(ValueError, match=r"RMSprop: parameter 0 of group 1.*centered=True"):
        optimizer.add_param_group({"params": params[1:], "centered": True})
    optimizer.add_param_group({"params": params[1:], "centered": True, "state_dtype": None})
    step(optimizer, range(2))


@every_class
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_first_of_several_that_fits_not_is_named(case: Case, dtype: torch.dtype) -> None:
    params = [*make_params(dtype)[:2], *make_params()]
    with pytest.raises(ValueError, match=f"{case.ours.__name__}: parameter 2 of group 0"):
        case.ours(params, **case.options, master_bits=32)


@every_class
def test_options_set_by_hand(case: Case) -> None:
    """A senseless one is refused, when the next plan is made, and nothing is changed."""
    optimizer = case.ours(make_params(BF16), **case.options)
    step(optimizer, range(2))
    optimizer.param_groups[0]["master_bits"] = 16
    optimizer._plan = None
    set_grads(params_of(optimizer), 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="master_bits=16"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_pair
def test_another_storage_set_by_hand(case: Case, choice: Choice) -> None:
    """From the next plan on: as if it had been loaded into such an optimizer."""
    optimizer = case.ours(choice.params(SHAPES), **case.options)
    step(optimizer, range(3))
    other = case.ours(clone_params(params_of(optimizer)), **case.options, **choice.options)
    optimizer.param_groups[0].update(choice.options)
    other.load_state_dict(optimizer.state_dict())
    optimizer._plan = None
    for each in (optimizer, other):
        step(each, range(3, 6))
    assert_same_bits(params_of(optimizer), params_of(other))
    for mine, theirs in zip(states_of(optimizer), states_of(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same_bits(mine[key], theirs[key])
