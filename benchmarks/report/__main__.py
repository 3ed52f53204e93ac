"""Tables from benchmarks' JSON files: ``python -m benchmarks.report results.json``.

Without an option the full table is printed. A ratio is the median, over the rounds of the run, of
another implementation's time divided by fusedopt's in the same round: 2.0x says that fusedopt is
twice as fast. The floor is the time of a read-modify-write of the bytes that a step must move,
measured in the same rounds.

``--readme`` writes all tables for which a file has a place, between comments; ``--check`` tells
whether they are the results'.

With ``--gpu``, the summary is that of runs on GPUs, for docs/performance.md: of all files given,
and without any it says that no GPU has been measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles

from benchmarks.measure.end_to_end import training_rows
from benchmarks.report.case import (
    COPY,
    DEVICE,
    FLAT,
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
from benchmarks.report.compare import comparison
from benchmarks.report.targets import target_rows

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
MARKER, GPU_MARKER = "benchmark", "gpu-benchmark"
README_COLUMNS = ("torch-fused", "torch-foreach", "torch-forloop", "deepspeed-cpu", FLAT)
STORAGE_SCENARIO = "1x64Mi"
AS_GOOD = 1.02  # times that are no further apart count as the same

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
    later: dict[str, list[str]] = {}
    for case in results["cases"]:
        if case.get("provenance"):
            name = f"{case['optimizer']} {of_what(case)}"
            later.setdefault(str(case["provenance"]["commit"])[:10], []).append(name)
    again = "".join(
        f"; measured again at commit {commit_of}: {', '.join(names)}"
        for commit_of, names in later.items()
    )
    return (
        f"{source['processor']}{isa}, threads: {source['threads']} of {source['cores']}, "
        f"torch {source['torch']}, {when}{again}"
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
            figures = gpu_row(case, name) if gpu else cpu_row(case, name)
            memory = memory_cells(case, name)
            rows.append([case["optimizer"], of_what(case), name, *figures, *memory])
        for name, reason in case["skipped"].items():
            notes.append(f"- {name}, {case['optimizer']}: not measured, {reason}.\n")
    notes += [f"- Left out: {reason}.\n" for reason in results.get("left_out", ())]
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
        + table([*head, "allocated bytes", "peak bytes/parameter"], rows, left=3)
        + f"\nMedians of {min(rounds)} to {max(rounds)} interleaved rounds. {meaning}"
        + "`allocated bytes`: by torch's allocators during one\nstep after the first; "
        + "`peak bytes/parameter`: the most of them in use at once until the first\nstep was done, "
        + "from nothing on: parameters, gradients, states and whatever else.\n\n"
        + "".join(dict.fromkeys(notes))
    )


def memory_cells(case: Json, name: str) -> list[str]:
    """What an implementation's step allocates, and its peak per parameter."""
    allocated = case["allocated"].get(name)
    peak = case.get("peak", {}).get(name)
    return [
        "-" if allocated is None else f"{allocated:,}",
        "-" if peak is None else f"{peak / case['parameters']:.1f}",
    ]


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
    cases = [case for case in results["cases"] if OURS in case[WALL]]
    others = [name for case in cases for name in case[WALL] if name not in (OURS, COPY, FLOOR)]
    return cases, list(dict.fromkeys(others))


def block(marker: str, text: str) -> str:
    """Text between the markers."""
    return f"<!-- {marker}:begin -->\n{text}<!-- {marker}:end -->"


def summary(results: Json, columns: Iterable[str] | None = None) -> str:
    """fusedopt's times, and those of the others, or of some, relative to it."""
    cases, others = measured_cases(results)
    if columns is not None:
        others = [name for name in columns if name in others]
    rows = [
        [
            case["optimizer"],
            of_what(case),
            duration(median(case[WALL][OURS])),
            percent(ratio(case, FLOOR, OURS)),
            *(times(ratio(case, name, OURS)) for name in others),
        ]
        for case in cases
    ]
    head = ["step of", "tensors", OURS, "of the floor", *others]
    return f"{table(head, rows, left=2)}\n{where(results)}.\n"


def peers(results: Json) -> str:
    """The versions of other projects' packages, and who was not measured, for which reason."""
    versions = results["provenance"].get("peers", {})
    lines = [f"- {name} {version}\n" for name, version in versions.items()]
    lines += [f"- {name}: not measured, {reason}.\n" for name, reason in absent(results).items()]
    return "".join(lines) or "Nothing but torch was measured.\n"


def as_good_or_better(results: Json) -> str:
    """Where another implementation takes no longer than fusedopt."""
    cases, others = measured_cases(results)
    found = [
        f"- {case['optimizer']} {of_what(case)}: {name} takes {times(ratio(case, name, OURS))} of "
        "fusedopt's time.\n"
        for case in cases
        for name in others
        if not name.startswith(OURS) and (ratio(case, name, OURS) or AS_GOOD) < AS_GOOD
    ]
    return "".join(found) or "In no case of this run.\n"


def storage_block(results: Json) -> str:
    """Steps with fewer bytes a parameter, next to those that do the same work in the usual way."""
    usual = {"AdamW": "torch-fused", "AdamW-master": "torch-fused-copies"}
    rows = [
        [
            case["optimizer"],
            of_what(case),
            name,
            f"{case['peak'][name] / case['parameters']:.1f}",
            duration(median(case[WALL][name])),
            times(ratio(case, usual[case["optimizer"]], name)),
        ]
        for case in results["cases"]
        if case["scenario"] == STORAGE_SCENARIO and case["optimizer"] in usual
        for name in case[WALL]
        if name not in (COPY, FLOOR)
    ]
    head = ["step of", "tensors", "implementation", "peak bytes/parameter", "median"]
    return table([*head, "times as fast as usual"], rows, left=3)


def memory_table(results: Json) -> str:
    """The peaks of memory of all cases and implementations."""
    rows = [
        [case["optimizer"], of_what(case), name, f"{peak:,}", f"{peak / case['parameters']:.2f}"]
        for case in results["cases"]
        for name, peak in case["peak"].items()
    ]
    return table(["optimizer", "tensors", "implementation", "peak", "per parameter"], rows, left=3)


def target_block(results: Json) -> str:
    """What was to be reached, and whether it was."""
    return targets(results)[0]


def scaling_block(results: Json) -> str:
    """Times along each axis."""
    cases: list[Json] = results.get("scaling", [])
    names = list(dict.fromkeys(n for case in cases for n in case[WALL] if n not in (COPY, FLOOR)))
    rows = [
        [
            case["axis"],
            of_what(case),
            *(duration(median(case[WALL][n])) if n in case[WALL] else "-" for n in (*names, FLOOR)),
        ]
        for case in cases
    ]
    return table(["axis", "tensors", *names, FLOOR], rows, left=2)


def training_block(results: Json) -> str:
    """Whole iterations of training."""
    head, rows = training_rows(results.get("training", []))
    return table(head, rows, left=1)


# What a page can have a place for, by the name of the comments around it.
BLOCKS: dict[str, Callable[[Json], str]] = {
    MARKER: summary,
    f"{MARKER}-short": lambda results: summary(results, README_COLUMNS),
    f"{MARKER}-peers": peers,
    f"{MARKER}-better": as_good_or_better,
    f"{MARKER}-storage": storage_block,
    f"{MARKER}-targets": target_block,
    f"{MARKER}-scaling": scaling_block,
    f"{MARKER}-training": training_block,
}


def with_blocks(text: str, results: Json) -> str:
    """A page with all its places filled; ValueError where it has none."""
    found = [marker for marker in BLOCKS if f"<!-- {marker}:begin -->" in text]
    if not found:
        raise ValueError(f"no <!-- {MARKER}:begin --> ... <!-- {MARKER}:end --> in it")
    for marker in found:
        text = with_block(text, marker, block(marker, BLOCKS[marker](results)))
    return text


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
    action.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="tell where fusedopt is slower than in this earlier run; exit status 1 if it is",
    )
    action.add_argument("--plots", type=Path, metavar="FOLDER", help="draw them into this folder")
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
    for path in [*arguments.results, *filter(None, [arguments.compare])]:
        try:
            runs.append(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            parser.error(f"{path}: {error}")
    if arguments.targets:
        text, met = targets(runs[0])
        print(text)
        return 0 if met else 1
    if arguments.compare:
        text, slower = comparison(runs[1], runs[0])
        print(text)
        return 1 if slower else 0
    if arguments.plots:
        from benchmarks.report.plots import (
            draw_all,  # needs matplotlib, which nothing else here does
        )

        draw_all(runs[0], arguments.plots)
        return 0
    if not (arguments.readme or arguments.check):
        print(markdown(runs[0]))
        return 0
    for path, run in zip(arguments.results, runs, strict=True):
        if on_gpu(run) != arguments.gpu:
            parser.error(f"{path}: measured on {run['provenance']['device']}; see --gpu")
    readme = arguments.readme_file or (PERFORMANCE if arguments.gpu else README)
    try:
        old = readme.read_text()
        if arguments.gpu:
            wanted = with_block(old, GPU_MARKER, gpu_block(runs))
        else:
            wanted = with_blocks(old, runs[0])
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
