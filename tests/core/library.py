"""The core library from Python: kernels, rows of hyper-parameters, spans, and the ways to run."""

import ctypes
import json
from collections.abc import Mapping, Sequence
from ctypes import c_double, c_int, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Options = Mapping[str, Any]

SPAN = np.dtype(
    [("param", "u8"), ("grad", "u8"), ("states", "u8", 3), ("numel", "i8")]
    + [("offset", "i8"), ("kernel", "i4"), ("row", "i4")]
)
ROW = np.dtype((np.uint8, 128))

FORWARD, BACKWARD, THREADED = 0, 1, -1
"""The order of the pieces of a step; any other number is the seed of a shuffle."""


@dataclass(frozen=True)
class Kernel:
    index: int
    rule: str
    variant: int  # among all variants of all rules
    states: tuple[str, ...]
    dtypes: tuple[str, ...]  # of the parameter, the gradient and each state
    chunk: int  # elements that a block of the CUDA kernel handles at a time

    def __str__(self) -> str:
        return f"{self.rule}({', '.join(self.states)}) on {', '.join(self.dtypes)}"

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
        self._library.tile_step.argtypes = [c_void_p, c_size_t, c_void_p, c_uint32, c_int]
        self._library.tile_chunks.argtypes = [c_void_p, c_size_t, c_void_p, c_void_p, c_size_t]
        self._library.tile_chunks.restype = c_uint32
        self._description = json.loads(self._library.describe())
        self.isas: dict[str, int] = dict(self._description["isas"])
        self._rules = self._description["rules"]  # of each: name, first variant, option keys
        self.rules: list[str] = [name for name, _, _ in self._rules]

    @cached_property
    def kernels(self) -> list[Kernel]:
        """All of them, in the order in which the core numbers them."""
        about = self._description
        kernels = []
        for variant, states in enumerate(about["variants"]):
            rule = [name for name, first, _ in self._rules if first <= variant][-1]
            for param, grad, state in about["combinations"]:
                index = len(kernels)
                dtypes = (param, grad, *[state] * len(states))
                kernels.append(
                    Kernel(index, rule, variant, tuple(states), dtypes, about["chunks"][index])
                )
        return kernels

    def _values(self, rule: str, options: Options) -> tuple[int, np.ndarray]:
        index = self.rules.index(rule)
        keys = self._rules[index][2]
        values = [options[key] if element < 0 else options[key][element] for key, element in keys]
        return index, np.array(values, np.float64)

    def variant(self, rule: str, options: Options) -> int:
        """The variant that these options ask for, among all variants of all rules."""
        index, values = self._values(rule, options)
        return int(self._rules[index][1]) + int(
            self._library.choose_variant(index, values.ctypes.data)
        )

    def row(
        self,
        kernel: Kernel,
        options: Options,
        step: float = 1,
        first: bool = False,
        grad_factor: float = 1,
    ) -> np.ndarray:
        index, values = self._values(kernel.rule, options)
        row = np.zeros((), ROW)
        wide = kernel.dtypes[0] == "float64"
        self._library.make_row(
            index, values.ctypes.data, step, first, grad_factor, wide, row.ctypes.data
        )
        return row

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

    def tile_step(
        self, spans: np.ndarray, rows: np.ndarray, blocks: int = 0, order: int = FORWARD
    ) -> int:
        """One step by the body of the CUDA kernels, with as many blocks as chunks if not told
        otherwise. Returns the number of launches."""
        return int(
            self._library.tile_step(spans.ctypes.data, len(spans), rows.ctypes.data, blocks, order)
        )

    def tile_chunks(self, spans: np.ndarray, rows: np.ndarray, chunks: Sequence[int]) -> int:
        """Only these chunks of the first launch. Returns how many chunks that launch has."""
        places = np.array(chunks, np.uint32)
        return int(
            self._library.tile_chunks(
                spans.ctypes.data, len(spans), rows.ctypes.data, places.ctypes.data, len(places)
            )
        )
