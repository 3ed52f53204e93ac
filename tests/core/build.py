"""Builds of the core without torch: as shipped, with sanitizers, or with planted faults.

A build lands in build/tests-core, in a folder named after the checksum of all that goes into it,
so it is made again only when something has changed.
"""

import ast
import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import ParamSpec

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "tests-core"
CXX = shlex.split(os.environ.get("CXX", "c++"))
JOBS = len(os.sched_getaffinity(0))


P = ParamSpec("P")


def one_at_a_time(make: Callable[P, Path]) -> Callable[P, Path]:
    """Of each name, the first argument: who asks for what is being built waits for it."""

    @wraps(make)
    def wrapped(*args: P.args, **options: P.kwargs) -> Path:
        CACHE.mkdir(parents=True, exist_ok=True)
        # Another thread may be building it, or another process.
        name = args[0] if args else make.__name__
        with Path(CACHE, f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return make(*args, **options)

    return wrapped


@dataclass(frozen=True)
class Fault:
    """A replacement of text that must stand exactly once in a file of csrc."""

    file: str
    old: str
    new: str

    def apply(self, csrc: Path) -> None:
        path = csrc / self.file
        text = path.read_text()
        count = text.count(self.old)
        assert count == 1, f"csrc/{self.file} has {count} times, not once: {self.old}"
        path.write_text(text.replace(self.old, self.new))


# For a build with a fault one rule, these combinations and the baseline loops do, and compile in
# seconds.
SMALL = (
    "Types<float, float, float>, Types<bfloat16, float, bfloat16>, "
    "Types<bfloat16, bfloat16, bfloat16>"
)
# For all rules, under sanitizers: each dtype, also of states of another size than the parameter's.
FEW = (
    "Types<float, float, float>, Types<double, float, double>, Types<bfloat16, bfloat16, float>, "
    "Types<float16, float, float16>"
)
NO_LOOPS = "namespace fusedopt::cpu { struct Loops; const Loops* %s_loops() { return nullptr; } }\n"


NO_LOSS_LOOPS = (
    "namespace fusedopt::cpu { struct LossLoops; "
    "const LossLoops* %s_loss_loops() { return nullptr; } }\n"
)


def set_list(path: Path, name: str, members: str) -> None:
    pattern = rf"using {name} =\s+TypeList<.*?>;\n"
    new = f"using {name} = TypeList<{members}>;\n"
    text, count = re.subn(pattern, new, path.read_text(), flags=re.DOTALL)
    assert count == 1, f"{path.name} has {count} times, not once: {pattern}"
    path.write_text(text)


def make_small(csrc: Path, rule: str, faults: Sequence[Fault]) -> None:
    set_list(csrc / "core/dtype.h", "Combinations", SMALL)
    set_list(csrc / "core/rules/list.h", "Rules", rule)
    for isa in ("avx2", "avx512"):
        if all(fault.file != f"cpu/{isa}.cpp" for fault in faults):
            (csrc / f"cpu/{isa}.cpp").write_text(NO_LOOPS % isa)


def host_flags() -> list[str]:
    """The flags that the product is built with. setup.py itself would run when imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HOST_FLAGS":
            code = compile(ast.Expression(node.value), "setup.py", "eval")
            # C++17 as for nvcc, which compiles the same headers.
            return ["-std=c++17", *eval(code, {"__builtins__": {}}), "-fPIC", "-pthread"]
    raise AssertionError("setup.py has no HOST_FLAGS")


def run(command: Sequence[str | Path]) -> str:
    """What the command prints; its output is the error where it fails."""
    result = subprocess.run(list(map(str, command)), text=True, capture_output=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{shlex.join(map(str, command))}\n{output}"
    return output


def with_included(source: Path, csrc: Path) -> set[Path]:
    """A source, and what it includes of ours."""
    found: set[Path] = set()
    left = [source.resolve()]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), flags=re.MULTILINE):
            places = [(folder / name).resolve() for folder in (path.parent, csrc)]
            left.append(next(place for place in places if place.exists()))
    return found


def checksum(sources: Sequence[Path], *others: object) -> str:
    digest = hashlib.sha256(repr((others, run([*CXX, "--version"]))).encode())
    for path in sources:
        digest.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def shipped(source: Path, csrc: Path) -> Path | None:
    """The object file of loops that the module was built with, if it is newer than its sources."""
    if csrc not in source.parents:
        return None
    folder = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    built = ROOT / "build" / folder / "csrc" / source.relative_to(csrc).with_suffix(".o")
    parts = [(ROOT / "csrc" / part).rglob("*.*") for part in ("core", "cpu")]
    newest = max(path.stat().st_mtime for path in itertools.chain(*parts))
    return built if built.exists() and built.stat().st_mtime > newest else None


@one_at_a_time
def build_alone(name: str, source: Path, flags: Sequence[str]) -> Path:
    """A library or a program of one source, as the flags say, and what it includes of ours."""
    flags = [*flags, f"-I{ROOT}/csrc"]
    included = sorted(with_included(source, ROOT / "csrc"))
    built = CACHE / f"{name}-{checksum(included, flags)}"
    if not built.exists():
        unfinished = built.with_suffix(".tmp")
        run([*CXX, *flags, source, "-o", unfinished])
        unfinished.rename(built)
    return built


@one_at_a_time
def build(
    name: str,
    target: str = "core.so",
    extra_flags: Sequence[str] = (),
    faults: Sequence[Fault] = (),
    small: str | None = None,
    few: bool = False,
) -> Path:
    """The target, a library or an executable, beside the object files it was linked from. Those
    that no fault reaches come from a build without faults. A small one has one rule, and one of few
    has all of them for few dtypes."""
    flags = [*host_flags(), *extra_flags]
    sources = [HERE / "core_api.cpp"]
    if target != "core.so":
        sources.insert(0, HERE / "sanitize.cpp")  # which includes the other one
    csrc_files = [
        path
        for part in ("core", "cpu", "device")
        for path in (ROOT / "csrc" / part).rglob("*.*")
        if path.parent.name != "losses"
    ]
    others = [
        HERE / "host_launcher.h",
        HERE / "measured_spans.h",
        Path(__file__),
        *sorted(csrc_files),
    ]
    key = checksum([*sources, *others], target, flags, faults, small, few)
    folder = CACHE / f"{name}-{key}"
    if folder.exists():
        return folder / target

    if faults:
        name_without = f"faultless-{Path(target).stem}-{small}"
        faultless = build(name_without, target, extra_flags, small=small).parent
    with tempfile.TemporaryDirectory(prefix="making-", dir=CACHE) as scratch:
        csrc, work = Path(scratch, "csrc").resolve(), Path(scratch, "out")
        work.mkdir()
        as_shipped = not (extra_flags or faults or small)
        for part in ("core", "cpu", "device"):
            shutil.copytree(ROOT / "csrc" / part, csrc / part)
        if small is not None:
            make_small(csrc, small, faults)
        if few:
            set_list(csrc / "core/dtype.h", "Combinations", FEW)
        for fault in faults:
            fault.apply(csrc)

        def compile_one(source: Path) -> Path:
            out = work / f"{source.stem}.o"
            changed = {csrc / fault.file for fault in faults}
            if faults and not changed & with_included(source, csrc):
                shutil.copy(faultless / out.name, out)
            elif as_shipped and (made := shipped(source, csrc)):
                shutil.copy(made, out)
            else:
                run([*CXX, *flags, f"-I{csrc}", "-c", source, "-o", out])
            return out

        # The longest to compile go first.
        loops = sorted((csrc / "cpu").glob("*.cpp"), key=lambda path: path.stem != "baseline")
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(compile_one, [sources[0], *loops]))
        link = ["-shared"] if target == "core.so" else []
        run([*CXX, *flags, *link, *objects, "-o", work / target])

        with contextlib.suppress(OSError):  # where another run has just made the same
            work.rename(folder)
    for stale in CACHE.glob(f"{name}-{'[0-9a-f]' * 16}"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    return folder / target


@one_at_a_time
def build_losses(
    name: str,
    target: str = "losses.so",
    extra_flags: Sequence[str] = (),
    faults: Sequence[Fault] = (),
    small: bool = False,
) -> Path:
    """Likewise, of the losses: their loops, or those of the baseline, and their kernels on the
    host."""
    flags = [*host_flags(), *extra_flags]
    source = HERE / "losses_api.cpp"
    parts = ("core", "cpu", "device")
    csrc_files = [path for part in parts for path in (ROOT / "csrc" / part).rglob("*.*")]
    key = checksum(
        [*sorted(HERE.glob("*loss*.h")), source, Path(__file__), *sorted(csrc_files)],
        target,
        flags,
        faults,
        small,
    )
    folder = CACHE / f"{name}-{key}"
    if folder.exists():
        return folder / target
    with tempfile.TemporaryDirectory(prefix="making-", dir=CACHE) as scratch:
        csrc, work = Path(scratch, "csrc").resolve(), Path(scratch, "out")
        work.mkdir()
        as_shipped = not (extra_flags or faults or small)
        for part in parts:
            shutil.copytree(ROOT / "csrc" / part, csrc / part)
        for fault in faults:
            fault.apply(csrc)

        def compile_one(source: Path) -> Path:
            out = work / f"{source.stem}.o"
            if as_shipped and (made := shipped(source, csrc)):
                shutil.copy(made, out)
            else:
                run([*CXX, *flags, f"-I{csrc}", "-c", source, "-o", out])
            return out

        for isa in ("avx2", "avx512") if small else ():
            (csrc / f"cpu/losses/{isa}.cpp").write_text(NO_LOSS_LOOPS % isa)
        with ThreadPoolExecutor(JOBS) as pool:
            loops = sorted((csrc / "cpu" / "losses").glob("*.cpp"))
            objects = list(pool.map(compile_one, [source, *loops]))
        link = ["-shared"] if target == "losses.so" else []
        run([*CXX, *flags, *link, *objects, "-o", work / target])
        with contextlib.suppress(OSError):  # where another run has just made the same
            work.rename(folder)
    for stale in CACHE.glob(f"{name}-{'[0-9a-f]' * 16}"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    return folder / target
