"""Spans and gradients in memory with guard zones around them, and bit patterns of all dtypes."""

from collections.abc import Callable, Sequence

import numpy as np

from .library import DTYPES, GRADIENT, Kernel
from .options import NEVER_NEGATIVE

Fill = Callable[[np.random.Generator, str, int], np.ndarray]
"""fill(random, stream, size): the values of a stream, as float64."""

UNSIGNED = {"float64": np.uint64, "float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
INFINITY = {
    "float64": 0x7FF0000000000000,
    "float32": 0x7F800000,
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
}
QUIET_NAN = {
    "float64": 0x7FF8000000000000,
    "float32": 0x7FC00000,
    "bfloat16": 0x7FC0,
    "float16": 0x7E00,
}


def to_bits(dtype: str, values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":  # cut off, not rounded: any value near will do
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(dtype).view(UNSIGNED[dtype])


def to_values(dtype: str, bits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        if dtype == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.view(dtype).astype(np.float64)


def canonical(dtype: str, bits: np.ndarray) -> np.ndarray:
    """The same bits with one NaN for all: where NaNs are must agree, their payloads need not."""
    unsigned = UNSIGNED[dtype]
    sign = unsigned(1 << (unsigned().itemsize * 8 - 1))
    return np.where((bits & ~sign) > INFINITY[dtype], unsigned(QUIET_NAN[dtype]), bits)


# Zeros, subnormals and the largest finite numbers of all dtypes, and what leaves their range.
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 6e-8, -3e-5, 65504, 65520, 1e5]
    + [-1e5, 3.4e38, -3.3e38, 1e-20, 1e20, -1e-300, 1e300, 1e-7, 1.0, -1.0]
)


def usual(random: np.random.Generator, stream: str, size: int) -> np.ndarray:
    """Values as in training; an average of squares is larger than the square of an average."""
    values = random.standard_normal(size)
    if stream in NEVER_NEGATIVE:
        return values**2 + 0.5
    return 0.1 * values if stream == "grad_avg" else values


def extreme(random: np.random.Generator, stream: str, size: int) -> np.ndarray:
    """Many magnitudes, and special values at every eighth place or so."""
    values = usual(random, stream, size) * 2.0 ** random.integers(-30, 12, size)
    special = random.choice(np.abs(SPECIAL) if stream in NEVER_NEGATIVE else SPECIAL, size)
    return np.where(random.random(size) < 0.125, special, values)


class Streams:
    """The streams of one kernel: the same spans in each, and guard zones around every span.

    Spans begin at a multiple of 64 elements plus shifts[span, stream] (0 to 15) of a 64-byte
    aligned array. Guards hold ordinary values, since a step that touches them has to show.
    """

    EDGE = 32768  # more than a chunk: even a fault stays inside the array

    def __init__(
        self,
        kernel: Kernel,
        sizes: Sequence[int] | np.ndarray,
        shifts: np.ndarray | None = None,
        rows: np.ndarray | int = 0,
        fill: Fill = usual,
        seed: int = 0,
    ) -> None:
        random = np.random.default_rng(seed)
        numel = np.array(sizes, np.int64)
        count, streams = len(numel), len(kernel.streams)
        if shifts is None:
            shifts = np.zeros((count, streams), np.int64)
        lengths = (numel + 16 + 64 + 63) // 64 * 64
        slots = self.EDGE + np.cumsum(lengths) - lengths
        total = int(lengths.sum()) + 2 * self.EDGE

        self.kernel = kernel
        self.starts = slots[:, None] + shifts
        self.arrays: list[np.ndarray] = []
        self.live: list[np.ndarray] = []
        self.spans = np.zeros(count, kernel.layout.span)
        for i, (stream, dtype) in enumerate(zip(kernel.streams, kernel.dtypes, strict=True)):
            unsigned = UNSIGNED[dtype]
            size = unsigned().itemsize
            memory = np.zeros(total * size + 64, np.uint8)
            begin = -memory.ctypes.data % 64
            array = memory[begin : begin + total * size].view(unsigned)
            # Repeated with a prime period, so that no two spans have the same values.
            values = fill(random, stream, min(total, 65537))
            array[:] = np.resize(to_bits(dtype, values), total)
            edges = np.zeros(total + 1, np.int64)
            np.add.at(edges, self.starts[:, i], 1)
            np.add.at(edges, self.starts[:, i] + numel, -1)
            self.arrays.append(array)
            self.live.append(np.cumsum(edges[:-1]) > 0)
            address = array.ctypes.data + self.starts[:, i] * size
            if i < 2:
                self.spans[stream] = address
            else:
                self.spans["states"][:, i - 2] = address
        self.spans["numel"] = numel
        self.spans["offset"] = np.cumsum(numel) - numel
        self.spans["kernel"] = kernel.index
        self.spans["row"] = rows
        self.spans["measured"] = -1
        self.before = [array.copy() for array in self.arrays]

    def set_zero(self, streams: Sequence[str]) -> None:
        for stream, array in zip(self.kernel.streams, self.before, strict=True):
            if stream in streams:
                array[:] = 0

    def reset(self) -> None:
        for array, before in zip(self.arrays, self.before, strict=True):
            array[:] = before

    def result(self) -> list[np.ndarray]:
        """The bits of each stream's spans, after a check that nothing else has changed."""
        for i, stream in enumerate(self.kernel.streams):
            changed = self.arrays[i] != self.before[i]
            if stream != "grad":
                changed &= ~self.live[i]
            assert not changed.any(), (
                f"{self.kernel}: {stream} was changed at {self.describe(i, changed)}"
            )
        return [
            canonical(dtype, array[live])
            for dtype, array, live in zip(self.kernel.dtypes, self.arrays, self.live, strict=True)
        ]

    def after(self, step: Callable[[np.ndarray], object]) -> list[np.ndarray]:
        """What the spans hold after a step over them from the values that they had at first."""
        self.reset()
        step(self.spans)
        return self.result()

    def describe(self, stream: int, where: np.ndarray) -> str:
        """The first place that a mask over a stream's whole array names."""
        place = int(np.flatnonzero(where)[0])
        starts = self.starts[:, stream]
        span = max(0, int(np.searchsorted(starts, place, side="right")) - 1)
        return (
            f"{int(where.sum())} elements, first in span {span} of {self.spans['numel'][span]} "
            f"elements with shifts {list(self.starts[span] % 64)}: element {place - starts[span]}"
        )

    def assert_same(self, got: list[np.ndarray], want: list[np.ndarray], what: str) -> None:
        for i, stream in enumerate(self.kernel.streams):
            if not np.array_equal(got[i], want[i]):
                where = np.zeros_like(self.live[i])
                where[self.live[i]] = got[i] != want[i]
                raise AssertionError(
                    f"{self.kernel}: {what} differs in {stream}, {self.describe(i, where)}"
                )


class Gradients:
    """Gradients of any dtypes for their norm. Each begins at a multiple of 64 bytes plus some
    elements, and all bytes between them are NaN: one element too many makes the sum NaN."""

    def __init__(
        self,
        chunk: int,
        parts: Sequence[tuple[str, np.ndarray]],
        shifts: Sequence[int] | np.ndarray = (),
    ) -> None:
        self.dtypes = [dtype for dtype, _ in parts]
        bits = [to_bits(dtype, values) for dtype, values in parts]
        self.values = [to_values(d, b) for d, b in zip(self.dtypes, bits, strict=True)]
        sizes = np.array([b.itemsize for b in bits], np.int64)
        numel = np.array([len(b) for b in bits], np.int64)
        before = np.zeros(len(bits), np.int64)
        before[: len(shifts)] = shifts
        slots = (before * sizes + numel * sizes + 64 + 63) // 64 * 64
        starts = np.cumsum(slots) - slots + before * sizes

        self.memory = np.full(int(slots.sum()) + 128, 0xFF, np.uint8)
        begin = 64 + -self.memory.ctypes.data % 64
        for start, b in zip(starts, bits, strict=True):
            self.memory[begin + start : begin + start + b.nbytes] = b.view(np.uint8)
        chunks = -(-numel // chunk)
        self.spans = np.zeros(len(bits), GRADIENT)
        self.spans["grad"] = self.memory.ctypes.data + begin + starts
        self.spans["numel"] = numel
        self.spans["first_chunk"] = np.cumsum(chunks) - chunks
        self.spans["dtype"] = [DTYPES.index(dtype) for dtype in self.dtypes]
        self.chunks = int(chunks.sum())
