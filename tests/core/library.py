"""The core library from Python: kernels, rows of hyper-parameters, spans, and the ways to run."""

import ctypes
import json
from collections.abc import Mapping, Sequence
from ctypes import c_double, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Options = Mapping[str, Any]

GRADIENT = np.dtype(
    [("grad", "u8"), ("numel", "i8"), ("first_chunk", "i8"), ("dtype", "u1")], align=True
)
COUNT_RANGE = np.dtype([("counts", "u8"), ("size", "u4"), ("source", "u4")], align=True)

DTYPES = ["float32", "float64", "bfloat16", "float16"]
"""In the order in which the core numbers them."""

FORWARD, BACKWARD, THREADED = 0, 1, -1
"""The order of the pieces of a step; any other number is the seed of a shuffle."""


class Layout:
    """Structs of the core, which have room for what the rules need most of."""

    def __init__(self, states: int, options: int, row: int, *sizes: int) -> None:
        span = [("param", "u8"), ("grad", "u8"), ("states", "u8", states), ("numel", "i8")]
        span += [("offset", "i8"), ("kernel", "i4"), ("row", "i4"), ("coding", "u8")]
        span += [("measured", "i4"), ("first_chunk", "u4")]
        coding = [("scales", "u8", states), ("master", "u8"), ("count", "u8")]
        coding += [("row", "i8"), ("first_block", "i8"), ("first_place", "i4"), ("key", "u8")]
        coding += [("step", "u4"), ("param", "u1"), ("grad", "u1"), ("state", "u1")]
        source = [("options", "u8", options), ("count", "u8"), ("taken", "f4"), ("kinds", "u4")]
        source += [("row", "u4"), ("first", "?"), ("float64", "?")]
        self.options = options
        self.row = np.dtype((np.uint8, row))
        self.span = np.dtype(span)
        self.coding = np.dtype(coding, align=True)
        self.row_source = np.dtype(source, align=True)
        structs = (self.span, self.coding, GRADIENT, self.row_source, COUNT_RANGE)
        assert [struct.itemsize for struct in structs] == list(sizes)

    def full_launch(self, room: int) -> tuple[int, int]:
        """As many sources of rows as there is room for, and the ranges of counts that fit in."""
        sources, left = divmod(room, self.row_source.itemsize)
        return sources, left // COUNT_RANGE.itemsize


@dataclass(frozen=True)
class Kernel:
    layout: Layout
    index: int
    rule: str
    variant: int  # among all variants of all rules
    states: tuple[str, ...]
    dtypes: tuple[str, ...]  # of the parameter, the gradient and each state, or all "coded"
    chunk: int  # elements that a block of the CUDA kernel handles at a time
    never_negative: tuple[bool, ...]  # of each state

    def __str__(self) -> str:
        dtypes = "codes" if self.dtypes[0] == "coded" else ", ".join(self.dtypes)
        return f"{self.rule}({', '.join(self.states)}) on {dtypes}"

    @property
    def streams(self) -> tuple[str, ...]:
        return ("param", "grad", *self.states)


class Core:
    """A built library. Which rules there are is asked of the library itself."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.describe.restype = ctypes.c_char_p
        self._library.make_row.argtypes = [
            *(c_int, c_void_p, c_double, c_int, c_double, c_int, c_void_p)
        ]
        self._library.choose_variant.argtypes = [c_int, c_void_p]
        self._library.cpu_step.argtypes = [
            *(c_void_p, c_size_t, c_void_p, c_int, c_void_p, c_size_t, c_int)
        ]
        self._library.measured_step.argtypes = [
            *(c_void_p, c_size_t, c_void_p, c_int, c_int, c_int, c_int, c_void_p)
        ]
        self._library.measures.argtypes = [c_int, c_void_p]
        self._library.tile_step.argtypes = [c_void_p, c_size_t, c_void_p, c_uint32, c_int]
        self._library.tile_step_from_memory.argtypes = [
            *(c_void_p, c_size_t, c_void_p, c_int, c_void_p, c_int, c_uint32, c_int)
        ]
        self._library.prepare_rows.argtypes = [
            *(c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_int, c_void_p)
        ]
        self._library.cpu_sum_of_squares.argtypes = [
            *(c_void_p, c_size_t, c_void_p, c_int, c_void_p, c_size_t, c_int)
        ]
        self._library.cpu_sum_of_squares.restype = c_double
        self._library.tile_sum_of_squares.argtypes = [c_void_p, c_size_t, c_void_p]
        self._library.tile_sum_of_squares.restype = c_double
        self._library.tile_chunks.argtypes = [c_void_p, c_size_t, c_void_p, c_void_p, c_size_t]
        self._library.tile_chunks.restype = c_uint32
        self._library.split_floats.argtypes = [c_void_p, c_size_t, c_int, c_void_p, c_void_p]
        self._library.join_floats.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p]
        self._library.cut_floats.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p]
        self._library.make_random_key.argtypes = [c_uint64, c_uint64]
        self._library.make_random_key.restype = c_uint64
        self._library.random_bits.argtypes = [c_uint64, c_uint32, c_int64, c_size_t, c_void_p]
        self._library.dithers.argtypes = [c_int64, c_uint32, c_size_t, c_void_p]
        self._library.encode_blocks.argtypes = [c_void_p, c_int64, c_int, c_void_p, c_void_p]
        self._library.decode_blocks.argtypes = [c_void_p, c_void_p, c_int64, c_int, c_void_p]
        self._library.encode_squares.argtypes = [*[c_void_p] * 3, c_int64, c_void_p]
        self._description = json.loads(self._library.describe())
        self.layout = Layout(*self._description["layout"])
        self.sums: int = self._description["sums"]
        self.norm_chunk: int = self._description["norm_chunk"]
        self.full_launch = self.layout.full_launch(self._description["prepare_bytes"])
        self.isas: dict[str, int] = dict(self._description["isas"])
        self._rules = self._description["rules"]  # of each: name, first variant, option keys
        self.rules: list[str] = [name for name, _, _ in self._rules]

    @cached_property
    def _all_kernels(self) -> list[Kernel]:
        """All of them, in the order in which the core numbers them."""
        about = self._description
        kernels = []
        for variant, states in enumerate(about["variants"]):
            rule = [name for name, first, _ in self._rules if first <= variant][-1]
            names = tuple(name for name, _ in states)
            never_negative = tuple(bool(flag) for _, flag in states)
            for param, grad, state in [*about["combinations"], ["coded"] * 3]:
                index = len(kernels)
                dtypes = (param, grad, *[state] * len(states))
                chunk = about["chunks"][index]
                kernels.append(
                    Kernel(self.layout, index, rule, variant, names, dtypes, chunk, never_negative)
                )
        assert len(kernels) == len(about["chunks"])
        return kernels

    @cached_property
    def kernels(self) -> list[Kernel]:
        """Those of spans without a Coding."""
        return [kernel for kernel in self._all_kernels if kernel.dtypes[0] != "coded"]

    @cached_property
    def coded_kernels(self) -> list[Kernel]:
        """Those of spans with a Coding, one for each variant."""
        return [kernel for kernel in self._all_kernels if kernel.dtypes[0] == "coded"]

    def values(self, rule: str, options: Options) -> np.ndarray:
        """The options as the core numbers them."""
        keys = self._rules[self.rules.index(rule)][2]
        values = [options[key] if element < 0 else options[key][element] for key, element in keys]
        return np.array(values, np.float64)

    def variant(self, rule: str, options: Options) -> int:
        """The variant that these options ask for, among all variants of all rules."""
        index, values = self.rules.index(rule), self.values(rule, options)
        return int(self._rules[index][1]) + int(
            self._library.choose_variant(index, values.ctypes.data)
        )

    def measures(self, rule: str, options: Options) -> bool:
        """Whether parameters are measured with these options."""
        index, values = self.rules.index(rule), self.values(rule, options)
        return bool(self._library.measures(index, values.ctypes.data))

    def make_row(
        self,
        rule: str,
        values: np.ndarray,
        float64: bool,
        step: float = 1,
        first: bool = False,
        grad_factor: float = 1,
    ) -> np.ndarray:
        """A row of hyper-parameters, as the host works it out."""
        row = np.zeros((), self.layout.row)
        index = self.rules.index(rule)
        self._library.make_row(
            index, values.ctypes.data, step, first, grad_factor, float64, row.ctypes.data
        )
        return row

    def row(
        self,
        kernel: Kernel,
        options: Options,
        step: float = 1,
        first: bool = False,
        grad_factor: float = 1,
    ) -> np.ndarray:
        values = self.values(kernel.rule, options)
        wide = kernel.dtypes[0] == "float64"
        return self.make_row(kernel.rule, values, wide, step, first, grad_factor)

    def prepare_rows(
        self, rule: str, sources: np.ndarray, counts: np.ndarray, skip: bool, rows: np.ndarray
    ) -> None:
        """Rows as a device works them out from their sources, and ranges of counts advanced."""
        self._library.prepare_rows(
            *(self.rules.index(rule), sources.ctypes.data, len(sources)),
            *(counts.ctypes.data, len(counts), skip, rows.ctypes.data),
        )

    def cpu_step(
        self,
        spans: np.ndarray,
        rows: np.ndarray,
        isa: str,
        cuts: Sequence[int] | np.ndarray = (),
        order: int = FORWARD,
    ) -> None:
        """One step by the loops of an instruction set, in pieces [cuts[i], cuts[i + 1])."""
        places = np.array(cuts, np.int64)
        self._library.cpu_step(
            *(spans.ctypes.data, len(spans), rows.ctypes.data, self.isas[isa]),
            *(places.ctypes.data, len(places), order),
        )

    def measured_step(
        self,
        spans: np.ndarray,
        rows: np.ndarray,
        isa: str | None,
        together: bool = False,
        pieces: int = 1,
        order: int = FORWARD,
    ) -> np.ndarray:
        """One step whose spans' parameters are measured first: by the loops of an instruction set,
        in so many pieces, measured and updated one after the other or together, or by the body of
        the CUDA kernels. Returns what was measured, if it is known."""
        count = int(spans["measured"].max()) + 1
        # Of each sum its mean and its root, too, as float64 and as float32.
        measured = np.full((count, self.sums + 1 + 2 * self.sums + self.sums), np.nan)
        self._library.measured_step(
            *(spans.ctypes.data, len(spans), rows.ctypes.data),
            *(-1 if isa is None else self.isas[isa], together, pieces, order),
            measured.ctypes.data,
        )
        return measured

    def tile_step(
        self, spans: np.ndarray, rows: np.ndarray, blocks: int = 0, order: int = FORWARD
    ) -> int:
        """One step by the body of the CUDA kernels, with as many blocks as chunks if not told
        otherwise. Returns the number of launches."""
        return int(
            self._library.tile_step(spans.ctypes.data, len(spans), rows.ctypes.data, blocks, order)
        )

    def tile_step_from_memory(
        self,
        spans: np.ndarray,
        rows: np.ndarray,
        grad_factor: float | None,
        skip: bool = False,
        rows_in_memory: bool = True,
        blocks: int = 0,
        order: int = FORWARD,
    ) -> int:
        """The same with rows or, unless it is None, a gradient factor in the device's memory."""
        factor = np.array([] if grad_factor is None else [grad_factor], np.float64)
        return int(
            self._library.tile_step_from_memory(
                *(spans.ctypes.data, len(spans), rows.ctypes.data, rows_in_memory),
                *(factor.ctypes.data if len(factor) else None, skip, blocks, order),
            )
        )

    def _sums(self, gradients: np.ndarray) -> np.ndarray:
        """Room for the sums of all chunks. One that is left out makes the total NaN."""
        chunks = int((-(-gradients["numel"] // self.norm_chunk)).sum())
        return np.full(chunks, np.nan)

    def cpu_sum_of_squares(
        self,
        gradients: np.ndarray,
        isa: str,
        cuts: Sequence[int] | np.ndarray = (),
        order: int = FORWARD,
    ) -> float:
        """By the loops of an instruction set, in pieces of the chunks [cuts[i], cuts[i + 1])."""
        places, sums = np.array(cuts, np.int64), self._sums(gradients)
        return float(
            self._library.cpu_sum_of_squares(
                *(gradients.ctypes.data, len(gradients), sums.ctypes.data, self.isas[isa]),
                *(places.ctypes.data, len(places), order),
            )
        )

    def tile_sum_of_squares(self, gradients: np.ndarray) -> float:
        """By the body of the CUDA kernel."""
        sums = self._sums(gradients)
        return float(
            self._library.tile_sum_of_squares(
                gradients.ctypes.data, len(gradients), sums.ctypes.data
            )
        )

    def tile_chunks(self, spans: np.ndarray, rows: np.ndarray, chunks: Sequence[int]) -> int:
        """Only these chunks of the first launch. Returns how many chunks that launch has."""
        places = np.array(chunks, np.uint32)
        return int(
            self._library.tile_chunks(
                spans.ctypes.data, len(spans), rows.ctypes.data, places.ctypes.data, len(places)
            )
        )

    # -- codes and random bits by themselves, see codes.h and random.h ---------------------------

    def split(self, bits: np.ndarray, to_24: bool = False) -> tuple[np.ndarray, np.ndarray]:
        high, remainder = np.empty(len(bits), np.uint16), np.empty(len(bits), np.int16)
        self._library.split_floats(
            *(bits.ctypes.data, len(bits), to_24, high.ctypes.data, remainder.ctypes.data)
        )
        return high, remainder

    def join(self, high: np.ndarray, remainder: np.ndarray) -> np.ndarray:
        bits = np.empty(len(high), np.uint32)
        self._library.join_floats(
            high.ctypes.data, remainder.ctypes.data, len(high), bits.ctypes.data
        )
        return bits

    def cut(self, values: np.ndarray, addends: np.ndarray) -> np.ndarray:
        """To bfloat16."""
        bits = np.empty(values.shape, np.uint16)
        self._library.cut_floats(
            values.ctypes.data, addends.ctypes.data, values.size, bits.ctypes.data
        )
        return bits

    def random_key(self, seed: int, ordinal: int) -> int:
        return int(self._library.make_random_key(seed, ordinal))

    def random_bits(self, key: int, step: int, block: int, steps: int = 1) -> np.ndarray:
        """Those of all elements of a block, in this step and the ones after it."""
        bits = np.empty((steps, 256), np.uint32)
        self._library.random_bits(key, step, block, steps, bits.ctypes.data)
        return bits

    def dithers(self, block: int, step: int, steps: int = 1) -> np.ndarray:
        """Likewise."""
        bits = np.empty((steps, 256), np.uint32)
        self._library.dithers(block, step, steps, bits.ctypes.data)
        return bits

    def encode_blocks(
        self, values: np.ndarray, never_negative: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes as they are stored, and scales, of blocks; each value rounded to nearest."""
        codes, scales = np.zeros(values.shape, np.uint8), np.zeros(len(values), np.float32)
        self._library.encode_blocks(
            values.ctypes.data, values.size, never_negative, codes.ctypes.data, scales.ctypes.data
        )
        return codes, scales

    def encode_squares(
        self, values: np.ndarray, scales: np.ndarray, dithers: np.ndarray
    ) -> np.ndarray:
        codes = np.zeros(values.shape, np.uint8)
        self._library.encode_squares(
            *(values.ctypes.data, scales.ctypes.data, dithers.ctypes.data),
            *(values.size, codes.ctypes.data),
        )
        return codes

    def decode_blocks(
        self, codes: np.ndarray, scales: np.ndarray, never_negative: bool
    ) -> np.ndarray:
        values = np.empty(codes.shape, np.float32)
        self._library.decode_blocks(
            codes.ctypes.data, scales.ctypes.data, codes.size, never_negative, values.ctypes.data
        )
        return values
