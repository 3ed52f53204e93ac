"""No code for one instruction set may be reached from what runs on every processor.

The linker keeps one copy of a weak symbol, such as an inline function or a template of the
standard library, whichever object file it comes from. Were that copy compiled for AVX-512, the
program would die of an illegal instruction on a processor without it, far from any loop.
"""

import platform
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from .build import Fault, build, run

pytestmark = [
    pytest.mark.slow,  # the core takes minutes to compile
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("objdump") is None,
        reason="needs an x86-64 machine with nm and objdump",
    ),
]


def shared_symbols(path: Path) -> dict[str, str]:
    """The kind of each symbol that the linker could give to other files: strong, weak, unique."""
    lines = run(["nm", "--defined-only", "--extern-only", "--demangle", path]).splitlines()
    return {name: kind for _, kind, name in (line.split(" ", 2) for line in lines)}


def vector_functions(path: Path) -> dict[str, set[str]]:
    """The functions that have VEX or EVEX encoded instructions, and these. All their names begin
    with a v, and no other instruction's in this code does."""
    output = run(["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path])
    functions = defaultdict(set)
    name = ""
    for line in output.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = header[1]
        elif match := re.match(r"\s+[0-9a-f]+:\t(v\w+)", line):
            functions[name].add(match[1])
    return dict(functions)


def check(isa: str, path: Path) -> None:
    functions, shared = vector_functions(path), shared_symbols(path)
    if isa in ("avx2", "avx512"):
        for loop in ("span_loop", "square_sum"):
            assert any(f"::{loop}<" in name for name in functions), f"{isa}: no vectors in {loop}"
    # Loops, and what those over coded spans call.
    local = rf"(^| )fusedopt::cpu::{isa}::\(anonymous namespace\)::"
    for name, instructions in functions.items():
        found = f"{isa}: {name} has {sorted(instructions)[:5]}"
        assert isa != "baseline" and re.search(local, name), found
        assert name not in shared, f"{found} and is visible to other files"
    strong = {name for name, kind in shared.items() if kind not in "WVu"}
    assert isa == "dispatch" or strong == {f"fusedopt::cpu::{isa}_loops()"}
    # Templates of the standard library may be shared: they hold no vector code, as shown above. And
    # templates over a file's own types are like no other file's. What is for every processor, as
    # all of dispatch is, may be shared where no file for an instruction set has it, too.
    own = f"fusedopt::cpu::{isa}::(anonymous namespace)::"
    weak = [name for name, kind in shared.items() if kind in "Wu"]
    odd = [name for name in weak if "std::" not in name and own not in name]
    assert isa == "dispatch" or not odd, f"{isa} shares {odd}"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "dispatch"])
def test_nothing_leaks(isa: str) -> None:
    check(isa, build("plain").with_name(f"{isa}.o"))


def test_a_leak_is_found() -> None:
    leak = "__attribute__((weak)) float leak(float a, float b) { return a * b; }"
    fault = Fault("cpu/avx512.cpp", '#include "update.h"\n', f'#include "update.h"\n{leak}\n')
    library = build("fault-leak", extra_flags=["-O0"], faults=[fault], small="Adam")
    with pytest.raises(AssertionError, match="leak"):
        check("avx512", library.with_name("avx512.o"))
