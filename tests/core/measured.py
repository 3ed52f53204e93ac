"""Checks of steps that measure parameters as a whole before they update them."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from .checks import ROUNDING, SMALLEST
from .coded import SOME_CODINGS
from .coded_streams import CodedStreams
from .coding import Coding
from .library import BACKWARD, FORWARD, THREADED, Core, Kernel
from .memory import Streams, extreme, to_values, usual
from .options import NEVER_NEGATIVE, RULES, Options

CHUNK = 16384
# One of them is more than a thread measures and updates by itself.
SIZES = [0, 1, 63, 64, 65, 300, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 70, 17 * CHUNK + 5, 129]
CODED_SIZES = [1, 64, 255, 256, 257, 700, CHUNK, CHUNK + 300]
CODED_ROWS = [(9, 63), (9, 65), (70, 300), (5, 511)]

Step = Callable[[np.ndarray], np.ndarray]


def overflown(random: np.random.Generator, stream: str, size: int) -> np.ndarray:
    """Averages of squares of which some have overflowed."""
    values = usual(random, stream, size)
    if stream in NEVER_NEGATIVE:
        values[::97] = np.inf
    return values


def measured_options(core: Core, kernel: Kernel) -> list[Options]:
    return [
        options
        for options in RULES[kernel.rule].all_options
        if core.variant(kernel.rule, options) == kernel.variant
        and core.measures(kernel.rule, options)
    ]


def all_ways(core: Core, rows: np.ndarray) -> Iterator[tuple[str, Step]]:
    """Every instruction set, with parameters measured and updated one after the other or together,
    in any pieces; and the bodies of the CUDA kernels."""
    pieces = [(1, FORWARD), (2, THREADED), (7, BACKWARD), (50, 2)]
    for isa, together, (count, order) in product(core.isas, (False, True), pieces):
        way = {"isa": isa, "together": together, "pieces": count, "order": order}
        yield f"{way}", partial(core.measured_step, rows=rows, **way)
    for order in (FORWARD, BACKWARD, 3):
        tile = partial(core.measured_step, rows=rows, isa=None, order=order)
        yield f"the tile in order {order}", tile


def check_ways(
    core: Core,
    memory: Streams | CodedStreams,
    rows: np.ndarray,
    options: Options,
) -> None:
    """The same bits in every way, of what is measured and of what is made of it."""
    found: list[np.ndarray] = []

    def noted(step: Step) -> Callable[[np.ndarray], None]:
        return lambda spans: found.append(step(spans))

    first: Any = memory.after(noted(partial(core.measured_step, rows=rows, isa="baseline")))
    for way, step in all_ways(core, rows):
        got: Any = memory.after(noted(step))
        memory.assert_same(got, first, f"{options} by {way}")
        doubles = 3 * core.sums + 1  # the last ones are pairs of float32
        sums, want = (each[:, :doubles] for each in (found.pop(), found[0]))
        if "'together': True" not in way:  # these are not told
            same = (sums == want) | (np.isnan(sums) & np.isnan(want))
            assert same.all(), f"{options} by {way}: {sums[~same]}, not {want[~same]}"


def check_measured(core: Core, kernel: Kernel) -> None:
    """Against the formulas in float64, and the same bits every way. Every fifth span is not
    measured, and some parameters are two spans."""
    count = len(SIZES)
    owners = np.arange(count)
    owners[5] = owners[4]
    owners[7] = owners[6]
    owners[9] = owners[8]
    numbers = np.unique(np.where(owners % 5 == 3, -1, owners))
    measured = np.array([-1 if o % 5 == 3 else np.searchsorted(numbers[1:], o) for o in owners])
    shifts = np.random.default_rng(0).integers(0, 16, (count, len(kernel.streams)))
    for number, options in enumerate(measured_options(core, kernel)):
        streams = Streams(kernel, SIZES, shifts, seed=1)
        streams.spans["measured"] = measured
        # Gradients that are smaller than their averages say, and larger.
        factor = (0.5, 4.0)[number % 2]
        rows = core.row(kernel, options, 7, False, grad_factor=factor).reshape(1, -1)
        old = [
            to_values(dtype, array[live])
            for dtype, array, live in zip(kernel.dtypes, streams.before, streams.live, strict=True)
        ]
        factor = -factor if options["maximize"] else factor
        want = [array.copy() for array in old]
        ends = np.cumsum(SIZES)
        for owner in range(count):
            places = [
                np.arange(ends[i] - SIZES[i], ends[i]) for i in range(count) if owners[i] == owner
            ]
            if not places:
                continue
            at = np.concatenate(places)
            whole = owner % 5 != 3
            update = RULES[kernel.rule].whole if whole else RULES[kernel.rule].update
            states = {name: old[2 + k][at] for k, name in enumerate(kernel.states)}
            param, new = update(options, 7, False, old[0][at], factor * old[1][at], states)
            want[0][at] = param
            for k, name in enumerate(kernel.states):
                want[2 + k][at] = new[name]
        expected = streams.after(partial(core.measured_step, rows=rows, isa="baseline"))
        for i, (dtype, bits) in enumerate(zip(kernel.dtypes, expected, strict=True)):
            computed = ROUNDING["float64" if kernel.dtypes[0] == "float64" else "float32"]
            bound = ROUNDING[dtype] * np.abs(want[i]) + SMALLEST[dtype]
            bound += 16 * computed * np.abs(want[i]).max()
            error = np.abs(to_values(dtype, bits) - want[i])
            assert (error <= bound).all(), (
                f"{kernel}, {options}: {kernel.streams[i]} is off by "
                f"{(error / bound).max():.3g} bounds at {np.argmax(error / bound)}"
            )
        for fill in (usual, extreme, overflown):
            streams = Streams(kernel, SIZES, shifts, fill=fill, seed=1)
            streams.spans["measured"] = measured
            check_ways(core, streams, rows, options)


def check_measured_coded(core: Core, kernel: Kernel) -> None:
    """Likewise of spans with a Coding, of which parameters with an exact master are known."""
    codes = [*SOME_CODINGS, Coding("bfloat16_and_16", "float32", "bfloat16")]
    in_rows = [
        (code, count * row, row)
        for code, (count, row) in product(codes, CODED_ROWS)
        if code.state == "int8"
    ]
    spans = [*product(codes, CODED_SIZES), *in_rows]
    for options in measured_options(core, kernel):
        rows = core.row(kernel, options, 7, False, grad_factor=0.5).reshape(1, -1)
        memory = CodedStreams(core, kernel, spans, rows, [usual], arbitrary=False)
        memory.spans["measured"] = np.arange(len(spans))
        want = memory.after(partial(core.measured_step, rows=rows, isa="baseline"))
        factor = -0.5 if options["maximize"] else 0.5
        for i, (code, size, *_) in enumerate(spans):
            if code.param not in ("float32", "bfloat16_and_16"):
                continue
            present = memory.present(i)
            p, g, *states = (
                array[present].astype(np.float64) for array in memory.decoded(memory.before, i)
            )
            of_name = dict(zip(kernel.states, states, strict=True))
            param, _ = RULES[kernel.rule].whole(options, 7, False, p, factor * g, of_name)
            assert len(param) == size
            error = np.abs(memory.decoded(want, i)[0][present] - param)
            assert (error <= 16 * ROUNDING["float32"] * np.abs(param).max()).all(), (
                f"{kernel}, {options}, {code} with {size} elements: {error.max()}"
            )
        check_ways(core, memory, rows, options)
