"""The parts of README.md and docs that are made from results, between comments that mark them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

from benchmarks.measure.scenarios import OTHER_RULES
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
    percent,
    predicted_share,
    ratio,
    share_of_copy,
    times,
    where,
)
from benchmarks.report.tables import GPU_TIMES, absent, table, target_table, training_rows

PREDICTED = Path(__file__).parents[1] / "results" / "predicted.json"
MARKER, GPU_MARKER = "benchmark", "gpu-benchmark"
README_COLUMNS = ("torch-fused", "torch-foreach", "torch-forloop", "deepspeed-cpu", FLAT)
STORAGE_SCENARIO = "1x64Mi"
AS_GOOD = 1.02  # another's time up to so many times fusedopt's counts as no longer
NO_GPU = "The CUDA kernels have not been measured on a GPU yet, so there are no figures here.\n"
GPU_RATIOS = """\
`predicted` is the share of a copy's bandwidth that was expected from the kernel's machine code
(docs/cuda.md). The columns behind it are wall times as multiples of fusedopt's.
"""


def block(marker: str, text: str) -> str:
    """Text between the markers."""
    return f"<!-- {marker}:begin -->\n{text}<!-- {marker}:end -->"


def with_block(text: str, marker: str, new: str) -> str:
    """A text with what stands between the markers (and these) replaced; ValueError without them."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no {begin} ... {end} in it")
    return before + new + after


def show(page: Path, marker: str, text: str, *, check: bool) -> bool:
    """Write a text between a page's markers, or only look; whether it was there before."""
    old = page.read_text()
    new = with_block(old, marker, block(marker, text))
    if not check:
        page.write_text(new)
    return old == new


def measured_cases(results: Json, rules: bool | None = None) -> tuple[list[Json], list[str]]:
    """The cases that have fusedopt, and who else was measured in any. Rules: only those of rules
    beside Adam's, SGD's and RMSprop's, or only of these."""
    cases = [
        case
        for case in results["cases"]
        if OURS in case[WALL] and rules in (None, case["optimizer"] in OTHER_RULES)
    ]
    others = [name for case in cases for name in case[WALL] if name not in (OURS, COPY, FLOOR)]
    return cases, list(dict.fromkeys(others))


def summary(results: Json, columns: Iterable[str] | None = None, rules: bool = False) -> str:
    """fusedopt's times, and relative to them the others', or only those in ``columns``."""
    cases, others = measured_cases(results, rules)
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
    """The versions of other projects' packages, and which were not measured, and why."""
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
    """Steps with fewer bytes a parameter, next to the usual way to do the same work."""
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


def target_block(results: Json) -> str:
    """The table of targets."""
    return target_table(results)[0]


def scaling_block(results: Json) -> str:
    """The times of steps along each axis of the curves."""
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
    f"{MARKER}-rules": lambda results: summary(results, rules=True),
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
    device, predictions = results["provenance"]["device"], json.loads(PREDICTED.read_text())
    rows = [
        [
            case["optimizer"],
            of_what(case),
            *(duration(median(case[timed][OURS])) for timed in (DEVICE, WALL, HOST)),
            percent(share_of_copy(case, OURS)),
            percent(predicted_share(case, device, predictions)),
            *(times(ratio(case, name, OURS)) for name in others),
        ]
        for case in cases
    ]
    head = ["step of", "tensors", "on the device", "wall", "host", "of the copy", "predicted"]
    head += others
    return f"\n{table(head, rows, left=2)}\n{where(results)}.\n"
