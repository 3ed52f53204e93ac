"""Checks of what belongs to no kernel: the norm, rows made on a device, conversions, arithmetic."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
import torch

from .checks import all_ways, find, flushing_denormals
from .library import BACKWARD, DTYPES, THREADED, Core
from .memory import INFINITY, QUIET_NAN, UNSIGNED, Gradients, Streams, canonical, to_bits, to_values
from .options import RULES
from .preparation import Preparation

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

    # A single chunk's sum is the total as it is.
    apart = [("float64", np.array([1e-160])), ("float64", np.array([2e-161, 1e-162]))]
    check_sum(core, Gradients(chunk, apart, [0, 1]), "denormal sums of two chunks")

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


CORE_CHECKS: dict[str, Callable[[Core], None]] = {
    "conversions": check_conversions,
    "multiply-add": check_multiply_add,
    "sum of squares": check_sum_of_squares,
    "prepare": check_prepare,
}
"""Those that are run once."""
