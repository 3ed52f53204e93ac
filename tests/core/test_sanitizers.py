"""AddressSanitizer and UndefinedBehaviorSanitizer over all kernels, on buffers of exact sizes."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from .build import CXX, FEW, SMALL, Fault, build
from .library import Core

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# -O1: at -O3 the compiler needs twice as long and fewer lines of a report are right.
FLAGS = ["-O1", "-g1", *SANITIZERS]
SMALL_FLAGS = ["-O0", *SANITIZERS]

OVERRUNS = {
    "loop": Fault("cpu/update.h", "i < end; ++i", "i <= end; ++i"),
    "tile": Fault("device/update.h", "if (i >= 0 && i < s.numel) update", "if (i >= 0) update"),
    "norm": Fault("device/norm.h", "if (at + j < count) add_square", "add_square"),
    "coded tile": Fault("core/blocks.h", "left < kBlock ? left : kBlock", "kBlock"),
    "coded loop": Fault("cpu/update_coded.h", "stop - i >= kBlock", "stop > i"),
    "wide lanes of the tile": Fault(
        "device/update_coded.h", "block.count == kBlock && place.first", "place.first"
    ),
    "part of the tile": Fault("device/update_coded.h", "i < place.count; i", "i <= place.count; i"),
}


@pytest.fixture(scope="module", autouse=True)
def sanitizers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() {}")
        command = [*CXX, *SANITIZERS, str(source), "-o", str(source.with_suffix(""))]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"{CXX[0]} cannot link with sanitizers (their runtime is not installed)")


def build_ahead(whole: bool = False, fault: Fault | None = None) -> Path:
    """All rules on every instruction set for few dtypes, or one rule, which may have a fault."""
    if whole:
        return build("sanitized", "sanitize", FLAGS, few=True)
    if fault is None:
        return build("faultless-sanitize-Adam", "sanitize", SMALL_FLAGS, small="Adam")
    name = f"sanitized-{fault.file.replace('/', '-').removesuffix('.h')}"
    return build(name, "sanitize", SMALL_FLAGS, faults=[fault], small="Adam")


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": ""}
    return subprocess.run(
        [program], text=True, capture_output=True, check=False, env=environment, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["small", "whole"])
def test_core_is_clean(whole: bool, core: Core) -> None:
    program = build_ahead(whole)
    result = run(program)
    assert result.returncode == 0, result.stderr[:5000]
    count, about = result.stdout.split(" kernels: ")
    built = json.loads(about)
    assert [name for name, _, _ in built["rules"]] == (core.rules if whole else ["adam"])
    dtypes = (FEW if whole else SMALL).count("Types<") + 1  # and codes
    assert len(built["combinations"]) + 1 == dtypes
    assert int(count) == len(built["variants"]) * dtypes


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=name, marks=pytest.mark.slow) for name, fault in OVERRUNS.items()],
)
def test_an_overrun_is_found(fault: Fault) -> None:
    """The control: a sanitizer that finds nothing might just not have been there."""
    result = run(build_ahead(fault=fault))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
