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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.benchmark import Timer
from tqdm import tqdm

from benchmarks.implementations import IMPLEMENTATIONS, Implementation
from benchmarks.report import COPY, FLOOR, markdown
from benchmarks.scenarios import OPTIMIZERS, SCENARIOS, OptimizerSetup, Scenario

RESULTS = Path(__file__).parent / "results"
MIN_ROUNDS = 3
MIN_SAMPLE_SECONDS = 0.01


@functools.lru_cache(maxsize=1)
def make_data(scenario: Scenario, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The same float32 (value, gradient) pairs for every implementation of a scenario."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        (
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
        )
        for shape in scenario.tensors
    ]


def allocated_by(optimizer: Optimizer, device: torch.device) -> int:
    """Bytes that torch's allocators hand out during one step, whether freed again or not.

    On a CPU the profiler reports every allocation of torch's CPU allocator; on CUDA the caching
    allocator counts by itself.
    """
    before = allocated_on_cuda(device)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        optimizer.step()
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


def check_same_work(name: str, got: Tensor, initial: Tensor, expected: Tensor, rtol: float) -> None:
    """Raise RuntimeError unless an implementation changed its parameters as another did."""
    if torch.equal(got, initial):
        raise RuntimeError(f"{name}: the steps changed no parameter")
    if not torch.allclose(got, expected, rtol=rtol, atol=1e-5):
        worst = (got - expected).abs().max().item()
        raise RuntimeError(f"{name}: parameters differ from the others' by up to {worst:.3g}")


def step_timer(optimizer: Optimizer) -> Timer:
    """A timer of one step."""
    return Timer("step()", globals={"step": optimizer.step}, num_threads=torch.get_num_threads())


def memory_timers(step_bytes: int, device: torch.device) -> dict[str, Timer]:
    """Timers of a copy and of a read-modify-write that move as many bytes as one step."""
    elements = step_bytes // (2 * torch.float32.itemsize)
    source, target, buffer = (torch.ones(elements, device=device) for _ in range(3))
    threads = torch.get_num_threads()
    return {
        COPY: Timer("to.copy_(x)", globals={"to": target, "x": source}, num_threads=threads),
        FLOOR: Timer("x.add_(1)", globals={"x": buffer}, num_threads=threads),
    }


def measure(
    timers: dict[str, Timer], rounds: int, seconds: float, bar: tqdm[Any]
) -> dict[str, list[float]]:
    """Seconds per call of each timer, one sample per round, until rounds or seconds run out.

    Each round starts with another timer, so that none always runs after the same one.
    """
    names = list(timers)
    calls = {
        name: math.ceil(MIN_SAMPLE_SECONDS / timer.timeit(1).mean) for name, timer in timers.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            bar.update(rounds - done)
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            mean = timers[name].timeit(calls[name]).mean
            samples[name].append(mean)
            calls[name] = max(calls[name], math.ceil(MIN_SAMPLE_SECONDS / mean))
        bar.update()
    return samples


def run_case(
    setup: OptimizerSetup,
    scenario: Scenario,
    implementations: list[Implementation],
    device: torch.device,
    rounds: int,
    seconds: float,
    bar: tqdm[Any],
) -> dict[str, Any]:
    """Measure all implementations of one optimizer in one scenario; the case for the JSON file."""
    gc.collect()
    data = make_data(scenario, device)
    parameters = sum(value.numel() for value, _ in data)
    initial = first_elements(value.to(setup.dtype) for value, _ in data)
    rtol = 4 * torch.finfo(setup.dtype).eps
    expected: Tensor | None = None
    timers: dict[str, Timer] = {}
    allocated: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for implementation in implementations:
        name = implementation.name
        bar.set_postfix_str(f"preparing {name}")
        reason = implementation.unavailable(setup, device)
        if reason is not None:
            skipped[name] = reason
            continue
        params, optimizer = implementation.build(setup, data)
        optimizer.step()
        allocated[name] = allocated_by(optimizer, device)
        got = first_elements(params)
        expected = got if expected is None else expected
        check_same_work(name, got, initial, expected, rtol)
        timers[name] = step_timer(optimizer)
    bar.set_postfix_str("")
    step_bytes = parameters * setup.bytes_per_parameter
    return {
        "optimizer": setup.name,
        "scenario": scenario.name,
        "tensors": len(data),
        "parameters": parameters,
        "bytes_per_parameter": setup.bytes_per_parameter,
        "allocated": allocated,
        "skipped": skipped,
        "seconds": measure(timers | memory_timers(step_bytes, device), rounds, seconds, bar),
    }


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


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to know about where the figures come from."""
    try:
        fusedopt = importlib.import_module("fusedopt")
        ours = {"fusedopt": fusedopt.__version__, "isa": fusedopt.isa()}
    except ImportError:
        ours = {}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=no") != "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **ours,
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write indented JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[([^][{}]*)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    path.write_text(text + "\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time optimizer steps: fusedopt and torch.optim, interleaved, in one run.",
        epilog="A case is one optimizer in one scenario. The full run takes about 5 minutes on two "
        "cores, and 10 GiB of memory for 1x64Mi.",
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
            default=list(choices),
            metavar="NAME",
            help=f"of {', '.join(choices)} (default: all)",
        )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of torch (default: its own choice)",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, under a minute")
    parser.add_argument("--rounds", type=int, help="at most, per case (default: 41, quick: 5)")
    parser.add_argument(
        "--seconds", type=float, help="of rounds, at most, per case (default: 20, quick: 2)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "latest.json",
        help="JSON file; the table goes beside it (default: benchmarks/results/latest.json)",
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = 5 if arguments.quick else 41
    if arguments.seconds is None:
        arguments.seconds = 2.0 if arguments.quick else 20.0
    if arguments.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: at least {MIN_ROUNDS}, got {arguments.rounds}")
    if not arguments.seconds > 0:
        parser.error(f"--seconds: more than 0, got {arguments.seconds}")
    if arguments.threads < 1:
        parser.error(f"--threads: at least 1, got {arguments.threads}")
    if arguments.output.suffix != ".json":
        parser.error(f"--output: a file name that ends in .json, got {arguments.output}")
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {arguments.output}: {error}")
    try:
        arguments.device = torch.device(arguments.device)
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    arguments.cases = [
        (OPTIMIZERS[optimizer], SCENARIOS[scenario])
        for scenario in arguments.scenario
        for optimizer in arguments.optimizer
        if scenario in (OPTIMIZERS[optimizer].scenarios or SCENARIOS)
    ]
    if not arguments.cases:
        parser.error(
            f"--optimizer {' '.join(arguments.optimizer)} does not run in "
            f"--scenario {' '.join(arguments.scenario)}"
        )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    arguments = parse_arguments(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes into the bar
    torch.set_num_threads(arguments.threads)
    implementations = [IMPLEMENTATIONS[name] for name in arguments.implementation]
    results: dict[str, Any] = {
        "provenance": provenance(arguments.device),
        "settings": {"rounds": arguments.rounds, "seconds": arguments.seconds},
        "cases": [],
    }
    with tqdm(total=arguments.rounds * len(arguments.cases), unit="round") as bar:
        for setup, scenario in arguments.cases:
            bar.set_description(f"{setup.name} {scenario.name}")
            results["cases"].append(
                run_case(
                    setup,
                    scenario,
                    implementations,
                    arguments.device,
                    arguments.rounds,
                    arguments.seconds,
                    bar,
                )
            )
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    table = markdown(results)
    write_json(arguments.output, results)
    arguments.output.with_suffix(".md").write_text(table)
    print(table)
    print(f"Written to {arguments.output} and {arguments.output.with_suffix('.md')}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
