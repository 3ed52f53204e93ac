"""Measure optimizer steps: ``python -m benchmarks.run``.

Implementations of one optimizer in one scenario are timed interleaved: every round takes one sample
of each, so that all of them see the same drift of the machine, and ratios are taken per round. Two
plain passes over memory that move as many bytes as one step are timed in the same rounds: a copy,
and a read-modify-write, whose time is the floor. The results go to a JSON file with all samples,
as a Markdown table to standard output and to a file beside the JSON, and as plots to a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.end_to_end import measure_training
from benchmarks.measure.implementations import (
    IMPLEMENTATIONS,
    LEARNING_RATE,
    Data,
    Implementation,
    Work,
    captured,
    first_line,
)
from benchmarks.measure.progress import Progress
from benchmarks.measure.scenarios import (
    GI,
    KI,
    OPTIMIZERS,
    SCALING,
    SCALING_IMPLEMENTATIONS,
    SCENARIOS,
    SUITES,
    OptimizerSetup,
    Scenario,
    choose_cases,
    find_scenario,
)
from benchmarks.measure.timing import measure, time_on_cuda
from benchmarks.report.__main__ import markdown, memory_table
from benchmarks.report.case import COPY, DEVICE, FLOOR
from benchmarks.report.compare import comparison

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 41, 5
SECONDS = {"cpu": 20.0, "cuda": 8.0}
QUICK_SECONDS = 2.0
SCALING_SECONDS = 4.0  # of rounds, at most, for each point of a curve
IMPORTS = 5

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
    """The scenario, scaled down where it cannot be held once for each implementation.

    ValueError where that does not help.
    """
    free = free_memory(device)
    of_each = setup.dtype.itemsize * (2 + setup.states)
    per_element = implementations * of_each + DATA_BYTES + TEMPORARIES * setup.dtype.itemsize
    copies = 0
    if device.type == "cuda":
        copies = 3 * min(scenario.elements * setup.bytes_per_parameter, MOST_COPIED) // 2
    else:
        per_element += 3 * setup.bytes_per_parameter // 2
    return scenario.fitting(int(max(0, USED_OF_FREE_MEMORY * free - copies) / per_element))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had there; on a CPU where nobody knows, as many as it has."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    # What glibc keeps of memory that was given back is not in what the system calls available.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    return int(found[1]) * KI if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class MemoryEvents:
    """What torch's allocators hand out and take back while this is entered.

    On a CPU the profiler reports every allocation of torch's CPU allocator; on CUDA the caching
    allocator counts by itself.

    Attributes:
        allocated: bytes handed out, whether freed again or not.
        peak: the most bytes that were in use at once, above those at the start.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self.allocated = self.peak = 0

    def __enter__(self) -> MemoryEvents:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._in_use = torch.cuda.memory_allocated(self._device)
            self._handed_out = allocated_on_cuda(self._device)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = [
            (event.start_ns(), event.nbytes())
            for event in self._profile.profiler.kineto_results.events()
            if event.name() == "[memory]" and event.device_type().name == "CPU"
        ]
        sizes = [size for _, size in sorted(events, key=lambda event: event[0])]
        self.allocated = sum(max(size, 0) for size in sizes)
        self.peak = max(itertools.accumulate(sizes, initial=0))
        if self._device.type == "cuda":
            self.allocated += allocated_on_cuda(self._device) - self._handed_out
            self.peak += torch.cuda.max_memory_allocated(self._device) - self._in_use


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


def warm_up(
    implementation: Implementation, build: Callable[[], Work], device: torch.device
) -> tuple[Work, int, int]:
    """Build and call twice, the second time a graph where that is asked for.

    Returns:
        What to time, the bytes that the second call allocates, and the peak of all bytes in use up
        to then: parameters, gradients, states and whatever else.
    """
    with MemoryEvents(device) as first:
        work = build()
        if work.prepare is not None:
            work.prepare()
        work.call()
    if implementation.graph:
        work = captured(work)
    if work.prepare is not None:
        work.prepare()
    with MemoryEvents(device) as second:
        work.call()
    return work, second.allocated, first.peak


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
        left_out: cases for which there is no memory.
        last: the scenario of the case before this one.
    """

    implementations: list[Implementation]
    device: torch.device
    rounds: int
    seconds: float
    progress: Progress
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    last: Scenario | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What goes wrong within a part of the run is a failure of that part."""
        try:
            yield
        except ValueError as error:
            self.left_out.append(f"{name}: {error}")
        except (ImportError, RuntimeError, subprocess.SubprocessError) as error:
            self.failures.append(f"{name}: {first_line(error)}")

    def case(self, setup: OptimizerSetup, scenario: Scenario) -> dict[str, Any]:
        """Measure all implementations of one optimizer in one scenario; the case for the file."""
        if scenario != self.last:
            make_data.cache_clear()
            self.last = scenario
        gc.collect()
        skipped: dict[str, str] = {}
        able = []
        for implementation in self.implementations:
            if implementation.name in scenario.without:
                continue
            reason = implementation.why_not(setup, scenario, self.device)
            if reason is None:
                able.append(implementation)
            elif reason:
                skipped[implementation.name] = reason
        scenario = fit_to_memory(scenario, setup, len(able), self.device)
        works, allocated, peak = self._build(setup, scenario, able, skipped)
        step_bytes = scenario.elements * setup.bytes_per_parameter
        if self.device.type == "cuda":
            step_bytes = min(step_bytes, MOST_COPIED)
        elements = max(1, step_bytes // 8)
        return {
            "optimizer": setup.name,
            "scenario": scenario.name,
            **({"note": scenario.note} if scenario.note else {}),
            "tensors": len(scenario.tensors),
            "parameters": scenario.elements,
            "bytes_per_parameter": setup.bytes_per_parameter,
            "memory_bytes": 8 * elements,
            "allocated": allocated,
            "peak": peak,
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
    ) -> tuple[dict[str, Work], dict[str, int], dict[str, int]]:
        """What to time of each implementation, the bytes that a step of it allocates, and its peak.

        One that fails is left out: other projects' with a note, torch's and ours as a failure.
        """
        data = make_data(scenario, self.device)
        initial = first_elements(value.to(setup.dtype) for value, _ in data)
        expected: Tensor | None = None
        works: dict[str, Work] = {}
        allocated: dict[str, int] = {}
        peak: dict[str, int] = {}
        for implementation in implementations:
            name = implementation.name
            self.progress.preparing(name)
            try:
                build = functools.partial(implementation.build, setup, scenario, data)
                gc.collect()  # what is freed later would count
                work, bytes_allocated, bytes_at_peak = warm_up(implementation, build, self.device)
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
            peak[name] = bytes_at_peak
        self.progress.preparing("")
        return works, allocated, peak


def seconds_to_import() -> list[float]:
    """What `import fusedopt` takes after `import torch`, each in a process of its own."""
    code = (
        "import torch, time; start = time.perf_counter(); import fusedopt; "
        "print(time.perf_counter() - start)"
    )
    root = RESULTS.parent.parent
    return [
        float(subprocess.check_output([sys.executable, "-c", code], cwd=root))
        for _ in range(IMPORTS)
    ]


def updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results with the new run's cases in their places, each with its own provenance."""
    cases = {(case["optimizer"], case["scenario"]): case for case in new["cases"]}
    for case in cases.values():
        case["provenance"] = new["provenance"]
    kept = [cases.pop((case["optimizer"], case["scenario"]), case) for case in old["cases"]]
    return {**old, "cases": [*kept, *cases.values()]}


def scaling(run: Run, seconds: float) -> list[dict[str, Any]]:
    """Cases along each axis of SCALING."""
    run = replace(
        run,
        implementations=[i for i in run.implementations if i.name in SCALING_IMPLEMENTATIONS],
        seconds=seconds,
    )
    cases: list[dict[str, Any]] = []
    for axis, names in SCALING.items():
        for name in names:
            run.progress.case(f"{axis}: {name}")
            with run.part(f"{axis}: {name}"):
                cases.append({"axis": axis, **run.case(OPTIMIZERS["AdamW"], find_scenario(name))})
    return cases


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
        f"{describe_suite('cpu')}; on GPUs {describe_suite('cuda')}. The CPU's takes about 10 "
        "minutes on two cores; what memory has no room for is left out. Where there is no git, the "
        "environment variable FUSEDOPT_COMMIT says which commit is measured.",
    )
    for option, choices in (("--optimizer", OPTIMIZERS), ("--implementation", IMPLEMENTATIONS)):
        parser.add_argument(
            option,
            nargs="+",
            choices=list(choices),
            metavar="NAME",
            help=f"of {', '.join(choices)}",
        )
    parser.add_argument(
        "--scenario",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(SCENARIOS)}; or tensors x elements, like 200x100K, 1x64Mi or, each "
        "tensor in a group of its own, 500x4Ki-groups",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="measure as well how a step of AdamW grows with tensors, groups and elements",
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="measure as well whole iterations of training (on a CPU)",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="keep what is in the output file, but for the cases that this run measures anew",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="a JSON file of an earlier run: tell where fusedopt is slower than there, relative to "
        "the machine's own speed; exit status 1 if it is",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="show peaks of memory, in bytes and per parameter, and time two rounds only",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of torch (default: its own choice)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, and on a CPU fewer cases: under 2 minutes"
    )
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
        help="seconds for the cases: they get fewer rounds, and the last are left out",
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
    if arguments.memory:
        arguments.rounds = 2  # quartiles take two
    if arguments.rounds < 1:
        parser.error(f"--rounds: at least 1, got {arguments.rounds}")
    arguments.into = None
    if arguments.update:
        try:
            arguments.into = json.loads(arguments.output.read_text())
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"--update --output {arguments.output}: {error}")
    for option in ("seconds", "limit"):
        if not getattr(arguments, option) > 0:
            parser.error(f"--{option}: more than 0, got {getattr(arguments, option)}")
    able = {name: one for name, one in IMPLEMENTATIONS.items() if kind in one.devices}
    for name in arguments.implementation or ():
        if name not in able:
            parser.error(f"--implementation {name}: is not measured on --device {kind}")
    # Compiling takes longer than all else that is quick.
    default = [name for name, one in able.items() if not (arguments.quick and one.compiled)]
    arguments.implementations = [able[name] for name in arguments.implementation or default]
    try:
        arguments.cases = choose_cases(
            kind, arguments.optimizer, arguments.scenario, arguments.quick
        )
    except ValueError as error:
        parser.error(f"--scenario: {error}")
    if arguments.training and kind != "cpu":
        parser.error(f"--training: measured on a CPU only, not on --device {kind}")
    arguments.old = None
    if arguments.compare is not None:
        try:
            arguments.old = json.loads(arguments.compare.read_text())
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"--compare {arguments.compare}: {error}")
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
            with run.part(name):
                results["cases"].append(run.case(setup, scenario))
        if arguments.scaling:
            results["scaling"] = scaling(run, min(arguments.seconds, SCALING_SECONDS))
        if arguments.training:
            with run.part("training"):
                results["training"] = measure_training(
                    arguments.rounds, arguments.seconds, progress
                )
    of_suite = arguments.scenario is None and arguments.optimizer is None
    if device.type == "cpu" and of_suite and results["provenance"].get("fusedopt"):
        with run.part("import"):
            results["import_seconds"] = seconds_to_import()
    for kind, lines in (("failures", run.failures), ("left_out", run.left_out)):
        if lines:
            results[kind] = lines
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if arguments.into is not None:
        results = updated(arguments.into, results)
    table = markdown(results)
    write_json(arguments.output, results)
    arguments.output.with_suffix(".md").write_text(table)
    print(memory_table(results) if arguments.memory else table)
    print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")
    if importlib.util.find_spec("matplotlib") is None:
        print("No plots: matplotlib is not installed.")
    elif device.type == "cpu" and results["cases"]:
        plots = importlib.import_module("benchmarks.report.plots")
        plots.draw_all(results, arguments.output.with_suffix(""))
        print(f"Plots are in {arguments.output.with_suffix('')}.")
    for failure in run.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    slower = False
    if arguments.old is not None:
        compared, slower = comparison(arguments.old, results)
        print(compared)
    return 1 if run.failures or slower else 0


if __name__ == "__main__":
    sys.exit(main())
