"""Build of the compiled module fusedopt._C: C++ always, CUDA where nvcc is found.

What the package is stands in pyproject.toml. These environment variables steer the build:

FUSEDOPT_CUDA        0 leaves CUDA out, 1 insists on it; by default it is built where nvcc is
FUSEDOPT_CUDA_ARCHS  "90;100" for example, or "native" for the GPUs of this machine
CUDA_HOME            the CUDA toolkit to use (default: that of the nvcc on PATH, /usr/local/cuda)
CXX, MAX_JOBS        the C++ compiler, and how many files are compiled at a time
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NoReturn


def fail(message: str) -> NoReturn:
    sys.exit(f"fusedopt: {message}")


try:
    import torch
    from setuptools import Extension, setup
    from setuptools.command.egg_info import egg_info
    from torch.torch_version import TorchVersion
    from torch.utils import cpp_extension
except ImportError as error:
    fail(
        f"torch is not installed in {sys.executable} ({error}); first: pip install torch "
        "(2.11 or newer), then: pip install --no-build-isolation fusedopt"
    )

ARCHS = [75, 80, 90, 100, 120]  # GPUs of 8.6, 8.9 and 12.1 run the code of the one before them
MIN_NVCC = "12.8"  # the first that compiles for all of them

# Bit-identical results need both compilers to round alike: no fused multiply-adds that the source
# does not ask for, IEEE division and square roots. Without -fno-math-errno no loop with a square
# root is vectorised, and without -fopenmp at::parallel_for is silently serial.
HOST_FLAGS = [
    *("-O3", "-g0", "-Wall", "-Wno-unknown-pragmas", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"),
    "-Xfatbin=-compress-all",
    *(f"-Xcompiler={flag}" for flag in HOST_FLAGS),
]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def output(*command: str) -> str:
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    return result.stdout + result.stderr


def find_cuda() -> tuple[Path, str, list[int]] | None:
    """The CUDA toolkit, its version, the compute capabilities to compile for; None: no CUDA."""
    wish = os.environ.get("FUSEDOPT_CUDA", "")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin" if home else f"{os.environ['PATH']}:/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=path)
    if wish == "1" and nvcc is None:
        fail(f"FUSEDOPT_CUDA=1, but there is no nvcc in {path}; set CUDA_HOME to a toolkit")
    if wish == "0" or nvcc is None:
        reason = "FUSEDOPT_CUDA=0" if wish == "0" else "no nvcc found"
        hint = "for NVIDIA GPUs set CUDA_HOME to a CUDA toolkit and build again"
        print(f"fusedopt: {reason}, building for the CPU only; {hint}")
        return None

    # nvcc may be a script that calls another one; a dry run (of no file) names the toolkit itself.
    top = re.search(r"TOP=(.+)", output(nvcc, "--dryrun", "none.cu"))
    release = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    if top is None or release is None:
        fail(f"{nvcc} does not run: {output(nvcc, '--version').strip()}")
    version = f"{release[1]}.{release[2]}"
    hint = "set CUDA_HOME to such a toolkit, or FUSEDOPT_CUDA=0 to build for the CPU only"
    wanted = (torch.version.cuda or version).split(".")[0]
    if release[1] != wanted:
        fail(f"{nvcc} is CUDA {version}, but torch {torch.__version__} needs CUDA {wanted}; {hint}")
    if TorchVersion(version) < MIN_NVCC:
        fail(f"{nvcc} is CUDA {version}, but fusedopt needs {MIN_NVCC} or newer; {hint}")
    known = [int(arch) for arch in re.findall(r"sm_(\d+)", output(nvcc, "--list-gpu-code"))]
    return Path(top[1]).resolve(), version, choose_archs(known)


def choose_archs(known: list[int]) -> list[int]:
    wish = os.environ.get("FUSEDOPT_CUDA_ARCHS", "")
    if not wish:
        return [arch for arch in ARCHS if arch in known]
    if wish == "native":
        if shutil.which("nvidia-smi") is None:
            fail("FUSEDOPT_CUDA_ARCHS=native, but there is no nvidia-smi to ask for the GPUs")
        wish = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    names = wish.replace(".", "").replace(";", " ").replace(",", " ").split()
    unknown = [name for name in names if not name.isdigit() or int(name) not in known]
    if unknown or not names:
        fail(f"FUSEDOPT_CUDA_ARCHS: this nvcc knows {sorted(known)}, not {' '.join(names)!r}")
    return sorted({int(name) for name in names})


def add_cuda(extension: Extension, home: Path, version: str, archs: list[int]) -> None:
    """Adds the CUDA sources. No CUDA library of torch is linked: any build of torch will do."""
    cpp_extension.CUDA_HOME = str(home)  # a CPU build of torch leaves it None
    # A CPU build of torch gives ninja no header dependencies for nvcc. A changed header changes
    # this checksum, and ninja compiles again what has a new command line.
    others = ("csrc/cpu/", "csrc/bindings/")
    used = [Path(header) for header in HEADERS if not header.startswith(others)]
    checksum = zlib.crc32(b"".join(header.read_bytes() for header in used))
    # The kernels ask for nothing newer than 8.0, so that their PTX is made once for all from there
    # on. It is in the module as well, for GPUs yet to come, and for those in between.
    shared = min((arch for arch in archs if arch >= 80), default=archs[-1])
    targets = [(min(arch, shared), f"sm_{arch}") for arch in archs]
    targets += [(shared, f"compute_{shared}")]
    extension.extra_compile_args["nvcc"] = [
        *NVCC_FLAGS,
        # The smallest that all drivers know that run such code; of those for CUDA 12, not all.
        f"--compress-mode={'speed' if version.startswith('12.') else 'size'}",
        f"-DFUSEDOPT_HEADERS={checksum}",
        # Not where it is only to be used: another nvcc may warn of other things.
        *(["--Werror=all-warnings"] if os.environ.get("CI") else []),
        *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets),
        f"--threads={min(len(targets), len(os.sched_getaffinity(0)))}",
    ]
    extension.extra_compile_args["cxx"] += ["-DFUSEDOPT_WITH_CUDA"]
    extension.sources += sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
    extension.include_dirs += [str(home / "include")]
    for folder in ("lib64", "lib", "targets/*/lib"):
        found = home.glob(f"{folder}/libcudart_static.a")
        extension.library_dirs += [str(library.parent) for library in found]
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]


class Build(cpp_extension.BuildExtension):
    """torch's build, with checks before it and a record of what was built after it."""

    def build_extensions(self) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if shutil.which(compiler) is None:
            fail(f"there is no C++ compiler {compiler}; install g++, or set CXX to a compiler")
        include = sysconfig.get_path("include")
        if not Path(include, "Python.h").exists():
            fail(f"there is no Python.h in {include}; install Python's headers (python3-dev)")
        cuda = find_cuda()
        self.record = {
            "version": self.distribution.get_version().partition("+")[0],
            "torch_version": str(torch.__version__),
            "cuda_version": cuda[1] if cuda else "",
            "cuda_archs": os.environ.get("FUSEDOPT_CUDA_ARCHS", ""),
        }
        (extension,) = self.extensions
        extension.extra_compile_args["cxx"] += [
            f'-DFUSEDOPT_{name.upper()}="{value}"' for name, value in self.record.items()
        ]
        if cuda:
            add_cuda(extension, *cuda)
        else:
            extension.sources += ["csrc/cuda/none.cpp"]
        try:
            super().build_extensions()
        except RuntimeError as error:  # ninja has already printed what the compiler said
            fail(f"the build failed: {error}")

    def run(self) -> None:
        super().run()
        # The names of everything are a tenth of the module. Those of the loops are kept: a profiler
        # shows them, and tests/binary looks for them.
        if strip := shutil.which("strip"):
            keep = ["--strip-unneeded", "--wildcard", "--keep-symbol=*fusedopt3cpu*"]
            subprocess.run([strip, *keep, self.get_ext_fullpath("fusedopt._C")], check=False)
        # Beside the module, for fusedopt/_extension.py to read where the module does not load.
        folder = Path(self.get_ext_fullpath("fusedopt._C")).parent
        (folder / "_build_info.json").write_text(json.dumps(self.record, indent=2) + "\n")


class Info(egg_info):
    """Gives an installation, and so a wheel, the torch in its version that it was built for."""

    def finalize_options(self) -> None:
        if "sdist" not in sys.argv:
            major, minor = str(torch.__version__).split(".")[:2]
            cuda = find_cuda()
            built = "cu" + cuda[1].replace(".", "") if cuda else "cpu"
            self.tag_build = f"+torch{major}.{minor}.{built}"
        super().finalize_options()


# torch looks for ninja on PATH, where an interpreter called by its path has not put its own.
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")

setup(
    ext_modules=[
        cpp_extension.CppExtension(
            "fusedopt._C",
            [
                *sorted(str(path) for path in Path("csrc/bindings").rglob("*.cpp")),
                *sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp")),
            ],
            depends=HEADERS,
            extra_compile_args={"cxx": ["-std=c++20", *HOST_FLAGS]},
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": Build, "egg_info": Info},
)
