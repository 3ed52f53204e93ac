"""Tables from benchmarks' JSON files: ``python -m benchmarks.report results.json``.

Without an option the full table is printed. A ratio is the median, over the rounds of the run, of
another implementation's time divided by fusedopt's in the same round: 2.0x says that fusedopt is
twice as fast. The floor is the time of a read-modify-write of the bytes that a step must move,
measured in the same rounds.

With ``--gpu``, the summary is that of runs on GPUs, for docs/performance.md: of all files given,
and without any it says that no GPU has been measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles

from benchmarks.case import (
    COPY,
    DEVICE,
    FLOOR,
    HOST,
    OURS,
    WALL,
    Json,
    duration,
    of_what,
    on_gpu,
    percent,
    ratio,
    share_of_copy,
    times,
)
from benchmarks.targets import target_rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
MARKER, GPU_MARKER = "benchmark", "gpu-benchmark"

NO_GPU = "The CUDA kernels have not been measured on a GPU yet, so there are no figures here.\n"
GPU_TIMES = """\
Three times of a step. On the device: between CUDA events, with the device kept waiting until the
host has enqueued what is timed. Wall: in a row of steps, until the device is done. Host: until the
call returns. `of the copy` is the bytes that a step must move over its time on the device, as a
share of what a copy of as many bytes reaches (of 8 GiB where they are more), timed in the same
rounds. `-graph` is a replay of a CUDA graph. `AdamW-pipeline` is all that follows a backward pass
of a scaled loss, one call at a time: a GradScaler's unscaling, clipping by the norm, the step, the
scaler's update, and `zero_grad()`.
"""
GPU_RATIOS = """\
The columns behind `of the copy` are wall times as multiples of fusedopt's.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> str:
    """A Markdown table whose first columns are aligned to the left and the others to the right."""
    head = list(head)
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])


def where(results: Json) -> str:
    """One line that says where and when the figures were measured."""
    source = results["provenance"]
    commit = f"commit {source['commit'][:10]}" if source["commit"] else "no commit"
    dirty = " with changes" if source["commit"] and source["dirty"] else ""
    when = f"Python {source['python']}, {source['date'][:10]}, {commit}{dirty}"
    if on_gpu(results):
        return (
            f"{source['device']}, a copy: {source['copy_bandwidth'] / 1e12:.2f} TB/s, "
            f"driver {source['driver']}, CUDA {source['cuda']}, torch {source['torch']}, {when}"
        )
    isa = f" ({source['isa']})" if source.get("isa") else ""
    return (
        f"{source['processor']}{isa}, threads: {source['threads']} of {source['cores']}, "
        f"torch {source['torch']}, {when}"
    )


def quartiles(seconds: list[float]) -> str:
    """The middle half, in milliseconds."""
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return f"{1e3 * low:.4g} to {1e3 * high:.4g}"


def milliseconds(seconds: list[float]) -> str:
    """The median."""
    return f"{1e3 * median(seconds):.4g}"


def cpu_row(case: Json, name: str) -> list[str]:
    """The figures of an implementation."""
    seconds = case[WALL][name]
    step_bytes = case["parameters"] * case["bytes_per_parameter"]
    return [
        milliseconds(seconds),
        quartiles(seconds),
        times(ratio(case, name, OURS)),
        percent(ratio(case, FLOOR, name)),
        f"{step_bytes / median(seconds) / 1e9:.1f}",
    ]


def gpu_row(case: Json, name: str) -> list[str]:
    """The figures of an implementation; those of the copies are of the bytes that they move."""
    step_bytes = case["parameters"] * case["bytes_per_parameter"]
    moved = case["memory_bytes"] if name in (COPY, FLOOR) else step_bytes
    return [
        milliseconds(case[DEVICE][name]),
        quartiles(case[DEVICE][name]),
        milliseconds(case[WALL][name]),
        quartiles(case[WALL][name]),
        milliseconds(case[HOST][name]),
        times(ratio(case, name, OURS, DEVICE)),
        times(ratio(case, name, OURS)),
        "-" if name in (COPY, FLOOR) else percent(share_of_copy(case, name)),
        f"{moved / median(case[DEVICE][name]) / 1e9:.1f}",
    ]


CPU_HEAD = ("median ms", "quartiles ms", "time/fusedopt", "of the floor", "GB/s")
GPU_HEAD = (
    *("device ms", "quartiles ms", "wall ms", "quartiles ms", "host ms"),
    *("device/fusedopt", "wall/fusedopt", "of the copy", "GB/s"),
)


def markdown(results: Json) -> str:
    """Every measured figure of a run."""
    gpu = on_gpu(results)
    rows = []
    notes = [f"- {name}: not measured, {reason}.\n" for name, reason in absent(results).items()]
    for case in results["cases"]:
        for name in case[WALL]:
            allocated = f"{case['allocated'][name]:,}" if name in case["allocated"] else "-"
            figures = gpu_row(case, name) if gpu else cpu_row(case, name)
            rows.append([case["optimizer"], of_what(case), name, *figures, allocated])
        for name, reason in case["skipped"].items():
            notes.append(f"- {name}, {case['optimizer']}: not measured, {reason}.\n")
    notes += [f"- FAILED: {failure}.\n" for failure in results.get("failures", ())]
    head = ["optimizer", "tensors", "implementation", *(GPU_HEAD if gpu else CPU_HEAD)]
    rounds = [len(taken) for case in results["cases"] for taken in case[WALL].values()] or [0]
    meaning = (
        GPU_TIMES
        if gpu
        else f"`{COPY}` and `{FLOOR}` move the bytes that\na step must move. `time/fusedopt` is "
        "the median of the rounds' ratios, `of the floor` that of\nthe read-modify-write's time to "
        "the step's. "
    )
    return (
        f"# One optimizer step\n\n{where(results)}.\n\n"
        + table([*head, "allocated bytes"], rows, left=3)
        + f"\nMedians of {min(rounds)} to {max(rounds)} interleaved rounds. {meaning}"
        + "`allocated bytes`: by torch's allocators during one\nstep after the first.\n\n"
        + "".join(dict.fromkeys(notes))
    )


def absent(results: Json) -> dict[str, str]:
    """Why implementations could not be imported, by name."""
    found: dict[str, str] = results.get("absent", {})
    return found


def targets(results: Json) -> tuple[str, bool]:
    """The table of targets, and whether all are met."""
    rows = target_rows(results)
    shown = [[*cells, "yes" if met else "NO"] for cells, met in rows]
    head = ["target", "measured", "required", "met"]
    return table(head, shown, left=1), all(met for _, met in rows)


def measured_cases(results: Json) -> tuple[list[Json], list[str]]:
    """The cases that have fusedopt, and who else was measured in any."""
    others = [
        name for case in results["cases"] for name in case[WALL] if name not in (OURS, COPY, FLOOR)
    ]
    return [case for case in results["cases"] if OURS in case[WALL]], list(dict.fromkeys(others))


def block(marker: str, text: str) -> str:
    """Text between the markers."""
    return f"<!-- {marker}:begin -->\n{text}<!-- {marker}:end -->"


def readme_block(results: Json) -> str:
    """README's summary: fusedopt's time, and the others' relative to it."""
    cases, others = measured_cases(results)
    rows = [
        [
            case["optimizer"],
            case["scenario"],
            f"{1e3 * median(case[WALL][OURS]):.3g} ms",
            percent(ratio(case, FLOOR, OURS)),
            *(times(ratio(case, name, OURS)) for name in others),
        ]
        for case in cases
    ]
    head = ["step of", "tensors", OURS, "of the floor", *others]
    return block(MARKER, f"{table(head, rows, left=2)}\n{where(results)}.\n")


def gpu_block(runs: list[Json]) -> str:
    """The summary of runs on GPUs, a table for each."""
    if not runs:
        return block(GPU_MARKER, NO_GPU)
    return block(GPU_MARKER, GPU_TIMES + GPU_RATIOS + "".join(map(gpu_summary, runs)))


def gpu_summary(results: Json) -> str:
    """One GPU's table: fusedopt's times, and the others' relative to them."""
    cases, others = measured_cases(results)
    rows = [
        [
            case["optimizer"],
            of_what(case),
            *(duration(median(case[timed][OURS])) for timed in (DEVICE, WALL, HOST)),
            percent(share_of_copy(case, OURS)),
            *(times(ratio(case, name, OURS)) for name in others),
        ]
        for case in cases
    ]
    head = ["step of", "tensors", "on the device", "wall", "host", "of the copy", *others]
    return f"\n{table(head, rows, left=2)}\n{where(results)}.\n"


def with_block(text: str, marker: str, new: str) -> str:
    """A text with what stands between the markers (and these) replaced; ValueError without them."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no {begin} ... {end} in it")
    return before + new + after


def main(argv: list[str] | None = None) -> int:
    """Print or write a table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of benchmarks.run")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--targets", action="store_true", help="print the targets; exit status 1 if one is missed"
    )
    action.add_argument("--readme", action="store_true", help="write the summary into README.md")
    action.add_argument(
        "--check", action="store_true", help="exit status 1 if README.md has another summary"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="with --readme and --check: the summary of GPUs"
    )
    parser.add_argument(
        "--readme-file", type=Path, help="instead of README.md (with --gpu: docs/performance.md)"
    )
    arguments = parser.parse_args(argv)
    if len(arguments.results) != 1 and not arguments.gpu:
        parser.error(f"one file of results, got {len(arguments.results)}")
    if arguments.gpu and not (arguments.readme or arguments.check):
        parser.error("--gpu goes with --readme or --check")
    runs = []
    for path in arguments.results:
        try:
            runs.append(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"{path}: {error}")
    if arguments.targets:
        text, met = targets(runs[0])
        print(text)
        return 0 if met else 1
    if not (arguments.readme or arguments.check):
        print(markdown(runs[0]))
        return 0
    for path, run in zip(arguments.results, runs, strict=True):
        if on_gpu(run) != arguments.gpu:
            parser.error(f"{path}: measured on {run['provenance']['device']}; see --gpu")
    readme = arguments.readme_file or (PERFORMANCE if arguments.gpu else README)
    marker = GPU_MARKER if arguments.gpu else MARKER
    new = gpu_block(runs) if arguments.gpu else readme_block(runs[0])
    try:
        old = readme.read_text()
        wanted = with_block(old, marker, new)
    except (OSError, ValueError) as error:
        parser.error(f"{readme}: {error}")
    if arguments.readme:
        readme.write_text(wanted)
    elif old != wanted:
        names = " ".join(map(str, arguments.results)) or "that there are no results"
        print(
            f"{readme} does not show {names}; run python -m benchmarks.report --readme with the "
            "same arguments",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
