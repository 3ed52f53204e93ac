"""What headers say of launches, and arithmetic that numpy lacks: machine_api.cpp from Python."""

import ctypes
from ctypes import byref, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import numpy as np
from core.build import build_alone
from core.loss_library import CrossEntropyCall, MseCall

SOURCE = Path(__file__).with_name("machine_api.cpp")
# Multiplications and additions round as the environment says, and are one instruction.
FLAGS = ["-std=c++17", "-O1", "-frounding-math", "-ffp-contract=off"]
FLAGS += ["-fPIC", "-shared", "-fvisibility=hidden"]


def build_machine_api() -> Path:
    return build_alone("machine-api", SOURCE, FLAGS)


NORM, PREPARE, TOTAL, MEASURE = -1, -2, -10, 1 << 20
CROSS_ENTROPY, MSE, SCALE, TARGETS, LOSS = -3, -4, -5, -6, -7
SHORT_ROWS, ROWS = -8, -9  # of cross-entropies, too
CROSS_ENTROPIES = (SHORT_ROWS, ROWS, CROSS_ENTROPY)


Placed = np.ndarray | tuple[int, np.ndarray]
"""An array, at another address than its own where one is given."""


class Launch(NamedTuple):
    kernel: int  # or NORM, PREPARE, TOTAL, one of losses, or MEASURE more than that of a step
    # A bit for each: formats of states, the rule that PREPARE is for, a loss's dtype (and, where
    # ROWS and CROSS_ENTROPY have accesses of 16 bytes, four bits further on).
    members: int
    blocks: int
    argument: bytes
    first: int  # block that runs


class MachineApi:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.kernel_name.restype = c_char_p
        self._library.demangle.restype = c_char_p
        self._library.demangle.argtypes = [c_char_p]
        self._library.kernel_count.restype = c_size_t
        self._library.record.restype = c_size_t
        self._library.record.argtypes = [c_void_p, c_size_t, c_void_p, c_int, c_void_p]
        self._library.record_measured.restype = c_size_t
        self._library.record_measured.argtypes = [c_void_p, c_size_t, *[c_void_p] * 3]
        self._library.control_bytes.restype = c_size_t
        self._library.make_control.argtypes = [c_void_p, c_double, c_void_p]
        self._library.launched_kernel.argtypes = [c_size_t]
        self._library.state_formats.restype = c_char_p
        self._library.launched_members.argtypes = [c_size_t]
        self._library.launched_members.restype = c_uint32
        self._library.launched_blocks.argtypes = [c_size_t]
        self._library.launched_blocks.restype = c_uint32
        self._library.launched_first.argtypes = [c_size_t]
        self._library.launched_first.restype = c_uint32
        self._library.launched_argument.argtypes = [c_size_t]
        self._library.launched_argument.restype = c_void_p
        self._library.launched_bytes.argtypes = [c_size_t]
        self._library.launched_bytes.restype = c_size_t
        self._library.rules.restype = c_char_p
        self._library.factor_bytes.restype = c_size_t
        self._library.make_factor.argtypes = [c_double, c_void_p, c_void_p, c_double, c_void_p]
        self._library.record_norm.restype = c_size_t
        self._library.record_norm.argtypes = [c_void_p, c_size_t, *[c_void_p] * 3]
        self._library.record_prepare.restype = c_size_t
        self._library.record_prepare.argtypes = [
            *(c_int, c_void_p, c_size_t, c_void_p, c_size_t, *[c_void_p] * 3)
        ]
        for name in ("record_cross_entropy", "record_mse", "record_scale"):
            getattr(self._library, name).restype = c_size_t
        for name in ("bytes_of_cross_entropy", "rows_that_fill"):
            getattr(self._library, name).restype = c_size_t
        for name in ("fma32", "fma64"):
            getattr(self._library, name).argtypes = [*[c_void_p] * 3, c_size_t, c_int, c_void_p]

    def kernel_names(self) -> list[str]:
        """The types of each kernel, as the names of symbols have them."""
        count = int(self._library.kernel_count())
        return [self._library.kernel_name(kernel).decode() for kernel in range(count)]

    def kernels_that_measure(self) -> list[int]:
        """The numbers of those that have one beside them that measures."""
        count = int(self._library.kernel_count())
        return [kernel for kernel in range(count) if self._library.measures(kernel)]

    def state_formats(self) -> list[str]:
        """Each of which a kernel of codings has a kernel of its own for."""
        return str(self._library.state_formats().decode()).split()

    def rules(self) -> list[str]:
        """Each of which has a kernel that makes its rows."""
        return str(self._library.rules().decode()).split()

    def demangle(self, symbol: str) -> str:
        return str(self._library.demangle(symbol.encode()).decode())

    def factor(
        self,
        factor: float = 1,
        grad_scale: np.ndarray | None = None,
        found_inf: np.ndarray | None = None,
        max_grad_norm: float = 0,
    ) -> np.ndarray:
        """What a factor of gradients is made of; they are clipped where there is a largest norm."""
        made = np.zeros(self._library.factor_bytes(), np.uint8)
        addresses = [None if one is None else one.ctypes.data for one in (grad_scale, found_inf)]
        self._library.make_factor(factor, *addresses, max_grad_norm, made.ctypes.data)
        return made

    def control(self, factor: np.ndarray, sum_of_squares: float = 0) -> np.ndarray:
        """What gradients are multiplied by, and whether the step is skipped, for a device."""
        made = np.zeros(self._library.control_bytes(), np.uint8)
        self._library.make_control(factor.ctypes.data, sum_of_squares, made.ctypes.data)
        return made

    def launches(
        self,
        spans: np.ndarray,
        rows: np.ndarray,
        rows_in_memory: bool = False,
        control: np.ndarray | None = None,
    ) -> list[Launch]:
        """What a step over these spans launches."""
        count = self._library.record(
            *(spans.ctypes.data, len(spans), rows.ctypes.data, rows_in_memory),
            None if control is None else control.ctypes.data,
        )
        return self._recorded(count)

    def measured(
        self, spans: np.ndarray, rows: np.ndarray, sums: np.ndarray, measured: np.ndarray
    ) -> list[Launch]:
        """What a step launches that measures the parameters which spans name."""
        count = self._library.record_measured(
            *(spans.ctypes.data, len(spans), rows.ctypes.data, sums.ctypes.data),
            measured.ctypes.data,
        )
        return self._recorded(count)

    def norm(
        self,
        gradients: np.ndarray,
        sums: np.ndarray,
        factor: np.ndarray,
        control: np.ndarray,
    ) -> list[Launch]:
        """What the norm of gradients launches, which leaves it and what follows in control."""
        count = self._library.record_norm(
            *(gradients.ctypes.data, len(gradients), sums.ctypes.data),
            *(factor.ctypes.data, control.ctypes.data),
        )
        return self._recorded(count)

    def prepare(
        self,
        rule: int,
        sources: np.ndarray,
        counts: np.ndarray,
        factor: np.ndarray,
        control: np.ndarray,
        rows: np.ndarray,
    ) -> list[Launch]:
        """What making rows from their sources, and advancing counts, launches; it also sets control
        where gradients are not clipped."""
        count = self._library.record_prepare(
            *(rule, sources.ctypes.data, len(sources), counts.ctypes.data, len(counts)),
            *(factor.ctypes.data, control.ctypes.data, rows.ctypes.data),
        )
        return self._recorded(count)

    def cross_entropy(
        self, call: CrossEntropyCall, as_many: bool = False, before: int = 0
    ) -> tuple[list[Launch], list[Placed]]:
        """What cross-entropy launches, and the memory that it needs for itself. As if rows were as
        many as fill a device, where that is asked for, or came after so many others."""
        terms = np.full(self._library.bytes_of_cross_entropy(byref(call)), 0xFF, np.uint8)
        divisors, factors = np.full(2, float(call.row_count)), c_uint64()
        addresses = [c_void_p(each.ctypes.data) for each in (divisors, terms)]
        least = self._library.rows_that_fill() if as_many else 0
        count = self._library.record_cross_entropy(
            *(byref(call), *addresses, c_int64(least), c_int64(before), byref(factors))
        )
        arrays: list[Placed] = [terms, divisors]
        if before:
            arrays.append((factors.value, np.full(call.row_count * 64, 0xFF, np.uint8)))
        return self._recorded(count), arrays

    def mse(self, call: MseCall) -> tuple[list[Launch], list[Placed]]:
        """Likewise, the mean squared error."""
        divisors = np.full(2, float(call.numel))
        count = self._library.record_mse(byref(call), c_void_p(divisors.ctypes.data))
        return self._recorded(count), [divisors]

    def scale(
        self, dtype: int, values: np.ndarray, of: int, factor: np.ndarray
    ) -> tuple[list[Launch], list[Placed]]:
        """Likewise, what multiplies values by a number of another dtype."""
        count = self._library.record_scale(
            *(c_void_p(values.ctypes.data), c_int64(len(values)), dtype),
            *(c_void_p(factor.ctypes.data), of),
        )
        return self._recorded(count), []

    def _recorded(self, count: int) -> list[Launch]:
        library = self._library
        return [
            Launch(
                int(library.launched_kernel(number)),
                int(library.launched_members(number)),
                int(library.launched_blocks(number)),
                ctypes.string_at(library.launched_argument(number), library.launched_bytes(number)),
                int(library.launched_first(number)),
            )
            for number in range(count)
        ]

    def fma(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: int) -> np.ndarray:
        """Rounded once: to nearest, down, up or towards zero."""
        a, b, c = map(np.ascontiguousarray, (a, b, c))
        found = np.empty_like(a)
        run = self._library.fma32 if a.dtype == np.float32 else self._library.fma64
        run(*(x.ctypes.data for x in (a, b, c)), len(a), mode, found.ctypes.data)
        return found
