"""The machine code of the kernels around a step, emulated: the norm, and rows made on a device."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from core.core_checks import NORM_SIZES, NORM_SPECIAL, many_magnitudes
from core.library import DTYPES, Core
from core.memory import Gradients, canonical
from core.options import RULES
from core.preparation import Preparation

from .emulator import Machine, Memory, Watch
from .faults import find_faults
from .machine_api import NORM, PREPARE, MachineApi

OF_POWERS = ("nadam", "asgd", "schedule_free_adamw", "schedule_free_sgd")
"""Rules whose rows have powers that are no whole numbers."""

slow = pytest.mark.slow
LEAST_EXECUTED = 0.9  # of a kernel's instructions


def unknown(api: MachineApi) -> np.ndarray:
    """Control before a device has written it; no block has been counted."""
    control = np.full_like(api.control(api.factor()), 0xFF)
    control[-4:] = 0
    return control


def assert_same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """Of two controls. The first two numbers are float64, the others of four bytes."""
    for dtype, unsigned, part in (
        ("float64", np.uint64, slice(16)),
        ("float32", np.uint32, slice(16, None)),
    ):
        a, b = (canonical(dtype, bits[part].view(unsigned)) for bits in (got, want))
        assert (a == b).all(), f"{what}: {a}, not {b}"


def factors(
    api: MachineApi, scale: float | None, found_inf: bool | None, max_grad_norm: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What a factor is made of, and the memory of the device that it names."""
    values = [
        None if value is None else np.array([value], np.float32) for value in (scale, found_inf)
    ]
    factor = api.factor(0.5, *values, max_grad_norm)
    return factor, [value for value in values if value is not None]


def check_norm(
    machine: Machine,
    core: Core,
    parts: Sequence[tuple[str, np.ndarray]],
    shifts: Sequence[int] = (),
    *,
    scale: float | None = None,
    found_inf: bool | None = None,
    max_grad_norm: float = 0,
    blocks: int | None = None,
    watch: Watch | None = None,
    order: int | None = None,
) -> None:
    """The sum of squares, the factor and the norm that follow, and that no block is left counted,
    after either of two steps."""
    api = machine.api
    gradients = Gradients(core.norm_chunk, parts, shifts)
    factor, named = factors(api, scale, found_inf, max_grad_norm)
    want = api.control(factor, core.tile_sum_of_squares(gradients.spans))
    sums, control = np.empty(gradients.chunks), unknown(api)
    memory = Memory([gradients.memory, sums, control, *named])
    for step in range(2):
        sums[:] = np.nan
        control[:-4] = 0xFF
        for launch in api.norm(gradients.spans, sums, factor, control):
            machine.run(launch, memory, blocks, watch, order)
        assert_same(control, want, f"step {step}")


def check_rows(
    machine: Machine,
    core: Core,
    rule: str,
    cases: Sequence[tuple[int, int]],
    watch: Watch | None = None,
    scale: float | None = 2,
    clips: bool = False,
    order: int | None = None,
) -> None:
    """The rows, the counts and, but where the norm has left it, control."""
    preparation, api = Preparation(core, rule), machine.api

    def prepare(sources: np.ndarray, ranges: np.ndarray, skip: bool, rows: np.ndarray) -> None:
        factor, named = factors(api, scale, skip, float(clips))
        before = unknown(api)
        control = before.copy()
        memory = Memory([*preparation.arrays, control, rows, *named])
        launches = api.prepare(core.rules.index(rule), sources, ranges, factor, control, rows)
        for launch in launches:
            machine.run(launch, memory, None, watch, order)
        assert_same(control, before if clips else api.control(factor), "control")

    for sources, ranges in cases:
        for skip in (True, False):
            preparation.check(sources, ranges, skip, prepare)


def test_a_norm(machine: Machine, core: Core) -> None:
    random = np.random.default_rng(0)
    parts = [
        (dtype, many_magnitudes(random, size))
        for dtype, size in zip(DTYPES, (5, 300, 70, 1), strict=True)
    ]
    check_norm(machine, core, parts, (0, 1, 0, 3))


def test_some_rows(machine: Machine, core: Core) -> None:
    check_rows(machine, core, "adam", [(5, 3)])


def test_some_rows_after_a_norm(machine: Machine, core: Core) -> None:
    check_rows(machine, core, "sgd", [(5, 3)], clips=True)


@slow
def test_the_barrier_of_rows_is_needed(machine_of: Callable[[str], Machine], core: Core) -> None:
    """Where warps run one by one, counts are advanced before all rows are made without it."""
    machine, key = machine_of("sm_90"), (PREPARE, core.rules.index("adam"))
    check_rows(machine, core, "adam", [(170, 300)], order=0)
    code = machine.code[key]
    (place,) = [i for i in machine.executed[key] if code[i].opcode[0] == "BAR"]
    without = copy(machine)
    nothing = replace(code[place], opcode=("NOP",), operands=())
    without.code = {**machine.code, key: [*code[:place], nothing, *code[place + 1 :]]}
    with pytest.raises(AssertionError, match="(rows|counts) are wrong"):
        check_rows(without, core, "adam", [(170, 300)], order=0)


@slow
def test_every_norm(machine: Machine, core: Core) -> None:
    """All sizes of all dtypes, aligned and not; Inf, NaN, what overflows or is denormal; more
    gradients than a launch takes, and fewer blocks than there are chunks."""
    random = np.random.default_rng(0)
    for blocks, shift in ((None, 0), (3, 1), (1, 0)):
        parts = [(d, many_magnitudes(random, n)) for d in DTYPES for n in [*NORM_SIZES, 0]]
        for order in (None, 0):
            check_norm(machine, core, parts, [shift] * len(parts), blocks=blocks, order=order)
    ways = [(None, None, 1e9), (1024, False, 1e-3), (3, True, 1), (2, False, 0)]
    for dtype in DTYPES:
        for values in [*NORM_SPECIAL[dtype], [np.inf], [-np.inf, 1.0], [np.nan], [0.0]]:
            for scale, found_inf, largest in ways:
                part = (dtype, np.array(values))
                check_norm(
                    *(machine, core, [part]),
                    scale=scale,
                    found_inf=found_inf,
                    max_grad_norm=largest,
                )
    sizes = random.integers(0, 300, 900)
    many = [(str(random.choice(DTYPES)), many_magnitudes(random, size)) for size in sizes]
    check_norm(machine, core, many, list(random.integers(0, 8, len(many))))
    check_norm(machine, core, [], max_grad_norm=1)
    assert machine.executed_share((NORM, 0)) >= LEAST_EXECUTED


@slow
def test_every_row(machine: Machine, core: Core) -> None:
    """Of all options from all kinds of sources after all numbers of steps, and ranges of counts."""
    full, room = core.full_launch
    cases = [(1, 0), (0, 1), (full, room), (full + 1, room + 2), (1000, 3)]
    shares, of_powers = {}, {}
    for number, rule in enumerate(core.rules):
        check_rows(machine, core, rule, cases)
        check_rows(machine, core, rule, [(100, 3)], scale=None, clips=True, order=0)
        share = machine.executed_share((PREPARE, number))
        (of_powers if rule in OF_POWERS else shares)[rule] = share
    # What is not executed is the same in each, a tenth of those that are short, and more of Muon's,
    # which is the shortest; and of Adagrad's, and where there are powers, the slow ways of
    # divisions, which only denormals take. Powers of NAdam are never above 1, which leaves out half
    # of what a power is made of.
    assert shares.pop("muon") >= LEAST_EXECUTED - 0.05, shares
    found = [*shares.values()]
    assert np.mean(found) >= LEAST_EXECUTED and min(found) >= LEAST_EXECUTED - 0.03, shares
    assert min(of_powers.values()) >= LEAST_EXECUTED - 0.11, of_powers


@slow
def test_faults_in_the_norm_are_found(machine_of: Callable[[str], Machine], core: Core) -> None:
    random = np.random.default_rng(0)
    parts = [(dtype, many_magnitudes(random, 5000)) for dtype in DTYPES for _ in range(3)]
    shifts = [0, 1, 0] * len(DTYPES)

    def check(machine: Machine, watch: Watch) -> None:
        check_norm(machine, core, parts, shifts, scale=4, max_grad_norm=1, watch=watch)

    found = find_faults(machine_of("sm_90"), 16, check, 50_000)
    # Others are in the upper halves of counts, and where either way leads to the same.
    found.assert_share(found=0.7)


@slow
@pytest.mark.parametrize("rule", RULES)
def test_faults_in_rows_are_found(
    rule: str, machine_of: Callable[[str], Machine], core: Core
) -> None:
    def check(machine: Machine, watch: Watch) -> None:
        check_rows(machine, core, rule, [(100, 30)], watch)

    found = find_faults(machine_of("sm_90"), 9, check, 50_000)
    # Much of a row is zero, whatever is moved where; and the last bits of a polynomial's
    # coefficients, of which powers are made, show in nothing.
    found.assert_share(found=0.5 if rule in OF_POWERS else 0.6)
