"""What goes wrong with a build or an installation is said in one clear line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # each one starts a build


def build(tmp_path: Path, **environment: str) -> str:
    """What a build that has to fail prints last."""
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib")]
        + ["--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    line = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert line.startswith("fusedopt: torch is not installed") and "pip install torch" in line


def test_without_compiler(tmp_path: Path) -> None:
    assert "no C++ compiler no-such-compiler" in build(tmp_path, CXX="no-such-compiler")


def test_cuda_wanted_without_nvcc(tmp_path: Path) -> None:
    line = build(tmp_path, FUSEDOPT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "no nvcc" in line and "set CUDA_HOME" in line


def fake_nvcc(tmp_path: Path, release: str) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\necho "#$ TOP={tmp_path}"\necho "Cuda compilation tools, release {release}"\n'
    )
    nvcc.chmod(0o755)


def test_nvcc_that_is_too_old(tmp_path: Path) -> None:
    fake_nvcc(tmp_path, "11.8")
    line = build(tmp_path, CUDA_HOME=str(tmp_path))
    assert "11.8" in line and "FUSEDOPT_CUDA=0" in line


def test_nvcc_of_another_major_version_than_torch(tmp_path: Path) -> None:
    fake_nvcc(tmp_path, "99.0")
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = '13.0'\n")
    line = build(tmp_path, CUDA_HOME=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert "CUDA 99.0" in line and "needs CUDA 13" in line


def import_copy(tmp_path: Path) -> str:
    """What importing the package from a copy in tmp_path says."""
    result = subprocess.run(
        [sys.executable, "-c", "import fusedopt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert result.returncode != 0
    return result.stderr[result.stderr.rindex("ImportError") :]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package without its compiled module."""
    source = ROOT / "fusedopt"
    shutil.copytree(source, tmp_path / "fusedopt", ignore=shutil.ignore_patterns("*.so", "*.json"))
    return tmp_path


def test_import_without_the_compiled_module(copied: Path) -> None:
    message = import_copy(copied)
    assert "it was not built" in message and "make build" in message


def test_import_with_another_torch(copied: Path) -> None:
    record = {"version": "0.1.0", "torch_version": "1.0.0", "cuda_version": "13.0"}
    (copied / "fusedopt" / "_build_info.json").write_text(json.dumps(record))
    message = import_copy(copied)
    assert "built against 1.0.0" in message and f"found {torch.__version__}" in message
    minor = ".".join(str(torch.__version__).split(".")[:2])
    assert f"to install it: the wheel fusedopt==0.1.0+torch{minor}.cu130\n" in message


def test_import_of_a_damaged_module(copied: Path) -> None:
    (module,) = (ROOT / "fusedopt").glob("_C.*.so")
    (copied / "fusedopt" / module.name).write_bytes(b"not a shared library" * 100)
    message = import_copy(copied)
    assert module.name in message and "invalid ELF header" in message
