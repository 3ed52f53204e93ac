"""The losses without torch: calls of losses_api.cpp, cases for them, and what they have to give."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from .memory import canonical, to_bits, to_values

DTYPES = ("float32", "float64", "bfloat16", "float16")
HOST = -1
"""The instruction set that stands for the kernels of a device, on the host."""

UNITS = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
LEAST = {"float32": 2.0**-149, "float64": 2.0**-1074, "bfloat16": 2.0**-133, "float16": 2.0**-24}
GUARD = 64
"""Bytes around each array that nobody may write to."""


@dataclass(frozen=True)
class Case:
    """One call of cross-entropy."""

    dtype: str
    rows: int
    classes: int
    smoothing: float = 0.0
    z_loss: float = 0.0
    weighted: bool = False
    probable: bool = False
    is_mean: bool = True
    in_place: bool = False
    with_gradient: bool = True
    with_lse: bool = True
    padding: int = 0  # elements between rows
    inner: int = 0  # rows in the inner dimension, which lie further apart; 0: there is one only
    backwards: bool = False  # rows lie in memory the other way round
    wrong: bool = False  # a third of the targets, and the last one, are no classes
    fill: str = "usual"
    seed: int = 0


def guarded(size: int) -> np.ndarray:
    return np.full(size + 2 * GUARD, 0xA5, np.uint8)


def inside(array: np.ndarray) -> np.ndarray:
    return array[GUARD : len(array) - GUARD]


def is_whole(array: np.ndarray) -> bool:
    return bool((array[:GUARD] == 0xA5).all() and (array[len(array) - GUARD :] == 0xA5).all())


class CalledRows(ctypes.Structure):
    """As loss_call.h has them, like those below."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("inner", "outer_bytes", "inner_bytes")),
    )


class CrossEntropyCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "row_count", "classes")),
        *((name, CalledRows) for name in ("logits", "gradient")),
        ("targets", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("probabilities", CalledRows),
        ("weights", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("smoothing", "z_loss")),
        ("is_mean", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("losses", "lse", "loss")),
    )


class MseCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "numel")),
        *((name, ctypes.c_void_p) for name in ("input", "target", "gradient")),
        ("is_mean", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sums", "loss")),
    )


class Data:
    """The arguments of a case: values, and their bits in memory with guard zones around them."""

    def __init__(self, case: Case) -> None:
        random = np.random.default_rng([case.seed, case.rows, case.classes, len(case.fill)])
        shape = (case.rows, case.classes)
        logits = random.standard_normal(shape) * 3
        if case.fill == "large":
            logits *= 3000
        if case.fill == "masked":
            logits[random.random(shape) < 0.4] = -np.inf
            logits[:, 1024:2048] = -np.inf
        if case.fill == "special" and case.rows:
            for row, value in enumerate([np.nan, np.inf, -np.inf]):
                logits[row % case.rows, random.integers(case.classes)] = value
            logits[-1] = -np.inf
        self.case = case
        self.compute = "float64" if case.dtype == "float64" else "float32"
        bits = to_bits(case.dtype, logits)
        self.logits = to_values(case.dtype, bits)
        self.size = bits.itemsize
        self.stride = self.size * (case.classes + case.padding)
        # Where in memory each row lies: those of an inner dimension are not neighbours.
        self.places = np.arange(case.rows)
        if case.inner:
            assert case.rows % case.inner == 0, "as many rows in each of the outer dimension"
            self.places = self.places.reshape(case.inner, -1).T.reshape(-1)
        if case.backwards:
            self.places = case.rows - 1 - self.places
        self.logit_memory = self.rows_in_memory(bits)
        self.targets = random.integers(case.classes, size=case.rows)
        self.ignored = random.random(case.rows) < 0.2
        probabilities = random.random(shape)
        probabilities /= probabilities.sum(1, keepdims=True)
        probability_bits = np.ascontiguousarray(to_bits(case.dtype, probabilities))
        self.probabilities = to_values(case.dtype, probability_bits)
        self.probability_memory = np.empty_like(probability_bits)
        self.probability_memory[self.places] = probability_bits
        weights = random.random(case.classes) + 0.25
        self.weights = weights.astype(self.compute)

    def rows_in_memory(self, bits: np.ndarray) -> np.ndarray:
        memory = guarded(self.stride * self.case.rows)
        rows = inside(memory).reshape(self.case.rows, self.stride)
        used = self.size * self.case.classes
        rows[self.places, :used] = bits.view(np.uint8).reshape(self.case.rows, used)
        return memory

    def called(self, first: int | None, stride: int) -> CalledRows:
        """The rows from an address on, one in so many bytes."""
        inner, rows = self.case.inner, self.case.rows
        if first is not None and self.case.backwards:
            first, stride = first + (rows - 1) * stride, -stride
        if inner == 0:
            return CalledRows(first, rows + 1, 0, stride)
        return CalledRows(first, inner, stride, rows // inner * stride)

    def values_of(self, memory: np.ndarray) -> np.ndarray:
        """The bits of rows, NaN as one for all."""
        rows = inside(memory).reshape(self.case.rows, self.stride)
        bytes_of_rows = np.ascontiguousarray(rows[self.places, : self.size * self.case.classes])
        return canonical(
            self.case.dtype, bytes_of_rows.view(to_bits(self.case.dtype, np.zeros(1)).dtype)
        )


@dataclass(frozen=True)
class Result:
    """Bits of all that a call gives."""

    loss: np.ndarray
    losses: np.ndarray
    lse: np.ndarray
    gradient: np.ndarray

    def assert_same(self, other: "Result", what: str) -> None:
        for name in ("loss", "losses", "lse", "gradient"):
            one, two = getattr(self, name), getattr(other, name)
            differ = np.flatnonzero(one != two)
            assert not len(differ), f"{what}: {name} differs at {differ[:5]} of {one.size}"


class CrossEntropyArguments:
    """A case in memory, and what a call has left there."""

    def __init__(self, case: Case) -> None:
        self.case, data = case, Data(case)
        targets = np.where(data.ignored, -100, data.targets).astype(np.int64)
        if case.wrong:
            targets[::3], targets[-1] = case.classes, -1
        self.wrong = (targets != -100) & ((targets < 0) | (targets >= case.classes))
        compute = to_bits(data.compute, np.zeros(0)).dtype
        self.losses, self.lse = guarded(8 * case.rows), guarded(compute.itemsize * case.rows)
        self.loss = guarded(data.size)
        zeros = np.zeros((case.rows, case.classes), to_bits(case.dtype, np.zeros(1)).dtype)
        self.gradient = data.logit_memory if case.in_place else data.rows_in_memory(zeros + 77)
        self.data, self.element, self.compute = data, zeros.dtype, compute
        self.read = [targets, data.probability_memory, data.weights]
        self.written = [data.logit_memory, self.losses, self.lse, self.loss]
        self.written += [] if case.in_place else [self.gradient]
        probabilities = data.probability_memory.ctypes.data if case.probable else None
        gradient = inside(self.gradient).ctypes.data if case.with_gradient else None
        self.call = CrossEntropyCall(
            *(DTYPES.index(case.dtype), case.rows, case.classes),
            data.called(inside(data.logit_memory).ctypes.data, data.stride),
            data.called(gradient, data.stride),
            *(None if case.probable else targets.ctypes.data, -100),
            data.called(probabilities, case.classes * data.size),
            data.weights.ctypes.data if case.weighted else None,
            *(case.smoothing, case.z_loss, case.is_mean),
            inside(self.losses).ctypes.data,
            inside(self.lse).ctypes.data if case.with_lse else None,
            inside(self.loss).ctypes.data,
        )

    def result(self) -> Result:
        assert all(map(is_whole, self.written)), "bytes beside an array were written"
        case = self.case
        has_gradient = case.with_gradient or case.in_place
        return Result(
            canonical(case.dtype, inside(self.loss).view(self.element)),
            canonical("float64", inside(self.losses).view(np.uint64)),
            canonical(self.data.compute, inside(self.lse).view(self.compute)),
            self.data.values_of(self.gradient) if has_gradient else np.zeros(0, self.element),
        )


class MseArguments:
    """Likewise, so many elements beside 16 bytes."""

    def __init__(self, dtype: str, numel: int, offset: int, with_gradient: bool = True) -> None:
        self.dtype, self.numel, self.with_gradient = dtype, numel, with_gradient
        random = np.random.default_rng([numel, offset])
        self.bits = [to_bits(dtype, random.standard_normal(numel + offset)) for _ in range(2)]
        size = self.bits[0].itemsize
        self.offset = offset * size
        self.gradient, self.loss = guarded(size * (numel + offset)), guarded(size)
        self.sums = np.zeros(numel // 16384 + 1)
        self.arrays = [*self.bits, self.gradient, self.loss, self.sums]
        gradient = inside(self.gradient).ctypes.data + self.offset
        self.call = MseCall(
            *(DTYPES.index(dtype), numel),
            *(each.ctypes.data + self.offset for each in self.bits),
            *(gradient if with_gradient else None, 1),
            *(self.sums.ctypes.data, inside(self.loss).ctypes.data),
        )

    def result(self) -> list[np.ndarray]:
        """The loss and the gradient, which have to be near those of the formula."""
        dtype, numel = self.dtype, self.numel
        assert is_whole(self.gradient)
        assert is_whole(self.loss)
        element = self.bits[0].dtype
        values = [to_values(dtype, each[self.offset // element.itemsize :]) for each in self.bits]
        got = to_values(dtype, inside(self.loss).view(element))[0]
        mean = np.mean((values[0] - values[1]) ** 2) if numel else np.nan
        assert abs(got - mean) <= 4 * UNITS[dtype] * mean or (numel == 0 and np.isnan(got)), "loss"
        loss = canonical(dtype, inside(self.loss).view(element))
        if not self.with_gradient:
            assert (inside(self.gradient) == 0xA5).all()
            return [loss]
        assert (inside(self.gradient)[: self.offset] == 0xA5).all()
        found = inside(self.gradient)[self.offset :].view(element)
        want = 2 * (values[0] - values[1]) / max(1, numel)
        error = np.abs(to_values(dtype, found) - want)
        assert (error <= 4 * UNITS[dtype] * np.abs(want) + 2 * LEAST[dtype]).all(), "gradient"
        return [canonical(dtype, found), loss]


class Losses:
    """A library of losses_api.cpp."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("losses_exponential_double", "losses_logarithm"):
            function = getattr(self.library, name)
            function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
        self.library.losses_exponential.restype = ctypes.c_float
        self.library.losses_exponential.argtypes = [ctypes.c_float]
        self.library.losses_cross_entropy.restype = ctypes.c_int64

    def cross_entropy(self, case: Case, isa: int, threads: int = 1) -> Result:
        arguments = CrossEntropyArguments(case)
        wrong = self.library.losses_cross_entropy(isa, threads, ctypes.byref(arguments.call))
        assert wrong == case.rows
        return arguments.result()

    def mse(
        self,
        dtype: str,
        numel: int,
        offset: int,
        isa: int,
        threads: int = 1,
        with_gradient: bool = True,
    ) -> list[np.ndarray]:
        arguments = MseArguments(dtype, numel, offset, with_gradient)
        self.library.losses_mse(isa, threads, ctypes.byref(arguments.call))
        return arguments.result()

    def scale(self, dtype: str, values: np.ndarray, of: str, factor: np.ndarray) -> None:
        """By a number of another dtype; both are bits."""
        self.library.losses_scale(
            *(ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(len(values))),
            DTYPES.index(dtype),
            *(ctypes.c_void_p(factor.ctypes.data), DTYPES.index(of)),
        )


def assert_right(case: Case, result: Result) -> None:
    """Against the formula, in float64."""
    data = Data(case)
    shares = np.zeros_like(data.logits)
    weights = data.weights.astype(np.float64) if case.weighted else np.ones(case.classes)
    if case.probable:
        shares += data.probabilities * (1 - case.smoothing) * weights
        ignored = np.zeros(case.rows, bool)
    else:
        shares[np.arange(case.rows), data.targets] = (1 - case.smoothing) * weights[data.targets]
        ignored = data.ignored
    shares += case.smoothing / case.classes * weights
    with np.errstate(all="ignore"):
        top = data.logits.max(1, keepdims=True)
        exponentials = np.exp(data.logits - top)
        lse = (top + np.log(exponentials.sum(1, keepdims=True)))[:, 0]
        kept = np.where(ignored, 0.0, 1.0)
        divisor, valid = 1.0, 1.0
        if case.is_mean:
            valid = float(kept.sum())
            divisor = valid if case.probable else float((kept * weights[data.targets]).sum())
        terms = np.where(shares == 0, 0, shares * (lse[:, None] - data.logits))
        losses = terms.sum(1) / divisor + case.z_loss * lse**2 / valid
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        of_all = shares.sum(1, keepdims=True) / divisor + 2 * case.z_loss * lse[:, None] / valid
        gradient = (probabilities * of_all - shares / divisor) * kept[:, None]
        scale = (np.abs(probabilities * of_all) + shares / divisor) * kept[:, None]
        scale = scale * (1 + (top - data.logits) / 8)  # the difference is rounded before its exp
        losses = np.where(ignored, 0, losses)

    def assert_near(
        name: str, bits: np.ndarray, dtype: str, want: np.ndarray, size: np.ndarray
    ) -> None:
        got = to_values(dtype, bits)
        bound = 16 * size * UNITS[data.compute] + np.abs(want) * UNITS[dtype] + 2 * LEAST[dtype]
        near = np.abs(got - want) <= bound
        assert near.all(), f"{case}: {name} {got[~near][:3]}, expected {want[~near][:3]}"

    assert_near(
        "losses", result.losses, "float64", losses, np.abs(losses) + shares.sum(1) / divisor
    )
    if case.with_lse:
        assert_near("lse", result.lse, data.compute, lse, np.abs(lse) + 1)
    if case.with_gradient:
        assert_near("gradient", result.gradient, case.dtype, gradient, scale)
    total = np.array([losses.sum()]) if valid else np.array([np.nan])
    assert_near(
        "loss",
        result.loss,
        case.dtype,
        total,
        (np.abs(losses) + shares.sum(1) / divisor).sum(keepdims=True),
    )


SIZES = (1, 2, 3, 10, 16, 63, 64, 65, 130, 255, 256, 257, 1000, 1023, 1024, 1025, 2048, 2049, 3333)


def cases(dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    """Usual values: their formula can be worked out."""
    for i, (classes, dtype) in enumerate(product(SIZES, dtypes)):
        plain = Case(dtype, rows=6 if classes > 64 else 72, classes=classes, seed=i)
        yield replace(plain, padding=i % 3)
        yield replace(plain, smoothing=0.1, weighted=i % 2 == 0, is_mean=i % 3 == 0, inner=3)
        yield replace(plain, probable=True, weighted=i % 2 == 1, smoothing=0.3 * (i % 2), inner=3)
        in_place = replace(plain, in_place=True, backwards=i % 3 == 0)
        yield replace(in_place, z_loss=1e-3, weighted=i % 2 == 0, with_lse=False)
        yield replace(plain, with_gradient=False, padding=4, fill="large")


def harsh_cases(dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    """Masked logits, Inf and NaN: all have to give the same."""
    for i, (classes, dtype) in enumerate(product((5, 64, 300, 1024, 3333), dtypes)):
        for fill in ("masked", "special", "large"):
            plain = Case(dtype, rows=9, classes=classes, fill=fill, seed=i)
            yield plain
            yield replace(plain, smoothing=0.2, weighted=True)
            yield replace(plain, probable=True)


def assert_formula(losses: Losses, dtypes: tuple[str, ...] = DTYPES) -> None:
    """That of cross-entropy and of squared errors, and exp and log."""
    for case in cases(dtypes):
        assert_right(case, losses.cross_entropy(case, 0))
    for dtype, numel, offset in product(dtypes, (0, 1, 127, 128, 1000, 16385, 40000), (0, 1)):
        losses.mse(dtype, numel, offset, 0)
    for x in np.linspace(-110, 0, 500, dtype=np.float32):
        want = np.exp(np.float64(x))
        bound = 2.0**-23 * want + 2.0**-149
        assert abs(losses.library.losses_exponential(float(x)) - want) <= bound, f"exp({x})"
    for x in np.linspace(-750, 0, 500):
        bound = 2.0**-52 * np.exp(x) + 2.0**-1074
        assert abs(losses.library.losses_exponential_double(x) - np.exp(x)) <= bound, f"exp({x})"
    for x in np.exp(np.linspace(-700, 700, 1001)):
        error = abs(losses.library.losses_logarithm(x) - np.log(x))
        assert error <= 2.0**-52 * abs(np.log(x)), f"log({x})"


def assert_same_bits(losses: Losses, isas: list[int], dtypes: tuple[str, ...] = DTYPES) -> None:
    """On these instruction sets, with several threads, and by the kernels of a device."""
    for case in [*cases(dtypes), *harsh_cases(dtypes)]:
        want = losses.cross_entropy(case, isas[0])
        for isa, threads in [*((isa, 3) for isa in isas), (HOST, 1)]:
            losses.cross_entropy(case, isa, threads).assert_same(
                want, f"{case}, {isa=}, {threads=}"
            )
    for dtype, numel, offset in product(dtypes, (1, 127, 128, 1000, 16385, 40000), (0, 1)):
        want_mse = losses.mse(dtype, numel, offset, isas[0])
        for isa in [*isas, HOST]:
            for got, want_bits in zip(
                losses.mse(dtype, numel, offset, isa, 3), want_mse, strict=True
            ):
                assert np.array_equal(got, want_bits), f"mse {dtype} {numel} {offset} {isa=}"
    # Few rows of many classes are shared by threads.
    for dtype in dtypes:
        for options in ({}, {"smoothing": 0.1, "in_place": True}, {"probable": True}):
            case = replace(Case(dtype, rows=2, classes=40_000), **options)
            want = losses.cross_entropy(case, isas[0])
            losses.cross_entropy(case, isas[-1], 4).assert_same(want, f"{case}, shared")


def assert_scaled(losses: Losses) -> None:
    """A device multiplies a gradient unless by one."""
    for dtype, factor, numel in product(DTYPES, (1.0, 0.375), (1, 127, 5000)):
        values = np.random.default_rng(numel).standard_normal(numel)
        bits = to_bits(dtype, values)
        memory = bits.copy()
        losses.scale(dtype, memory, "float32", to_bits("float32", np.array([factor])))
        want = to_values(dtype, bits) * factor
        assert (np.abs(to_values(dtype, memory) - want) <= UNITS[dtype] * np.abs(want)).all()
        assert factor != 1 or np.array_equal(memory, bits)
