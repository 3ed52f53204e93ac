"""Measure optimizer steps: ``python -m benchmarks.run``.

Implementations of one optimizer in one scenario are timed interleaved: every round takes one sample
of each, so that all of them see the same drift of the machine, and ratios are taken per round. Two
plain passes over memory that move as many bytes as one step are timed in the same rounds: a copy,
and a read-modify-write, whose time is the floor. The results go to a JSON file with all samples,
as a Markdown table to standard output and to a file beside the JSON, and as plots to a folder.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.cases import Run
from benchmarks.measure.end_to_end import measure_training
from benchmarks.measure.implementations import IMPLEMENTATIONS
from benchmarks.measure.progress import Progress
from benchmarks.measure.provenance import provenance
from benchmarks.measure.scenarios import (
    OPTIMIZERS,
    SCALING,
    SCALING_IMPLEMENTATIONS,
    SCENARIOS,
    SUITES,
    choose_cases,
    find_scenario,
)
from benchmarks.report.compare import comparison
from benchmarks.report.files import write_json
from benchmarks.report.tables import markdown, memory_table

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 41, 5
SECONDS = {"cpu": 20.0, "cuda": 8.0}
QUICK_SECONDS = 2.0
SCALING_SECONDS = 4.0  # of rounds, at most, for each point of a curve
IMPORTS = 5  # processes that import fusedopt to time it


def seconds_to_import() -> list[float]:
    """What `import fusedopt` takes after `import torch`, in several new processes.

    It has been imported before, so that Python has its bytecode.
    """
    code = (
        "import torch, time; start = time.perf_counter(); import fusedopt; "
        "print(time.perf_counter() - start)"
    )
    root = RESULTS.parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        environment["PYTHONPYCACHEPREFIX"] = folder
        seconds = [
            float(subprocess.check_output([sys.executable, "-c", code], cwd=root, env=environment))
            for _ in range(1 + IMPORTS)
        ]
    return seconds[1:]


def updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results with what the new run measured in its place, with its own provenance."""
    cases = {(case["optimizer"], case["scenario"]): case for case in new["cases"]}
    for case in cases.values():
        case["provenance"] = new["provenance"]
    kept = [cases.pop((case["optimizer"], case["scenario"]), case) for case in old["cases"]]
    parts = [part for part in ("scaling", "training", "import_seconds") if part in new]
    again = {**old.get("again", {}), **dict.fromkeys(parts, new["provenance"])}
    others = {part: new[part] for part in parts} | ({"again": again} if again else {})
    return {**old, **others, "cases": [*kept, *cases.values()]}


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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked, with the cases and the implementations chosen."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time optimizer steps: fusedopt, torch.optim and what else is installed, "
        "interleaved, in one run.",
        epilog="A case is one optimizer in one scenario. Without --optimizer and --scenario a "
        "suite of cases is run, another one on GPUs than on CPUs: "
        f"{describe_suite('cpu')}; on GPUs {describe_suite('cuda')}. The CPU's takes about 25 "
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
        help="keep what is in the output file, but for what this run measures anew",
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
    # A quick run leaves compiling out, which takes longer than all the rest of it.
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
