"""What bounds the CUDA kernels, by their machine code: ``python -m benchmarks.gpu.model``.

No GPU is needed, and none has been asked: all figures are predictions. The step's kernels of the
built module run in the emulator that the tests have, which counts what a warp issues for one more
chunk of a long span. These counts are set against what a device can issue in the time in which its
memory moves the bytes, against its pipes, and against the bytes that its resident warps can have
under way, from the time that a warp takes by itself. The least of these is the prediction.

With ``--write``, benchmarks/results/predicted.json gets what was counted, and docs/cuda.md the
table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.report.case import Json
from benchmarks.report.pages import show
from benchmarks.report.tables import table as markdown

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from core.build import build  # noqa: E402
from core.checks import make_rows  # noqa: E402
from core.coded_streams import CodedStreams  # noqa: E402
from core.coding import Coding  # noqa: E402
from core.library import Core, Kernel  # noqa: E402
from core.memory import Fill, Streams, usual  # noqa: E402
from machine_code.emulator import THREADS, WARP, Machine, Memory  # noqa: E402
from machine_code.machine_api import MachineApi, build_machine_api  # noqa: E402
from machine_code.sass import find_disassembler, read_kernels  # noqa: E402

if TYPE_CHECKING:
    from machine_code.sass import Instruction

PAGE = ROOT / "docs" / "cuda.md"
RESULTS = ROOT / "benchmarks" / "results" / "predicted.json"
MARKER = "predicted"


@dataclass(frozen=True)
class Device:
    """Of a GPU under load.

    Attributes:
        arch: that its code is compiled for.
        processors: multiprocessors.
        ghz: their clock.
        copy: bytes of a copy, in 10^12 a second: 90% of what the memory is sold with.
        special: conversions, reciprocals and roots that a multiprocessor begins in a cycle.
        doubles: float64 instructions likewise.
    """

    arch: str
    processors: int
    ghz: float
    copy: float
    special: int = 16
    doubles: int = 64

    @property
    def clock(self) -> float:
        """Cycles of all multiprocessors in a second."""
        return self.processors * self.ghz * 1e9


DEVICES = {
    "H100": Device("sm_90", 132, 1.755, 3.0),
    "H200": Device("sm_90", 132, 1.755, 4.3),
    "B200": Device("sm_100", 148, 1.85, 7.0),
}
MOST_OF_COPY = 0.95  # that kernels reach
MOST_OF_ISSUE = 0.85  # of a multiprocessor's 128 instructions a cycle (of 32 lanes each, four)
MOST_OF_PIPE = 0.9
PIPES = {
    "special": {"MUFU", "F2I", "I2F", "F2F", "FCHK"},
    "doubles": {"DFMA", "DADD", "DMUL", "DSETP"},
    "multiply": {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2"},
    "memory": {"LDG", "STG", "LDS", "STS", "ATOMG", "SHFL"},
    "constant": {"LDC", "ULDC", "LDCU"},
    "control": {"BRA", "BSSY", "BSYNC", "CALL", "RET", "EXIT", "NOP", "WARPSYNC", "BREAK"},
}
# Cycles until what an instruction with a barrier writes is there; of any other one 20.
LATENCIES = {
    **dict.fromkeys(("MUFU", "F2I", "I2F", "F2F", "FCHK", "S2R", "S2UR", "ULDC", "DFMA"), 30),
    **{"LDG": 800, "LDC": 45, "LDCU": 45, "SHFL": 25, "BREV": 25, "P2R": 10, "I2FP": 8},
}
LATENCY, READ_LATENCY, BRANCH = 20, 15, 8
REGISTERS, MOST_BLOCKS = 65536, 8


@dataclass(frozen=True)
class Case:
    """Kernels by what they do. A coding: of the parameter, the gradient and the states."""

    rule: str
    states: int
    dtypes: tuple[str, ...]
    coding: Coding | None = None


def coded(*names: str) -> Case:
    return Case("adam", 2, ("coded",) * 4, Coding(*names))


BF16 = "bfloat16"
STATE_FORMATS = ["float32", BF16, "int8"]  # in the order of codes.h
CASES = {
    "AdamW float32": Case("adam", 2, ("float32",) * 4),
    "AdamW bfloat16": Case("adam", 2, (BF16,) * 4),
    "AdamW bfloat16, float32 states": Case("adam", 2, (BF16, BF16, "float32", "float32")),
    "RMSprop float32": Case("rmsprop", 1, ("float32",) * 3),
    "SGD with momentum float32": Case("sgd", 1, ("float32",) * 3),
    "AdamW float32, int8 states": coded("float32", "float32", "int8"),
    "AdamW bfloat16 + master, int8 states": coded("bfloat16_and_16", BF16, "int8"),
    "AdamW bfloat16 + 24-bit master, int8 states": coded("bfloat16_and_8", BF16, "int8"),
    "AdamW bfloat16 stochastic, int8 states": coded("bfloat16_stochastic", BF16, "int8"),
    "AdamW bfloat16 + master, float32 states": coded("bfloat16_and_16", BF16, "float32"),
    "AdamW float32, bfloat16 states": coded("float32", "float32", BF16),
}


@dataclass
class Issued:
    """What is issued to the warps of a block, and to the first one in turn."""

    counts: Counter[int] = field(default_factory=Counter)
    first: list[tuple[int, bool]] = field(default_factory=list)

    def watch(self, place: int, issued: np.ndarray, active: np.ndarray) -> None:
        warps = issued.reshape(-1, WARP).any(1)
        self.counts[place] += int(warps.sum())
        if warps[0]:
            self.first.append((place, bool(active[:WARP].any())))


def zeros(random: np.random.Generator, stream: str, size: int) -> np.ndarray:
    """Rows of an embedding that have not been used yet."""
    return usual(random, stream, size) if stream == "param" else np.zeros(size)


def pipe_of(opcode: str) -> str:
    return next((pipe for pipe, members in PIPES.items() if opcode in members), "other")


def cycles(
    code: Sequence[Instruction],
    issued: Sequence[tuple[int, bool]],
    latencies: Mapping[int, int] | None = None,
) -> int:
    """How long a warp takes by itself, from how long its instructions say that they wait.
    Latencies: of some, by their number in the order of issue; None: by their kind."""
    time, done, before = 0, [0] * 6, -1
    for number, (place, is_done) in enumerate(issued):
        control = code[place].control
        stall, written, read, awaited = (
            (control >> shift & mask) for shift, mask in ((41, 15), (46, 7), (49, 7), (52, 63))
        )
        time += BRANCH * (place != before + 1)
        time = max(time, *(done[i] for i in range(6) if awaited >> i & 1), time)
        latency = LATENCIES.get(code[place].opcode[0], LATENCY) if is_done else 2
        latency = (latencies or {}).get(number, latency)
        if written < 6:
            done[written] = max(done[written], time + latency)
        if read < 6:
            done[read] = max(done[read], time + READ_LATENCY)
        time += max(1, stall)
        before = place
    return time


def bytes_of(case: Case) -> float:
    """That an element takes: all is read, and all but the gradient written."""
    sizes = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 256}
    if case.coding is None:
        param, grad, *states = (sizes[dtype] for dtype in case.dtypes)
    else:
        masters = {"bfloat16_and_16": 4, "bfloat16_and_8": 3, "bfloat16_stochastic": 2}
        param = masters.get(case.coding.param) or sizes[case.coding.param]
        grad, states = sizes[case.coding.grad], [sizes[case.coding.state]] * case.states
    return 2 * param + grad + 2 * sum(states)


@dataclass(frozen=True)
class Measured:
    """Of one more chunk of a kernel.

    Attributes:
        per_element: instructions of each pipe that a warp issues for an element of each lane.
        bytes: that an element takes.
        chunk: elements of a block.
        registers: of a thread.
        cycles: that a warp takes by itself.
        instructions: that it issues.
    """

    per_element: Mapping[str, float]
    bytes: float
    chunk: int
    registers: int
    cycles: int
    instructions: int

    @property
    def all(self) -> float:
        return sum(self.per_element.values())

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds."""
        return min(MOST_BLOCKS, REGISTERS // (-(-self.registers // 8) * 8 * THREADS))

    @property
    def bytes_per_cycle(self) -> float:
        """That a multiprocessor's warps have moved, where nothing else bounds them."""
        return self.blocks * self.chunk * self.bytes / self.cycles

    def budget(self, device: Device) -> float:
        """Instructions an element that can be issued while a copy moves its bytes."""
        return device.clock * 128 * self.bytes / (device.copy * 1e12)

    def share(self, device: Device) -> float:
        """Of the speed of a copy."""
        memory = device.copy * 1e12 / self.bytes  # elements a second
        warps = self.blocks * THREADS / WARP
        fill = min(MOST_OF_ISSUE, warps / 4 * self.instructions / self.cycles)
        pipes = {"special": device.special, "doubles": device.doubles, "other": 64}
        bounds = [
            MOST_OF_COPY,
            MOST_OF_COPY * self.bytes_per_cycle * device.clock / (device.copy * 1e12),
            fill * self.budget(device) / self.all,
        ]
        for pipe, rate in pipes.items():
            if count := self.per_element.get(pipe):
                bounds.append(MOST_OF_PIPE * device.clock * rate / count / memory)
        return min(bounds)


@dataclass(frozen=True)
class Kernels:
    """Those of one architecture, and how many registers each has."""

    core: Core
    machine: Machine
    registers: Mapping[str, int]

    def kernel(self, case: Case) -> Kernel:
        kernels = [*self.core.kernels, *self.core.coded_kernels]
        return next(
            k
            for k in kernels
            if (k.rule, len(k.states), k.dtypes) == (case.rule, case.states, case.dtypes)
        )

    def issued(self, case: Case, chunks: int, fill: Fill) -> Issued:
        """By one block, for a span of so many chunks."""
        kernel = self.kernel(case)
        rows = make_rows(self.core, kernel, 1)
        size = chunks * kernel.chunk
        if case.coding is None:
            memory = Streams(kernel, [size], fill=fill)
            arrays = memory.arrays
        else:
            spans, kinds = [(case.coding, size)], [(fill, True)]
            memory = CodedStreams(*(self.core, kernel, spans, rows), arbitrary=False, kinds=kinds)
            arrays = [memory.memory]
        issued = Issued()
        step = partial(
            self.machine.step,
            rows=rows,
            memory=Memory([*arrays, rows]),
            blocks=1,
            watch=issued.watch,
        )
        memory.after(step)
        return issued

    def measure(self, case: Case, fill: Fill) -> Measured:
        kernel = self.kernel(case)
        state = 0 if case.coding is None else STATE_FORMATS.index(case.coding.state)
        code = self.machine.code[kernel.index, state]
        less, more = (self.issued(case, chunks, fill) for chunks in (2, 3))
        counts = Counter[str]()
        for place in more.counts:
            pipe = pipe_of(code[place].opcode[0])
            counts[pipe] += more.counts[place] - less.counts[place]
        # Of a warp, for each of a lane's elements.
        per_element = {pipe: count * WARP / kernel.chunk for pipe, count in counts.items()}
        registers = self.registers[self.machine.symbols[kernel.index, state]]
        return Measured(
            per_element=per_element,
            bytes=bytes_of(case),
            chunk=kernel.chunk,
            registers=registers,
            cycles=cycles(code, more.first) - cycles(code, less.first),
            instructions=len(more.first) - len(less.first),
        )


def read_registers(disassembler: str, module: Path) -> Iterator[tuple[tuple[str, str], int]]:
    command = [disassembler, "--dump-resource-usage", str(module)]
    arch = name = ""
    for line in subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.splitlines():
        if "arch = " in line:
            arch = line.split()[-1]
        elif line.startswith(" Function "):
            name = line.split()[1].rstrip(":")
        elif found := re.search(r"REG:(\d+)", line):
            yield (arch, name), int(found[1])


def kernels_of(module: Path, archs: Sequence[str]) -> dict[str, Kernels]:
    disassembler = find_disassembler()
    if disassembler is None:
        sys.exit("there is no cuobjdump; pip install nvidia-cuda-cuobjdump")
    core, api = Core(build("plain")), MachineApi(build_machine_api())
    registers = dict(read_registers(disassembler, module))
    return {
        arch: Kernels(
            core,
            Machine(read_kernels(disassembler, module, arch), arch, api),
            {name: count for (of_arch, name), count in registers.items() if of_arch == arch},
        )
        for arch in archs
    }


def shares_of(arch: str, measured: Measured) -> dict[str, float]:
    """Of a copy's speed, by the names of an architecture's devices."""
    devices = {name: device for name, device in DEVICES.items() if device.arch == arch}
    return {name: round(measured.share(device), 3) for name, device in devices.items()}


def measure_all(kernels: Mapping[str, Kernels], names: Sequence[str]) -> list[Json]:
    """What is measured of each kernel and architecture, with usual gradients and with zeros, and
    the shares of a copy's speed that are predicted of devices with usual ones."""
    results = []
    for name in names:
        for arch, of_arch in kernels.items():
            usually, with_zeros = (of_arch.measure(CASES[name], fill) for fill in (usual, zeros))
            results.append(
                {
                    **{"kernel": name, "arch": arch, "shares": shares_of(arch, usually)},
                    **{"usual": asdict(usually), "zeros": asdict(with_zeros)},
                }
            )
    return results


def table(results: Sequence[Json]) -> str:
    """In Markdown. In brackets where it differs: of gradients and states that are zero."""
    archs = list(dict.fromkeys(result["arch"] for result in results))
    devices = {name: device for name, device in DEVICES.items() if device.arch in archs}
    head = ["kernel", "bytes"]
    for arch in archs:
        head += [f"instructions, {arch}", "registers", "bytes/cycle"]
    rows = []
    for name in dict.fromkeys(result["kernel"] for result in results):
        of_arch = {
            result["arch"]: [Measured(**result[values]) for values in ("usual", "zeros")]
            for result in results
            if result["kernel"] == name
        }
        row = [name, f"{of_arch[archs[0]][0].bytes:.1f}"]
        for usually, with_zeros in of_arch.values():
            row += [both(f"{each.all:.1f}" for each in (usually, with_zeros))]
            row += [f"{usually.registers}", f"{usually.bytes_per_cycle:.0f}"]
        for device in devices.values():
            row.append(both(f"{each.share(device):.0%}" for each in of_arch[device.arch]))
        rows.append(row)
    return markdown([*head, *devices], rows, left=1)


def both(texts: Iterable[str]) -> str:
    first, second = texts
    return first if first == second else f"{first} ({second})"


def main(arguments: list[str] | None = None) -> int:
    """Measure the kernels, or only write or check the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.model", description=__doc__)
    parser.add_argument("--module", type=Path, help="another one than the built module")
    parser.add_argument("--arch", nargs="*", default=["sm_90", "sm_100"])
    parser.add_argument("--kernel", default="", help="those whose names match this pattern")
    parser.add_argument("--write", action="store_true", help="write the results and the table")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the table is old")
    options = parser.parse_args(arguments)
    if options.check:
        results = json.loads(RESULTS.read_text())
        if any(
            one["shares"] != shares_of(one["arch"], Measured(**one["usual"])) for one in results
        ):
            sys.exit(f"{RESULTS}: shares are not those of what was counted")
        shown = show(PAGE, MARKER, table(results), check=True)
        print(f"{PAGE}: the table {'is' if shown else 'is not'} that of {RESULTS}")
        return 0 if shown else 1
    module = options.module
    if module is None:
        from fusedopt._extension import _C

        if not _C.has_cuda:
            sys.exit("fusedopt was built without CUDA")
        module = Path(_C.__file__)
    names = [name for name in CASES if re.search(options.kernel, name)]
    results = measure_all(kernels_of(module, options.arch), names)
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        show(PAGE, MARKER, table(results), check=False)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
