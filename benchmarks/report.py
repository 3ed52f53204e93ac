"""Tables from a benchmark's JSON file: ``python -m benchmarks.report results.json``.

Without an option the full table is printed. A ratio is the median, over the rounds of the run, of
another implementation's time divided by fusedopt's in the same round: 2.0x says that fusedopt is
twice as fast. The floor is the time of a read-modify-write of the bytes that a step must move,
measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

COPY = "copy"
FLOOR = "read-modify-write"
OURS = "fusedopt"
FLAT = "fusedopt-flat"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

Json = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """At least how many times as fast fusedopt is than the fastest of some implementations."""

    optimizer: str
    scenario: str
    against: tuple[str, ...]
    at_least: float


TARGETS = (
    Target("AdamW", "1x64Mi", ("torch-fused",), 0.97),
    Target("AdamW", "1x64Mi", ("torch-foreach",), 4),
    Target("AdamW", "1x64Mi", ("torch-forloop",), 6),
    Target("SGD", "1x64Mi", ("torch-fused",), 0.97),
    Target("RMSprop", "1x64Mi", ("torch-foreach", "torch-forloop"), 5),
    Target("AdamW", "1000x1Ki", ("torch-fused",), 8),
    Target("AdamW-bf16", "1x64Mi", ("torch-fused",), 1.5),
)
ALLOCATED_AT_MOST = 0  # bytes, in a step after the first, in every case


def ratio(case: Json, name: str, to: str) -> float | None:
    """Median over the rounds of one time divided by another; None where one was not measured."""
    seconds: dict[str, list[float]] = case["seconds"]
    if name not in seconds or to not in seconds:
        return None
    return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def times(value: float | None) -> str:
    """A ratio as text."""
    if value is None:
        return "-"
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def percent(value: float | None) -> str:
    """A share as text."""
    return "-" if value is None else f"{100 * value:.0f}%"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> str:
    """A Markdown table whose first columns are aligned to the left and the others to the right."""
    head = list(head)
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])


def where(results: Json) -> str:
    """One line that says where and when the figures were measured."""
    source = results["provenance"]
    device = source["processor"] if source["device"] == "CPU" else source["device"]
    isa = f" ({source['isa']})" if source.get("isa") else ""
    commit = f"commit {source['commit'][:10]}" if source["commit"] else "no commit"
    dirty = " with changes" if source["commit"] and source["dirty"] else ""
    return (
        f"{device}{isa}, threads: {source['threads']} of {source['cores']}, "
        f"torch {source['torch']}, Python {source['python']}, "
        f"{source['date'][:10]}, {commit}{dirty}"
    )


def markdown(results: Json) -> str:
    """Every measured figure of a run."""
    head = (
        "optimizer tensors implementation median-ms quartiles-ms time/fusedopt "
        "of-the-floor GB/s allocated-bytes"
    )
    rows = []
    notes = []
    for case in results["cases"]:
        step_bytes = case["parameters"] * case["bytes_per_parameter"]
        for name, samples in case["seconds"].items():
            low, middle, high = quantiles(samples, n=4, method="inclusive")
            rows.append(
                [
                    case["optimizer"],
                    case["scenario"],
                    name,
                    f"{1e3 * middle:.4g}",
                    f"{1e3 * low:.4g} to {1e3 * high:.4g}",
                    times(ratio(case, name, OURS)),
                    percent(ratio(case, FLOOR, name)),
                    f"{step_bytes / middle / 1e9:.1f}",
                    f"{case['allocated'][name]:,}" if name in case["allocated"] else "-",
                ]
            )
        for name, reason in case["skipped"].items():
            notes.append(f"- {name}, {case['optimizer']}: not measured, {reason}.\n")
    rounds = [len(samples) for case in results["cases"] for samples in case["seconds"].values()]
    return (
        f"# One optimizer step\n\n{where(results)}.\n\n"
        + table([word.replace("-", " ") for word in head.split()], rows, left=3)
        + f"\nMedians of {min(rounds)} to {max(rounds)} interleaved rounds. `{COPY}` and `{FLOOR}` "
        "move the bytes that\na step must move. `time/fusedopt` is the median of the rounds' "
        "ratios, `of the floor` that of\nthe read-modify-write's time to the step's. "
        "`allocated bytes`: by torch's allocators during one\nstep after the first.\n\n"
        + "".join(dict.fromkeys(notes))
    )


def targets(results: Json) -> tuple[str, bool]:
    """The table of targets, and whether all are met."""
    cases = {(case["optimizer"], case["scenario"]): case for case in results["cases"]}
    rows = []
    met = []
    for target in TARGETS:
        case = cases.get((target.optimizer, target.scenario), {"seconds": {}})
        ratios = [ratio(case, name, OURS) for name in target.against]
        measured = min((value for value in ratios if value is not None), default=None)
        met.append(measured is not None and measured >= target.at_least)
        what = f"{target.optimizer} {target.scenario} vs {' / '.join(target.against)}"
        rows.append([what, times(measured), f"at least {target.at_least:g}x"])
    allocated = [
        count
        for case in results["cases"]
        for name, count in case["allocated"].items()
        if name in (OURS, FLAT)
    ]
    met.append(bool(allocated) and max(allocated) <= ALLOCATED_AT_MOST)
    rows.append(
        [
            f"allocated during a step after the first, {OURS} and {FLAT}, all cases",
            f"{max(allocated):,} bytes" if allocated else "-",
            f"at most {ALLOCATED_AT_MOST} bytes",
        ]
    )
    rows = [[*row, "yes" if good else "NO"] for row, good in zip(rows, met, strict=True)]
    return table(["target", "measured", "required", "met"], rows, left=1), all(met)


def readme_block(results: Json) -> str:
    """README's summary: fusedopt's time, and the others' relative to it."""
    others = list(
        dict.fromkeys(
            name
            for case in results["cases"]
            for name in case["seconds"]
            if name not in (OURS, COPY, FLOOR)
        )
    )
    rows = [
        [
            case["optimizer"],
            case["scenario"],
            f"{1e3 * median(case['seconds'][OURS]):.3g} ms",
            percent(ratio(case, FLOOR, OURS)),
            *(times(ratio(case, name, OURS)) for name in others),
        ]
        for case in results["cases"]
        if OURS in case["seconds"]
    ]
    return (
        f"{BEGIN}\n"
        + table(["step of", "tensors", OURS, "of the floor", *others], rows, left=2)
        + f"\n{where(results)}.\n{END}"
    )


def with_block(text: str, block: str) -> str:
    """A text with what stands between the markers (and these) replaced; ValueError without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} ... {END} in it")
    return before + block + after


def main(argv: list[str] | None = None) -> int:
    """Print or write a table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file of benchmarks.run")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--targets", action="store_true", help="print the targets; exit status 1 if one is missed"
    )
    action.add_argument("--readme", action="store_true", help="write the summary into README.md")
    action.add_argument(
        "--check", action="store_true", help="exit status 1 if README.md has another summary"
    )
    parser.add_argument("--readme-file", type=Path, default=README, help="instead of README.md")
    arguments = parser.parse_args(argv)
    try:
        results = json.loads(arguments.results.read_text())
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"{arguments.results}: {error}")
    if arguments.targets:
        text, met = targets(results)
        print(text)
        return 0 if met else 1
    if not (arguments.readme or arguments.check):
        print(markdown(results))
        return 0
    try:
        old = arguments.readme_file.read_text()
        new = with_block(old, readme_block(results))
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.readme_file}: {error}")
    if arguments.readme:
        arguments.readme_file.write_text(new)
    elif old != new:
        print(
            f"{arguments.readme_file} does not show {arguments.results}; run "
            f"python -m benchmarks.report {arguments.results} --readme",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
