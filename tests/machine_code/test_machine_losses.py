"""The machine code of the kernels of losses, emulated: the bits that the CPU gets."""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
from core.loss_library import (
    DTYPES,
    HOST,
    Case,
    CrossEntropyArguments,
    Losses,
    MseArguments,
    cases,
    harsh_cases,
)
from core.memory import SPECIAL, canonical, to_bits

from .emulator import ARGUMENT, Machine, Memory, Watch
from .faults import find_faults
from .machine_api import (
    CROSS_ENTROPIES,
    CROSS_ENTROPY,
    LOSS,
    MSE,
    ROWS,
    SCALE,
    SHORT_ROWS,
    TARGETS,
    Launch,
)

slow = pytest.mark.slow
LEAST_EXECUTED = 0.9  # of a kernel's instructions
CHUNK = 1024  # classes
NORM_CHUNK = 16384  # elements
FAR = 3 << 32  # rows: the number of one behind them has more than 32 bits
SCALES = (1.0, 0.375)
MSE_SIZES = (1, 127, 128, 1000, NORM_CHUNK + 1, 40_000)


def run_cross_entropy(
    machine: Machine,
    arguments: CrossEntropyArguments,
    as_many: bool = False,
    before: int = 0,
    **options: Any,
) -> list[Launch]:
    launches, own = machine.api.cross_entropy(arguments.call, as_many, before)
    memory = Memory([*arguments.read, *arguments.written, *own])
    for launch in launches:
        # What all rows share would take a pass over those before them, too.
        if not before or launch.kernel in CROSS_ENTROPIES:
            machine.run(launch, memory, **options)
    return launches


def check(machine: Machine, losses: Losses, case: Case, **options: Any) -> None:
    """As the CPU does; with wrong targets as the device's functions do on the host, since a CPU
    refuses them."""
    want = losses.cross_entropy(case, HOST if case.wrong else 0)
    arguments = CrossEntropyArguments(case)
    run_cross_entropy(machine, arguments, **options)
    what = f"the machine code of {machine.arch}, {case}, {options}"
    arguments.result().assert_same(want, what)


def check_far(machine: Machine, losses: Losses, case: Case) -> None:
    """All that is there of each row, where so many others come before them."""
    want = losses.cross_entropy(case, 0)
    arguments = CrossEntropyArguments(case)
    run_cross_entropy(machine, arguments, before=FAR)
    got = replace(arguments.result(), loss=want.loss)
    got.assert_same(want, f"the machine code of {machine.arch}, {case}, far rows")


def check_mse(
    machine: Machine,
    losses: Losses,
    dtype: str,
    numel: int,
    offset: int,
    with_gradient: bool = True,
    **options: Any,
) -> None:
    want = losses.mse(dtype, numel, offset, 0, with_gradient=with_gradient)
    arguments = MseArguments(dtype, numel, offset, with_gradient)
    launches, own = machine.api.mse(arguments.call)
    memory = Memory([*arguments.arrays, *own])
    for launch in launches:
        machine.run(launch, memory, **options)
    for got, bits in zip(arguments.result(), want, strict=True):
        what = f"the machine code of {machine.arch}, {dtype}, {numel=}, {offset=}"
        assert np.array_equal(got, bits), f"{what}: mse differs"


def check_scale(
    machine: Machine, losses: Losses, dtype: str, numel: int, offset: int, of: str, factor: float
) -> None:
    """As the device's functions do on the host: a CPU has others."""
    random = np.random.default_rng(numel)
    values = random.standard_normal(numel + offset)
    places = random.random(values.size) < 0.125
    bits = to_bits(dtype, np.where(places, random.choice(SPECIAL, values.size), values))
    given = to_bits(of, np.array([factor]))
    got, want = bits.copy(), bits.copy()
    losses.scale(dtype, want[offset:], of, given)
    launches, own = machine.api.scale(DTYPES.index(dtype), got[offset:], DTYPES.index(of), given)
    memory = Memory([got, given, *own])
    for launch in launches:
        machine.run(launch, memory)
    assert np.array_equal(canonical(dtype, got), canonical(dtype, want)), f"{dtype}, {numel=}"


def wrong_cases(dtype: str) -> Iterable[Case]:
    for classes in (10, CHUNK + 1):
        yield Case(dtype, rows=9, classes=classes, wrong=True)
        yield Case(dtype, rows=9, classes=classes, wrong=True, weighted=True, smoothing=0.1)


def test_some_cross_entropies(machine: Machine, losses: Losses) -> None:
    """A lane takes a row, a warp or a block does, or warps take the chunks of few rows."""
    for dtype in ("float32", "bfloat16"):
        plain = Case(dtype, rows=9, classes=70, inner=3)
        check(machine, losses, replace(plain, classes=10))
        check(machine, losses, replace(plain, classes=72, padding=8))
        many = replace(plain, classes=2 * CHUNK + 5)
        check(machine, losses, replace(plain, weighted=True, smoothing=0.1, padding=1))
        check(machine, losses, replace(plain, fill="special", in_place=True, z_loss=1e-3))
        check(machine, losses, replace(many, probable=True, fill="masked"))
        check(machine, losses, replace(many, is_mean=False, in_place=True), as_many=True)
    check(machine, losses, Case("float64", rows=9, classes=70, with_gradient=False))
    check(machine, losses, Case("float16", rows=9, classes=70, wrong=True))


def test_some_squared_errors_and_scales(machine: Machine, losses: Losses) -> None:
    for dtype in DTYPES:
        check_mse(machine, losses, dtype, 1000, 0)
        check_scale(machine, losses, dtype, 1000, 0, "float32", SCALES[1])


def test_a_wrong_target_is_nan(machine: Machine) -> None:
    """Of its row, and of the loss of all rows."""
    case = Case("float32", rows=9, classes=70, wrong=True)
    arguments = CrossEntropyArguments(case)
    run_cross_entropy(machine, arguments)
    result = arguments.result()
    wrong = arguments.wrong
    assert wrong.any() and not wrong.all()
    gradient = result.gradient.view(np.float32).reshape(case.rows, -1)
    assert np.isnan(result.loss.view(np.float32)).all()
    assert (np.isnan(result.losses.view(np.float64)) == wrong).all()
    assert (np.isnan(gradient) == wrong[:, None]).all()


def test_launches_have_all_forms(machine: Machine) -> None:
    """By the numbers of rows and classes; a block has rows of its own only where they are many."""
    forms = {
        (264, 16): [2],
        (264, 1024): [33],
        (264, 1025): [264],
        (263, 1025): [66, 33, 66],
        (1, 50_000): [7, 1, 7],
    }
    for (rows, classes), blocks in forms.items():
        arguments = CrossEntropyArguments(Case("float16", rows=rows, classes=classes))
        launches, _ = machine.api.cross_entropy(arguments.call)
        found = [launch.blocks for launch in launches if launch.kernel in CROSS_ENTROPIES]
        assert found == blocks, f"{rows} rows of {classes} classes"


@slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cross_entropy(dtype: str, machine: Machine, losses: Losses) -> None:
    """Some of all cases, others for other dtypes and architectures; with each quick reciprocal up
    to one unit off."""
    turn = 2 * DTYPES.index(dtype) + list(ARGUMENT).index(machine.arch)
    some = [*cases((dtype,))][turn % 3 :: 3], [*harsh_cases((dtype,))][turn % 4 :: 4]
    for case in chain(*some):
        check(machine, losses, case)
        if case.classes > CHUNK:
            check(machine, losses, case, as_many=True)
    for case in wrong_cases(dtype):
        check(machine, losses, case)
    long = Case(dtype, rows=2, classes=129 * CHUNK)  # a lane has more chunks than a loop's turn
    check(machine, losses, replace(long, probable=True))
    check(machine, losses, Case(dtype, rows=264, classes=CHUNK + 1, inner=3), blocks=100)
    # None of the accesses of these is of 16 bytes, or all of them are.
    for classes in (1024, 3 * CHUNK + 5):
        narrow = Case(dtype, rows=6, classes=classes, inner=3, padding=1)
        check(machine, losses, replace(narrow, with_gradient=False, weighted=True))
        check(machine, losses, replace(narrow, probable=True), as_many=True)
    for classes in (128, 2 * CHUNK + 128):
        wide = Case(dtype, rows=6, classes=classes, inner=3)
        for options in (
            {},
            {"fill": "special"},
            {"probable": True},
            {"smoothing": 0.1, "weighted": True},
        ):
            for as_many in (False, True):
                check(machine, losses, replace(wide, **options), as_many=as_many)
    for classes in (10, 70, 128, CHUNK + 1, 2 * CHUNK):
        far = Case(dtype, rows=6, classes=classes, inner=3, is_mean=False)
        check_far(machine, losses, far)
        check_far(machine, losses, replace(far, smoothing=0.1, weighted=True))
        check_far(machine, losses, replace(far, probable=True))
    member = DTYPES.index(dtype)
    members = (member, len(DTYPES) + member)
    for key in [(SHORT_ROWS, member), *product((ROWS, CROSS_ENTROPY), members)]:
        share = machine.executed_share(key)
        assert share >= LEAST_EXECUTED, f"{key}: {share:.0%}"


@slow
def test_totals_of_many_rows(machine: Machine, losses: Losses) -> None:
    """More than all threads of a block have one of; weights, targets that are no classes, no row,
    and so many rows that all unrolled loops have some."""
    plain = Case("float32", rows=1500, classes=1, wrong=True, with_gradient=False, with_lse=False)
    check(machine, losses, replace(plain, rows=0, wrong=False))
    check(machine, losses, replace(plain, dtype="float16", rows=700))
    check(machine, losses, replace(plain, weighted=True))
    for dtype in ("float32", "float64"):
        check(machine, losses, replace(plain, dtype=dtype, weighted=True, rows=4200))
    check(machine, losses, replace(plain, dtype="bfloat16", rows=8500, wrong=False))
    for kernel in (TARGETS, LOSS):
        assert machine.executed_share((kernel, 0)) >= LEAST_EXECUTED


@slow
def test_warps_in_any_order(machine: Machine, losses: Losses) -> None:
    """Of blocks that have a row to themselves, and of those whose warps share nothing."""
    case = Case("float32", rows=2, classes=3 * CHUNK + 1, smoothing=0.1)
    for as_many, order in product((False, True), (0, 1)):
        check(machine, losses, case, as_many=as_many, order=order)


@slow
def test_the_barriers_of_a_row_are_needed(
    machine_of: Callable[[str], Machine], losses: Losses
) -> None:
    """Where warps run one by one, a row is worked out before all of its chunks are without them."""
    machine, key = machine_of("sm_90"), (CROSS_ENTROPY, DTYPES.index("float32"))
    case = Case("float32", rows=2, classes=3 * CHUNK + 1)
    check(machine, losses, case, as_many=True, order=0)
    code = machine.code[key]
    places = [i for i in machine.executed[key] if code[i].opcode[0] == "BAR"]
    assert places
    for place in places:
        without = copy(machine)
        nothing = replace(code[place], opcode=("NOP",), operands=())
        without.code = {**machine.code, key: [*code[:place], nothing, *code[place + 1 :]]}
        with pytest.raises(AssertionError, match="differs"):
            for order in range(8):
                check(without, losses, case, as_many=True, order=order)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_squared_error(dtype: str, machine: Machine, losses: Losses) -> None:
    for numel, offset in product(MSE_SIZES, (0, 1)):
        check_mse(machine, losses, dtype, numel, offset)
    check_mse(machine, losses, dtype, 1001, 0, with_gradient=False)
    check_mse(machine, losses, dtype, 9 * NORM_CHUNK + 5, 1, blocks=1)
    assert machine.executed_share((MSE, DTYPES.index(dtype))) >= LEAST_EXECUTED


@slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale(dtype: str, machine: Machine, losses: Losses) -> None:
    for of, factor, numel in product(DTYPES, SCALES, (1, 127, 5000)):
        for offset in (0, 1):
            check_scale(machine, losses, dtype, numel, offset, of, factor)
    assert machine.executed_share((SCALE, DTYPES.index(dtype))) >= LEAST_EXECUTED


@slow
def test_faults_in_cross_entropy_are_found(
    machine_of: Callable[[str], Machine], losses: Losses
) -> None:
    plain = Case("float32", rows=6, classes=CHUNK + 70, inner=3)
    options = {"weighted": True, "smoothing": 0.1, "padding": 1, "backwards": True}
    in_turn = replace(plain, **options), {"blocks": 1}
    by_block = replace(plain, probable=True, z_loss=1e-3, is_mean=False), {"as_many": True}
    some: list[tuple[Case, dict[str, Any]]] = [
        *(in_turn, by_block),
        (replace(plain, fill="special"), {}),
        (replace(plain, rows=66, classes=1000, in_place=True), {}),  # a maximum in each place
        (replace(plain, rows=2, inner=0, classes=129 * CHUNK), {}),
    ]

    def check_some(machine: Machine, watch: Watch) -> None:
        for case, how in some:
            check(machine, losses, case, watch=watch, **how)

    found = find_faults(machine_of("sm_90"), 48, check_some, 50_000)
    # Others are in the upper halves of numbers of rows and bytes, much more of its code than of
    # other kernels', in digits of float64 constants that float32 does not show, and where a maximum
    # that is not quite one does as well.
    found.assert_share(found=0.6)


@slow
def test_faults_in_squared_errors_are_found(
    machine_of: Callable[[str], Machine], losses: Losses
) -> None:
    def check_some(machine: Machine, watch: Watch) -> None:
        for offset in (0, 1):
            check_mse(machine, losses, "float32", NORM_CHUNK + 301, offset, watch=watch)
        check_mse(machine, losses, "float32", 9 * NORM_CHUNK + 3, 0, watch=watch, blocks=1)
        check_mse(machine, losses, "float32", 301, 0, with_gradient=False, watch=watch)

    found = find_faults(machine_of("sm_90"), 3, check_some, 50_000)
    found.assert_share(found=0.7)  # others are in the upper halves of counts and addresses
