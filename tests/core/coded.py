"""Checks of the kernels of spans with a Coding, and of the codes by themselves.

What such a kernel has to do to a span is known to the last bit: what the kernel of plain float32
does to the decoded elements, encoded again. Decoding and encoding are those of coding.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from . import coding
from .checks import (
    ROUNDING,
    all_ways,
    flushing_denormals,
    make_rows,
    options_of,
)
from .coding import BLOCK, PARAM_CODES, STATE_CODES, Coding
from .library import BACKWARD, DTYPES, FORWARD, THREADED, Core, Kernel
from .memory import UNSIGNED, Fill, extreme, to_bits, usual
from .options import RULES

GRADS = ["float32", "bfloat16", "float16"]
CODINGS = [Coding(*names) for names in product(PARAM_CODES, GRADS, STATE_CODES)]
SOME_CODINGS = [
    Coding("bfloat16_and_16", "bfloat16", "int8"),
    Coding("bfloat16_stochastic", "float32", "bfloat16"),
    Coding("float16_and_float32", "float16", "int8"),
    Coding("float32", "float32", "int8"),
    Coding("bfloat16_and_8", "bfloat16", "bfloat16"),
]
SIZES = [0, 1, 3, 255, 256, 257, 2047, 2048, 2049, 5000]
"""Around the borders of blocks, and of the eight blocks that are a chunk of the CUDA kernel."""


def training(random: np.random.Generator, stream: str, size: int) -> np.ndarray:
    """Many magnitudes; in few blocks, an element that is no ordinary number."""
    values = usual(random, stream, size) * 2.0 ** random.integers(-12, 4, size)
    return np.where(random.random(size) < 1 / 2000, extreme(random, stream, size), values)


FILLS = [usual, training, extreme]


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

    EDGE = 16384  # more than a chunk of any stream: even a fault stays inside

    def __init__(
        self,
        core: Core,
        kernel: Kernel,
        spans: Sequence[tuple[Coding, int]],
        rows: np.ndarray,
        fills: Sequence[Fill] = FILLS,
        seed: int = 0,
        arbitrary: bool = True,
    ) -> None:
        random = np.random.default_rng(seed)
        self._core, self._kernel, self._rows = core, kernel, rows
        self._of_span: list[dict[str, Part]] = []
        self._parts: list[Part] = []
        self.codes = [code for code, _ in spans]
        numel = np.array([size for _, size in spans], np.int64)
        self._blocks = -(-numel // BLOCK)
        end = self.EDGE
        for i, (code, size) in enumerate(spans):
            parts = {}
            # Half of the spans are aligned in all streams; codes always are, to eight bytes.
            for name, dtype, count in self._streams(code, size):
                shift = 0 if i % 2 else int(random.integers(0, 16))
                size_of = 8 if dtype == np.uint8 and name != "master" else dtype.itemsize
                parts[name] = Part(i, name, end + shift * size_of, dtype, count)
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
        self.codings["step"] = random.integers(1, 2**24, len(spans))
        self.codings["param"] = [list(PARAM_CODES).index(code.param) for code in self.codes]
        self.codings["grad"] = [DTYPES.index(code.grad) for code in self.codes]
        self.codings["state"] = [list(STATE_CODES).index(code.state) for code in self.codes]
        self.spans = np.zeros(len(spans), kernel.layout.span)
        self.spans["numel"] = numel
        self.spans["offset"] = np.cumsum(numel) - numel
        self.spans["kernel"] = kernel.index
        self.spans["row"] = np.arange(len(spans)) * 5 % len(rows)
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
            self._fill(i, random, fills[i % len(fills)], arbitrary, arbitrary and i % 7 == 3)
        self._is_float = np.zeros(total // 4, bool)
        for part in self._parts:
            if part.dtype == np.uint32:
                self._is_float[part.start // 4 : part.bytes.stop // 4] = True
        self.before = self.memory.copy()

    def _streams(self, code: Coding, size: int) -> list[tuple[str, np.dtype, int]]:
        param, master = PARAM_CODES[code.param]
        streams: list[tuple[str, type, int]] = [("param", param, size)]
        if master is not None:
            streams.append(("master", master, size))
        streams.append(("grad", UNSIGNED[code.grad], size))
        blocks = -(-size // BLOCK)
        for state in self._kernel.states:
            in_codes = code.state == "int8"
            count = blocks * BLOCK if in_codes else size
            streams.append((state, STATE_CODES[code.state], count))
            if in_codes:
                streams.append((f"scales of {state}", np.uint32, blocks))
        return [(name, np.dtype(dtype), count) for name, dtype, count in streams]

    def _get(self, memory: np.ndarray, span: int, name: str) -> np.ndarray | None:
        """A stream of a span as blocks, the last one filled up with zeros; scales as they are."""
        part = self._of_span[span].get(name)
        if part is None:
            return None
        values = memory[part.bytes].view(part.dtype)
        if name.startswith("scales of "):
            return values.view(np.float32)
        blocks = np.zeros((int(self._blocks[span]), BLOCK), part.dtype)
        blocks.ravel()[: part.count] = values
        return blocks

    def _put(self, memory: np.ndarray, span: int, name: str, blocks: np.ndarray | None) -> None:
        part = self._of_span[span].get(name)
        assert (part is None) == (blocks is None), name
        if part is not None and blocks is not None:
            assert blocks.dtype.itemsize == part.dtype.itemsize, f"{name}: {blocks.dtype}"
            memory[part.bytes] = (
                np.ascontiguousarray(blocks)
                .ravel()
                .view(np.uint8)[: part.count * part.dtype.itemsize]
            )

    def _fill(
        self, span: int, random: np.random.Generator, fill: Fill, changed: bool, any_codes: bool
    ) -> None:
        """Values as they are after a step, but for parameters that somebody has changed, and for
        bytes that may be any."""
        code, numel = self.codes[span], int(self.spans["numel"][span])
        shape = (int(self._blocks[span]), BLOCK)

        def values(stream: str) -> np.ndarray:
            array = np.zeros(shape)
            array.ravel()[:numel] = fill(random, stream, numel)
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
                code.state, values(state), never_negative, random.integers(0, 1 << 23, shape)
            )
            if any_codes and scales is not None:
                stored = random.integers(0, 256, shape, np.uint8)
                odd = [0, -0.0, 2.0**-100, -(2.0**-100), 3.4e38, -3.4e38, 1, -1, 1e-9, -1e-3]
                scales = random.choice(odd, len(scales)).astype(np.float32)
            self._put(self.memory, span, state, stored)
            self._put(self.memory, span, f"scales of {state}", scales)

    # -- what a step has to do -------------------------------------------------------------------

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
            streams.append(coding.decode_state(code.state, stored, scales, never_negative))
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
            for b in blocks:
                random[b], dither[b] = coding.random_bits(key, step, b), coding.dither(b, step)
            new = [array[starts[i] : starts[i + 1]].reshape(-1, BLOCK) for array in streams]
            param, master = coding.encode_param(code.param, new[0], random)
            self._put(memory, i, "param", param)
            self._put(memory, i, "master", master)
            for k, state in enumerate(self._kernel.states):
                never_negative = self._kernel.never_negative[k]
                stored, scales = coding.encode_state(code.state, new[2 + k], never_negative, dither)
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


def check_bits(core: Core, kernel: Kernel) -> None:
    """Every coding by every instruction set and by the tile, to the last bit: all sizes, aligned
    and misaligned, with special values, in threads that flush denormals."""
    rows = make_rows(core, kernel, 7)
    memory = CodedStreams(core, kernel, [*product(CODINGS, SIZES)], rows)
    want = memory.expected()
    for way, step in all_ways(core, rows):
        memory.assert_same(memory.after(step), want, way)
    for isa in core.isas:
        step = flushing_denormals(partial(core.cpu_step, rows=rows, isa=isa))
        memory.assert_same(memory.after(step), want, f"{isa} where denormals are flushed")


def check_division(core: Core, kernel: Kernel) -> None:
    """The same bits however a step is cut into pieces, in whatever order or thread they run."""
    sizes = [1000, 30011, 17, 256, 3, 512, 5001]
    rows = make_rows(core, kernel, 3)
    memory = CodedStreams(core, kernel, [*product(SOME_CODINGS, sizes)], rows)
    want = memory.expected()
    total = int(memory.spans["numel"].sum())
    borders = np.append(memory.spans["offset"], total)
    near = np.concatenate([borders + i for i in (-257, -256, -255, -1, 0, 1, 255, 256, 257)])
    random = np.random.default_rng(0).integers(0, total, 50)
    cuts = np.unique(np.concatenate([near, random, [0, 1, total]]).clip(0, total))
    even = [(np.linspace(0, total, n + 1).astype(int), THREADED) for n in (1, 2, 3)]
    for isa in core.isas:
        for places, order in [*even, (cuts, BACKWARD), (cuts, 2)]:
            step = partial(core.cpu_step, rows=rows, isa=isa, cuts=places, order=order)
            what = f"{isa} in {len(places) - 1} pieces, order {order}"
            memory.assert_same(memory.after(step), want, what)


def check_memory(core: Core, kernel: Kernel) -> None:
    """Rows, a gradient factor and counts of steps in the device's memory. A step to be skipped
    changes nothing."""
    random = np.random.default_rng(0)
    sizes = [*random.integers(1, 600, 200), 2047, 2048, 2049, 4100]
    spans = [(SOME_CODINGS[i % len(SOME_CODINGS)], int(size)) for i, size in enumerate(sizes)]
    factor = 1 / 3  # which float32 does not hold
    plain = make_rows(core, kernel, 7, grad_factor=1)
    scaled = make_rows(core, kernel, 7, grad_factor=factor)
    memory = CodedStreams(core, kernel, spans * 2, scaled)
    want = memory.expected()
    counts = memory.codings["step"].astype(np.float32)
    places = np.arange(len(counts))
    in_memory = places % 3 > 0
    memory.codings["count"] = np.where(in_memory, counts.ctypes.data + 4 * places, 0)
    memory.codings["step"][in_memory] = 77  # which is not to be looked at
    ways = [(plain, factor, True), (plain, factor, False), (scaled, None, True)]
    for (rows, own_factor, rows_in_memory), (blocks, order) in product(
        ways, [(0, FORWARD), (3, 3), (0, BACKWARD)]
    ):
        memory.memory[:] = memory.before
        launches = core.tile_step_from_memory(
            memory.spans, rows, own_factor, False, rows_in_memory, blocks, order
        )
        what = f"the tile with factor {own_factor}, rows in memory: {rows_in_memory}"
        assert launches >= 2 + (own_factor is not None), f"{what}: {launches} launches"
        memory.assert_same(memory.memory, want, f"{what}, {blocks} blocks in order {order}")
        if own_factor is not None:
            memory.memory[:] = memory.before
            core.tile_step_from_memory(memory.spans, rows, own_factor, True, rows_in_memory)
            memory.assert_same(memory.memory, memory.before, "a step that is skipped")


def spacing(points: np.ndarray, scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How far apart what is stored is around these values; in blocks, one scale each."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(scale[:, None] == 0, 0, np.abs(values) / scale[:, None])
    upper = np.searchsorted(points, ratios).clip(1, len(points) - 1)
    gaps: np.ndarray = (points[upper] - points[upper - 1]) * scale[:, None]
    return gaps


def check_reference(core: Core, kernel: Kernel) -> None:
    """A step amidst training against the formulas in float64, as exactly as the codes allow."""
    update = RULES[kernel.rule].update
    codes = CODINGS[::2]
    for options in options_of(core, kernel):
        rows = core.row(kernel, options, 7, False, grad_factor=0.5).reshape(1, -1)
        spans = [(code, 700) for code in codes]
        memory = CodedStreams(core, kernel, spans, rows, [usual], arbitrary=False)
        old = [memory.decoded(memory.before, i) for i in range(len(spans))]
        ways = [(isa, partial(core.cpu_step, rows=rows, isa=isa)) for isa in core.isas]
        for way, step in [*ways, ("the tile", partial(core.tile_step, rows=rows))]:
            after = memory.after(step)
            for i, code in enumerate(codes):
                inputs = [array.astype(np.float64).ravel()[:700] for array in old[i]]
                states = dict(zip(kernel.states, inputs[2:], strict=True))
                factor = -0.5 if options["maximize"] else 0.5
                param, states = update(options, 7, False, inputs[0], factor * inputs[1], states)
                got = memory.decoded(after, i)
                for k, name in enumerate(["param", "grad", *kernel.states]):
                    want = {"param": param, "grad": inputs[1]} | states
                    expected = np.zeros_like(got[k], np.float64)
                    expected.ravel()[:700] = want[name]
                    magnitude = np.abs(expected)
                    bound = 16 * ROUNDING["float32"] * magnitude.max()
                    if k == 0:
                        lost = {"bfloat16": 2.0**-8, "bfloat16_stochastic": 2.0**-7}
                        lost |= {"float16": 2.0**-11, "bfloat16_and_8": 2.0**-16}
                        bound = bound + lost.get(code.param, 0) * magnitude + 2.0**-25
                    elif k > 1 and code.state == "bfloat16":
                        square = kernel.never_negative[k - 2]
                        bound = bound + 2.0 ** (-7 if square else -8) * magnitude
                    elif k > 1 and code.state == "int8":
                        square = kernel.never_negative[k - 2]
                        largest = magnitude.max(axis=1) * (1 + 1e-5)
                        if square:
                            bound = bound + spacing(coding.SQUARE_POINTS, largest, expected)
                        else:
                            largest = largest * (32 / 31)
                            bound = bound + spacing(coding.SIGNED_POINTS, largest, expected) / 2
                    error = np.where(np.arange(expected.size).reshape(expected.shape) < 700, 1, 0)
                    error = error * np.abs(got[k] - expected)
                    assert (error <= bound * (1 + 1e-3)).all(), (
                        f"{kernel}, {code} by {way}, {options}: "
                        f"{name} is off by {(error / bound).max():.3g} bounds"
                    )


def check_isolation(core: Core, kernel: Kernel) -> None:
    """A gradient that is no finite number leaves other elements of its block as they would be."""
    rows = make_rows(core, kernel, 1, seed=1)
    codes = [Coding(param, "float32", "int8") for param in PARAM_CODES]
    spans = [(code, 2 * BLOCK) for code in codes]
    memory = CodedStreams(core, kernel, spans, rows, [usual], arbitrary=False)
    sick = 77  # of either block; its states are no block's largest
    others = np.arange(BLOCK) != sick
    for i in range(len(spans)):
        for state in ("grad", *kernel.states):
            blocks = memory._get(memory.before, i, state)
            assert blocks is not None
            if state == "grad":
                blocks[:, sick] = 0
            else:
                blocks.reshape(2, 64, 4)[:, sick % 64, sick // 64] = 0
            memory._put(memory.before, i, state, blocks)
    healthy = memory.after(partial(core.cpu_step, rows=rows, isa="baseline"))
    for value in (np.inf, -np.inf, np.nan, 3e38):
        for i in range(len(spans)):
            grad = memory._get(memory.before, i, "grad")
            assert grad is not None
            grad[:, sick] = np.float32(value).view(np.uint32)
            memory._put(memory.before, i, "grad", grad)
        for way, step in all_ways(core, rows):
            after = memory.after(step)
            for i, code in enumerate(codes):
                want, got = memory.decoded(healthy, i), memory.decoded(after, i)
                for k, name in enumerate(["param", "grad", *kernel.states]):
                    if name == "grad":
                        continue
                    known = np.isfinite(got[k][:, sick]) & (np.abs(got[k][:, sick]) > 1e30)
                    if name != "param" and known.any():
                        continue  # a finite number this large is a scale of its own
                    same = got[k][:, others] == want[k][:, others]
                    if k > 1 and kernel.never_negative[k - 2]:
                        # The code above the largest is taken in a block of finite numbers only.
                        largest = want[k].max(axis=1, keepdims=True)
                        same |= want[k][:, others] >= largest * (1 - 2.0**-6)
                    assert same.all(), (
                        f"{kernel}, {code} by {way}: {name} differs beside a gradient of {value}"
                    )


CODED_CHECKS: dict[str, Callable[[Core, Kernel], None]] = {
    "coded bits": check_bits,
    "coded division": check_division,
    "coded memory": check_memory,
    "coded reference": check_reference,
    "isolation": check_isolation,
}
"""Those that are run for the kernel of each variant that takes a Coding."""
