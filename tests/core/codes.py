"""Checks of codes, random bits and dither by themselves: that they are what coding.py says, and
that they do what they are there for.

All seeds are fixed, and bounds of statistics lie six standard deviations out or more.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from . import coding
from .coding import BLOCK
from .core_checks import float32_samples
from .library import Core

HALF = np.uint32(1 << 22)  # of the range of a dither


def assert_equal(got: np.ndarray, want: np.ndarray, what: str) -> None:
    wrong = np.flatnonzero(np.ravel(got) != np.ravel(want))
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {got.size} are wrong, first {wrong[0]}: "
        f"{np.ravel(got)[wrong[0]]}, not {np.ravel(want)[wrong[0]]}"
    )


# -- masters -------------------------------------------------------------------------------------


def check_split(core: Core, bits: np.ndarray) -> None:
    """Nothing is lost, and the upper half is the nearest bfloat16, ties away from zero."""
    high, remainder = core.split(bits)
    assert_equal(core.join(high, remainder), bits, "split and joined")
    upper = (bits >> np.uint32(16)).astype(np.int64)
    lower = (bits & np.uint32(0xFFFF)).astype(np.int64)
    # What is stored is one of the two neighbours of the number, the nearer one.
    assert_equal(high, ((upper + (lower >= 0x8000)) % 0x10000).astype(np.uint16), "the upper half")
    assert (np.abs(remainder.astype(np.int32)) <= 0x8000).all()

    kept = ~np.isnan(bits.view(np.float32))  # NaN is made canonical before it is stored
    bits = bits[kept]
    high, remainder = core.split(bits, to_24=True)
    assert not (remainder & 0xFF).any(), "a remainder of 24 bits has more than 8"
    joined = core.join(high, remainder)
    assert_equal(joined & np.uint32(0xFF), np.zeros_like(joined), "bits beyond 24")
    distance = joined.astype(np.int64) - bits
    assert ((distance <= 0x80) & (distance > -0x80)).all(), "not rounded to nearest"


def check_masters(core: Core) -> None:
    samples = float32_samples()
    check_split(core, samples)
    for to_24, name in [(False, "split"), (True, "split of 24 bits")]:
        bits = coding.bits_of(samples.view(np.float32))
        want = coding.split(coding.round_to_24(bits) if to_24 else bits)
        for got, part in zip(core.split(bits, to_24), want, strict=True):
            assert_equal(got, part, name)
    random = np.random.default_rng(0)
    for addends in [np.zeros_like(samples), random.integers(0, 1 << 16, samples.shape, np.uint32)]:
        got = core.cut(samples.view(np.float32), addends)
        assert_equal(got, coding.cut_to_bfloat16(samples.view(np.float32), addends), "cut")


# -- random bits ---------------------------------------------------------------------------------


def check_uniform(values: np.ndarray, bins: int, what: str) -> None:
    """Chi-squared of integers below bins, along the last axis; worst of all others."""
    values = values.reshape(-1, values.shape[-1])
    rows = np.repeat(np.arange(len(values)), values.shape[-1])
    counts = np.bincount(rows * bins + values.ravel(), minlength=len(values) * bins)
    expected = values.shape[-1] / bins
    assert expected >= 16
    statistic = ((counts.reshape(len(values), bins) - expected) ** 2 / expected).sum(axis=1)
    freedom = bins - 1
    # Of so many statistics, the largest lies further out; the tail is longer than a normal one's.
    most = freedom + (6 + math.log2(len(values))) * math.sqrt(2 * freedom)
    assert statistic.max() < most, f"{what}: chi-squared {statistic.max():.0f}, at most {most:.0f}"
    if freedom > 50:
        least = freedom - 6 * math.sqrt(2 * freedom)
        assert statistic.min() > least, f"{what}: more even than chance: {statistic.min():.0f}"


def check_independent(a: np.ndarray, b: np.ndarray, what: str) -> None:
    """No bit of the one says anything about a bit of the other."""
    # Packed, as a product of matrices would have BLAS's threads wait for each other.
    packed = [[np.packbits(np.ravel(x) >> place & 1) for place in range(16)] for x in (a, b)]
    differ = np.array([[int(np.bitwise_count(p ^ q).sum()) for q in packed[1]] for p in packed[0]])
    correlation = np.abs(a.size - 2 * differ) / np.sqrt(a.size)
    assert correlation.max() < 6, (
        f"{what}: bits {np.unravel_index(correlation.argmax(), correlation.shape)} correlate by "
        f"{correlation.max():.1f} standard deviations"
    )


def check_random_bits(core: Core) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        seed, ordinal = (int(random.integers(0, 2**63)) >> int(random.integers(63)) for _ in "ab")
        step, block = (int(random.integers(0, 2**31)) >> int(random.integers(31)) for _ in "ab")
        key = core.random_key(seed, ordinal)
        assert key == coding.random_key(seed, ordinal), f"the key of {seed}, {ordinal}"
        got = core.random_bits(key, step, block)[0]
        assert_equal(got, coding.random_bits(key, step, block), f"of step {step}, block {block}")

    # Seeds, ordinals, blocks and steps as they are in practice: small and one after the other.
    size = 8
    bits = np.stack(
        [
            [
                [
                    core.random_bits(core.random_key(seed, ordinal), 1, block, size)
                    for block in range(size)
                ]
                for ordinal in range(size)
            ]
            for seed in range(size)
        ]
    )
    assert bits.max() < 1 << 16
    for shift in (0, 4, 8):
        check_uniform(bits.reshape(1, -1) >> shift & 0xFF, 256, f"bits {shift} to {shift + 8}")
    check_uniform(bits.reshape(1, -1), 1 << 16, "all 16 bits")
    check_uniform(bits.reshape(-1, BLOCK).T >> 12, 16, "each place")
    ones = (bits.reshape(-1, 1) >> np.arange(16) & 1).mean(axis=0)
    bias = np.abs(ones - 0.5) * 2 * math.sqrt(bits.size)
    assert bias.max() < 6, f"bit {bias.argmax()} is 1 in {ones[bias.argmax()]:.4f} of all cases"

    for axis, name in enumerate(["seeds", "ordinals", "blocks", "steps", "places"]):
        for distance in (1, 2, 4):
            moved = np.moveaxis(bits, axis, 0)
            a, b = moved[:-distance], moved[distance:]
            check_independent(a, b, f"{name} {distance} apart")
    # These two have halves of the same word.
    check_independent(bits[..., :128], bits[..., 128:], "places half a block apart")
    # One element in many steps, and what its weight does when it is rounded at random.
    steps = 1 << 14
    long = core.random_bits(core.random_key(1, 1), 1, 0, steps)
    check_uniform(long.T[:32] >> 8, 256, "an element's steps")
    check_independent(long[:-1], long[1:], "an element's steps")
    for part in (0.5, 0.1, 0.9, 2.0**-7):
        value = np.float32(1 + part / 128)
        cut = core.cut(np.full(long.shape, value), long)
        mean = coding.from_bfloat16(cut).astype(np.float64).mean()
        deviation = math.sqrt(part * (1 - part) / long.size) / 128
        assert abs(mean - value) < 6 * deviation, f"{value} is {mean} on average"


# -- dither --------------------------------------------------------------------------------------


def check_dither(core: Core) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        step, block = (int(random.integers(0, 2**31)) >> int(random.integers(31)) for _ in "ab")
        got = core.dithers(block, step)[0]
        assert_equal(got, coding.dither(block, step), f"of step {step}, block {block}")
        # The elements of a block have one threshold in each of 256 parts,
        assert_equal(np.sort(got >> 15), np.arange(BLOCK), "the parts of a block's elements")
    for start, block in [(0, 0), (1, 7), (12345, 2**33), (2**32 - 100, 1)]:
        for n in (1, 2, 3, 5, 8, 11):
            got = core.dithers(block, start, 1 << n)
            parts = np.sort(got >> np.uint32(23 - n), axis=0)
            # and so has each of them in so many steps.
            want = np.broadcast_to(np.arange(1 << n)[:, None], parts.shape)
            assert_equal(parts, want, f"the parts of {1 << n} steps from {start}")


def mean_error(core: Core, values: np.ndarray, start: int, steps: int) -> np.ndarray:
    """How far the mean over so many steps is from what was to be stored, in gaps between codes."""
    scales = values.max(axis=1)
    total = np.zeros(values.shape)
    for step in range(start, start + steps):
        dithers = np.concatenate([core.dithers(block, step) for block in range(len(values))])
        codes = core.encode_squares(values, scales, dithers)
        total += core.decode_blocks(codes, scales, True)
    upper = np.searchsorted(coding.SQUARE_POINTS, values / scales[:, None], side="right")
    upper = upper.clip(1, 255)
    gap = (coding.SQUARE_POINTS[upper] - coding.SQUARE_POINTS[upper - 1]) * scales[:, None]
    error: np.ndarray = np.abs(total / steps - values) / gap
    return error


def check_dithering(core: Core) -> None:
    """Averages of squares move by less than half the gap between two codes in a step. Dithered,
    they are right on average, and get to where they ought to."""
    random = np.random.default_rng(0)
    # Down to 2^-24 of the largest; between the few codes below, the middle is not the mean.
    values = (2.0 ** random.uniform(-23.9, 0, (16, BLOCK))).astype(np.float32)
    values[:, 7] = [2.0 ** (i - 8) * 1.7 for i in range(16)]
    values[:, :7] *= values[:, 7:8]
    values[:, 8:] *= values[:, 7:8]
    for start, steps in [(1, 16), (1000, 256), (54321, 1024)]:
        error = mean_error(core, values, start, steps).max()
        # One threshold in each part is off by one part at most; the sum is rounded in float32.
        assert error <= 1 / steps + 2.0**-13, f"the mean of {steps} steps is off by {error} gaps"
    # Every block with all kinds of thresholds, the largest and the smallest among them.
    for _, blocks in blocks_of_all_kinds(True):
        for low, high in [(0, 1), (0, 1 << 23), ((1 << 23) - 2, 1 << 23)]:
            thresholds = random.integers(low, high, blocks.shape, np.uint32)
            want, scales = coding.encode_codes(blocks, True, thresholds)
            got = coding.from_bytes(core.encode_squares(blocks, scales, thresholds))
            assert_equal(got, want, "codes of squares")
    codes, scales = core.encode_blocks(values, True)
    nearest = np.abs(core.decode_blocks(codes, scales, True) - values) / values
    assert (nearest > 1e-3).mean() > 0.5, "codes to nearest would do as well"

    bfloat16 = np.zeros(values.shape)
    for step in range(1024):
        dithers = np.concatenate([core.dithers(block, step) for block in range(len(values))])
        bfloat16 += coding.from_bfloat16(core.cut(values, dithers >> np.uint32(7)))
    error = np.abs(bfloat16 / 1024 - values) / values
    assert error.max() <= 2.0**-7 / 1024 + 2.0**-16 * 2.0**-7, "the mean of bfloat16 is off"

    # A slow decay of all but the largest, which codes to nearest would not let through.
    dithered, stuck = values.copy(), values.copy()
    scales = values.max(axis=1)
    stays = values == scales[:, None]
    decay, steps = np.float32(0.999), 1000
    for step in range(1, steps + 1):
        dithered = np.where(stays, values, dithered * decay)
        dithers = np.concatenate([core.dithers(block, step) for block in range(len(values))])
        codes = core.encode_squares(dithered, scales, dithers)
        dithered = core.decode_blocks(codes, scales, True)
        stuck = np.where(stays, values, stuck * decay)
        stuck = core.decode_blocks(*core.encode_blocks(stuck, True), True)
    large = (values > scales[:, None] / 256) & ~stays
    ratio = (dithered / values)[large].mean() / float(decay) ** steps
    # What was rounded is rounded again, by thresholds that are not independent of the earlier ones:
    # this is 0.974, where random ones give 1, but with four times the noise.
    assert abs(ratio - 1) < 0.04, f"dithered, a decay is off by a factor of {ratio}"
    ratio = (stuck / values)[large].mean() / float(decay) ** steps
    assert ratio > 2, "the control: to nearest, a decay is not let through"


# -- codes ---------------------------------------------------------------------------------------


def blocks_of_all_kinds(never_negative: bool) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(int(never_negative))
    shape = (64, BLOCK)
    sign = 1 if never_negative else random.choice([-1, 1], shape)
    with np.errstate(over="ignore", under="ignore"):
        wide = 2.0 ** random.uniform(-40, 0, shape) * sign
        magnitudes = 2.0 ** np.linspace(-160, 127, len(wide))[:, None]
        yield "all magnitudes", (wide * magnitudes).astype(np.float32)
        yield "usual", (random.standard_normal(shape) ** 2 * sign).astype(np.float32)
        even = random.uniform(0.5, 1, (4096, 1)) * 2.0 ** random.integers(-90, 120, (4096, 1))
        yield "equal", (even * np.ones(BLOCK)).astype(np.float32)
    yield "zeros", np.zeros((2, BLOCK), np.float32)
    sick = (wide * magnitudes.clip(2.0**-30, 2.0**30)).astype(np.float32)
    limit = coding.LEAST_INFINITE
    odd = [np.inf, np.nan, 3.4028235e38, limit, np.nextafter(limit, np.float32(0)), 1e-45, 0, 1e-39]
    for value in odd:
        blocks = sick.copy()
        blocks[np.arange(len(blocks)), random.integers(0, BLOCK, len(blocks))] = value
        yield f"with {value}", blocks
        yield f"all {value}", np.full((1, BLOCK), value, np.float32)


def check_codes(core: Core) -> None:
    for never_negative in (False, True):
        points = coding.SQUARE_POINTS if never_negative else coding.SIGNED_POINTS
        for kind, values in blocks_of_all_kinds(never_negative):
            what = f"{kind}, never negative: {never_negative}"
            codes, scales = core.encode_blocks(values, never_negative)
            want, want_scales = coding.encode_codes(values, never_negative, np.full(1, HALF))
            assert_equal(scales.view(np.uint32), want_scales.view(np.uint32), f"scales: {what}")
            assert_equal(codes, coding.to_bytes(want), f"codes: {what}")
            decoded = core.decode_blocks(codes, scales, never_negative)
            expected = coding.decode_codes(want, scales, never_negative)
            assert_equal(coding.bits_of(decoded), coding.bits_of(expected), f"decoded: {what}")
            assert np.isfinite(scales).all(), f"{what}: a scale is not finite"

            finite = np.abs(values) < coding.LEAST_INFINITE
            assert np.isfinite(decoded[finite]).all(), f"{what}: a finite number became another"
            special = decoded[~finite]
            assert (np.isposinf if never_negative else np.isnan)(special).all(), what

            # As near as the codes around it.
            scale = np.abs(scales)[:, None].astype(np.float64)
            magnitudes = np.where(finite, np.abs(values), 0).astype(np.float64)
            ratios = np.divide(magnitudes, scale, out=np.zeros_like(magnitudes), where=scale > 0)
            upper = np.searchsorted(points, ratios).clip(1, len(points) - 1)
            gap = (points[upper] - points[upper - 1]).astype(np.float64)
            # Below a root of 4 a place between two is not the place between what they stand for.
            bound = (
                np.where(ratios >= points[2 if never_negative else 4], gap / 2, gap)
                * scale
                * (1 + 1e-5)
            )
            bound += 2.0**-149
            if never_negative:  # the least code stands for 2^-28
                bound = np.maximum(bound, 2.0**-28 * scale)
            with np.errstate(invalid="ignore"):
                error = np.where(finite, np.abs(decoded.astype(np.float64) - values), 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                worst = np.nanmax(error / bound)
            assert (error <= bound).all(), f"{what}: off by {worst:.3g} bounds"
            # In other words: four binades with one part in 32 or 64, the next with twice that.
            for binades, part in [(4, 1), (8, 2), (12, 4), (16, 8)]:
                within = finite & (magnitudes > 2.0**-100) & (ratios >= 2.0**-binades)
                most = part * (2.0**-6 if never_negative else 2.0**-5) * (1 + 1e-5)
                assert (error[within] <= most * magnitudes[within]).all(), f"{what}: {binades}"

            # A larger number has no smaller code, and the largest is kept.
            order = np.argsort(np.where(finite, values, 0), axis=1)
            rising = np.take_along_axis(np.where(finite, decoded, 0), order, axis=1)
            assert (np.diff(rising, axis=1) >= 0).all(), f"{what}: not monotonic"
            largest = magnitudes.max(axis=1)
            kept = np.where(finite, np.abs(decoded), 0).max(axis=1)
            ordinary = largest > 2.0**-100
            error = np.abs(kept - largest)[ordinary]
            assert (error <= largest[ordinary] * 1e-6).all(), f"{what}: the largest is not kept"

            again, scales_again = core.encode_blocks(decoded, never_negative)
            assert_equal(again, codes, f"encoded again: {what}")
            near = np.abs(scales_again - scales) <= 1e-6 * np.abs(scales)
            assert near[ordinary].all(), f"{what}: another scale when encoded again"
            if not magnitudes.any() and finite.all():
                assert not decoded.any(), f"{what}: a zero became something"
        # A block that is not whole.
        values = np.linspace(0, 1, 100, dtype=np.float32)[None]
        whole, scales = core.encode_blocks(np.pad(values, ((0, 0), (0, 156))), never_negative)
        memory = np.full(BLOCK, 0xAA, np.uint8)
        short = np.zeros(1, np.float32)
        core._library.encode_blocks(
            *(values.ctypes.data, 100, never_negative, memory.ctypes.data, short.ctypes.data)
        )
        # The bytes of its elements lie one behind the other, and others are left alone.
        want = np.where(np.arange(BLOCK) < 100, coding.from_bytes(whole)[0], 0xAA).astype(np.uint8)
        assert_equal(memory, want, "a block of 100 elements")
        assert short == scales


CODE_CHECKS: dict[str, Callable[[Core], None]] = {
    "masters": check_masters,
    "random bits": check_random_bits,
    "dither": check_dither,
    "dithering": check_dithering,
    "codes": check_codes,
}
"""Those that are run once."""
