"""Steps of sharded parameters: ``python -m benchmarks.sharded``.

    python -m benchmarks.sharded            measures and writes everything
    python -m benchmarks.sharded --tables   only writes table and plot again

Parameters are DTensors of 32 x 32 elements on a process group of one rank, so that what is measured
is the host's time; implementations take turns. As gradients have FSDP2's, with the spec object of
their parameter, or from_local's, with one of their own that is equal, made anew before each step
(which is not timed). Then the demo's GPT is trained by FSDP2 on two ranks.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from tqdm import tqdm

import fusedopt
from benchmarks.measure.memory import MemoryEvents, peak_of_process
from benchmarks.measure.provenance import provenance
from benchmarks.models.batch import cross_entropy
from benchmarks.models.networks import GPT
from benchmarks.models.text import load_text, text_batches
from benchmarks.report.case import Json, duration, times, where
from benchmarks.report.colours import OUR_COLOUR, TORCH_COLOUR
from benchmarks.report.files import write_json
from benchmarks.report.pages import show
from benchmarks.report.tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sharded.json"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "sharded.png"
MARKER = "sharded"

COUNTS = (100, 1000, 10_000)
MOST = COUNTS[-1]
SHAPE = (32, 32)
ROUNDS = 15
SECONDS = 12.0  # of rounds, at most, for a number of tensors
RANKS = 2
ITERATIONS = 20
OURS = "fusedopt"


@dataclass(frozen=True)
class Subject:
    """An implementation of the step, and what its parameters and gradients are."""

    make: Callable[..., Optimizer]
    sharded: bool = True
    same_spec: bool = True
    clips_before: bool = False  # by torch's function
    most: int = 1000  # tensors: to make torch's state of more takes minutes


ADAMW = torch.optim.AdamW
SUBJECTS: dict[str, Subject] = {
    f"{OURS}, plain tensors": Subject(fusedopt.AdamW, sharded=False, most=MOST),
    f"{OURS}": Subject(fusedopt.AdamW, most=MOST),
    f"{OURS}, from_local": Subject(fusedopt.AdamW, same_spec=False, most=MOST),
    "torch-fused": Subject(functools.partial(ADAMW, fused=True)),
    "torch-foreach": Subject(functools.partial(ADAMW, foreach=True)),
    "torch-forloop": Subject(functools.partial(ADAMW, foreach=False)),
}
CLIPPED = functools.partial(fusedopt.AdamW, max_grad_norm=1.0)
CLIPPING: dict[str, Subject] = {
    f"{OURS}, plain tensors": Subject(CLIPPED, sharded=False, most=MOST),
    f"{OURS}": Subject(CLIPPED, most=MOST),
    f"{OURS}, from_local": Subject(CLIPPED, same_spec=False, most=MOST),
    "torch-fused": Subject(functools.partial(ADAMW, fused=True), clips_before=True),
    "torch-foreach": Subject(functools.partial(ADAMW, foreach=True), clips_before=True),
}
KINDS = {"step": SUBJECTS, "clip and step": CLIPPING}


class Work:
    """So many parameters with gradients, and the step of a subject."""

    def __init__(self, subject: Subject, count: int, mesh: DeviceMesh) -> None:
        self.subject, self.mesh = subject, mesh
        self.grads = [torch.randn(SHAPE) for _ in range(count)]
        locals_ = [torch.randn(SHAPE) for _ in range(count)]
        if subject.sharded:
            locals_ = [self.shard(local) for local in locals_]
        self.params = [nn.Parameter(local) for local in locals_]
        for p, grad in zip(self.params, self.grads, strict=True):
            if not subject.sharded:
                p.grad = grad
            elif subject.same_spec:
                p.grad = DTensor(grad, p._spec, requires_grad=False)
        self.optimizer = subject.make(self.params)

    def shard(self, local: Tensor) -> Tensor:
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False)

    def prepare(self) -> None:
        if not self.subject.same_spec:
            for p, grad in zip(self.params, self.grads, strict=True):
                p.grad = self.shard(grad)

    def step(self) -> None:
        if self.subject.clips_before:
            nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()

    def seconds(self) -> float:
        self.prepare()
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


def measure_steps(counts: tuple[int, ...], rounds: int) -> list[Json]:
    """The seconds of all rounds, for each number of tensors, with and without clipping."""
    found: list[Json] = []
    mesh = init_device_mesh("cpu", (1,))
    for count in counts:
        for kind, subjects in KINDS.items():
            works = {
                name: Work(subject, count, mesh)
                for name, subject in subjects.items()
                if count <= subject.most
            }
            for work in works.values():
                work.seconds()
            seconds: dict[str, list[float]] = {name: [] for name in works}
            begin = time.perf_counter()
            for number in tqdm(range(rounds), desc=f"{kind} of {count}"):
                if number >= 3 and time.perf_counter() - begin > SECONDS:
                    break
                for name, work in works.items():
                    seconds[name].append(work.seconds())
            ours = works[OURS]
            with MemoryEvents(torch.device("cpu")) as events:
                ours.step()
            found.append(
                {
                    "kind": kind,
                    "tensors": count,
                    "seconds": seconds,
                    "allocated": events.allocated,
                }
            )
    return found


# -- training -----------------------------------------------------------------------------------


def train(rank: int, name: str, folder: str, iterations: int) -> None:
    """One rank's part of training by FSDP2; rank 0 writes the seconds of its iterations."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    text = load_text()
    model = GPT(len(text.vocabulary))
    for layer in model.blocks:
        fully_shard(layer)
    fully_shard(model)
    makers = {OURS: fusedopt.AdamW, **{k: s.make for k, s in SUBJECTS.items() if "torch" in k}}
    optimizer = makers[name](model.parameters(), lr=1e-3)
    seconds, steps, losses = [], [], []
    for batch in islice(text_batches(text.train, 4, 64, seed=rank), iterations + 3):
        dist.barrier()
        start = time.perf_counter()
        loss = cross_entropy(model, batch)
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        steps.append(time.perf_counter() - before)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = peak_of_process()
    if rank == 0:
        result = {"iteration": seconds[3:], "step": steps[3:], "peak": peak, "loss": losses[-1]}
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measure_training(iterations: int) -> dict[str, Json]:
    """By each implementation, one after the other, in processes of their own."""
    found: dict[str, Json] = {}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for name in tqdm([OURS, *(name for name in SUBJECTS if "torch" in name)], desc="training"):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train, (name, folder, iterations), nprocs=RANKS)
            found[name] = json.loads(Path(folder, "result.json").read_text())
    return found


# -- tables -------------------------------------------------------------------------------------


def per_tensor(case: Json, name: str) -> float:
    return median(case["seconds"][name]) / case["tensors"]


def tables(results: Json) -> str:
    """Times of steps and of training, as Markdown."""
    rows = []
    for case in results["steps"]:
        ours = case["seconds"][OURS]
        for name, seconds in case["seconds"].items():
            ratio = median(b / a for a, b in zip(ours, seconds, strict=True))
            share = duration(per_tensor(case, name))
            rows.append([case["kind"], f"{case['tensors']:,}", name, share, times(ratio)])
    head = ["", "tensors", "implementation", "a tensor", "of fusedopt's time"]
    text = table(head, rows, left=3)
    trained = [
        [
            name,
            duration(median(one["iteration"])),
            duration(median(one["step"])),
            f"{one['peak'] / 2**20:.0f} MiB",
        ]
        for name, one in results["training"].items()
    ]
    head = ["FSDP2 on two ranks", "iteration", "step", "peak of a process"]
    allocated = max(case["allocated"] for case in results["steps"])
    return (
        f"{text}\nA step after the first allocates {allocated} bytes.\n\n"
        f"{table(head, trained, left=1)}\n{where({**results, 'cases': []})}.\n"
    )


def draw(results: Json, path: Path) -> None:
    """Write the plot of the time a tensor, as a PNG file."""
    from matplotlib.figure import Figure  # the only part that needs it

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        cases = [case for case in results["steps"] if case["kind"] == kind]
        counts = [case["tensors"] for case in cases]
        for name in KINDS[kind]:
            ours = name.startswith(OURS)
            style = {OURS: "-", f"{OURS}, from_local": "--", f"{OURS}, plain tensors": ":"}
            measured = [case for case in cases if name in case["seconds"]]
            values = [1e6 * per_tensor(case, name) for case in measured]
            axes.plot(
                [case["tensors"] for case in measured],
                values,
                style.get(name, "-"),
                color=OUR_COLOUR if ours else TORCH_COLOUR,
                marker="o",
            )
            axes.annotate(
                name,
                (measured[-1]["tensors"], values[-1]),
                xytext=(8, -14 if "plain" in name else -3),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(y=0.1)
        axes.set_xlim(right=40 * counts[-1])
        axes.set_title(f"AdamW: {kind}")
        axes.set_xlabel("DTensors of 32 x 32")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("us a tensor (medians)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def study(counts: tuple[int, ...], rounds: int, iterations: int) -> Json:
    """Measure everything."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        steps = measure_steps(counts, rounds)
        dist.destroy_process_group()
    return {
        "provenance": provenance(torch.device("cpu"), []),
        "steps": steps,
        "training": measure_training(iterations),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or only write or check its tables; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write tables and plot again")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a table is old")
    parser.add_argument("--tensors", type=int, nargs="+", default=COUNTS, help="how many")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of training")
    options = parser.parse_args(arguments)
    if not (options.tables or options.check):
        made = study(tuple(options.tensors), options.rounds, options.iterations)
        write_json(options.output, made)
    results = json.loads(options.output.read_text())
    if options.output != RESULTS:
        print(tables(results))
        return 0
    shown = show(PAGE, MARKER, tables(results), check=options.check)
    if options.check:
        return int(not shown)
    draw(results, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
