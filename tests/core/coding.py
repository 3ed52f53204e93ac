"""What csrc/core/codes.h and random.h define, once more in numpy: how elements are stored.

All of it works on arrays whose last axis is a block of 256 elements; where a block has fewer, what
is behind them has no meaning.
"""

from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 256
PARAM_CODES = {
    "float32": (np.uint32, None),
    "bfloat16": (np.uint16, None),
    "float16": (np.uint16, None),
    "bfloat16_and_16": (np.uint16, np.uint16),
    "bfloat16_and_8": (np.uint16, np.uint8),
    "bfloat16_stochastic": (np.uint16, None),
    "float16_and_float32": (np.uint16, np.uint32),
}
"""How a parameter is stored, and what of its master is not in it, in the core's order."""
STATE_CODES = {"float32": np.uint32, "bfloat16": np.uint16, "int8": np.uint8}
"""Likewise."""

NAN, NAN_CODE, INF_CODE = np.float32(np.nan), 0x80, 0xFF
LEAST_INFINITE = np.uint32(0x7F770000).view(np.float32)
"""From here on, a signed state's scale would overflow."""
LEAST_SCALED = np.float32(2.0**-100)


@dataclass(frozen=True)
class Coding:
    """Names of codes, as the core has them, and the dtype of gradients."""

    param: str
    grad: str
    state: str


def bits_of(values: np.ndarray) -> np.ndarray:
    """Those of float32, with one NaN for all."""
    assert values.dtype == np.float32
    return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))


def floats_of(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


# -- weights -------------------------------------------------------------------------------------


def split(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest bfloat16, ties away from zero, and the distance from there in units of float32's
    last place, whatever the sign."""
    upper, lower = bits >> np.uint32(16), (bits & np.uint32(0xFFFF)).astype(np.int64)
    up = lower >= 0x8000
    return (upper + up).astype(np.uint16), (lower - up * 0x10000).astype(np.int16)


def join(high: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    joined: np.ndarray = high.astype(np.int64) * 0x10000 + remainder
    return (joined % 2**32).astype(np.uint32)


def round_to_24(bits: np.ndarray) -> np.ndarray:
    whole, part = np.divmod(bits.astype(np.int64), 256)
    return ((whole + (part >= 128)) * 256 % 2**32).astype(np.uint32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), bits)


def to_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7E00), bits)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return floats_of(bits.astype(np.uint32) << np.uint32(16))


def from_float16(bits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bits.view(np.float16).astype(np.float32)


def cut_to_bfloat16(values: np.ndarray, addends: np.ndarray) -> np.ndarray:
    """The bfloat16 towards zero, or the next one where the 16 bits cut off and these carry."""
    upper, lower = np.divmod(bits_of(values).astype(np.int64), 0x10000)
    carry = (lower + addends >= 0x10000) & ~np.isnan(values)
    return (upper + carry).astype(np.uint16)


def decode_param(code: str, stored: np.ndarray, master: np.ndarray | None) -> np.ndarray:
    if code == "float32":
        return floats_of(stored)
    if code == "float16":
        return from_float16(stored)
    if code == "bfloat16_and_16":
        assert master is not None
        return floats_of(join(stored, master.view(np.int16)))
    if code == "bfloat16_and_8":
        assert master is not None
        return floats_of(join(stored, master.view(np.int8).astype(np.int64) * 256))
    if code == "float16_and_float32":
        assert master is not None
        exact = floats_of(master)
        return np.where(to_float16(exact) == stored, exact, from_float16(stored))
    return from_bfloat16(stored)


def encode_param(
    code: str, values: np.ndarray, random: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """What is stored of float32 values, and of their masters; random: 16 bits for each."""
    if code == "float32":
        return values.view(np.uint32), None
    if code == "bfloat16":
        return to_bfloat16(values), None
    if code == "float16":
        return to_float16(values), None
    if code == "bfloat16_and_16":
        high, remainder = split(bits_of(values))
        return high, remainder.view(np.uint16)
    if code == "bfloat16_and_8":
        high, remainder = split(round_to_24(bits_of(values)))
        byte, rest = np.divmod(remainder.astype(np.int64), 256)
        assert not rest.any()
        return high, byte.astype(np.int8).view(np.uint8)
    if code == "bfloat16_stochastic":
        return cut_to_bfloat16(values, random), None
    return to_float16(values), values.view(np.uint32)


# -- random bits and dither ----------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def mix(x: int) -> int:
    """The finalizer of SplitMix64."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def random_key(seed: int, ordinal: int) -> int:
    return mix(mix(seed + GOLDEN) + ordinal * GOLDEN)


def random_bits(key: int, step: int, block: int) -> np.ndarray:
    """The 16 bits of each element of a block: of a word, the first half of the block has the lower
    half and the second half the upper one."""
    word = mix(mix(key + step * GOLDEN) + block * GOLDEN)
    first, second = np.uint32(word & 0xFFFFFFFF), np.uint32(word >> 32)
    x = np.arange(BLOCK // 2, dtype=np.uint32) * np.uint32(0x9E3779B9) + first
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ second ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    x = x ^ x >> np.uint32(16)
    return np.concatenate([x & np.uint32(0xFFFF), x >> np.uint32(16)])


def reversed_bits(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


PLACES = np.array([reversed_bits(place) >> 9 for place in range(BLOCK)], np.uint32)


def dither(block: int, step: int) -> np.ndarray:
    """The 23 bits of each element of a block."""
    of_block = (reversed_bits(step) ^ mix(block * GOLDEN) & 0xFFFFFFFF) >> 9
    return PLACES ^ np.uint32(of_block)


# -- states of one byte --------------------------------------------------------------------------


def logarithm(values: np.ndarray) -> np.ndarray:
    """To base 2 at powers of two, straight in between; exact in float64. Of 0 it is -127, and
    subnormal numbers run straight from there."""
    return values.view(np.uint32).astype(np.float64) / 2**23 - 127


def power(logarithms: np.ndarray) -> np.ndarray:
    """The float32 at or below which has this logarithm, 0 for those of none."""
    bits = np.floor((np.maximum(logarithms, -127) + 127) * 2**23)
    return floats_of(bits.astype(np.uint32))


def root(ratios: np.ndarray, places: int) -> np.ndarray:
    """2^places times the fourth root, or what runs straight between those of powers of two."""
    return power(logarithm(ratios) / 4 + places)


def fourth_power(roots: np.ndarray, places: int) -> np.ndarray:
    return power((logarithm(roots.astype(np.float32)) - places) * 4)


SIGNED_POINTS = fourth_power(np.arange(128), 7)
SQUARE_POINTS = fourth_power(np.arange(256) + 2, 8)
"""What each code stands for, in scales. A sign is the topmost bit."""


def decode_codes(codes: np.ndarray, scales: np.ndarray, never_negative: bool) -> np.ndarray:
    careful, scale = np.signbit(scales)[:, None], np.abs(scales)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        if never_negative:
            values = SQUARE_POINTS[codes] * scale
            return np.where(careful & (codes == INF_CODE), np.float32(np.inf), values)
        values = np.copysign(SIGNED_POINTS[codes & 0x7F] * scale, 0.5 - (codes >> 7), dtype="f4")
    return np.where(careful & (codes == NAN_CODE), NAN, values)


def encode_codes(
    values: np.ndarray, never_negative: bool, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, in the order of elements, and scales of blocks; thresholds of 23 bits."""
    one = np.float32(1)
    with np.errstate(all="ignore"):
        magnitudes = np.abs(values)
        finite = magnitudes < LEAST_INFINITE  # false for NaN
        magnitudes = np.where(finite, magnitudes, np.float32(0))
        careful = ~finite.all(axis=-1)
        largest = magnitudes.max(axis=-1)
        scales = np.where(largest == 0, largest, np.maximum(largest, LEAST_SCALED))
        if not never_negative:  # the largest code stands for 31 / 32
            scales *= np.float32(32 / 31)
        ratios = np.where(largest == 0, largest, one / scales)[:, None] * magnitudes
        if never_negative:
            # As much of 1 as the dither says, rounded with the root in float32.
            thresholds = (thresholds.astype(np.float64) / 2**23 + 1).astype(np.float32)
            codes = np.floor(root(ratios, 8) + thresholds).astype(np.int64)
            codes = np.maximum(codes, 3) - 3
            codes = np.where(careful[:, None], np.minimum(codes, INF_CODE - 1), codes)
            codes = np.where(finite, codes, INF_CODE)
        else:
            codes = np.floor(root(ratios, 7) + np.float32(0.5)).astype(np.int64)
            zero = careful[:, None] & (codes == 0)  # whose negative would be the code of NaN
            codes = codes + np.where(np.signbit(values) & ~zero, 0x80, 0)
            codes = np.where(finite, codes, NAN_CODE)
    assert codes.max(initial=0) < 256
    return codes.astype(np.uint8), np.where(careful, -scales, scales)


def sizes_of_blocks(numel: int, row: int) -> np.ndarray:
    """How many elements each block has: rows are cut into blocks, each for itself."""
    of_row = [min(BLOCK, row - begin) for begin in range(0, row, BLOCK)]
    return np.array(of_row * (numel // row if row else 0), np.int64)


def present(sizes: np.ndarray) -> np.ndarray:
    """Which elements of blocks there are."""
    there: np.ndarray = np.arange(BLOCK) < sizes[:, None]
    return there


def to_bytes(codes: np.ndarray, sizes: np.ndarray | int = BLOCK) -> np.ndarray:
    """Codes in the order in which they are stored: in a whole block those of elements i, 64 + i,
    128 + i and 192 + i are neighbours."""
    words = codes.reshape(-1, 4, BLOCK // 4).swapaxes(1, 2).reshape(-1, BLOCK)
    return np.where(np.broadcast_to(sizes, len(words))[:, None] == BLOCK, words, codes)


def from_bytes(stored: np.ndarray, sizes: np.ndarray | int = BLOCK) -> np.ndarray:
    codes = stored.reshape(-1, BLOCK // 4, 4).swapaxes(1, 2).reshape(-1, BLOCK)
    return np.where(np.broadcast_to(sizes, len(codes))[:, None] == BLOCK, codes, stored)


def encode_state(
    code: str,
    values: np.ndarray,
    never_negative: bool,
    thresholds: np.ndarray,
    sizes: np.ndarray | int = BLOCK,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What is stored of float32 values, and scales of blocks where there are any."""
    if code == "float32":
        return values.view(np.uint32), None
    if code == "bfloat16" and never_negative:
        return cut_to_bfloat16(values, thresholds >> np.uint32(7)), None
    if code == "bfloat16":
        return to_bfloat16(values), None
    there = present(np.broadcast_to(sizes, len(values)))
    values = np.where(there, values, np.float32(0))
    codes, scales = encode_codes(values, never_negative, thresholds)
    return to_bytes(codes, sizes), scales


def decode_state(
    code: str,
    stored: np.ndarray,
    scales: np.ndarray | None,
    never_negative: bool,
    sizes: np.ndarray | int = BLOCK,
) -> np.ndarray:
    if code == "float32":
        return floats_of(stored)
    if code == "bfloat16":
        return from_bfloat16(stored)
    assert scales is not None
    return decode_codes(from_bytes(stored, sizes), scales, never_negative)


def decode_grad(dtype: str, stored: np.ndarray) -> np.ndarray:
    if dtype == "float32":
        return floats_of(stored)
    return from_bfloat16(stored) if dtype == "bfloat16" else from_float16(stored)
