"""The whole of the CUDA way through bindings and Python, with the host as the accelerator.

The module is built with CPU tensors taken for those of a GPU and with kernels that the host runs;
the tests that need a GPU then run on it, graphs included, which are lists of launches here.
"""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

from .build import CACHE, CXX, HERE, ROOT, build, checksum, host_flags, one_at_a_time, run

DEFINES = [
    "-DFUSEDOPT_ACCELERATOR=c10::kCPU",
    "-DFUSEDOPT_WITH_CUDA",
    '-DFUSEDOPT_VERSION="host-run"',
    '-DFUSEDOPT_CUDA_VERSION=""',
    '-DFUSEDOPT_TORCH_VERSION=""',
    "-DTORCH_EXTENSION_NAME=_C",
]
ISA_FILES = ["baseline", "avx2", "avx512", "dispatch"]
TESTS = [
    "device",
    "steps/test_clipping.py",
    "steps/test_plan.py",
    "storage/test_storage_bitwise.py",
]


@one_at_a_time
def build_ahead() -> Path:
    loops = [build("plain").with_name(f"{name}.o") for name in ISA_FILES]
    flags = [flag for flag in host_flags() if flag not in ("-O3", "-std=c++17")]
    flags += ["-std=c++20", "-O1", *DEFINES, f"-I{ROOT}/csrc", f"-I{HERE}"]
    flags += [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    sources = [ROOT / "csrc/bindings/module.cpp", HERE / "host_cuda.cpp"]
    headers = [*HERE.glob("*.h"), *ROOT.glob("csrc/**/*.h")]
    key = checksum([*sources, *sorted(headers)], flags, [loop.parent.name for loop in loops])
    module = CACHE / f"host-run-{key}" / "_C.so"
    if module.exists():
        return module
    module.parent.mkdir(parents=True, exist_ok=True)
    objects = [module.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor() as pool:
        commands = [
            [*CXX, *flags, "-c", source, "-o", out]
            for source, out in zip(sources, objects, strict=True)
        ]
        list(pool.map(run, commands))
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    unfinished = module.with_suffix(".tmp")
    link = [*CXX, "-shared", "-fopenmp", *objects, *loops, *libraries, "-ltorch_python"]
    run([*link, "-o", unfinished])
    return unfinished.rename(module)


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
