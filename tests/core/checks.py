"""Checks of kernels: each raises AssertionError where a build of the core does not pass.

The tests run them on the core as it is; the mutation check runs them on builds with a fault.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from .library import BACKWARD, FORWARD, THREADED, Core, Kernel
from .memory import Streams, extreme, to_values
from .options import RULES, Options

T = TypeVar("T")


Step = Callable[[np.ndarray], object]


SIZES = [0, 1, 3, 15, 17, 1000]


ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


SMALLEST = {"float64": 0.0, "float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-25}


def options_of(core: Core, kernel: Kernel) -> list[Options]:
    options = RULES[kernel.rule].all_options
    return [o for o in options if core.variant(kernel.rule, o) == kernel.variant]


GRIDS = [(0, FORWARD), (0, BACKWARD), (0, 2), (1, FORWARD), (3, 3), (1000, 4)]
"""Numbers of blocks and orders that the tile is run with."""


def make_rows(
    core: Core, kernel: Kernel, count: int, seed: int = 0, grad_factor: float | None = None
) -> np.ndarray:
    """Rows that all differ: in options, step, first and, unless it is given, gradient factor."""
    random = np.random.default_rng(seed)
    options = options_of(core, kernel)
    return np.stack(
        [
            core.row(
                kernel,
                options[i % len(options)],
                step=int(random.integers(1, 1000)),
                first=bool(random.random() < 0.3),
                grad_factor=random.uniform(0.5, 2) if grad_factor is None else grad_factor,
            )
            for i in range(count)
        ]
    )


def all_ways(core: Core, rows: np.ndarray) -> Iterator[tuple[str, Step]]:
    """Every instruction set, and the CUDA kernel with grids of several shapes and orders."""
    for isa in core.isas:
        yield isa, partial(core.cpu_step, rows=rows, isa=isa)
    for blocks, order in GRIDS:
        name = f"the tile with {blocks or 'exactly enough'} blocks in order {order}"
        yield name, partial(core.tile_step, rows=rows, blocks=blocks, order=order)


def flushing_denormals(step: Callable[[np.ndarray], T]) -> Callable[[np.ndarray], T]:
    """The step by a thread that flushes denormals, which must make no difference to it."""

    def run(spans: np.ndarray) -> T:
        torch.set_flush_denormal(True)
        try:
            return step(spans)
        finally:
            torch.set_flush_denormal(False)

    return run


def gap_of_signs(
    update: Callable[..., Any], factor: float, old: Sequence[np.ndarray], names: Sequence[str]
) -> np.ndarray:
    """How far apart steps may end whose direction hangs on the sign of what is nearly zero."""
    ends = []
    for nearly in (1 - 1e-5, 1 + 1e-5):
        states = dict(zip(names, old[2:], strict=True))
        ends.append(update(old[0], nearly * factor * old[1], states)[0])
    apart = np.abs(ends[1] - ends[0])
    apart[apart < 1e-3 * np.abs(ends[0] - old[0]).max()] = 0
    assert np.mean(apart > 0) < 0.01  # few
    return apart


def check_reference(core: Core, kernel: Kernel) -> None:
    """One step from nothing, and one amidst training, against the formulas in float64."""
    update = RULES[kernel.rule].update
    for options in options_of(core, kernel):
        for step in (1, 7):
            first = step == 1
            streams = Streams(kernel, [*SIZES, kernel.chunk + 3], seed=step)
            if first:
                streams.set_zero(kernel.states)
            rows = core.row(kernel, options, step, first, grad_factor=0.5).reshape(1, -1)
            old = [
                to_values(dtype, array[live])
                for dtype, array, live in zip(
                    kernel.dtypes, streams.before, streams.live, strict=True
                )
            ]
            states = dict(zip(kernel.states, old[2:], strict=True))
            factor = -0.5 if options["maximize"] else 0.5
            param, states = update(options, step, first, old[0], factor * old[1], states)
            want = {"param": param, "grad": old[1]} | states
            apart = gap_of_signs(partial(update, options, step, first), factor, old, kernel.states)

            tile = ("the tile", partial(core.tile_step, rows=rows))
            ways = [(isa, partial(core.cpu_step, rows=rows, isa=isa)) for isa in core.isas]
            for way, run in [*ways, tile]:
                got = streams.after(run)
                for stream, dtype, bits in zip(kernel.streams, kernel.dtypes, got, strict=True):
                    expected = want[stream]
                    computed = ROUNDING["float64" if kernel.dtypes[0] == "float64" else "float32"]
                    bound = ROUNDING[dtype] * np.abs(expected) + SMALLEST[dtype]
                    bound += 16 * computed * np.abs(expected).max()
                    bound += apart if stream == "param" else 0
                    error = np.abs(to_values(dtype, bits) - expected)
                    assert (error <= bound).all(), (
                        f"{kernel} by {way}, step {step}, {options}: {stream} is off by "
                        f"{(error / bound).max():.3g} bounds at {np.argmax(error / bound)}"
                    )


def check_same_bits(core: Core, kernel: Kernel) -> None:
    """The same bits every way, for all sizes, aligned and misaligned, with special values."""
    chunk, streams = kernel.chunk, len(kernel.streams)
    sizes = [*SIZES, chunk - 1, chunk, chunk + 1, 2 * chunk + 3]
    together = [[shift] * streams for shift in (0, 1, 2, 4, 7)]
    apart = [[(k * i) % 16 for i in range(streams)] for k in (1, 2, 5)] + [
        [8] + [0] * (streams - 1),
        [0] * (streams - 1) + [1],
    ]
    shifts = np.repeat(np.array(together + apart), len(sizes), axis=0)
    numel = sizes * (len(together) + len(apart))
    rows = make_rows(core, kernel, 7)
    memory = Streams(kernel, numel, shifts, np.arange(len(numel)) % len(rows), extreme)
    want = memory.after(partial(core.cpu_step, rows=rows, isa="baseline"))
    for way, step in all_ways(core, rows):
        memory.assert_same(memory.after(step), want, way)
    for isa in core.isas:
        step = flushing_denormals(partial(core.cpu_step, rows=rows, isa=isa))
        memory.assert_same(memory.after(step), want, f"{isa} where denormals are flushed")


def check_division(core: Core, kernel: Kernel) -> None:
    """The same bits however a step is cut into pieces, in whatever order or thread they run."""
    sizes = [1000, 100003, 17, 64, 3, 500]
    shifts = np.arange(len(sizes) * len(kernel.streams)).reshape(len(sizes), -1) % 16
    rows = make_rows(core, kernel, 2)
    memory = Streams(kernel, sizes, shifts, np.arange(len(sizes)) % 2, extreme)
    want = memory.after(partial(core.cpu_step, rows=rows, isa="baseline"))

    total = sum(sizes)
    even = [(np.linspace(0, total, n + 1).astype(int), THREADED) for n in (1, 2, 3)]
    borders = np.cumsum([0, *sizes])
    near = np.concatenate([borders + i for i in (-257, -256, -64, -1, 0, 1, 64, 255, 256)])
    random = np.random.default_rng(0).integers(0, total, 50)
    cuts = np.unique(np.concatenate([near, random, [0, 1, total]]).clip(0, total))
    for isa in core.isas:
        for places, order in [*even, (cuts, BACKWARD), (cuts, 2)]:
            step = partial(core.cpu_step, rows=rows, isa=isa, cuts=places, order=order)
            memory.assert_same(
                memory.after(step), want, f"{isa} in {len(places) - 1} pieces, order {order}"
            )
    for blocks, order in [(0, 2), (3, BACKWARD)]:
        step = partial(core.tile_step, rows=rows, blocks=blocks, order=order)
        memory.assert_same(memory.after(step), want, f"the tile with {blocks} blocks")


def check_many_spans(core: Core, kernel: Kernel) -> None:
    """2000 spans, more than one launch takes, with rows that change at nearly every span."""
    random = np.random.default_rng(0)
    sizes = random.integers(0, 40, 2000)
    shifts = random.integers(0, 16, (len(sizes), len(kernel.streams)))
    rows = make_rows(core, kernel, 23)
    which = np.where(random.random(len(sizes)) < 0.2, 0, random.integers(0, 23, len(sizes)))
    memory = Streams(kernel, sizes, shifts, which, extreme)
    want = memory.after(partial(core.cpu_step, rows=rows, isa="baseline"))
    for isa in core.isas:
        got = memory.after(partial(core.cpu_step, rows=rows, isa=isa))
        memory.assert_same(got, want, isa)
    for blocks, order in [(0, BACKWARD), (3, FORWARD)]:
        memory.reset()
        launches = core.tile_step(memory.spans, rows, blocks, order)
        assert launches >= 3, f"{kernel}: {launches} launches"
        memory.assert_same(memory.result(), want, f"the tile with {blocks} blocks")


def check_memory(core: Core, kernel: Kernel) -> None:
    """Rows, a gradient factor or both in the device's memory: the bits that the CPU gets with rows
    which are scaled by that factor. A step to be skipped changes nothing."""
    random = np.random.default_rng(0)
    chunk = kernel.chunk
    sizes = np.append(random.integers(0, 40, 1000), [chunk - 1, chunk, chunk + 1, 2 * chunk + 3])
    shifts = random.integers(0, 16, (len(sizes), len(kernel.streams)))
    shifts[::2] = shifts[::2, :1]
    which = random.integers(0, 7, len(sizes))
    memory = Streams(kernel, sizes, shifts, which, extreme)
    factor = 1 / 3  # which float32 does not hold
    plain = make_rows(core, kernel, 7, grad_factor=1)
    scaled = make_rows(core, kernel, 7, grad_factor=factor)
    want = memory.after(partial(core.cpu_step, rows=scaled, isa="baseline"))

    def check(
        rows: np.ndarray, own_factor: float | None, in_memory: bool, blocks: int, order: int
    ) -> None:
        memory.reset()
        launches = core.tile_step_from_memory(
            memory.spans, rows, own_factor, rows_in_memory=in_memory, blocks=blocks, order=order
        )
        what = f"with factor {own_factor}, rows in memory: {in_memory}, blocks: {blocks}"
        assert launches >= 2 + (own_factor is not None), f"{kernel} {what}: {launches} launches"
        memory.assert_same(memory.result(), want, f"the tile {what}, in order {order}")

    for blocks, order in GRIDS[3:]:
        check(plain, factor, True, blocks, order)
    check(plain, factor, False, 0, BACKWARD)
    check(scaled, None, True, 0, 2)

    for in_memory in (True, False):
        memory.reset()
        core.tile_step_from_memory(memory.spans, plain, factor, True, in_memory)
        for stream, array, before in zip(kernel.streams, memory.arrays, memory.before, strict=True):
            assert np.array_equal(array, before), f"{kernel}: a skipped step changes {stream}"


def find(core: Core, rule: str, states: tuple[str, ...], *dtypes: str) -> list[Kernel]:
    return [
        k
        for k in core.kernels
        if (k.rule, k.states) == (rule, states) and k.dtypes[: len(dtypes)] == dtypes
    ]


CHECKS: dict[str, Callable[[Core, Kernel], None]] = {
    "reference": check_reference,
    "same bits": check_same_bits,
    "division": check_division,
    "many spans": check_many_spans,
    "memory": check_memory,
}
"""Those that are run for each kernel."""

OF_ANY_RULE = (check_division, check_many_spans, check_memory)
"""What they look at is the same for all rules."""


def taken(kernels: Sequence[Kernel], check: Callable[[Core, Kernel], None]) -> Sequence[Kernel]:
    """Those to run a check for: all, or a third with all variants and all combinations of dtypes,
    as the number of combinations is no multiple of three."""
    return kernels[::3] if check in OF_ANY_RULE else kernels
