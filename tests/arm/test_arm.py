"""The loops of the CPU on 64-bit ARM: compiled by a cross-compiler, run by an emulator, with the
bits that they have on x86.

``make test-arm`` runs these; they need Debian's g++-aarch64-linux-gnu and qemu-user-static.
"""

import contextlib
import platform
import re
import shutil
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from core.build import (
    CACHE,
    CXX,
    JOBS,
    ROOT,
    build,
    build_losses,
    checksum,
    host_flags,
    one_at_a_time,
    run,
    with_included,
)
from torch.utils.cpp_extension import include_paths

from fusedopt._extension import _C

pytestmark = pytest.mark.slow  # the loops take minutes to compile

HERE = Path(__file__).parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
DISASSEMBLER = "aarch64-linux-gnu-objdump"
LOOPS = ("baseline", "avx2", "avx512", "dispatch")
# Those of half precision call what updates a piece of float32.
LOOP = re.compile(
    r"fusedopt::cpu::baseline::.*(?:span_loop<.*Types<(?P<types>[^>]*)>|(?P<piece>update_piece<))"
)
HALF = ("fusedopt::bfloat16", "fusedopt::float16")
LOSS_LOOP = re.compile(
    r"fusedopt::cpu::baseline::\(anonymous namespace\)::(?:(?P<mse>mse_loop<)|begin_chunk<\w+, |"
    r"CrossEntropyRows<)(?P<type>[\w:]+)>(?:::(?:end_chunks|short_rows))?\("
)
PACKED = {"float": "4s", "double": "2d"}


def flags() -> list[str]:
    return [*host_flags(), f"-I{ROOT}/csrc"]


def all_included(sources: list[Path]) -> list[Path]:
    return sorted(set().union(*(with_included(source, ROOT / "csrc") for source in sources)))


def program_of_this_machine(source: Path, folder: Path) -> Path:
    """Linked with the loops that ship, whose object files are in the folder."""
    program = folder / f"{source.stem}-{checksum(all_included([source]), flags())}"
    if not program.exists():
        unfinished = program.with_suffix(".tmp")
        objects = [folder / f"{name}.o" for name in LOOPS]
        run([*CXX, *flags(), source, *objects, "-o", unfinished])
        unfinished.rename(program)
    return program


@one_at_a_time
def build_for_arm(name: str, source: Path, loops: Path) -> Path:
    """The program, in a folder with the object files."""
    sources = [loops / f"{loop}.cpp" for loop in LOOPS] + [source]
    folder = CACHE / f"{name}-{checksum(all_included(sources), flags())}"
    if folder.exists():
        return folder / source.stem
    unfinished = folder.with_suffix(".tmp")
    unfinished.mkdir(parents=True, exist_ok=True)
    commands = [
        [COMPILER, *flags(), "-c", each, "-o", unfinished / f"{each.stem}.o"] for each in sources
    ]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run, commands))
    objects = sorted(unfinished.glob("*.o"))
    run([COMPILER, "-static", "-pthread", *objects, "-o", unfinished / source.stem])
    return unfinished.rename(folder) / source.stem


def need_tools() -> None:
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)}: g++-aarch64-linux-gnu and qemu-user-static have them"
        )


@pytest.fixture(scope="module")
def arm() -> Path:
    need_tools()
    return build_for_arm("arm", HERE / "digests.cpp", ROOT / "csrc/cpu")


@pytest.fixture(scope="module")
def arm_losses() -> Path:
    need_tools()
    return build_for_arm("arm-losses", HERE / "loss_digests.cpp", ROOT / "csrc/cpu/losses")


def digests(output: str) -> dict[str, Mapping[str, str]]:
    """Of each kernel, by instruction set."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        instruction_set, kernel, digest = line.split()
        found.setdefault(kernel, {})[instruction_set] = digest
    return dict(found)


def assert_same_digests(of_here: str, of_there: str, least: int) -> None:
    here, there = digests(of_here), digests(of_there)
    assert len(here) > least and here.keys() == there.keys()
    wrong = []
    for kernel, of_sets in here.items():
        if len({*of_sets.values(), *there[kernel].values()}) != 1:
            wrong.append(f"{kernel}: {of_sets} here, {there[kernel]} there")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(here)} differ", *wrong])


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64")


@needs_x86
def test_same_bits(arm: Path) -> None:
    """All kernels, codes and norms, with Inf, NaN, denormals and all magnitudes."""
    here = program_of_this_machine(HERE / "digests.cpp", build("plain").parent)
    assert_same_digests(run([here]), run([EMULATOR, arm]), 500)


@needs_x86
def test_losses_have_the_same_bits(arm_losses: Path) -> None:
    """All loops with all options, also of masked logits, Inf and NaN; and exp and log."""
    here = program_of_this_machine(HERE / "loss_digests.cpp", build_losses("losses").parent)
    found = []
    for name in ("baseline", "avx2", "avx512"):
        with contextlib.suppress(ValueError):  # this processor has no such instructions
            _C.set_isa(name)
            found.append(name)
    assert_same_digests(run([here, *found]), run([EMULATOR, arm_losses, "baseline"]), 5000)


def disassembled(loops: Path) -> dict[str, list[str]]:
    """The instructions of each function."""
    command = [DISASSEMBLER, "--disassemble", "--demangle", "--no-show-raw-insn"]
    functions: dict[str, list[str]] = {}
    current = ""
    for line in run([*command, loops]).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = header[1]
        elif current and "\t" in line:
            functions.setdefault(current, []).append(line.split("\t", 1)[1])
    return functions


def test_loops_are_packed(arm: Path) -> None:
    """Each loop works on whole registers, in the precision of its dtypes."""
    checked = 0
    for name, code in disassembled(arm.parent / "baseline.o").items():
        match = LOOP.search(name)
        types = "" if match is None else match["types"] or "float"
        if not types or "coded" in types or types.startswith(HALF):
            continue
        checked += 1
        width = PACKED["double" if types.startswith("double") else "float"]
        packed = {text.split()[0] for text in code if f".{width}" in text}
        assert packed & {"fmul", "fmla", "fadd", "fsub"}, f"{name}: {sorted(packed)}"
        scalar = {text.split()[0] for text in code if text.startswith(("fsqrt", "fdiv"))}
        assert scalar <= packed, f"{name}: {sorted(scalar - packed)} are not packed"
    assert checked > 50


def test_loops_of_losses_are_packed(arm_losses: Path) -> None:
    """Likewise, multiply-adds as well, and nothing is left to the C library's maths."""
    checked = 0
    for name, code in disassembled(arm_losses.parent / "baseline.o").items():
        match = LOSS_LOOP.search(name)
        if match is None:
            continue
        checked += 1
        width = PACKED["double" if match["type"] == "double" else "float"]
        packed = {text.split()[0] for text in code if f".{width}" in text}
        wanted = {"fmul", "fsub"} if match["mse"] else {"fmul", "fmla"}
        assert wanted <= packed, f"{name}: {sorted(wanted - packed)} are not packed"
        calls = [text for text in code if re.match(r"bl\s+\w+ <(?!mem|.*fusedopt::)", text)]
        assert not calls, f"{name}: {calls[0]}"
    assert checked == 16  # of float32 and float64, two for chunks; of all dtypes, three others


@pytest.mark.parametrize("source", ["module.cpp", "losses/losses.cpp"])
def test_bindings_compile(source: str) -> None:
    """Against the headers of this machine's torch, which are those of ARM's as well."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}: g++-aarch64-linux-gnu has it")
    strings = ("VERSION", "CUDA_VERSION", "TORCH_VERSION", "CUDA_ARCHS")
    defines = [f'-DFUSEDOPT_{string}=""' for string in strings]
    folders = [*include_paths(), sysconfig.get_path("include")]
    own = [flag for flag in flags() if flag != "-std=c++17"] + ["-std=c++20", *defines]
    torch = [f"-isystem{folder}" for folder in folders]
    unit = ROOT / "csrc/bindings" / source
    run([COMPILER, *own, *torch, "-DTORCH_EXTENSION_NAME=_C", "-fsyntax-only", unit])
