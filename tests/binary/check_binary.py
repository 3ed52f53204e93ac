"""Checks in the disassembly that the build is as fast as its sources mean it to be.

On the CPU every loop must work on whole registers of its instruction set, in the precision that
its dtypes ask for, with the multiply-adds that the rules ask for as instructions. On CUDA every
kernel must load and store 16 bytes at a time. A compiler may quietly break any of these.

Run as `make check-binary`; prints what is wrong and exits with 1 if anything is.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fusedopt"
MODULE = PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

REGISTERS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
TYPES = r"<(?:fusedopt::)?(?P<rule>\w+::Variant<[^>]*>), .*Types<(?P<types>[^>]*)>"
LOOP = re.compile(r"fusedopt::cpu::(?P<isa>\w+)::.*span_loop" + TYPES)
KERNEL = re.compile(r"fusedopt::cuda::.*step_kernel" + TYPES)
ARITHMETIC = re.compile(r"v?(sqrt|div|mul|add|sub)([ps])([sd])\b.*")
ACCESS = re.compile(r"\b(LDG|STG)\.E((?:\.\w+)*)")
BITS = {"double": 64, "float": 32, "bfloat16": 16, "float16": 16}


def lines(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        sys.exit(f"check-binary: {' '.join(command)} failed")


def check_loops() -> tuple[list[str], int]:
    """What is wrong with the loops of the CPU, and how many of them each instruction set has."""
    loops: dict[str, list[str]] = defaultdict(list)
    current = ""
    for line in lines("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(MODULE)):
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = header[1] if LOOP.search(header[1]) else ""
        elif current and "\t" in line:
            loops[current].append(line.split("\t", 1)[1].strip())

    wrong, count = [], Counter[str]()
    for name, instructions in loops.items():
        match = LOOP.search(name)
        assert match is not None
        count[match["isa"]] += 1
        for problem in loop_problems(instructions, REGISTERS[match["isa"]], match["types"]):
            wrong.append(f"{match['isa']} loop {match['rule']} ({match['types']}): {problem}")
    if len({count[isa] for isa in REGISTERS}) != 1 or not loops:
        wrong.append(f"not the same loops for each instruction set: {dict(count)}")
    print(f"CPU: {len(loops)} loops, {dict(count)}")
    return wrong, count["baseline"]


def loop_problems(instructions: list[str], register: str, types: str) -> Iterator[str]:
    baseline = register == REGISTERS["baseline"]
    precision = "d" if types.startswith("double") else "s"
    if baseline and precision == "d":
        return  # x86-64 has no multiply-add of doubles: the C library's is called for each element
    operations = [match for text in instructions if (match := ARITHMETIC.match(text))]
    packed = {match[1] for match in operations if match[2] == "p" and register in match[0]}
    # The baseline makes the multiply-add of floats out of doubles.
    foreign = {match[1] for match in operations if match[3] != precision}
    foreign -= {"mul", "add", "sub"} if baseline else set()
    if foreign:
        yield f"{', '.join(sorted(foreign))} in another precision than that of its dtypes"
    if not packed & {"mul", "add", "sub"}:
        yield f"no packed arithmetic on {register}"
    # What the scalar loop over the last few elements does, the packed loop must do as well.
    scalar = {match[1] for match in operations if match[2] == "s"}
    if missing := sorted((scalar & {"sqrt", "div"}) - packed):
        yield f"no packed {', '.join(missing)} on {register}"
    if not baseline and not any(
        re.match(rf"vfn?m(add|sub)\d+p{precision}\b.*{register}", text) for text in instructions
    ):
        yield f"no packed multiply-add on {register}"
    if calls := [text for text in instructions if text.startswith("call")]:
        yield calls[0]


def check_kernels(expected: int) -> list[str]:
    """What is wrong with the CUDA kernels, of which each architecture must have as many."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/cuobjdump")
    cuobjdump = next(map(str, packages), None) or shutil.which("cuobjdump")
    if cuobjdump is None:
        return ["no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"]
    kernels: dict[tuple[str, str], Counter[str]] = {}
    arch, accesses = "", Counter[str]()
    for line in lines(cuobjdump, "--dump-sass", str(MODULE)):
        if "arch = " in line:
            arch = line.split()[-1]
        elif "Function : " in line:
            accesses = kernels[arch, line.split()[-1]] = Counter()
        elif match := ACCESS.search(line):
            width = re.search(r"\d+", match[2])
            accesses[f"{match[1]} {width[0] if width else 32}"] += 1

    mangled = sorted({name for _, name in kernels})
    demangled = dict(zip(mangled, lines("c++filt", *mangled), strict=True))
    wrong, count = [], Counter[str]()
    for (arch, name), accesses in kernels.items():
        if match := KERNEL.search(demangled[name]):
            count[arch] += 1
            for problem in kernel_problems(accesses, match["types"]):
                wrong.append(f"{arch} kernel {match['rule']} ({match['types']}): {problem}")
    if not count or set(count.values()) != {expected}:
        wrong.append(f"not {expected} kernels for each architecture: {dict(count)}")
    print(f"CUDA: {sum(count.values())} kernels, {dict(count)}")
    return wrong


def kernel_problems(accesses: Counter[str], types: str) -> Iterator[str]:
    # A parameter and its states are loaded and stored, the gradient is loaded only.
    if not accesses["LDG 128"] > accesses["STG 128"] > 0:
        yield f"not all accesses have 128 bits: {dict(accesses)}"
    # Unaligned ends are walked element by element; any other width is a vector taken apart.
    single = {BITS[dtype.split("::")[-1]] for dtype in types.split(", ")} | {32}
    widths = {int(access.split()[1]) for access in accesses}
    if odd := sorted(widths - single - {128}):
        yield f"accesses of {odd} bits: {dict(accesses)}"


def main() -> None:
    if not MODULE.exists():
        sys.exit(f"check-binary: there is no {MODULE}; first: make build")
    built_with_cuda = json.loads((PACKAGE / "_build_info.json").read_text())["cuda_version"]
    wrong: list[str] = []
    if platform.machine() != "x86_64":
        print("CPU and CUDA: not checked, this is not an x86-64 machine")
    else:
        wrong, loops = check_loops()
        if built_with_cuda:
            wrong += check_kernels(loops)
        else:
            print(
                "CUDA: not checked, the module was built without it (no nvcc, or FUSEDOPT_CUDA=0)"
            )
    for problem in wrong:
        print("  wrong:", problem.replace("fusedopt::", ""))
    if wrong:
        sys.exit(f"check-binary: {len(wrong)} problems")


if __name__ == "__main__":
    main()
