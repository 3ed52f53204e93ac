"""What bounds the kernels of losses, by machine code: ``python -m benchmarks.gpu.loss_model``.

No GPU is needed, and none has been asked: all figures are predictions, made like those of model.py.
What the emulator counts is what a block does for one more task: a row of logits that it has to
itself, or a row, or a chunk of squared errors, for each of its warps. It also tells bytes that come
from memory from those that have been there before, which a cache gives. Blocks run in waves, as
many at a time as a device holds.

With ``--write``, benchmarks/results/predicted_losses.json gets what was counted, and docs/cuda.md
the table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.gpu.model import (
    DEVICES,
    MOST_BLOCKS,
    MOST_OF_COPY,
    MOST_OF_ISSUE,
    MOST_OF_PIPE,
    PAGE,
    REGISTERS,
    Device,
    Issued,
    Kernels,
    cycles,
    kernels_of,
    pipe_of,
)
from benchmarks.report.case import Json, duration
from benchmarks.report.pages import show
from benchmarks.report.tables import table as markdown

# isort: split
# model.py has made these importable.
from core.loss_library import DTYPES, Case, CrossEntropyArguments, MseArguments
from machine_code.emulator import THREADS, WARP, Memory
from machine_code.machine_api import (
    CROSS_ENTROPY,
    LOSS,
    MSE,
    ROWS,
    SHORT_ROWS,
    TARGETS,
    Launch,
    Placed,
)

RESULTS = Path(__file__).parents[1] / "results" / "predicted_losses.json"
MARKER = "predicted-losses"
WARPS = THREADS // WARP
SHORT_ROW, CHUNK, NORM_CHUNK = 16, 1024, 16384  # classes, and elements of squared errors
BF16 = "bfloat16"
FILL = 264  # rows of more than a chunk: a block takes each
CLOSE = 128 << 10  # bytes that a multiprocessor's own cache has, of those that it moved last
LATENCIES = {"memory": 800, "L2": 270, "L1": 40}  # cycles
L2 = {"H100": 50e6, "H200": 50e6, "B200": 126e6}
SHOWN = ("H200", "B200")
L2_RATE = 32  # bytes that a multiprocessor gets from it in a cycle


@dataclass(frozen=True)
class LossCase:
    """Of so many rows of logits; without classes, a mean squared error of so many elements."""

    rows: int
    classes: int = 0
    dtype: str = "float32"
    in_place: bool = False
    with_gradient: bool = True

    @property
    def elements(self) -> int:
        return self.rows * max(1, self.classes)

    @property
    def kernel(self) -> int:
        if self.classes > CHUNK:
            return CROSS_ENTROPY
        return MSE if self.classes == 0 else ROWS if self.classes > SHORT_ROW else SHORT_ROWS

    @property
    def member(self) -> int:
        """Of the kernel's: its dtype, and whether rows are made of whole accesses of 16 bytes."""
        of_access = {"float32": 4, BF16: 8}[self.dtype]
        has_wide = self.kernel in (ROWS, CROSS_ENTROPY)
        is_wide = has_wide and self.classes % of_access == 0
        return DTYPES.index(self.dtype) + is_wide * len(DTYPES)

    @property
    def task(self) -> int:
        """Rows, or elements, that a block takes at a time."""
        if self.classes == 0:
            return WARPS * NORM_CHUNK
        return {CROSS_ENTROPY: 1, ROWS: WARPS, SHORT_ROWS: THREADS}[self.kernel]


VOCABULARY, ALIGNED = (1024, 50257), (1024, 50304)
CASES = {
    "cross_entropy 1024x50257": LossCase(*VOCABULARY),
    "cross_entropy 1024x50257, in place": LossCase(*VOCABULARY, in_place=True),
    "cross_entropy 1024x50257, loss only": LossCase(*VOCABULARY, with_gradient=False),
    "cross_entropy 1024x50257 bfloat16": LossCase(*VOCABULARY, BF16),
    "cross_entropy 1024x50257 bfloat16, in place": LossCase(*VOCABULARY, BF16, in_place=True),
    "cross_entropy 1024x50257 bfloat16, loss only": LossCase(
        *VOCABULARY, BF16, with_gradient=False
    ),
    "cross_entropy 1024x50304": LossCase(*ALIGNED),
    "cross_entropy 1024x50304, in place": LossCase(*ALIGNED, in_place=True),
    "cross_entropy 1024x50304 bfloat16": LossCase(*ALIGNED, BF16),
    "cross_entropy 1024x50304 bfloat16, in place": LossCase(*ALIGNED, BF16, in_place=True),
    "cross_entropy 65536x10": LossCase(65536, 10),
    "cross_entropy 65536x10 bfloat16": LossCase(65536, 10, BF16),
    "cross_entropy 4096x1000": LossCase(4096, 1000),
    "cross_entropy 4096x1000 bfloat16": LossCase(4096, 1000, BF16),
    "mse_loss 16Mi": LossCase(16 << 20),
}


class Traffic(Memory):
    """Memory that knows what a block has moved, and where that came from."""

    def __init__(self, arrays: Sequence[Placed]) -> None:
        super().__init__(arrays)
        self.moved = 0  # bytes
        self.counts = Counter[str]()
        self.last = "L1"  # where the last load was answered
        # What had been moved when each byte was moved last, and whether it was written; -1: never.
        self._when = {id(each): np.full(len(each), -1) for each in self._arrays}
        self._written = {id(each): np.zeros(len(each), bool) for each in self._arrays}

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        found = Counter[str]()
        for _, array, places in self._pieces(addresses, size):
            once = np.unique(places)
            when = self._when[id(array)][once]
            is_new, is_close = when < 0, self.moved - when <= CLOSE // 2
            found["memory"] += int(is_new.sum())
            found["L2"] += int((~is_new & ~is_close).sum())
            found["L1"] += int((~is_new & is_close).sum())
            self._move(array, once)
        self.last = next(level for level in ("memory", "L2", "L1") if found[level])
        self.counts += found
        return super().load(addresses, size)

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        for _, array, places in self._pieces(addresses, values.shape[1]):
            once = np.unique(places)
            self.counts["written"] += int((~self._written[id(array)][once]).sum())
            self.counts["fresh"] += int((self._when[id(array)][once] < 0).sum())
            self._written[id(array)][once] = True
            self._move(array, once)
        super().store(addresses, values)

    def _move(self, array: np.ndarray, places: np.ndarray) -> None:
        self.moved += len(places)
        self._when[id(array)][places] = self.moved


@dataclass
class Counted(Issued):
    """Also, what answered the loads of the first warp."""

    loads: set[int] = field(default_factory=set)  # their places in the code
    memory: Traffic = field(default_factory=lambda: Traffic([]))
    latencies: dict[int, int] = field(default_factory=dict)
    _asked: int | None = None

    def watch(self, place: int, issued: np.ndarray, active: np.ndarray) -> None:
        self.settle()
        super().watch(place, issued, active)
        if place in self.loads and active[:WARP].any():
            self._asked = len(self.first) - 1

    def settle(self) -> None:
        """The load before has been answered by now."""
        if self._asked is not None:
            self.latencies[self._asked] = LATENCIES[self.memory.last]
        self._asked = None


@dataclass(frozen=True)
class Measured:
    """Of one more task of a block.

    Attributes:
        per_element: instructions of each pipe that a warp issues for an element of each lane.
        bytes: that an element takes from memory, from each cache, and to memory ("written"; of
            these "fresh" were not read before).
        task: elements of it.
        tasks: of all.
        registers: of a thread.
        cycles: that the first warp takes for it by itself.
        others: cycles of the kernels of one block that come before and after.
    """

    per_element: Mapping[str, float]
    bytes: Mapping[str, float]
    task: int
    tasks: int
    registers: int
    cycles: int
    others: int

    @property
    def all(self) -> float:
        return sum(self.per_element.values())

    @property
    def least_bytes(self) -> float:
        return self.bytes["memory"] + self.bytes["written"]

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds."""
        return min(MOST_BLOCKS, REGISTERS // (-(-self.registers // 8) * 8 * THREADS))

    def missed(self, device: Device, l2: float) -> float:
        """The share of what L2 is asked for again that it has no longer. Between two reads of an
        element, all blocks move half of what they move in all, on average."""
        running = min(device.processors * self.blocks, self.tasks)
        between = running * self.task * (self.bytes["memory"] + self.bytes["fresh"]) / 2
        return max(0.0, 1 - l2 / between)

    def bounds(self, device: Device, l2: float, tasks: int) -> dict[str, float]:
        """Seconds that so many tasks take at least, which run at a time."""
        elements = tasks * self.task
        processors = min(device.processors, tasks)
        clock = processors * device.ghz * 1e9
        again = self.bytes["L2"]
        moved = self.least_bytes + again * self.missed(device, l2)
        asked = self.bytes["memory"] + again
        seconds = {
            "memory": elements * moved / (MOST_OF_COPY * device.copy * 1e12),
            "L2": elements * asked / (MOST_OF_PIPE * clock * L2_RATE),
            "latency": self.cycles / (device.ghz * 1e9),
            "issue": elements * self.all / (MOST_OF_ISSUE * clock * 128),
        }
        for pipe, rate in {
            "special": device.special,
            "doubles": device.doubles,
            "other": 64,
        }.items():
            count = self.per_element.get(pipe, 0.0)
            seconds[pipe] = elements * count / (MOST_OF_PIPE * clock * rate)
        return seconds

    def seconds(self, device: Device, l2: float) -> tuple[float, str]:
        """Of all tasks, a wave after the other, and what bounds most of them."""
        slots = device.processors * self.blocks
        waves, left = divmod(self.tasks, slots)
        whole = self.bounds(device, l2, min(slots, self.tasks))
        total = waves * max(whole.values())
        if left:
            total += max(self.bounds(device, l2, left).values())
        return total, max(whole, key=lambda name: whole[name])

    def share(self, device: Device, l2: float) -> float:
        """Of the speed of a copy."""
        least = self.tasks * self.task * self.least_bytes / (device.copy * 1e12)
        return least / self.seconds(device, l2)[0]


def issued(kernels: Kernels, case: LossCase, tasks: int) -> Counted:
    """By one block, for so many tasks."""
    api, count = kernels.machine.api, tasks * case.task
    if case.classes == 0:
        squares = MseArguments(case.dtype, count, 0, case.with_gradient)
        launches, own = api.mse(squares.call)
        arrays: list[Placed] = [*squares.arrays, *own]
    else:
        loss = Case(
            *(case.dtype, count, case.classes),
            in_place=case.in_place,
            with_gradient=case.with_gradient,
            with_lse=False,
        )
        arguments = CrossEntropyArguments(loss)
        launches, own = api.cross_entropy(arguments.call, case.rows >= FILL)
        arrays = [*arguments.read, *arguments.written, *own]
    return counted(kernels, next(one for one in launches if one.kernel == case.kernel), arrays)


def counted(kernels: Kernels, launch: Launch, arrays: Sequence[Placed]) -> Counted:
    code = kernels.machine.code[launch.kernel, launch.members.bit_length() - 1]
    loads = {place for place, one in enumerate(code) if one.opcode[0] == "LDG"}
    found = Counted(loads=loads, memory=Traffic(arrays))
    kernels.machine.run(launch, found.memory, 1, found.watch)
    found.settle()
    return found


def cycles_of_totals(kernels: Kernels, case: LossCase) -> int:
    """Of what one block does before, or after, for all rows, or chunks of squared errors."""
    is_squares = case.classes == 0
    count = -(-case.rows // NORM_CHUNK) if is_squares else case.rows
    arguments = CrossEntropyArguments(Case(case.dtype, count, 1, with_gradient=False))
    launches, own = kernels.machine.api.cross_entropy(arguments.call)
    arrays = [*arguments.read, *arguments.written, *own]
    total = 0
    for launch in launches:
        if launch.kernel in ((LOSS,) if is_squares else (TARGETS, LOSS)):
            found = counted(kernels, launch, arrays)
            code = kernels.machine.code[launch.kernel, 0]
            total += cycles(code, found.first, found.latencies)
    return total


def measure(kernels: Kernels, case: LossCase) -> Measured:
    machine, key = kernels.machine, (case.kernel, case.member)
    added = 1
    less, more = (issued(kernels, case, tasks) for tasks in (2, 2 + added))
    code, task = machine.code[key], case.task * max(1, case.classes)
    counts, elements = Counter[str](), added * task
    for place, count in more.counts.items():
        counts[pipe_of(code[place].opcode[0])] += count - less.counts[place]
    names = ("memory", "L2", "L1", "written", "fresh")
    moved = {name: more.memory.counts[name] - less.memory.counts[name] for name in names}
    shorter, longer = (cycles(code, each.first, each.latencies) for each in (less, more))
    return Measured(
        per_element={pipe: count * WARP / elements for pipe, count in counts.items()},
        bytes={name: count / elements for name, count in moved.items()},
        task=task,
        tasks=-(-case.rows // case.task),
        registers=kernels.registers[machine.symbols[key]],
        cycles=(longer - shorter) // added,
        others=cycles_of_totals(kernels, case),
    )


def predicted_of(arch: str, measured: Measured) -> dict[str, Json]:
    """By the names of an architecture's devices."""
    found = {}
    for name, device in DEVICES.items():
        if device.arch == arch:
            seconds, bound = measured.seconds(device, L2[name])
            found[name] = {
                **{"share": round(measured.share(device, L2[name]), 3), "bound": bound},
                **{"seconds": float(f"{seconds:.3g}")},
                "seconds of others": float(f"{measured.others / (device.ghz * 1e9):.3g}"),
            }
    return found


def table(results: Sequence[Json]) -> str:
    """In Markdown: of the first architecture what was counted, of each device what is predicted."""
    archs = list(dict.fromkeys(result["arch"] for result in results))
    head = ["kernel", "bytes", "again", "instructions", "registers"]
    devices = [name for name in SHOWN if DEVICES[name].arch in archs]
    for device in devices:
        head += [device, "bound by", "time", "others"]
    rows = []
    for name in dict.fromkeys(result["kernel"] for result in results):
        of_arch = {one["arch"]: one for one in results if one["kernel"] == name}
        first = Measured(**of_arch[archs[0]]["measured"])
        row = [name, f"{first.least_bytes:.1f}", f"{first.bytes['L2']:.1f}"]
        row += [f"{first.all:.1f}", f"{first.registers}"]
        for device in devices:
            one = of_arch[DEVICES[device].arch]["predicted"][device]
            row += [f"{one['share']:.0%}", one["bound"]]
            row += [duration(one["seconds"]), duration(one["seconds of others"])]
        rows.append(row)
    return markdown(head, rows, left=1)


def main(arguments: list[str] | None = None) -> int:
    """Measure the kernels, or only check the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.loss_model", description=__doc__
    )
    parser.add_argument("--arch", nargs="*", default=["sm_90", "sm_100"])
    parser.add_argument("--kernel", default="", help="those whose names match this pattern")
    parser.add_argument("--write", action="store_true", help="write the results and the table")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the table is old")
    options = parser.parse_args(arguments)
    if options.check:
        results = json.loads(RESULTS.read_text())
        if any(
            one["predicted"] != predicted_of(one["arch"], Measured(**one["measured"]))
            for one in results
        ):
            sys.exit(f"{RESULTS}: predictions are not those of what was counted")
        shown = show(PAGE, MARKER, table(results), check=True)
        print(f"{PAGE}: the table {'is' if shown else 'is not'} that of {RESULTS}")
        return 0 if shown else 1
    from fusedopt._extension import _C

    if not _C.has_cuda:
        sys.exit("fusedopt was built without CUDA")
    kernels = kernels_of(Path(_C.__file__), options.arch)
    results = []
    for name in (name for name in CASES if re.search(options.kernel, name)):
        for arch, of_arch in kernels.items():
            measured = measure(of_arch, CASES[name])
            predicted = predicted_of(arch, measured)
            one = {"kernel": name, "arch": arch, "predicted": predicted}
            results.append({**one, "measured": asdict(measured)})
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        show(PAGE, MARKER, table(results), check=False)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
