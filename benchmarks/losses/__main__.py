"""Forward and backward pass of losses: ``python -m benchmarks.losses``.

    python -m benchmarks.losses                  measures and writes everything
    python -m benchmarks.losses --tables         only writes tables and plot again
    python -m benchmarks.losses --only "cross_entropy 8x10"    measures this again

Each case is measured in processes of its own, one for each way in which they get their memory:
fresh, as glibc does it by default, and reused, which favours whoever needs a lot of it. All
implementations take turns in each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.losses.cases import CASES, QUICK, SETTINGS
from benchmarks.losses.tables import draw, short_table, tables
from benchmarks.losses.training import MODELS
from benchmarks.measure.provenance import provenance
from benchmarks.report.case import Json
from benchmarks.report.files import write_json
from benchmarks.report.pages import show

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "losses.json"
QUICK_RESULTS = RESULTS.with_name("latest-losses.json")
PAGE = ROOT / "docs" / "losses.md"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "images" / "losses.png"
MARKER, SHORT_MARKER = "losses", "losses-short"
ROUNDS, SECONDS = 31, 10.0  # at most, per case and setting
QUICK_ROUNDS, QUICK_SECONDS = 5, 2.0


def measure_in_child(name: str, environment: dict[str, str], arguments: list[str]) -> Json:
    """What a process of its own measures of a case or of a model's training."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "measured.json")
        command = [sys.executable, "-m", "benchmarks.losses.child", name, *arguments]
        subprocess.run(
            [*command, "--output", str(output)],
            cwd=ROOT,
            env={**os.environ, **environment},
            check=True,
        )
        found: Json = json.loads(output.read_text())
        return found


def study(names: list[str], device: torch.device, arguments: list[str]) -> Json:
    """Measure these cases and models."""
    results: Json = {"provenance": provenance(device, []), "cases": [], "training": []}
    for name in names:
        settings = {
            setting: measure_in_child(name, environment, arguments)
            for setting, environment in SETTINGS[device.type].items()
        }
        if name in CASES:
            case = CASES[name]
            results["cases"].append(
                {
                    "name": name,
                    "loss": case.loss,
                    "size": case.size,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "bytes": case.bytes,
                    "settings": settings,
                }
            )
        else:
            model = MODELS[name]
            results["training"].append({"name": name, "batch": model.batch, "settings": settings})
    return results


def updated(old: Json, new: Json) -> Json:
    """Old results with those in place of them that were measured again, which say so."""
    again = {key: new["provenance"][key] for key in ("commit", "date")}
    result = dict(old)
    for part, order in (("cases", list(CASES)), ("training", list(MODELS))):
        found = {case["name"]: case for case in old[part]}
        found |= {case["name"]: {**case, "again": again} for case in new[part]}
        result[part] = sorted(found.values(), key=lambda case: order.index(case["name"]))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or only write or check its tables; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write tables and plot again")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a table is old")
    parser.add_argument("--quick", action="store_true", help="a few cases, to a file of their own")
    parser.add_argument(
        "--only",
        action="append",
        choices=(*CASES, *MODELS),
        metavar="CASE",
        help=f"measured again, in place of what the file has of it: {', '.join((*CASES, *MODELS))}",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, help=f"at most (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"of rounds, at most (default: {SECONDS:g})")
    options = parser.parse_args(arguments)
    apart = options.quick or options.device.type != "cpu"
    output = options.output or (QUICK_RESULTS if apart else RESULTS)
    if not (options.tables or options.check):
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
        seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
        of_child = ["--rounds", str(rounds), "--seconds", str(seconds)]
        of_child += ["--device", str(options.device), *(["--quick"] if options.quick else [])]
        on_cpu = options.device.type == "cpu"
        all_names = list(QUICK) if options.quick else [*CASES, *(MODELS if on_cpu else ())]
        made = study(options.only or all_names, options.device, of_child)
        if options.only and output.exists():
            made = updated(json.loads(output.read_text()), made)
        write_json(output, made)
    results = json.loads(output.read_text())
    if output != RESULTS:
        print(tables(results))
        return 0
    shown = [
        show(PAGE, MARKER, tables(results), check=options.check),
        show(README, SHORT_MARKER, short_table(results), check=options.check),
    ]
    if options.check:
        return int(not all(shown))
    draw(results, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
