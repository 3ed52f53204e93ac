"""The machine code of the kernels around a step, emulated: the norm, and rows made on a device."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from core.core_checks import NORM_SIZES, NORM_SPECIAL, many_magnitudes
from core.library import DTYPES, Core
from core.memory import Gradients, canonical
from core.options import RULES
from core.preparation import Preparation

from .emulator import Machine, Memory, Watch
from .faults import find_faults

slow = pytest.mark.slow


def check_norm(
    machine: Machine,
    core: Core,
    parts: Sequence[tuple[str, np.ndarray]],
    shifts: Sequence[int] = (),
    *,
    scale: float = 1,
    found_inf: bool = False,
    max_grad_norm: float = 1,
    blocks: int | None = None,
    watch: Watch | None = None,
) -> None:
    """The sum of squares, the factor and the norm that follow, and that no block is left counted,
    after either of two steps."""
    gradients = Gradients(core.norm_chunk, parts, shifts)
    scales = np.array([scale, found_inf], np.float32)
    factor = machine.api.factor(0.5, scales[:1], scales[1:], max_grad_norm)
    want = machine.api.control(factor, core.tile_sum_of_squares(gradients.spans))
    sums = np.full(gradients.chunks, np.nan)
    control = machine.api.control(factor)
    memory = Memory([gradients.memory, sums, scales, control])
    for step in range(2):
        for launch in machine.api.norm(gradients.spans, sums, factor, control):
            machine.run(launch, memory, blocks, watch)
        # The sum and the factor are of float64, the others of four bytes.
        for got, expected in ((control, want), (control[16:], want[16:])):
            dtype = "float64" if len(got) == len(control) else "float32"
            unsigned = np.uint64 if dtype == "float64" else np.uint32
            got, expected = (canonical(dtype, bits.view(unsigned)) for bits in (got, expected))
            count = 2 if dtype == "float64" else len(got)
            assert (got[:count] == expected[:count]).all(), f"step {step}: {got}, not {expected}"


def check_rows(
    machine: Machine,
    core: Core,
    rule: str,
    cases: Sequence[tuple[int, int]],
    watch: Watch | None = None,
) -> None:
    preparation = Preparation(core, rule)

    def prepare(sources: np.ndarray, ranges: np.ndarray, skip: bool, rows: np.ndarray) -> None:
        found_inf = np.array([skip], np.float32)
        memory = Memory([*preparation.arrays, found_inf, rows])
        number = core.rules.index(rule)
        for launch in machine.api.prepare(number, sources, ranges, found_inf, rows):
            machine.run(launch, memory, watch=watch)

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


@slow
def test_every_norm(machine: Machine, core: Core) -> None:
    """All sizes of all dtypes, aligned and not; Inf, NaN, what overflows or is denormal; more
    gradients than a launch takes, and fewer blocks than there are chunks."""
    random = np.random.default_rng(0)
    for blocks, shift in ((None, 0), (3, 1), (1, 0)):
        parts = [(d, many_magnitudes(random, n)) for d in DTYPES for n in [*NORM_SIZES, 0]]
        check_norm(machine, core, parts, [shift] * len(parts), blocks=blocks)
    for dtype in DTYPES:
        for values in [*NORM_SPECIAL[dtype], [np.inf], [-np.inf, 1.0], [np.nan], [0.0]]:
            for scale, found_inf, largest in ((1, False, 1e9), (1024, False, 1e-3), (3, True, 1)):
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
    check_norm(machine, core, [])


@slow
def test_every_row(machine: Machine, core: Core) -> None:
    """Of all options from all kinds of sources after all numbers of steps, and ranges of counts."""
    for rule in core.rules:
        full, room = core.full_launch
        check_rows(
            machine, core, rule, [(1, 0), (0, 1), (full, room), (full + 1, room + 2), (1000, 3)]
        )


@slow
def test_faults_in_the_norm_are_found(machine_of: Callable[[str], Machine], core: Core) -> None:
    random = np.random.default_rng(0)
    parts = [(dtype, many_magnitudes(random, 5000)) for dtype in DTYPES for _ in range(3)]
    shifts = [0, 1, 0] * len(DTYPES)

    def check(machine: Machine, watch: Watch) -> None:
        check_norm(machine, core, parts, shifts, watch=watch)

    find_faults(machine_of("sm_90"), 16, check, 50_000).assert_share(0.7, 0.7)


@slow
@pytest.mark.parametrize("rule", RULES)
def test_faults_in_rows_are_found(
    rule: str, machine_of: Callable[[str], Machine], core: Core
) -> None:
    """Much of a rule's row is zero, whatever is moved where."""

    def check(machine: Machine, watch: Watch) -> None:
        check_rows(machine, core, rule, [(100, 30)], watch)

    find_faults(machine_of("sm_90"), 12, check, 50_000).assert_share(0.6, 0.6)
