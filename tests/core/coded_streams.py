"""Spans with a Coding in one memory with guard zones, and what a step has to make of them.

It is known to the last bit: what the kernel of plain float32 does to the decoded elements, encoded
again. Decoding and encoding are those of coding.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from . import coding
from .coding import BLOCK, PARAM_CODES, STATE_CODES, Coding
from .library import DTYPES, Core, Kernel
from .memory import UNSIGNED, Fill, extreme, to_bits, usual


def training(random: np.random.Generator, stream: str, size: int) -> np.ndarray:
    """Many magnitudes; in few blocks, an element that is no ordinary number."""
    values = usual(random, stream, size) * 2.0 ** random.integers(-12, 4, size)
    return np.where(random.random(size) < 1 / 2000, extreme(random, stream, size), values)


def tiny(random: np.random.Generator, stream: str, size: int) -> np.ndarray:
    """So small that the inverse of a block's scale would overflow."""
    return usual(random, stream, size) * 2.0**-136


FILLS = [usual, training, extreme, tiny]


@dataclass
class Part:
    """One stream of one span: where it is in the memory of all, in bytes, and what it holds."""

    span: int
    name: str
    start: int
    dtype: np.dtype
    count: int

    @property
    def bytes(self) -> slice:
        return slice(self.start, self.start + self.count * self.dtype.itemsize)


class CodedStreams:
    """Spans, each with a coding of its own, in a memory with guard zones around every stream."""

    EDGE = 32768  # more than a chunk of any stream: even a fault stays inside

    def __init__(
        self,
        core: Core,
        kernel: Kernel,
        spans: Sequence[tuple[Coding, int] | tuple[Coding, int, int]],
        rows: np.ndarray,
        fills: Sequence[Fill] = FILLS,
        seed: int = 0,
        arbitrary: bool = True,
        kinds: Sequence[tuple[Fill, bool]] | None = None,
    ) -> None:
        """Kinds: what each span is filled with, and whether its streams are aligned; otherwise as
        it comes, so that neither goes with a size or a coding."""
        random = np.random.default_rng(seed)
        if kinds is None:
            turns = (random.permutation(len(spans)) for _ in range(2))
            pairs = zip(*turns, strict=True)
            kinds = [(fills[fill % len(fills)], turn % 2 == 0) for fill, turn in pairs]
        self._core, self._kernel, self._rows = core, kernel, rows
        self._of_span: list[dict[str, Part]] = []
        self._parts: list[Part] = []
        self.codes = [code for code, *_ in spans]
        numel = np.array([size for _, size, *_ in spans], np.int64)
        rows_of = [row[0] if row else size for _, size, *row in spans]
        self._sizes = [coding.sizes_of_blocks(*one) for one in zip(numel, rows_of, strict=True)]
        self._blocks = np.array([len(sizes) for sizes in self._sizes], np.int64)
        end = self.EDGE
        for i, (code, size, *_) in enumerate(spans):
            parts = {}
            for name, dtype, count in self._streams(code, size, int(self._blocks[i])):
                shift = 0 if kinds[i][1] else int(random.integers(0, 16))
                parts[name] = Part(i, name, end + shift * dtype.itemsize, dtype, count)
                end = (parts[name].bytes.stop + 64 + 63) // 64 * 64
            self._of_span.append(parts)
            self._parts += parts.values()
        total = end + self.EDGE
        memory = np.zeros(total + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        self.memory = memory[begin : begin + total]
        self.memory[:] = random.integers(0, 256, total, np.uint8)

        self.codings = np.zeros(len(spans), kernel.layout.coding)
        self.codings["key"] = random.integers(0, 2**64, len(spans), np.uint64)
        self.codings["row"] = rows_of
        # Shards of a whole, which may begin within a block where these do not end with rows.
        self.codings["first_block"] = random.integers(0, 2**40, len(spans)) * (numel % 3 != 0)
        in_block = [code.state != "int8" and 0 < size <= BLOCK for code, size, *_ in spans]
        first = random.integers(0, np.maximum(BLOCK - numel, 0) + 1)
        self.codings["first_place"] = np.where(in_block, first, 0)
        self.codings["step"] = random.integers(1, 2**24, len(spans))
        self.codings["param"] = [list(PARAM_CODES).index(code.param) for code in self.codes]
        self.codings["grad"] = [DTYPES.index(code.grad) for code in self.codes]
        self.codings["state"] = [list(STATE_CODES).index(code.state) for code in self.codes]
        self.spans = np.zeros(len(spans), kernel.layout.span)
        self.spans["numel"] = numel
        self.spans["offset"] = np.cumsum(numel) - numel
        self.spans["kernel"] = kernel.index
        self.spans["row"] = np.arange(len(spans)) * 5 % len(rows)
        self.spans["measured"] = -1
        self.spans["coding"] = self.codings.ctypes.data + self.codings.itemsize * np.arange(
            len(spans)
        )
        for part in self._parts:
            address = self.memory.ctypes.data + part.start
            if part.name in ("param", "grad"):
                self.spans[part.name][part.span] = address
            elif part.name == "master":
                self.codings["master"][part.span] = address
            elif part.name.startswith("scales of "):
                k = kernel.states.index(part.name.removeprefix("scales of "))
                self.codings["scales"][part.span, k] = address
            else:
                self.spans["states"][part.span, kernel.states.index(part.name)] = address

        for i in range(len(spans)):
            self._fill(i, random, kinds[i][0], arbitrary, arbitrary and i % 7 == 3)
        self._is_float = np.zeros(total // 4, bool)
        for part in self._parts:
            if part.dtype == np.uint32:
                self._is_float[part.start // 4 : part.bytes.stop // 4] = True
        self.before = self.memory.copy()

    def _streams(self, code: Coding, size: int, blocks: int) -> list[tuple[str, np.dtype, int]]:
        param, master = PARAM_CODES[code.param]
        streams: list[tuple[str, type, int]] = [("param", param, size)]
        if master is not None:
            streams.append(("master", master, size))
        streams.append(("grad", UNSIGNED[code.grad], size))
        for state in self._kernel.states:
            streams.append((state, STATE_CODES[code.state], size))
            if code.state == "int8":
                streams.append((f"scales of {state}", np.uint32, blocks))
        return [(name, np.dtype(dtype), count) for name, dtype, count in streams]

    def _get(self, memory: np.ndarray, span: int, name: str) -> np.ndarray | None:
        """A stream of a span as blocks, filled up with zeros; scales as they are."""
        part = self._of_span[span].get(name)
        if part is None:
            return None
        values = memory[part.bytes].view(part.dtype)
        if name.startswith("scales of "):
            return values.view(np.float32)
        blocks = np.zeros((int(self._blocks[span]), BLOCK), part.dtype)
        blocks[coding.present(self._sizes[span])] = values
        return blocks

    def _put(self, memory: np.ndarray, span: int, name: str, blocks: np.ndarray | None) -> None:
        part = self._of_span[span].get(name)
        assert (part is None) == (blocks is None), name
        if part is not None and blocks is not None:
            assert blocks.dtype.itemsize == part.dtype.itemsize, f"{name}: {blocks.dtype}"
            scales = name.startswith("scales of ")
            there = slice(None) if scales else coding.present(self._sizes[span])
            memory[part.bytes] = np.ascontiguousarray(blocks[there]).view(np.uint8)

    def _fill(
        self, span: int, random: np.random.Generator, fill: Fill, changed: bool, any_codes: bool
    ) -> None:
        """Values as they are after a step, but for parameters that somebody has changed, and for
        bytes that may be any."""
        code, numel = self.codes[span], int(self.spans["numel"][span])
        shape = (int(self._blocks[span]), BLOCK)

        def values(stream: str) -> np.ndarray:
            array = np.zeros(shape)
            array[coding.present(self._sizes[span])] = fill(random, stream, numel)
            with np.errstate(over="ignore"):
                return array.astype(np.float32)

        halves = random.integers(0, 1 << 16, shape)
        param, master = coding.encode_param(code.param, values("param"), halves)
        if changed and code.param == "float16_and_float32":
            param = np.where(random.random(shape) < 0.05, halves.astype(np.uint16), param)
        self._put(self.memory, span, "param", param)
        self._put(self.memory, span, "master", master)
        grad = to_bits(code.grad, values("grad").astype(np.float64))
        self._put(self.memory, span, "grad", grad)
        for state, never_negative in zip(
            self._kernel.states, self._kernel.never_negative, strict=True
        ):
            stored, scales = coding.encode_state(
                *(code.state, values(state), never_negative),
                *(random.integers(0, 1 << 23, shape), self._sizes[span]),
            )
            if any_codes and scales is not None:
                stored = random.integers(0, 256, shape, np.uint8)
                odd = [0, -0.0, 2.0**-100, -(2.0**-100), 3.4e38, -3.4e38, 1, -1, 1e-9, -1e-3]
                scales = random.choice(odd, len(scales)).astype(np.float32)
            self._put(self.memory, span, state, stored)
            self._put(self.memory, span, f"scales of {state}", scales)

    # -- what a step has to do -------------------------------------------------------------------

    def present(self, span: int) -> np.ndarray:
        """Which elements of a span's blocks there are, as decoded() has them."""
        mask: np.ndarray = coding.present(self._sizes[span])
        return mask

    def decoded(self, memory: np.ndarray, span: int) -> list[np.ndarray]:
        """The parameter, the gradient and the states as blocks of float32."""
        code, get = self.codes[span], partial(self._get, memory, span)
        param, grad = get("param"), get("grad")
        assert param is not None and grad is not None
        streams = [coding.decode_param(code.param, param, get("master"))]
        streams.append(coding.decode_grad(code.grad, grad))
        for state, never_negative in zip(
            self._kernel.states, self._kernel.never_negative, strict=True
        ):
            stored = get(state)
            assert stored is not None
            scales = get(f"scales of {state}")
            sizes = self._sizes[span]
            streams.append(coding.decode_state(code.state, stored, scales, never_negative, sizes))
        return streams

    def expected(self) -> np.ndarray:
        """The memory after a step from the values that it had at first."""
        wanted = {"float32"}
        plain = next(
            k
            for k in self._core.kernels
            if k.variant == self._kernel.variant and set(k.dtypes) == wanted
        )
        count = len(self.spans)
        streams = [
            np.concatenate([np.ravel(array) for array in arrays])
            for arrays in zip(*(self.decoded(self.before, i) for i in range(count)), strict=True)
        ]
        starts = np.append(0, np.cumsum(self._blocks)) * BLOCK
        spans = np.zeros(count, plain.layout.span)
        spans["numel"], spans["offset"] = self._blocks * BLOCK, starts[:-1]
        spans["kernel"], spans["row"] = plain.index, self.spans["row"]
        spans["measured"] = self.spans["measured"]
        for i, array in enumerate(streams):
            address = array.ctypes.data + 4 * starts[:-1].astype(np.uint64)
            if i < 2:
                spans["grad" if i else "param"] = address
            else:
                spans["states"][:, i - 2] = address
        self._core.cpu_step(spans, self._rows, "baseline")

        memory = self.before.copy()
        for i, code in enumerate(self.codes):
            blocks, own = range(int(self._blocks[i])), self.codings[i]
            key, step = int(own["key"]), int(own["step"])
            random, dither = np.zeros((2, len(blocks), BLOCK), np.uint32)
            first = int(own["first_place"])
            for b in blocks:
                number = int(own["first_block"]) + b
                random[b, : BLOCK - first] = coding.random_bits(key, step, number)[first:]
                dither[b, : BLOCK - first] = coding.dither(number, step)[first:]
            new = [array[starts[i] : starts[i + 1]].reshape(-1, BLOCK) for array in streams]
            param, master = coding.encode_param(code.param, new[0], random)
            self._put(memory, i, "param", param)
            self._put(memory, i, "master", master)
            for k, state in enumerate(self._kernel.states):
                never_negative = self._kernel.never_negative[k]
                stored, scales = coding.encode_state(
                    *(code.state, new[2 + k], never_negative, dither, self._sizes[i])
                )
                self._put(memory, i, state, stored)
                self._put(memory, i, f"scales of {state}", scales)
        return memory

    # -- what a step does ------------------------------------------------------------------------

    def after(self, step: Callable[[np.ndarray], object]) -> np.ndarray:
        """The memory after a step over the spans from the values that it had at first."""
        self.memory[:] = self.before
        step(self.spans)
        return self.memory.copy()

    def _canonical(self, memory: np.ndarray) -> np.ndarray:
        words = memory.view(np.uint32)
        is_nan = self._is_float & ((words & np.uint32(0x7FFFFFFF)) > 0x7F800000)
        return np.where(is_nan, np.uint32(0x7FC00000), words).view(np.uint8)

    def assert_same(self, got: np.ndarray, want: np.ndarray, what: str) -> None:
        different = np.flatnonzero(self._canonical(got) != self._canonical(want))
        if not len(different):
            return
        place = int(different[0])
        part = max((p for p in self._parts if p.start <= place), key=lambda p: p.start)
        element = (place - part.start) // part.dtype.itemsize
        bytes_of = slice(
            part.start + element * part.dtype.itemsize,
            part.start + (element + 1) * part.dtype.itemsize,
        )
        raise AssertionError(
            f"{self._kernel}: {what}: {len(different)} bytes differ, first in span {part.span} of "
            f"{self.spans['numel'][part.span]} elements, {self.codes[part.span]}, {part.name}, "
            f"element {element} of {part.count}: {got[bytes_of].view(part.dtype)[0]:#x}, not "
            f"{want[bytes_of].view(part.dtype)[0]:#x}"
        )
