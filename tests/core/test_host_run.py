"""The whole of the CUDA way through bindings and Python, with the host as the accelerator.

The module is built with CPU tensors taken for those of a GPU and with kernels that the host runs;
the tests that need a GPU then run on it, graphs included, which are lists of launches here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .build import HERE, ROOT
from .build_module import build_module

DEFINES = ["-DFUSEDOPT_ACCELERATOR=c10::kCPU", "-DFUSEDOPT_WITH_CUDA"]
TESTS = [
    "device",
    "steps/test_averages.py",
    "steps/test_clipping.py",
    "steps/test_plan.py",
    "storage/test_storage_bitwise.py",
]


def build_ahead() -> Path:
    return build_module("host-run", HERE / "host_cuda.cpp", ["-O1", *DEFINES])


@pytest.mark.slow
def test_everything_for_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *(str(ROOT / "tests" / name) for name in TESTS)],
        env=os.environ | {"FUSEDOPT_HOST_RUN": str(build_ahead())},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    assert " passed" in result.stdout
