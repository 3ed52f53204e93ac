"""Measure optimizer steps: ``python -m benchmarks.run``.

Implementations of one optimizer in one scenario are timed interleaved: every round takes one sample
of each, so that all of them see the same drift of the machine, and ratios are taken per round. Two
plain passes over memory that move as many bytes as one step are timed in the same rounds: a copy,
and a read-modify-write, whose time is the floor. The results go to a JSON file with all samples,
and as a Markdown table to standard output and to a file beside the JSON.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import COPY, DEVICE, FLOOR
from benchmarks.implementations import (
    IMPLEMENTATIONS,
    LEARNING_RATE,
    Data,
    Implementation,
    Work,
    captured,
    first_line,
)
from benchmarks.progress import Progress
from benchmarks.report import markdown
from benchmarks.scenarios import (
    GI,
    OPTIMIZERS,
    SCENARIOS,
    SUITES,
    OptimizerSetup,
    Scenario,
    choose_cases,
)
from benchmarks.timing import MIN_ROUNDS, measure, time_on_cuda

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 41, 5
SECONDS = {"cpu": 20.0, "cuda": 8.0}
QUICK_SECONDS = 2.0

# On a GPU a copy need not be larger than this to show its bandwidth, and memory is for the steps.
MOST_COPIED = 8 * GI
COPY_SAMPLES = 21
USED_OF_FREE_MEMORY = 0.9  # the rest is for fragments, and for what others allocate
DATA_BYTES = 2 * torch.float32.itemsize  # of the common values and gradients, per element
TEMPORARIES = 3  # per element, in torch's foreach step


@functools.lru_cache(maxsize=1)
def make_data(scenario: Scenario, device: torch.device) -> Data:
    """The same float32 (value, gradient) pairs for every implementation of a scenario."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        (
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
        )
        for shape in scenario.tensors
    ]


def fit_to_memory(
    scenario: Scenario, setup: OptimizerSetup, implementations: int, device: torch.device
) -> Scenario:
    """The scenario, scaled down where a GPU cannot hold it once for each implementation."""
    if device.type != "cuda":
        return scenario
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    of_each = setup.dtype.itemsize * (2 + setup.states)
    per_element = implementations * of_each + DATA_BYTES + TEMPORARIES * setup.dtype.itemsize
    step_bytes = scenario.elements * setup.bytes_per_parameter
    copies = 3 * min(step_bytes, MOST_COPIED) // 2
    return scenario.fitting(int(max(0, USED_OF_FREE_MEMORY * free - copies) / per_element))


def allocated_by(work: Work, device: torch.device) -> int:
    """Bytes that torch's allocators hand out during one call, whether freed again or not.

    On a CPU the profiler reports every allocation of torch's CPU allocator; on CUDA the caching
    allocator counts by itself.
    """
    before = allocated_on_cuda(device)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work.call()
    on_cuda = allocated_on_cuda(device) - before
    on_cpu = sum(
        max(event.nbytes(), 0)
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    )
    return int(on_cpu + on_cuda)


def allocated_on_cuda(device: torch.device) -> int:
    """Bytes that the CUDA caching allocator has handed out so far; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"])


def first_elements(params: Iterable[Tensor]) -> Tensor:
    """Up to 256 elements of each tensor, in one float32 tensor."""
    return torch.cat([param.detach().flatten()[:256].float() for param in params])


def check_same_work(
    name: str, got: Tensor, initial: Tensor, expected: Tensor | None, dtype: torch.dtype
) -> None:
    """Raise RuntimeError unless an implementation changed its parameters, and as expected if so."""
    if torch.equal(got, initial):
        raise RuntimeError(f"{name}: the steps changed no parameter")
    rtol = 4 * torch.finfo(dtype).eps
    atol = max(1e-5, rtol * LEARNING_RATE)  # steps have about the length of the learning rate
    if expected is not None and not torch.allclose(got, expected, rtol=rtol, atol=atol):
        worst = (got - expected).abs().max().item()
        raise RuntimeError(f"{name}: parameters differ from the others' by up to {worst:.3g}")


def warm_up(implementation: Implementation, work: Work, device: torch.device) -> tuple[Work, int]:
    """Call twice, the second time a graph where that is asked for; the bytes this allocates."""
    if work.prepare is not None:
        work.prepare()
    work.call()
    if implementation.graph:
        work = captured(work)
    if work.prepare is not None:
        work.prepare()
    return work, allocated_by(work, device)


def memory_works(elements: int, device: torch.device) -> dict[str, Work]:
    """A copy, and a read-modify-write, each of so many float32: eight bytes per element."""
    source, target, buffer = (torch.ones(elements, device=device) for _ in range(3))
    return {
        COPY: Work(lambda: target.copy_(source)),
        FLOOR: Work(lambda: buffer.add_(1)),
    }


@dataclass
class Run:
    """What all cases of a run share.

    Attributes:
        implementations: who is measured; all can be imported.
        device: where.
        rounds: at most, per case.
        seconds: of rounds, at most, per case.
        progress: tells what is being done.
        failures: what went wrong so far.
    """

    implementations: list[Implementation]
    device: torch.device
    rounds: int
    seconds: float
    progress: Progress
    failures: list[str] = field(default_factory=list)

    def case(self, setup: OptimizerSetup, scenario: Scenario) -> dict[str, Any]:
        """Measure all implementations of one optimizer in one scenario; the case for the file."""
        gc.collect()
        if self.device.type == "cuda":
            make_data.cache_clear()
        skipped: dict[str, str] = {}
        able = []
        for implementation in self.implementations:
            if implementation.name in scenario.without:
                continue
            reason = implementation.why_not(setup, scenario, self.device)
            if reason is None:
                able.append(implementation)
            else:
                skipped[implementation.name] = reason
        scenario = fit_to_memory(scenario, setup, len(able), self.device)
        works, allocated = self._build(setup, scenario, able, skipped)
        step_bytes = scenario.elements * setup.bytes_per_parameter
        if self.device.type == "cuda":
            step_bytes = min(step_bytes, MOST_COPIED)
        elements = step_bytes // 8
        return {
            "optimizer": setup.name,
            "scenario": scenario.name,
            **({"note": scenario.note} if scenario.note else {}),
            "tensors": len(scenario.tensors),
            "parameters": scenario.elements,
            "bytes_per_parameter": setup.bytes_per_parameter,
            "memory_bytes": 8 * elements,
            "allocated": allocated,
            "skipped": skipped,
            **measure(
                works | memory_works(elements, self.device),
                self.device.type,
                self.rounds,
                self.seconds,
                self.progress,
            ),
        }

    def _build(
        self,
        setup: OptimizerSetup,
        scenario: Scenario,
        implementations: list[Implementation],
        skipped: dict[str, str],
    ) -> tuple[dict[str, Work], dict[str, int]]:
        """What to time of each implementation, and the bytes that a step of it allocates.

        One that fails is left out: other projects' with a note, torch's and ours as a failure.
        """
        data = make_data(scenario, self.device)
        initial = first_elements(value.to(setup.dtype) for value, _ in data)
        expected: Tensor | None = None
        works: dict[str, Work] = {}
        allocated: dict[str, int] = {}
        for implementation in implementations:
            name = implementation.name
            self.progress.preparing(name)
            try:
                work = implementation.build(setup, scenario, data)
                work, bytes_allocated = warm_up(implementation, work, self.device)
                got = first_elements(work.params)
                wanted = expected if implementation.exact else None
                check_same_work(name, got, initial, wanted, setup.dtype)
            except Exception as error:
                if implementation.package:
                    skipped[name] = f"it failed with {first_line(error)}"
                else:
                    failure = f"{setup.name} {scenario.name} {name}: {first_line(error)}"
                    self.failures.append(failure)
                continue
            works[name] = work
            if implementation.exact and expected is None:
                expected = got
            if setup.loss_scale is None:  # a GradScaler allocates, too
                allocated[name] = bytes_allocated
        self.progress.preparing("")
        return works, allocated


def git(*arguments: str) -> str | None:
    """What git answers about this checkout, or None where it cannot."""
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def processor() -> str:
    """The CPU's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.+)", text)
    return found[1] if found else platform.processor()


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None where nvidia-smi does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.split()[0] if answer.stdout.split() else None


def gpu_provenance(device: torch.device) -> dict[str, Any]:
    """The GPU, what runs it, and the bandwidth at which it copies."""
    properties = torch.cuda.get_device_properties(device)
    elements = min(MOST_COPIED, properties.total_memory // 4) // 8
    copy = memory_works(elements, device)[COPY]
    time_on_cuda(copy, 1)
    bandwidths = [8 * elements / time_on_cuda(copy, 5)[DEVICE] for _ in range(COPY_SAMPLES)]
    return {
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "copy_bandwidth": median(bandwidths),
        "copy_bandwidth_samples": bandwidths,
    }


def provenance(device: torch.device, implementations: list[Implementation]) -> dict[str, Any]:
    """Everything that a reader needs to know about where the figures come from.

    Where the checkout has no history, FUSEDOPT_COMMIT in the environment can tell the commit.
    """
    try:
        fusedopt = importlib.import_module("fusedopt")
        ours = {"fusedopt": fusedopt.__version__, "isa": fusedopt.isa()}
    except ImportError:
        ours = {}
    peers = {other.package: other.installed_version() for other in implementations if other.package}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or os.environ.get("FUSEDOPT_COMMIT"),
        "dirty": None if changes is None else changes != "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **ours,
        **({"peers": peers} if peers else {}),
        **(gpu_provenance(device) if device.type == "cuda" else {}),
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write indented JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[([^][{}]*)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    path.write_text(text + "\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked, with the cases and the implementations chosen."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time optimizer steps: fusedopt, torch.optim and what else is installed, "
        "interleaved, in one run.",
        epilog="A case is one optimizer in one scenario. Without --optimizer and --scenario a "
        "suite of cases is run, another one on GPUs than on CPUs: "
        f"{describe_suite('cpu')}; on GPUs {describe_suite('cuda')}. The CPU's takes about 5 "
        "minutes on two cores, and 10 GiB of memory for 1x64Mi. Where there is no git to ask, the "
        "environment variable FUSEDOPT_COMMIT says which commit is measured.",
    )
    for option, choices in (
        ("--optimizer", OPTIMIZERS),
        ("--scenario", SCENARIOS),
        ("--implementation", IMPLEMENTATIONS),
    ):
        parser.add_argument(
            option,
            nargs="+",
            choices=list(choices),
            metavar="NAME",
            help=f"of {', '.join(choices)}",
        )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of torch (default: its own choice)",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, under a minute")
    parser.add_argument(
        "--rounds", type=int, help=f"at most, per case (default: {ROUNDS}, quick: {QUICK_ROUNDS})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of rounds, at most, per case (default: {SECONDS['cpu']:g}, on a GPU "
        f"{SECONDS['cuda']:g}, quick: {QUICK_SECONDS:g})",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=math.inf,
        help="seconds for everything: cases get fewer rounds, and the last are left out",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "latest.json",
        help="JSON file; the table goes beside it (default: benchmarks/results/latest.json)",
    )
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads: at least 1, got {arguments.threads}")
    if arguments.output.suffix != ".json":
        parser.error(f"--output: a file name that ends in .json, got {arguments.output}")
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {arguments.output}: {error}")
    try:
        arguments.device = torch.empty(0, device=arguments.device).device  # with its number
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    kind = arguments.device.type
    if kind not in SUITES:
        parser.error(f"--device {arguments.device}: one of {', '.join(SUITES)}")
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.seconds is None:
        arguments.seconds = QUICK_SECONDS if arguments.quick else SECONDS[kind]
    if arguments.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: at least {MIN_ROUNDS}, got {arguments.rounds}")
    for option in ("seconds", "limit"):
        if not getattr(arguments, option) > 0:
            parser.error(f"--{option}: more than 0, got {getattr(arguments, option)}")
    able = {name: one for name, one in IMPLEMENTATIONS.items() if kind in one.devices}
    for name in arguments.implementation or ():
        if name not in able:
            parser.error(f"--implementation {name}: is not measured on --device {kind}")
    arguments.implementations = [able[name] for name in arguments.implementation or able]
    arguments.cases = choose_cases(kind, arguments.optimizer, arguments.scenario)
    if not arguments.cases:
        parser.error(
            f"--optimizer {' '.join(arguments.optimizer)}: is not in the suite of --device {kind}; "
            "choose a --scenario, too"
        )
    return arguments


def describe_suite(kind: str) -> str:
    """A suite in words."""
    return "; ".join(f"{scenario}: {', '.join(names)}" for scenario, names in SUITES[kind].items())


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    start = time.perf_counter()
    arguments = parse_arguments(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes into the bar
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    absent = {one.name: one.missing() for one in arguments.implementations}
    implementations = [one for one in arguments.implementations if absent[one.name] is None]
    results: dict[str, Any] = {
        "provenance": provenance(device, implementations),
        "settings": {"rounds": arguments.rounds, "seconds": arguments.seconds},
        "absent": {name: reason for name, reason in absent.items() if reason is not None},
        "cases": [],
    }
    cases = arguments.cases
    with Progress(arguments.rounds * len(cases)) as progress:
        run = Run(implementations, device, arguments.rounds, arguments.seconds, progress)
        for number, (setup, scenario) in enumerate(cases):
            left = arguments.limit - (time.perf_counter() - start)
            run.seconds = min(arguments.seconds, left / (len(cases) - number))
            name = f"{setup.name} {scenario.name}"
            progress.case(name)
            if left <= 0:
                run.failures.append(f"{name}: not measured, {arguments.limit:g} s are over")
                continue
            try:
                results["cases"].append(run.case(setup, scenario))
            except (RuntimeError, ValueError) as error:
                run.failures.append(f"{name}: {first_line(error)}")
    if run.failures:
        results["failures"] = run.failures
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    table = markdown(results)
    write_json(arguments.output, results)
    arguments.output.with_suffix(".md").write_text(table)
    print(table)
    print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")
    for failure in run.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
