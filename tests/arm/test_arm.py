"""The loops of the CPU on 64-bit ARM: compiled by a cross-compiler, run by an emulator, with the
bits that they have on x86.

``make test-arm`` runs these; they need Debian's g++-aarch64-linux-gnu and qemu-user-static.
"""

import platform
import re
import shutil
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from core.build import CACHE, CXX, JOBS, ROOT, build, checksum, host_flags, one_at_a_time, run
from torch.utils.cpp_extension import include_paths

pytestmark = pytest.mark.slow  # the loops take minutes to compile

HERE = Path(__file__).parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
DISASSEMBLER = "aarch64-linux-gnu-objdump"
LOOPS = ("baseline", "avx2", "avx512", "dispatch")
LOOP = re.compile(r"fusedopt::cpu::baseline::.*span_loop<.*Types<(?P<types>[^>]*)>")
PACKED = {"float": "4s", "double": "2d"}


def flags() -> list[str]:
    return [*host_flags(), f"-I{ROOT}/csrc"]


def program_of_this_machine() -> Path:
    """Linked with the loops that ship."""
    folder = build("plain").parent
    program = folder / "digests"
    if not program.exists():
        unfinished = program.with_suffix(".tmp")
        objects = [folder / f"{name}.o" for name in LOOPS]
        run([*CXX, *flags(), HERE / "digests.cpp", *objects, "-o", unfinished])
        unfinished.rename(program)
    return program


@one_at_a_time
def build_for_arm(name: str = "arm") -> Path:
    """A folder with the object files and the program."""
    sources = [ROOT / f"csrc/cpu/{loop}.cpp" for loop in LOOPS] + [HERE / "digests.cpp"]
    headers = [path for part in ("core", "cpu") for path in (ROOT / "csrc" / part).rglob("*.h")]
    key = checksum([*sources, *sorted(headers)], flags())
    folder = CACHE / f"{name}-{key}"
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".tmp")
    unfinished.mkdir(parents=True, exist_ok=True)
    commands = [
        [COMPILER, *flags(), "-c", source, "-o", unfinished / f"{source.stem}.o"]
        for source in sources
    ]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run, commands))
    objects = sorted(unfinished.glob("*.o"))
    run([COMPILER, "-static", "-pthread", *objects, "-o", unfinished / "digests"])
    return unfinished.rename(folder)


@pytest.fixture(scope="module")
def arm() -> Path:
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)}: g++-aarch64-linux-gnu and qemu-user-static have them"
        )
    return build_for_arm()


def digests(output: str) -> dict[str, Mapping[str, str]]:
    """Of each kernel, by instruction set."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        instruction_set, kernel, digest = line.split()
        found.setdefault(kernel, {})[instruction_set] = digest
    return dict(found)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64")
def test_same_bits(arm: Path) -> None:
    """All kernels, codes and norms, with Inf, NaN, denormals and all magnitudes."""
    here = digests(run([program_of_this_machine()]))
    there = digests(run([EMULATOR, arm / "digests"]))
    assert len(here) > 500 and here.keys() == there.keys()
    wrong = []
    for kernel, of_sets in here.items():
        if len({*of_sets.values(), *there[kernel].values()}) != 1:
            wrong.append(f"{kernel}: {of_sets} here, {there[kernel]} there")
    assert not wrong, "\n".join(wrong)


def test_loops_are_packed(arm: Path) -> None:
    """Each loop works on whole registers, in the precision of its dtypes."""
    command = [DISASSEMBLER, "--disassemble", "--demangle", "--no-show-raw-insn"]
    loops: dict[str, list[str]] = {}
    current = ""
    for line in run([*command, arm / "baseline.o"]).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            match = LOOP.search(header[1])
            current = f"{header[1]} of {match['types']}" if match else ""
        elif current and "\t" in line:
            loops.setdefault(current, []).append(line.split("\t", 1)[1])
    plain = {name: code for name, code in loops.items() if "coded" not in name.split(" of ")[-1]}
    assert len(plain) > 50
    for name, code in plain.items():
        width = PACKED["double" if name.split(" of ")[-1].startswith("double") else "float"]
        packed = {text.split()[0] for text in code if f".{width}" in text}
        assert packed & {"fmul", "fmla", "fadd", "fsub"}, f"{name}: {sorted(packed)}"
        scalar = {text.split()[0] for text in code if text.startswith(("fsqrt", "fdiv"))}
        assert scalar <= packed, f"{name}: {sorted(scalar - packed)} are not packed"


def test_bindings_compile() -> None:
    """Against the headers of this machine's torch, which are those of ARM's as well."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}: g++-aarch64-linux-gnu has it")
    strings = ("VERSION", "CUDA_VERSION", "TORCH_VERSION", "CUDA_ARCHS")
    defines = [f'-DFUSEDOPT_{string}=""' for string in strings]
    folders = [*include_paths(), sysconfig.get_path("include")]
    own = [flag for flag in flags() if flag != "-std=c++17"] + ["-std=c++20", *defines]
    torch = [f"-isystem{folder}" for folder in folders]
    module = ROOT / "csrc/bindings/module.cpp"
    run([COMPILER, *own, *torch, "-DTORCH_EXTENSION_NAME=_C", "-fsyntax-only", module])
