"""Checks in the disassembly that the build is as fast as its sources mean it to be.

On the CPU every loop must work on whole registers of its instruction set, in the precision that
its dtypes ask for, with the multiply-adds that the rules ask for as instructions. On CUDA the
kernels of every architecture must load and store 16 bytes at a time, keep all they work on in
registers, few enough for two blocks on a multiprocessor, calculate in doubles only where their
dtypes are doubles, and address their arguments in one way. A compiler may quietly break any of it.

Run as `make check-binary`; prints what is wrong and exits with 1 if anything is.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fusedopt"
MODULE = PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

REGISTERS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
TYPES = r"<(?:fusedopt::)?(?P<rule>\w+::Variant(?:<[^>]*>)?), .*Types<(?P<types>[^>]*)>"
CODED_TYPES = (
    r"<(?:fusedopt::)?(?P<rule>\w+::Variant(?:<[^>]*>)?), (?:fusedopt::)?(?P<state>\w+)State>"
)
STATE_FORMATS = 3  # each has a kernel of its own for spans with a Coding
LOOP = re.compile(r"fusedopt::cpu::(?P<isa>\w+)::.*span_loop" + TYPES)
# What the loops call that convert pieces: one for all dtypes of gradients and states.
CONVERTED = re.compile(
    r"fusedopt::cpu::(?P<isa>\w+)::.*update_piece<\w+, "
    r"(?:fusedopt::)?(?P<rule>\w+::Variant(?:<[^>]*>)?), "
)
CALL_TO_CONVERTED = re.compile(r"call\s.*(\*|::update_piece<)")
# What the loops over pieces, and over spans with a Coding, call: the same for all rules.
PIECE = re.compile(
    r"fusedopt::cpu::(?P<isa>\w+)::\(anonymous namespace\)::"
    r"(?P<piece>(en|de)code.*|(widen|narrow)_piece<.*)"
)
# The loops of losses, by their dtype, and what each is made of besides products.
LOSS_LOOP = re.compile(
    r"fusedopt::cpu::(?P<isa>\w+)::\(anonymous namespace\)::(?P<loss>(?P<name>begin_chunk<\w+, |"
    r"CrossEntropyRows<|mse_loop<)(?P<types>[\w:]+)>(?:::(?P<part>end_chunks|short_rows))?)\("
)
CALL_TO_PIECE = re.compile(
    r"call\s.*(::(en|de)code\w*[<(]|::(widen|narrow)_piece<|<mem(cpy|set)@plt>)"
)
SCALAR = re.compile(r"v?((?:sqrt|div|mul|add|sub|cvt\w+)(?:ss|sd)|cvtt?ss2\w+|cvtsi2s\w+)\b")
ARITHMETIC = re.compile(r"v?(sqrt|div|mul|add|sub)([ps])([sd])\b.*")
WITHOUT_MULTIPLY_ADD = ("Rprop::",)  # rules whose formula has none
BITS = {"double": 64, "float": 32, "bfloat16": 16, "float16": 16}

ARCHS = ["80", "90", "100", "120"]
KERNEL = re.compile(r"fusedopt::cuda::.*?(?P<name>(?P<kind>\w+)_kernel\b.*)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
ACCESS = re.compile(r"(LDG|STG)\.E\b(?:.*?\.[US]?(\d+)\b)?")
LOCAL = re.compile(r"(LDL|STL)\b")
# ptxas has two forms of addresses from 0x8000 on, which are the same only if these wrap at 16 bits.
CONSTANT = re.compile(r"c\[0x[0-9a-f]+\]\[(?:U?R\w+\s*\+\s*)?(-?0x[0-9a-f]+)\]")
FAR = "far constants"
MOST_BYTES = 25_000_000  # of the module for all architectures
DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|MUFU\.\w+64H\b|.*\.F64\b")
# What does not fit into registers spills to the stack, which is local memory.
MOST = {"STACK": 0, "LOCAL": 0}
# With 128 registers a multiprocessor, which has 65536, holds two blocks of 256 threads. Where ptxas
# takes that many, it has as many bytes in flight.
MOST_IN_STEP = {**MOST, "SHARED": 0, "REG": 128}
# With 128 registers these kernels, of three or four states with a Coding, spill, so that they ask
# for one block only (Tile::kMinBlocks); with any number from 129 to 255 it is one.
THREE_CODED = re.compile(
    r"coded_step_kernel<.*"
    r"(Adam::Variant<true, true, false>|RmsProp::Variant<true, true>|AdEMAMix::Variant), "
)
FOUR_CODED = re.compile(r"coded_step_kernel<.*Adan::Variant, ")
MOST_OF_THREE = {**MOST_IN_STEP, "REG": 192}
MOST_OF_FOUR = {**MOST_IN_STEP, "REG": 224}

LOSSES = ("cross_entropy", "rows", "mse", "scale")  # their kernels that read and write tensors
NARROW = re.compile(r", 1>")  # of rows that are not made of 16 bytes

Kernel = tuple[str, str]  # the architecture, the mangled name


def lines(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        sys.exit(f"check-binary: {' '.join(command)} failed")


def function_ends() -> dict[int, int]:
    """Where functions end that begin at these addresses: behind one may lie another without a name,
    as setup.py strips most, which objdump takes for a part of it."""
    found = {}
    for line in lines("nm", "--print-size", "--defined-only", str(MODULE)):
        if match := re.match(r"([0-9a-f]+) ([0-9a-f]+) \w ", line):
            found[int(match[1], 16)] = int(match[1], 16) + int(match[2], 16)
    return found


def check_loops() -> tuple[list[str], Counter[str]]:
    """What is wrong with the loops of the CPU, and how many each instruction set has: of spans
    without a Coding, and of those with one."""
    loops: dict[str, list[str]] = defaultdict(list)
    of_losses: dict[str, list[str]] = defaultdict(list)
    current, taken, end = "", loops, 0
    ends = function_ends()
    for line in lines("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(MODULE)):
        if header := re.match(r"([0-9a-f]+) <(.*)>:$", line):
            of_loss = LOSS_LOOP.search(header[2].replace("fusedopt::bfloat16", "bfloat16"))
            ours = (LOOP, PIECE, CONVERTED)
            named = of_loss or any(pattern.search(header[2]) for pattern in ours)
            current, taken = header[2] if named else "", of_losses if of_loss else loops
            end = ends.get(int(header[1], 16), 0)
        elif current and "\t" in line:
            address, instruction = line.split("\t", 1)
            if int(address.strip().rstrip(":"), 16) < end:
                taken[current].append(instruction.strip())

    converted: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in [name for name in loops if CONVERTED.search(name)]:
        match = CONVERTED.search(name)
        assert match is not None
        converted[match["isa"], match["rule"]] += loops.pop(name)

    wrong, count, pieces, kinds = [], Counter[str](), Counter[str](), Counter[str]()
    for name, instructions in loops.items():
        if match := PIECE.search(name):
            pieces[match["isa"]] += 1
            for problem in piece_problems(match["piece"], instructions, REGISTERS[match["isa"]]):
                wrong.append(f"{match['isa']} {match['piece']}: {problem}")
            continue
        match = LOOP.search(name)
        assert match is not None
        count[match["isa"]] += 1
        kinds["coded" if "coded" in match["types"] else "plain"] += match["isa"] == "baseline"
        register, rule = REGISTERS[match["isa"]], match["rule"]
        param = match["types"].replace("fusedopt::", "").split(",")[0]
        if param in ("float16", *(["bfloat16"] if match["isa"] == "baseline" else [])):
            ours = (CALL_TO_CONVERTED, CALL_TO_PIECE)
            called = [text for text in instructions if any(call.match(text) for call in ours)]
            instructions = [text for text in instructions if text not in called]
            instructions += converted[match["isa"], rule]
        for problem in loop_problems(instructions, register, match["types"], rule):
            wrong.append(f"{match['isa']} loop {rule} ({match['types']}): {problem}")
    if len({count[isa] for isa in REGISTERS}) != 1 or not loops:
        wrong.append(f"not the same loops for each instruction set: {dict(count)}")
    if len({pieces[isa] for isa in REGISTERS}) != 1 or not pieces:
        wrong.append(f"not the same pieces for each instruction set: {dict(pieces)}")
    wrong += check_loss_loops(of_losses)
    print(
        f"CPU: {count.total()} loops, {dict(count)}; {pieces.total()} pieces of coded ones; "
        f"{len(of_losses)} loops of losses"
    )
    return wrong, kinds


def check_loss_loops(loops: dict[str, list[str]]) -> list[str]:
    """What is wrong with the loops of losses: all work on whole registers."""
    wrong, count = [], Counter[str]()
    for name, instructions in loops.items():
        match = LOSS_LOOP.search(name)
        assert match is not None
        count[match["isa"]] += 1
        precision = "d" if match["types"] == "double" else "s"
        register = REGISTERS[match["isa"]]
        is_baseline, is_mse = match["isa"] == "baseline", match["name"] == "mse_loop<"
        if precision == "d" and is_baseline and not is_mse:
            continue  # it has no multiply-add of doubles: the C library's is called
        packed = [text for text in instructions if register in text]
        wanted = {f"v?mulp{precision}\\b": "product"}
        if not (is_mse or is_baseline or match["part"] == "end_chunks"):
            wanted[f"vfn?m(add|sub)\\d+p{precision}\\b"] = "multiply-add"
        for pattern, what in wanted.items():
            if not any(re.match(pattern, text) for text in packed):
                wrong.append(f"{match['isa']} loop {match['loss']}: no packed {what}")
    if len({count[isa] for isa in REGISTERS}) != 1 or not loops:
        wrong.append(f"not the same loops of losses for each instruction set: {dict(count)}")
    return wrong


def loop_problems(instructions: list[str], register: str, types: str, rule: str) -> Iterator[str]:
    baseline = register == REGISTERS["baseline"]
    precision = "d" if types.startswith("double") else "s"
    if baseline and precision == "d":
        return  # x86-64 has no multiply-add of doubles: the C library's is called for each element
    operations = [match for text in instructions if (match := ARITHMETIC.match(text))]
    packed = Counter(m[1] for m in operations if m[2] == "p" and register in m[0])
    # The baseline makes the multiply-add of floats out of doubles.
    foreign = {match[1] for match in operations if match[3] != precision}
    foreign -= {"mul", "add", "sub"} if baseline else set()
    if foreign:
        yield f"{', '.join(sorted(foreign))} in another precision than that of its dtypes"
    if not packed.keys() & {"mul", "add", "sub"}:
        yield f"no packed arithmetic on {register}"
    # What the scalar loop over the last few elements does, the packed loop must do as well: that of
    # usual rows, and that of the others.
    scalar = {match[1] for match in operations if match[2] == "s"}
    if missing := sorted(name for name in scalar & {"sqrt", "div"} if packed[name] < 2):
        yield f"no packed {', '.join(missing)} on {register}"
    if (
        not baseline
        and not rule.startswith(WITHOUT_MULTIPLY_ADD)
        and not any(
            re.match(rf"vfn?m(add|sub)\d+p{precision}\b.*{register}", text) for text in instructions
        )
    ):
        yield f"no packed multiply-add on {register}"
    calls = [text for text in instructions if text.startswith("call")]
    if "coded" in types:
        calls = [text for text in calls if not CALL_TO_PIECE.match(text)]
        yield from conversion_problems(instructions, register)
    if calls:
        yield calls[0]


def conversion_problems(instructions: list[str], register: str) -> Iterator[str]:
    """Codes become floats, and floats codes, by whole registers."""
    for conversion in ("cvtdq2ps", "cvttps2dq"):
        found = [text for text in instructions if re.match(f"v?{conversion}\\b", text)]
        if found and not any(register in text for text in found):
            yield f"no {conversion} on {register}"
    if scalar := [text for text in instructions if re.match(r"v?cvt(tss2si|si2ss)\b", text)]:
        yield f"an element at a time: {scalar[0]}"


def piece_problems(piece: str, instructions: list[str], register: str) -> Iterator[str]:
    # An instruction converts eight float16 to float32, or back.
    if "float16 const*, float*" in piece.replace("bfloat16", "") or "::float16*" in piece:
        register = min(register, "ymm")
    if not any(register in text for text in instructions):
        yield f"nothing on {register}"
    scalar = {match[1] for text in instructions if (match := SCALAR.match(text))}
    if piece.startswith("encode_codes"):
        scalar -= {"divss", "mulss"}  # the scale of the block
        converted = "cvttps2dq"
    elif piece.startswith(("widen_piece", "narrow_piece")):
        scalar, converted = set(), ""  # of any number of elements: the last few are no register
    else:
        converted = "cvtdq2ps" if piece.startswith("decode_codes") else ""
    if scalar:
        yield f"an element at a time: {', '.join(sorted(scalar))}"
    if converted and not any(converted in text and register in text for text in instructions):
        yield f"no {converted} on {register}"
    calls = [text for text in instructions if text.startswith("call")]
    if other := [text for text in calls if not CALL_TO_PIECE.match(text)]:
        yield other[0]


def check_kernels(loops: Counter[str], chosen: str) -> list[str]:
    """What is wrong with the CUDA kernels; each architecture must have those of all loops."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/cuobjdump")
    cuobjdump = next(map(str, packages), None) or shutil.which("cuobjdump")
    if cuobjdump is None:
        return ["no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"]
    resources = read_resources(lines(cuobjdump, "--dump-resource-usage", str(MODULE)))
    instructions = read_instructions(lines(cuobjdump, "--dump-sass", str(MODULE)))
    if only := sorted(resources.keys() ^ instructions.keys()):
        return [f"{' '.join(only[0])} has no resource usage, or no instructions"]
    if not resources:
        return ["no kernels"]

    mangled = sorted({name for _, name in resources})
    demangled = dict(zip(mangled, lines("c++filt", *mangled), strict=True))
    wrong: list[str] = []
    count: dict[str, Counter[str]] = defaultdict(Counter)
    registers = Counter[str]()
    for (arch, name), used in resources.items():
        full = demangled[name].strip()
        match = KERNEL.search(full)
        kind, full = (match["kind"], match["name"]) if match else ("other", full)
        count[arch][kind] += 1
        if kind.endswith("step"):
            registers[arch] = max(registers[arch], used["REG"])
        for problem in kernel_problems(kind, full, used, instructions[arch, name]):
            wrong.append(f"{arch} {full}: {problem}")
    wrong += count_problems(count, loops, chosen)
    size = MODULE.stat().st_size
    if not chosen and size > MOST_BYTES:
        wrong.append(f"the module has {size:,} bytes, at most {MOST_BYTES:,}")
    kinds = sum(count.values(), Counter[str]())
    print(
        f"CUDA: {kinds.total()} kernels, {dict(kinds)}, most registers: {dict(registers)}; "
        f"{size / 1e6:.1f} MB"
    )
    return wrong


def read_resources(dump: Iterable[str]) -> dict[Kernel, dict[str, int]]:
    """What each kernel uses: {"REG": 64, "STACK": 0, "SHARED": 0, "LOCAL": 0, ...}."""
    resources: dict[Kernel, dict[str, int]] = {}
    arch = name = ""
    for line in dump:
        if "arch = " in line:
            arch = line.split()[-1]
        elif line.startswith(" Function "):
            name = line.split()[1].rstrip(":")
        elif "REG:" in line:
            pairs = re.findall(r"(\S+):(\d+)", line)
            resources[arch, name] = {resource: int(number) for resource, number in pairs}
    return resources


def read_instructions(dump: Iterable[str]) -> dict[Kernel, Counter[str]]:
    """How many there are in each kernel of each instruction: {"LDG.E.128": 4, ...}."""
    instructions: dict[Kernel, Counter[str]] = {}
    arch, counter = "", Counter[str]()
    for line in dump:
        if match := INSTRUCTION.match(line):
            counter[match[1]] += 1
            offsets = [int(offset, 16) for offset in CONSTANT.findall(line)]
            counter[FAR] += any(not -0x4000 < offset < 0x8000 for offset in offsets)
        elif "arch = " in line:
            arch = line.split()[-1]
        elif "Function : " in line:
            counter = instructions[arch, line.split()[-1]] = Counter()
    return instructions


def kernel_problems(
    kind: str, name: str, used: dict[str, int], instructions: Counter[str]
) -> Iterator[str]:
    most_of_step = MOST_OF_THREE if THREE_CODED.search(name) else MOST_IN_STEP
    most_of_step = MOST_OF_FOUR if FOUR_CODED.search(name) else most_of_step
    for resource, most in (most_of_step if kind.endswith("step") else MOST).items():
        if used[resource] > most:
            yield f"{resource} {used[resource]}, at most {most}"
    if local := sorted(filter(LOCAL.match, instructions)):
        yield f"local memory: {', '.join(local)}"
    if instructions[FAR]:
        yield f"{instructions[FAR]} constants at offsets from 0x8000 on"
    accesses = Counter[str]()
    for instruction, number in instructions.items():
        if match := ACCESS.match(instruction):
            accesses[f"{match[1]} {match[2] or 32}"] += number
    if kind.endswith("step"):
        match = re.search(TYPES if kind == "step" else CODED_TYPES, name)
        assert match is not None, name
        types = match["types"] if kind == "step" else f"coded {match['state']}"
        yield from step_problems(types, instructions, accesses, "Muon::" in name)
    elif kind in LOSSES and NARROW.search(name):
        pass
    elif kind in ("norm", *LOSSES) and not accesses["LDG 128"]:
        yield f"no load has 128 bits: {dict(accesses)}"
    elif kind in LOSSES and not accesses["STG 128"]:
        yield f"no store has 128 bits: {dict(accesses)}"
    elif "EXIT" not in instructions:
        yield "no EXIT: its disassembly was not understood"


def step_problems(
    types: str, instructions: Counter[str], accesses: Counter[str], only_writes: bool
) -> Iterator[str]:
    """Only_writes: the rule does not look at the parameter."""
    if "double" not in types and (double := sorted(filter(DOUBLE.match, instructions))):
        yield f"{', '.join(double)}, but none of its dtypes is double"
    if types.startswith("coded"):
        yield from coded_step_problems(types, accesses)
        return
    # A parameter and its states are loaded and stored, the gradient is loaded only; with
    # only_writes one state alone is loaded of what is stored.
    loads = accesses["LDG 128"] * (2 if only_writes else 1)
    if not loads > accesses["STG 128"] > 0:
        yield f"not all accesses have 128 bits: {dict(accesses)}"
    # Unaligned ends are walked element by element; any other width is a vector taken apart.
    single = {BITS[dtype.split("::")[-1]] for dtype in types.split(", ")} | {32}
    widths = {int(access.split()[1]) for access in accesses}
    if odd := sorted(widths - single - {128}):
        yield f"accesses of {odd} bits: {dict(accesses)}"


def coded_step_problems(types: str, accesses: Counter[str]) -> Iterator[str]:
    # A thread has four neighbours of two or four bytes, or the codes of four times four.
    for access in ("LDG", "STG"):
        for width in (64, 128):
            if not accesses[f"{access} {width}"]:
                yield f"{types}: no {access} of {width} bits: {dict(accesses)}"


def count_problems(
    count: dict[str, Counter[str]], loops: Counter[str], chosen: str
) -> Iterator[str]:
    wanted = re.findall(r"\d+", chosen.replace(".", "")) if chosen else ARCHS
    if missing := [f"sm_{arch}" for arch in wanted if f"sm_{arch}" not in count]:
        yield f"no kernels for {', '.join(missing)}"
    for kind, expected in (
        ("step", loops["plain"]),
        ("coded_step", STATE_FORMATS * loops["coded"]),
    ):
        found = {arch: kinds[kind] for arch, kinds in count.items()}
        if set(found.values()) != {expected}:
            yield f"not {expected} {kind} kernels for each architecture: {found}"
    kinds = {arch: dict(sorted(kinds.items())) for arch, kinds in count.items()}
    if any(of_one != next(iter(kinds.values())) for of_one in kinds.values()):
        yield f"not the same kernels for each architecture: {kinds}"


def main() -> None:
    if not MODULE.exists():
        sys.exit(f"check-binary: there is no {MODULE}; first: make build")
    built = json.loads((PACKAGE / "_build_info.json").read_text())
    # An older record of the build does not say for which architectures somebody wished.
    chosen = built.get("cuda_archs", os.environ.get("FUSEDOPT_CUDA_ARCHS", ""))
    wrong: list[str] = []
    if platform.machine() != "x86_64":
        print("CPU and CUDA: not checked, this is not an x86-64 machine")
    else:
        wrong, loops = check_loops()
        if built["cuda_version"]:
            wrong += check_kernels(loops, chosen)
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
