"""The losses without torch: the formula, the same bits from loops and kernels, planted faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt._extension import _C

from . import loss_library
from .build import CXX, HERE, ROOT, Fault, build_losses, run
from .loss_library import DTYPES, Losses

CORE, LOOPS, DISPATCH, LANES, LAUNCHES, MSE, SCALE, ARITHMETIC = (
    "core/losses/cross_entropy.h",
    "cpu/losses/cross_entropy.h",
    "cpu/losses/dispatch.cpp",
    "device/losses/cross_entropy.h",
    "device/losses/launches.h",
    "device/losses/mse.h",
    "device/losses/scale.h",
    "core/arithmetic.h",
)
FORMULA, BITS, SCALED = "formula", "bits", "scaled"
MEMSET = "memset(work.gradient.at(row)"
MAXIMUM_TAIL = "lane = 0; i + lane < count"
# What is planted in which file, and what has to catch it.
FAULTS: dict[str, tuple[str, str, str, str]] = {
    "smoothing over all": (FORMULA, CORE, "return 1 - smoothing;", "return 1;"),
    "smoothing by class": (FORMULA, CORE, "smoothing / double(classes)", "smoothing"),
    "distance of a chunk": (FORMULA, CORE, "double(each.maximum)) * share", "double(0)) * share"),
    "weight of a chunk": (FORMULA, CORE, "double(chunk.maximum) - maximum", "0 * maximum"),
    "z_loss once": (FORMULA, CORE, "of_exponentials += 2 * z;", "of_exponentials += z;"),
    "z_loss not of the loss": (FORMULA, CORE, "result.loss += z * result.lse;", ""),
    "target not expected": (FORMULA, CORE, "expected = target_share * loss.factor", "expected = 0"),
    "share without the log": (FORMULA, CORE, "row.distance + row.share * log_sum", "row.distance"),
    "no weight of the target": (FORMULA, LOOPS, "? share\n", "? share : true ? share\n"),
    "ignored rows": (FORMULA, LOOPS, "memset(work.gradient.at(row), 0", f"{MEMSET}, 1"),
    "tail of a chunk": (FORMULA, LOOPS, "? left : kLossSlots", "? left - 1 : kLossSlots"),
    "maximum of the tail": (FORMULA, LOOPS, MAXIMUM_TAIL, MAXIMUM_TAIL.replace("= 0", "= 1")),
    "tree of short rows": (FORMULA, LOOPS, "i + half < classes", "i + half + 1 < classes"),
    "exp less exact": (FORMULA, ARITHMETIC, "-0x1.7f7d1cp-20f", "0.0f"),
    "exp of denormals": (FORMULA, ARITHMETIC, "x < -105.0f", "x < -87.0f"),
    "log of two": (FORMULA, ARITHMETIC, "(k, 0x1.62e42fefp-1, f", "(k, 0x1.62e42p-1, f"),
    "order of slots": (BITS, LANES, "sums[j % kSlots] +=", "sums[j % kSlots / 2] +="),
    "order of slots with shares": (BITS, LANES, "sums[slot] +=", "sums[slot / 2] +="),
    "a step too few": (BITS, LANES, "(count - first + kStep - 1)", "(count - first)"),
    "target's step": (BITS, LANES, "target / kStep, target", "(target + 1) / kStep, target"),
    "a short row's tree": (BITS, LANES, "tree_sum<kShortRow>(sums);", ""),
    "whole rows": (BITS, LAUNCHES, "work.loss.classes * element_bytes;", "0;"),
    "chunks of a lane": (BITS, LANES, "(terms[i].distance) + (max", "(terms[i].distance) - (max"),
    "ignored on a device": (
        BITS,
        LANES,
        "      store_zeros(to);\n      return;\n    }\n    const",
        "    }\n    const",
    ),
    "ignored short rows": (BITS, LANES, "narrow(of_row.ignored ? T(0) : value", "narrow(value"),
    "target's weight on a device": (BITS, LANES, "share *= double(", "(void)double("),
    "mean on a device": (BITS, LANES, "loss.factor = 1 / given.divisors->weight;", ""),
    "tail of squared errors": (BITS, MSE, "gradient[at + i]);", "gradient[at]);"),
    "shared rows": (
        BITS,
        DISPATCH,
        "end_chunks(work, row, begin, end,",
        "end_chunks(work, row, 0, 1,",
    ),
    "scaled by one less": (
        SCALED,
        SCALE,
        "if (at + i < args.count)",
        "if (at + i + 1 < args.count)",
    ),
}


def supported() -> list[int]:
    before, found = _C.isa(), []
    for number, name in enumerate(("baseline", "avx2", "avx512")):
        try:
            _C.set_isa("neon" if before == "neon" else name)
        except ValueError:
            continue
        found.append(number)
    _C.set_isa(before)
    return found if before != "neon" else [0]


def faulty(name: str) -> Path:
    _, file, old, new = FAULTS[name]
    # Nothing is left of what the compiler may take for granted.
    fault = Fault(file, old, new)
    return build_losses(
        f"losses-{name.replace(' ', '-')}", extra_flags=["-O1"], faults=[fault], small=True
    )


def build_ahead(name: str = "", dtype: str = "") -> Path:
    return faulty(name) if name else build_losses("losses")


@pytest.fixture(scope="module")
def losses() -> Losses:
    return Losses(build_losses("losses"))


FEW = ("float32", "bfloat16")
SOME_SLOW = [
    pytest.param(dtype, marks=[] if dtype in FEW else [pytest.mark.slow]) for dtype in DTYPES
]


@pytest.mark.parametrize("dtype", SOME_SLOW)
def test_the_formula(losses: Losses, dtype: str) -> None:
    loss_library.assert_formula(losses, (dtype,))


@pytest.mark.parametrize("dtype", SOME_SLOW)
def test_the_same_bits(losses: Losses, dtype: str) -> None:
    loss_library.assert_same_bits(losses, supported(), (dtype,))


def test_a_scaled_gradient(losses: Losses) -> None:
    loss_library.assert_scaled(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str) -> None:
    library = Losses(faulty(name))
    check = FAULTS[name][0]
    with pytest.raises(AssertionError):
        if check == FORMULA:
            loss_library.assert_formula(library, FEW)
        elif check == BITS:
            loss_library.assert_same_bits(library, [0], FEW)
        else:
            loss_library.assert_scaled(library)


SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SHORT_SCRATCH = Fault(LOOPS, "new T[work.loss.classes]", "new T[work.loss.classes - 1]")


def run_sanitized(library: Path) -> subprocess.CompletedProcess[str]:
    """All cases, in a process that has the sanitizers' runtime from its beginning."""
    runtimes = [
        run([*CXX, f"-print-file-name={name}.so"]).strip() for name in ("libasan", "libubsan")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip(f"{CXX[0]} has no runtime of the sanitizers")
    program = (
        "import sys; from core import loss_library as l; "
        "losses = l.Losses(sys.argv[1]); isas = [int(isa) for isa in sys.argv[2:]]; "
        "l.assert_formula(losses); l.assert_same_bits(losses, isas); l.assert_scaled(losses)"
    )
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(ROOT)]),
    }
    command = [sys.executable, "-c", program, str(library), *map(str, supported())]
    return subprocess.run(
        command, env=environment, text=True, capture_output=True, check=False, timeout=600
    )


@pytest.mark.slow
def test_memory_and_arithmetic_are_clean() -> None:
    result = run_sanitized(build_losses("losses-sanitized", extra_flags=SANITIZED))
    assert result.returncode == 0, result.stderr[-5000:]


@pytest.mark.slow
def test_an_overrun_is_found() -> None:
    """The control: a sanitizer that finds nothing might just not have been there."""
    built = build_losses("losses-overrun", extra_flags=SANITIZED, faults=[SHORT_SCRATCH])
    result = run_sanitized(built)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
