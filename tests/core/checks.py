"""What a build of the core has to pass: each check raises AssertionError where it does not.

The tests run them on the core as it is; the mutation check runs them on builds with a fault.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TypeVar

import numpy as np
import torch

from .library import (
    BACKWARD,
    DTYPES,
    FORWARD,
    THREADED,
    Core,
    Kernel,
)
from .memory import (
    INFINITY,
    QUIET_NAN,
    UNSIGNED,
    Gradients,
    Streams,
    canonical,
    extreme,
    to_bits,
    to_values,
)
from .options import RULES, Options
from .preparation import Preparation

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

            tile = ("the tile", partial(core.tile_step, rows=rows))
            ways = [(isa, partial(core.cpu_step, rows=rows, isa=isa)) for isa in core.isas]
            for way, run in [*ways, tile]:
                got = streams.after(run)
                for stream, dtype, bits in zip(kernel.streams, kernel.dtypes, got, strict=True):
                    expected = want[stream]
                    computed = ROUNDING["float64" if kernel.dtypes[0] == "float64" else "float32"]
                    bound = ROUNDING[dtype] * np.abs(expected) + SMALLEST[dtype]
                    bound += 16 * computed * np.abs(expected).max()
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


NORM_SIZES = [1, 3, *(size + i for size in (128, 256, 1024, 16384) for i in (-1, 0, 1))]
NORM_SIZES += [3 * 16384 + 17]


def norm_ways(core: Core) -> Iterator[tuple[str, Callable[[np.ndarray], float]]]:
    for isa in core.isas:
        yield isa, partial(core.cpu_sum_of_squares, isa=isa)
    yield "the tile", core.tile_sum_of_squares


def add_tree(values: np.ndarray) -> np.ndarray:
    """The sums along the last axis, of halves and halves of halves."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def add_lanes(values: np.ndarray, lanes: int) -> np.ndarray:
    """Lane i adds up the values i, i + lanes, i + 2 * lanes and so on, one after the other."""
    padded = np.zeros((max(1, -(-len(values) // lanes)), lanes))
    padded.ravel()[: len(values)] = values
    sums: np.ndarray = np.add.accumulate(padded)[-1]
    return sums


def ordered_sum(core: Core, gradients: Gradients) -> float:
    """The sum of squares, added up in the order that norm.h sets out."""
    sums = []
    with np.errstate(all="ignore"):
        for dtype, values in zip(gradients.dtypes, gradients.values, strict=True):
            slots = 16 // UNSIGNED[dtype]().itemsize
            for begin in range(0, len(values), core.norm_chunk):
                lanes = add_lanes(values[begin : begin + core.norm_chunk] ** 2, 32 * slots)
                sums.append(add_tree(add_tree(lanes.reshape(32, slots))))
        return float(add_tree(add_lanes(np.array(sums), 256)))


def bits_of(value: float) -> int:
    """Its bits, the same ones for each NaN."""
    return int(canonical("float64", np.array([value]).view(np.uint64))[0])


def check_sum(core: Core, gradients: Gradients, what: str) -> float:
    """The sum of squares has the same bits every way, and is right. Returns it."""
    want = ordered_sum(core, gradients)
    with np.errstate(all="ignore"):
        # Exact for all dtypes but float64, where each square is off by 2^-53 of it at most.
        exact = math.fsum(np.concatenate([values**2 for values in gradients.values]))
    if math.isfinite(exact):
        assert abs(want - exact) <= 1e-12 * exact, f"{what}: {want}, not {exact}"
    else:
        assert bits_of(want) == bits_of(exact), f"{what}: {want}, not {exact}"
    thirds = np.linspace(0, gradients.chunks, 4).astype(int)
    runs = list(norm_ways(core))
    for isa in core.isas:
        whole = partial(core.cpu_sum_of_squares, isa=isa)
        threads = partial(whole, cuts=thirds, order=THREADED)
        runs += [(f"{isa} where denormals are flushed", flushing_denormals(whole))]
        runs += [(f"{isa} in threads", threads)]
        runs += [(f"{isa} in threads that flush denormals", flushing_denormals(threads))]
    for way, run in runs:
        got = run(gradients.spans)
        assert bits_of(got) == bits_of(want), f"{what} by {way}: {got}, not {want}"
    return want


def many_magnitudes(random: np.random.Generator, size: int) -> np.ndarray:
    """Numbers whose squares cannot be added up without rounding."""
    return random.standard_normal(size) * 2.0 ** random.integers(-20, 12, size)


# What the square of a float32 could not hold, or a thread that flushes denormals.
NORM_SPECIAL: dict[str, list[list[float]]] = {
    "float32": [[1e30], [3.4e38, 1e30, -1.0], [1e-30], [1e-45, -1e-40], [1.1e-38, 1e-45]],
    "float64": [[1e150], [1e-160, 2e-161], [1e-154] * 3, [5e-324], [1e200], [1e-200, 1.0]],
    "bfloat16": [[1e30], [3.3e38, -1e30], [1e-30], [1e-40, -9e-41], [1.1e-38, 1e-40]],
    "float16": [[65504.0], [6e-8], [6e-5, -6e-8], [-65504.0, 6e-8]],
}


def check_sum_of_squares(core: Core) -> None:
    """All sizes of all dtypes by themselves and together, aligned and misaligned; Inf, NaN, and
    what overflows or is denormal; many gradients, cut into pieces of many kinds."""
    random = np.random.default_rng(0)
    chunk = core.norm_chunk
    assert chunk == 16384, "the sizes are those around a chunk"
    together: list[tuple[str, np.ndarray]] = []
    shifts: list[int] = []
    for dtype, size, shift in product(DTYPES, [*NORM_SIZES, 0], (0, 1, 3)):
        part = (dtype, many_magnitudes(random, size))
        together.append(part)
        shifts.append(shift)
        if size > 0:
            what = f"{size} elements of {dtype}, shifted by {shift}"
            check_sum(core, Gradients(chunk, [part], [shift]), what)
            equal = [(dtype, np.full(size, 3.0))]
            total = check_sum(core, Gradients(chunk, equal, [shift]), f"{what}, all equal")
            assert total == 9 * size, f"{what}: {total}"
    order = [int(i) for i in random.permutation(len(together))]
    mixed = Gradients(chunk, [together[i] for i in order], [shifts[i] for i in order])
    check_sum(core, mixed, "all sizes of all dtypes")

    for dtype in DTYPES:
        special = [*NORM_SPECIAL[dtype], [math.inf], [-math.inf, 1.0], [math.nan]]
        special += [[math.inf, math.nan]]
        for values in special:
            for ordinary in (0, 1000):  # where they are, and where none of theirs can be lost
                numbers = np.concatenate([many_magnitudes(random, ordinary), values])
                what = f"{values} among {ordinary} elements of {dtype}"
                check_sum(core, Gradients(chunk, [(dtype, numbers)], [1]), what)

    # More than two launches take: an argument of 32 KiB has no room for more than 1024 of them.
    # Runs of empty ones at the front, at the back and in between.
    sizes = np.where(random.random(2500) < 0.3, 0, random.integers(0, 300, 2500))
    sizes[::50] = random.choice(NORM_SIZES, 50)
    sizes[[0, 1, 1000, 1001, 1002, -2, -1]] = 0
    parts = [(str(random.choice(DTYPES)), many_magnitudes(random, size)) for size in sizes]
    many = Gradients(chunk, parts, random.integers(0, 8, len(parts)))
    want = check_sum(core, many, "many gradients")
    everywhere = np.arange(many.chunks + 1)
    some = np.unique(np.append(random.integers(0, many.chunks, 100), [0, many.chunks]))
    even = [(np.linspace(0, many.chunks, n + 1).astype(int), THREADED) for n in (1, 2, 7)]
    for isa in core.isas:
        for cuts, way in [*even, (everywhere, BACKWARD), (everywhere, 2), (some, 3)]:
            got = core.cpu_sum_of_squares(many.spans, isa, cuts, way)
            assert got == want, f"{isa} in {len(cuts) - 1} pieces, order {way}: {got}, not {want}"


def check_prepare(core: Core) -> None:
    """Rows that are worked out from sources are those that the host works out from the counts as
    they are before they are advanced. A step to be skipped leaves all counts as they are."""
    for rule in core.rules:
        preparation = Preparation(core, rule)
        every = (len(preparation.sources), len(preparation.ranges))
        full, room = core.full_launch
        around = [(full, room), (full, room + 1), (full + 1, room + 2)]
        for sources, ranges in [(1, 0), (0, 1), (0, 3000), *around, every]:
            preparation.check(sources, ranges, skip=True)
            preparation.check(sources, ranges)
        preparation.check(*every)


def float32_samples() -> np.ndarray:
    """Four million floats: all sign, exponent and upper mantissa bits, with lower ones around
    the ties of both 16-bit formats, subnormal ones included."""
    random = np.random.default_rng(0)
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x5000, 0x7FFF, 0x8000]
    lower += [0x8001, 0x9000, 0xB000, 0xF000, 0xFFFF]
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    grid = (upper[:, None] | np.array(lower, np.uint32)).ravel()
    # What float16 holds as a subnormal has its tie at a bit that depends on the exponent.
    below = random.integers(0x32000000, 0x39000000, 1 << 21, dtype=np.uint32)
    bit = np.uint32(1) << random.integers(12, 25, len(below), dtype=np.uint32)
    ties = (below & ~(bit - 1)) | bit
    ties += random.integers(-1, 2, len(ties)).astype(np.uint32)
    signs = random.integers(0, 2, len(ties), dtype=np.uint32) << 31
    return np.concatenate([grid, ties | signs, random.integers(0, 1 << 32, 1 << 20, np.uint32)])


def find(core: Core, rule: str, states: tuple[str, ...], *dtypes: str) -> list[Kernel]:
    return [
        k
        for k in core.kernels
        if (k.rule, k.states) == (rule, states) and k.dtypes[: len(dtypes)] == dtypes
    ]


def check_conversions(core: Core) -> None:
    """Rounding to 16 bits and back, in the loops themselves, against torch and numpy."""
    sgd = RULES["sgd"].defaults
    samples = float32_samples()
    values = torch.from_numpy(samples.view(np.float32))
    for dtype in ("bfloat16", "float16"):
        expected = values.to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)
        expected = np.where(np.isnan(values.numpy()), np.uint16(QUIET_NAN[dtype]), expected)
        if dtype == "float16":
            with np.errstate(over="ignore", under="ignore"):
                other = values.numpy().astype(np.float16)
            assert np.array_equal(
                expected[~np.isnan(other)], other.view(np.uint16)[~np.isnan(other)]
            )
        for kernel in find(core, "sgd", (), dtype, "float32"):
            # -0.0 - (-1 * g) is g, whatever its sign.
            rows = core.row(kernel, sgd | {"lr": -1.0}).reshape(1, -1)
            memory = Streams(kernel, [len(samples)])
            memory.before[0][memory.live[0]] = 0x8000
            memory.before[1][memory.live[1]] = samples
            for way, step in [*all_ways(core, rows)][: len(core.isas) + 1]:
                memory.reset()
                step(memory.spans)
                got = memory.arrays[0][memory.live[0]]
                wrong = np.flatnonzero(got != expected)
                assert not len(wrong), (
                    f"{dtype} by {way}: {len(wrong)} wrong, first {samples[wrong[0]]:#x} -> "
                    f"{got[wrong[0]]:#x}, not {expected[wrong[0]]:#x}"
                )

        # Sums of two neighbouring magnitudes are exact in float32, and every fourth is a tie.
        random = np.random.default_rng(0)
        one = to_bits(dtype, np.ones(1))[0]
        codes = one + random.integers(0, 1 << 11, (2, 10_001), dtype=np.uint16)
        codes |= random.integers(0, 2, codes.shape, dtype=np.uint16) << 15
        sums = torch.from_numpy(sum(to_values(dtype, code).astype(np.float32) for code in codes))
        expected = sums.to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)
        for kernel in find(core, "sgd", (), dtype, dtype):
            rows = core.row(kernel, sgd | {"lr": -1.0}).reshape(1, -1)
            memory = Streams(kernel, [codes.shape[1]])
            for stream in range(2):
                memory.before[stream][memory.live[stream]] = codes[stream]
            for way, step in all_ways(core, rows):
                got = memory.after(step)[0]
                assert np.array_equal(got, expected), f"sums of {dtype} by {way}"

        # In a first step the momentum buffer is the gradient.
        codes = np.arange(1 << 16, dtype=np.uint16)
        for kernel in find(core, "sgd", ("momentum_buffer",), dtype, dtype, "float32"):
            rows = core.row(kernel, sgd | {"momentum": 0.9}, first=True).reshape(1, -1)
            memory = Streams(kernel, [len(codes)])
            memory.before[1][memory.live[1]] = codes
            widened = to_bits("float32", to_values(dtype, codes))
            is_nan = (codes & 0x7FFF) > INFINITY[dtype]
            widened[is_nan] = QUIET_NAN["float32"]
            for way, step in all_ways(core, rows):
                got = memory.after(step)[2]
                assert np.array_equal(got, widened), f"{dtype} to float32 by {way}"


def check_multiply_add(core: Core) -> None:
    """p - lr * g rounded once, where rounding twice would show: the product is half a unit in the
    last place of p, but for so little that a double's sum with p does not hold it."""
    random = np.random.default_rng(0)
    a = random.integers(1 << 23, 1 << 24, 1 << 13)
    b = np.rint(2.0**47 / a).astype(np.int64)
    off = np.abs(a * b - (1 << 47))
    a, b = (factor[(off > 0) & (off < 1 << 18)] for factor in (a, b))
    assert len(a) > 100

    kernel = find(core, "sgd", (), "float32", "float32")[0]
    options = [RULES["sgd"].defaults | {"lr": factor * 2.0**-47} for factor in a]
    rows = np.stack([core.row(kernel, o) for o in options])
    memory = Streams(kernel, [512] * len(a), rows=np.arange(len(a)))
    shape = (len(a), 512)
    signs = random.choice([-1.0, 1.0], (2, *shape))
    scale = 2.0 ** random.choice([-126, -100, 0, 20], shape)
    # With the smallest scale, p is subnormal at times.
    p = np.where(scale < 2.0**-120, random.integers(0, 1 << 24, shape) * 2.0**-23, 0)
    p = np.where(p == 0, random.integers(1 << 23, 1 << 24, shape) * 2.0**-23, p)
    memory.before[0][memory.live[0]] = to_bits("float32", signs[0] * p * scale).ravel()
    grad = signs[1] * b[:, None] * 2.0**-24 * scale
    memory.before[1][memory.live[1]] = to_bits("float32", grad).ravel()
    # The tile, on the host, has its multiply-add from the C library.
    want = memory.after(partial(core.tile_step, rows=rows))
    for isa in core.isas:
        got = memory.after(partial(core.cpu_step, rows=rows, isa=isa))
        memory.assert_same(got, want, isa)


CHECKS: dict[str, Callable[[Core, Kernel], None]] = {
    "reference": check_reference,
    "same bits": check_same_bits,
    "division": check_division,
    "many spans": check_many_spans,
    "memory": check_memory,
}
"""Those that are run for each kernel."""

CORE_CHECKS: dict[str, Callable[[Core], None]] = {
    "conversions": check_conversions,
    "multiply-add": check_multiply_add,
    "sum of squares": check_sum_of_squares,
    "prepare": check_prepare,
}
"""Those that are run once."""
