"""Machine code of the compiled module, as NVIDIA's disassembler lists it."""

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

LINE = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P[T\d]+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;\s+/\* (?P<immediate>0x[0-9a-f]{8})"
)
UPPER = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/$")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # empty: always
    opcode: tuple[str, ...]  # and its modifiers
    operands: tuple[str, ...]
    control: int = 0  # the upper half of its bits: how long it is waited for, and for what

    def __str__(self) -> str:
        predicate = f"@{self.predicate} " if self.predicate else ""
        return f"{self.address:#x}: {predicate}{'.'.join(self.opcode)} {', '.join(self.operands)}"


def split_operands(text: str, immediate: str) -> tuple[str, ...]:
    """At the commas outside of brackets. Hints to the caches of registers are dropped. What is
    listed as a NaN has any of its bits: it may be the upper half of an infinite float64."""
    text = re.sub(r"[-+]QNAN\b", immediate, text)
    found = re.findall(r"(?:\[[^]]*\]|[^,\[])+", text)
    return tuple(operand.strip().replace(".reuse", "") for operand in found)


def find_disassembler() -> str | None:
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/cuobjdump")
    return next(map(str, packages), None) or shutil.which("cuobjdump")


def read_kernels(disassembler: str, module: Path, arch: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by the kernel's symbol."""
    command = [disassembler, "--dump-sass", "--gpu-architecture", arch, str(module)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if "Function : " in line:
            code = kernels[line.split()[-1]] = []
        elif code and (upper := UPPER.match(line)):
            if not code[-1].control:
                code[-1] = replace(code[-1], control=int(upper[1], 16))
        elif match := LINE.match(line):
            code.append(
                Instruction(
                    int(match["address"], 16),
                    match["predicate"] or "",
                    tuple(match["opcode"].split(".")),
                    split_operands(match["operands"], match["immediate"]),
                )
            )
    return kernels
