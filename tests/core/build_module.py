"""Builds of the compiled module that are not those that ship."""

import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from .build import (
    CACHE,
    CXX,
    HERE,
    ROOT,
    build,
    build_losses,
    checksum,
    host_flags,
    one_at_a_time,
    run,
)

ISA_FILES = ["baseline", "avx2", "avx512", "dispatch"]
STRINGS = ("VERSION", "CUDA_VERSION", "TORCH_VERSION")


@one_at_a_time
def build_module(name: str, cuda: Path, extra_flags: Sequence[str]) -> Path:
    """The module with the loops that ship.

    Args:
        name: one that no build of the core has, which would remove this one as stale.
        cuda: what has the functions of csrc/cuda/cuda.h.
        extra_flags: of the bindings and of that.
    """
    loops = [build("plain").with_name(f"{file}.o") for file in ISA_FILES]
    loops += [build_losses("losses").with_name(f"{file}.o") for file in ISA_FILES]
    flags = [flag for flag in host_flags() if flag not in ("-O3", "-std=c++17")]
    flags += [f'-DFUSEDOPT_{string}="{name}"' for string in STRINGS]
    flags += ["-std=c++20", "-DTORCH_EXTENSION_NAME=_C", f"-I{ROOT}/csrc", f"-I{HERE}"]
    flags += [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    flags += extra_flags
    bindings = [ROOT / "csrc/bindings/module.cpp", ROOT / "csrc/bindings/losses/losses.cpp"]
    sources = [*bindings, cuda]
    headers = [*HERE.glob("*.h"), *ROOT.glob("csrc/**/*.h")]
    key = checksum([*sources, *sorted(headers)], flags, [loop.parent.name for loop in loops])
    module = CACHE / f"{name}-{key}" / "_C.so"
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
    sanitizers = [flag for flag in extra_flags if flag.startswith("-fsanitize")]
    unfinished = module.with_suffix(".tmp")
    link = [*CXX, "-shared", "-fopenmp", *sanitizers, *objects, *loops, *libraries]
    run([*link, "-ltorch_python", "-o", unfinished])
    return unfinished.rename(module)
