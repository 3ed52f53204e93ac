"""The machine code of the kernels that measure parameters, emulated, and of steps by their sums."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from core.coded import SOME_CODINGS
from core.coded_streams import CodedStreams
from core.library import Core, Kernel
from core.measured import measured_options
from core.memory import Streams, extreme, usual
from core.options import RULES

from .emulator import Machine, Memory

slow = pytest.mark.slow
SIZES = [1, 0, 63, 64, 65, 300, 1, 130]  # the one before the last is not measured
CHUNK = 16384


def check(machine: Machine, core: Core, kernel: Kernel, large: bool = False) -> None:
    """The bits of the CPU, of each set of options; several chunks and a chunk that is cut off."""
    for number, options in enumerate(measured_options(core, kernel)):
        rows = core.row(kernel, options, 7, False, grad_factor=0.5).reshape(1, -1)
        streams: Any
        if kernel.dtypes[0] == "coded":
            spans = [(coding, size) for coding in SOME_CODINGS for size in (300, 256, 1, 90)]
            spans += [(SOME_CODINGS[0], 7 * 300, 300)]  # type: ignore[list-item]
            streams = CodedStreams(core, kernel, spans, rows, [usual], arbitrary=False)
            streams.spans["measured"] = np.arange(len(spans))
            arrays = [streams.memory]
        else:
            sizes = [*SIZES, CHUNK + 40] if large else SIZES
            shifts = np.random.default_rng(number).integers(0, 16, (len(sizes), 9))
            fill = extreme if number % 2 else usual
            streams = Streams(kernel, sizes, shifts[:, : len(kernel.streams)], fill=fill)
            owners = [0, 1, 2, 3, 3, 4, -1, 5, 6]
            streams.spans["measured"] = owners[: len(sizes)]
            arrays = [*streams.arrays]
        want = streams.after(partial(core.measured_step, rows=rows, isa="baseline"))
        count = int(streams.spans["measured"].max()) + 1
        chunks = int((-(-streams.spans["numel"] // CHUNK)).sum())
        sums, measured = np.full((chunks, core.sums), np.nan), np.full((count, 9), np.nan)
        memory = Memory([*arrays, rows, sums, measured])
        step = partial(
            machine.measured_step, rows=rows, memory=memory, sums=sums, measured=measured
        )
        what = f"the machine code of {machine.arch}, {options}"
        streams.assert_same(streams.after(step), want, what)


def of_rule(core: Core, rule: str) -> list[Kernel]:
    return [k for k in [*core.kernels, *core.coded_kernels] if k.rule == rule]


def test_a_measured_step(machine: Machine, core: Core) -> None:
    for kernel in of_rule(core, "stable_adamw"):
        if kernel.dtypes[0] in ("float32", "coded"):
            check(machine, core, kernel)


@slow
@pytest.mark.parametrize("rule", RULES)
def test_every_measured_step(machine: Machine, core: Core, part: slice, rule: str) -> None:
    """A part of half of the kernels for each architecture."""
    for kernel in of_rule(core, rule)[machine.arch == "sm_100" :: 2][part]:
        check(machine, core, kernel, large=kernel.dtypes[0] == "float32")
