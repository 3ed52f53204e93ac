"""The machine code of the kernels, emulated: the bits that the CPU gets.

What is not covered is what only a device has: its scheduler, its memory's order, and the time that
anything takes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from core import checks, coded
from core.coded_streams import FILLS, CodedStreams, training
from core.coding import Coding
from core.library import Core, Kernel
from core.memory import Fill, Streams, extreme, usual

from .emulator import ARGUMENT, Machine, Memory, Watch
from .faults import find_faults

slow = pytest.mark.slow
CODED_SIZES = [4097, 300, 1, 700, 3841]
CODED_ROWS = [(9, 300), (5, 513), (9, 1000), (17, 896)]
"""How many, and how many elements each has, of spans with codes: more than a chunk of blocks."""
FACTOR = 1 / 3  # which float32 does not hold
LEAST_EXECUTED = 0.6  # of a kernel's instructions
# Where little is done besides a division by a root, what is rare of that is nearly half of it.
LEAST_EXECUTED_OF_SHORT = 0.5
FAULT_EVERY = {"float32": 8, "coded": 96}  # instructions
LEAST_FOUND = {"float32": (0.7, 0.0), "coded": (0.6, 0.1)}  # of the faults; took a slow way


CodedSpan = tuple[Coding, int] | tuple[Coding, int, int]


def coded_spans(
    codings: Sequence[Coding], third: int | None = None
) -> tuple[list[CodedSpan], list[tuple[Fill, bool]]]:
    """Of each coding a chunk of whole blocks, aligned, with usual values; of all or a third of them
    blocks that are cut off, misaligned and with any values, too. Also what spans are filled with,
    and whether they are aligned."""
    spans: list[CodedSpan] = [(coding, 4096) for coding in codings]
    kinds: list[tuple[Fill, bool]] = [(usual, True)] * len(codings)
    for i, coding in enumerate(codings):
        # Thirds do not go with any of a coding's three formats.
        if third is None or (i + i // 3 + i // 9) % 3 == third % 3:
            turn = len(spans) + (third or 0)
            spans.append((coding, CODED_SIZES[turn % len(CODED_SIZES)]))
            kinds.append((FILLS[turn // 2 % len(FILLS)], turn % 2 == 0))
    in_codes = [coding for coding in codings if coding.state == "int8"]
    for coding, (count, row) in zip(in_codes, CODED_ROWS, strict=False):
        spans.append((coding, count * row, row))
        kinds.append((training, True))
    return spans, kinds


class Case:
    """Spans of one kernel, and what the CPU makes of them."""

    def __init__(
        self,
        core: Core,
        kernel: Kernel,
        fill: Fill = extreme,
        zero: bool = False,
        control: np.ndarray | None = None,
        codings: Sequence[Coding] | None = None,
    ) -> None:
        """Control: that of a factor of gradients, which rows have none of then. Codings: None: all,
        with other spans for each variant."""
        # Of all options: rows of usual ones have code of their own.
        count = len(checks.options_of(core, kernel))
        self.rows = checks.make_rows(
            core, kernel, count, grad_factor=1 if control is not None else None
        )
        rows = checks.make_rows(
            core, kernel, count, grad_factor=None if control is None else FACTOR
        )
        more = [] if control is None else [control]
        self.memory: Any
        if kernel.dtypes[0] == "coded":
            third = None if codings is not None else kernel.variant
            spans, kinds = coded_spans(codings or coded.CODINGS, third)
            self.memory = CodedStreams(core, kernel, spans, rows, kinds=kinds)
            self.want: Any = self.memory.expected()
            self.touched = Memory([self.memory.memory, self.rows, *more])
            return
        sizes = [1, 0, 3, 17, kernel.chunk + 3, 64, kernel.chunk, 300, 301, 302, 303, 304]
        streams = np.arange(len(kernel.streams))
        shifts = np.stack([k * streams % 16 for k in (0, 1, 5, 3, 0, 2, 5, 0, 0, 0, 0, 0)])
        shifts[3:5] = [[4], [1]]  # all streams alike
        self.memory = Streams(kernel, sizes, shifts, np.arange(len(sizes)) % count, fill)
        if zero:
            self.memory.set_zero(["grad"])
        step = partial(core.cpu_step, rows=rows, isa="baseline")
        self.want = self.memory.after(step)
        self.touched = Memory([*self.memory.arrays, self.rows, *more])

    def check(self, machine: Machine, **options: Any) -> None:
        step = partial(machine.step, rows=self.rows, memory=self.touched, **options)
        what = f"the machine code of {machine.arch}, {options}"
        self.memory.assert_same(self.memory.after(step), self.want, what)


def test_one_kernel_of_each_kind(machine: Machine, core: Core) -> None:
    """Of a rule that divides: of float32, of bfloat16, and some codings of each format."""
    kinds = (("float32",) * 4, ("bfloat16",) * 4)
    plain = [next(k for k in core.kernels if k.dtypes == kind) for kind in kinds]
    for kernel in plain:
        Case(core, kernel).check(machine)
    coded_kernel = next(k for k in core.coded_kernels if k.variant == plain[0].variant)
    Case(core, coded_kernel, codings=coded.SOME_CODINGS).check(machine)


@slow
def test_every_kernel(machine: Machine, core: Core, part: slice) -> None:
    """Sizes around a chunk's, streams aligned together, apart and not at all, Inf, NaN, denormals
    and all magnitudes, with each quick reciprocal and root up to one unit off. A part of half of
    the kernels of each architecture; the halves have all variants and combinations of dtypes."""
    for kernel in core.kernels[[*ARGUMENT].index(machine.arch) :: 2][part]:
        Case(core, kernel).check(machine)


def test_every_coding_has_every_kind_of_span(core: Core) -> None:
    """In some kernel."""
    codings, formats = set(), set()
    for kernel in core.coded_kernels:
        spans, kinds = coded_spans(coded.CODINGS, kernel.variant)
        for (coding, size, *_), (fill, aligned) in list(zip(spans, kinds, strict=True))[
            len(coded.CODINGS) :
        ]:
            codings.add(coding)
            formats |= {(coding.state, fill, aligned), (coding.param, fill), (coding.grad, fill)}
            formats |= {(coding.state, size)} if size in CODED_SIZES else set()
    states, params, grads = (
        {getattr(coding, of) for coding in coded.CODINGS} for of in ("state", "param", "grad")
    )
    assert codings == set(coded.CODINGS)
    assert formats >= set(product(states, FILLS, (False, True))) | set(product(states, CODED_SIZES))
    assert formats >= set(product(params, FILLS)) | set(product(grads, FILLS))


@slow
def test_every_coded_kernel(machine: Machine, core: Core, part: slice) -> None:
    """Every coding. A part of half of the kernels of each architecture."""
    for kernel in core.coded_kernels[[*ARGUMENT].index(machine.arch) :: 2][part]:
        Case(core, kernel).check(machine)


@slow
def test_usual_and_zero_gradients(machine: Machine, core: Core, part: slice) -> None:
    for kernel in core.kernels[::6][part]:
        for zero in (False, True):
            Case(core, kernel, usual, zero).check(machine)


@slow
def test_few_blocks_take_all_chunks(machine: Machine, core: Core, part: slice) -> None:
    for kernel in [*core.kernels[::10][part], *core.coded_kernels[::4][part]]:
        Case(core, kernel).check(machine, blocks=3)


@slow
def test_rows_and_a_factor_in_memory(machine: Machine, core: Core, part: slice) -> None:
    """Of the device, where a capturable step or clipping has worked them out. A step that is
    skipped there changes nothing."""
    api = machine.api
    control = api.control(api.factor(FACTOR))
    skips = api.control(api.factor(FACTOR, found_inf=np.ones(1, np.float32)))
    for kernel in [*core.kernels[::5][part], *core.coded_kernels[::4][part]]:
        case = Case(core, kernel, control=control)
        case.check(machine, rows_in_memory=True, control=control)
    for kernel in [*core.kernels[::10][part], *core.coded_kernels[::4][part]]:
        case = Case(core, kernel, control=skips)
        before = case.memory.after(lambda spans: None)
        step = partial(machine.step, rows=case.rows, memory=case.touched, control=skips)
        case.memory.assert_same(case.memory.after(step), before, "a skipped step")


@slow
def test_most_instructions_have_been_executed(machine: Machine, core: Core, part: slice) -> None:
    """But for what is called for rare divisions and roots."""
    # Of rules whose options have usual rows and others, which have code of their own.
    kernels = [kernel for kernel in core.kernels if kernel.rule in ("adam", "sgd")]
    for kernel in [*kernels[::4][part], core.coded_kernels[0]]:
        Case(core, kernel, usual).check(machine, rows_in_memory=True)
        Case(core, kernel).check(machine)
        control = machine.api.control(machine.api.factor(FACTOR))
        Case(core, kernel, control=control).check(machine, control=control)
        for key in (key for key in machine.code if key[0] == kernel.index):
            share = machine.executed_share(key)
            is_short = kernel.rule == "adam" and "exp_avg" not in kernel.states
            assert share >= (LEAST_EXECUTED_OF_SHORT if is_short else LEAST_EXECUTED), (
                f"{kernel}: {share:.0%}"
            )


@slow
@pytest.mark.parametrize("kind", ["float32", "coded"])
def test_planted_faults_are_found(
    kind: str, machine_of: Callable[[str], Machine], core: Core
) -> None:
    # Of a rule that cannot be cautious: what a row of Adam's says of that is of no effect in two of
    # the three ways through a kernel, which usual rows take.
    kernel = next(
        k
        for k in [*core.kernels, *core.coded_kernels]
        if k.dtypes == (kind,) * 4 and "cautious" not in checks.options_of(core, k)[0]
    )
    case = Case(core, kernel, codings=coded.SOME_CODINGS * 3)

    def check(machine: Machine, watch: Watch) -> None:
        case.check(machine, watch=watch)

    found = find_faults(machine_of("sm_90"), FAULT_EVERY[kind], check, 50_000)
    # Others are in steps that correct what the one before has got wrong, in bits that do not matter
    # and, of codes, in what makes a block rare, which is then done again in another way.
    found.assert_share(*LEAST_FOUND[kind])
