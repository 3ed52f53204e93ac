"""What headers say of launches, and arithmetic that numpy lacks: machine_api.cpp from Python."""

import ctypes
from collections.abc import Iterator
from ctypes import c_char_p, c_double, c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import NamedTuple

import numpy as np
from core.build import build_alone

SOURCE = Path(__file__).with_name("machine_api.cpp")
# Multiplications and additions round as the environment says, and are one instruction.
FLAGS = ["-std=c++17", "-O1", "-frounding-math", "-ffp-contract=off"]
FLAGS += ["-fPIC", "-shared", "-fvisibility=hidden"]


def build_machine_api() -> Path:
    return build_alone("machine-api", SOURCE, FLAGS)


class Launch(NamedTuple):
    kernel: int
    formats: int  # of states, a bit for each of a kernel of codings
    chunks: int
    argument: bytes


class MachineApi:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.kernel_name.restype = c_char_p
        self._library.demangle.restype = c_char_p
        self._library.demangle.argtypes = [c_char_p]
        self._library.argument_bytes.restype = c_size_t
        self._library.kernel_count.restype = c_size_t
        self._library.record.restype = c_size_t
        self._library.record.argtypes = [c_void_p, c_size_t, c_void_p, c_int, c_void_p]
        self._library.control_bytes.restype = c_size_t
        self._library.make_control.argtypes = [c_double, c_int, c_void_p]
        self._library.launched_kernel.argtypes = [c_size_t]
        self._library.state_formats.restype = c_char_p
        self._library.launched_formats.argtypes = [c_size_t]
        self._library.launched_formats.restype = c_uint32
        self._library.launched_chunks.argtypes = [c_size_t]
        self._library.launched_chunks.restype = c_uint32
        self._library.launched_arguments.argtypes = [c_size_t]
        self._library.launched_arguments.restype = c_void_p
        for name in ("fma32", "fma64"):
            getattr(self._library, name).argtypes = [*[c_void_p] * 3, c_size_t, c_int, c_void_p]
        self._bytes = int(self._library.argument_bytes())

    def kernel_names(self) -> list[str]:
        """The types of each kernel, as the names of symbols have them."""
        count = int(self._library.kernel_count())
        return [self._library.kernel_name(kernel).decode() for kernel in range(count)]

    def state_formats(self) -> list[str]:
        """Each of which a kernel of codings has a kernel of its own for."""
        return str(self._library.state_formats().decode()).split()

    def demangle(self, symbol: str) -> str:
        return str(self._library.demangle(symbol.encode()).decode())

    def control(self, factor: float, skip: bool) -> np.ndarray:
        """What gradients are multiplied by, and whether the step is skipped, for a device."""
        made = np.zeros(self._library.control_bytes(), np.uint8)
        self._library.make_control(factor, skip, made.ctypes.data)
        return made

    def launches(
        self,
        spans: np.ndarray,
        rows: np.ndarray,
        rows_in_memory: bool = False,
        control: np.ndarray | None = None,
    ) -> Iterator[Launch]:
        """What a step over these spans launches."""
        count = self._library.record(
            *(spans.ctypes.data, len(spans), rows.ctypes.data, rows_in_memory),
            None if control is None else control.ctypes.data,
        )
        for number in range(count):
            argument = ctypes.string_at(self._library.launched_arguments(number), self._bytes)
            kernel = int(self._library.launched_kernel(number))
            formats = int(self._library.launched_formats(number))
            chunks = int(self._library.launched_chunks(number))
            yield Launch(kernel, formats, chunks, argument)

    def fma(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: int) -> np.ndarray:
        """Rounded once: to nearest, down, up or towards zero."""
        a, b, c = map(np.ascontiguousarray, (a, b, c))
        found = np.empty_like(a)
        run = self._library.fma32 if a.dtype == np.float32 else self._library.fma64
        run(*(x.ctypes.data for x in (a, b, c)), len(a), mode, found.ctypes.data)
        return found
