"""What is read from the results: errors and losses by code, and the pairs to train with."""

from __future__ import annotations

import math
from statistics import stdev

from benchmarks.report.case import Json
from benchmarks.studies.codes.dynamic import DYNAMIC

# What stands for a code in the rows of trainings without one.
FLOAT32 = "float32"
NUDGED = "float32, weights moved by one rounding"

CHOSEN = 3  # pairs that are trained with because of their errors
# Trained with, whatever their errors: codes of m and of v.
ALSO = (
    ("tapered 4", "tapered 4, no zero, dithered"),
    ("square root", "fourth root, no zero"),
    ("square root", "minifloat 4+4, no zero"),
    ("square root", "minifloat 5+3"),
    ("square root", "square root, no zero"),
    ("square root", "square root"),
    (DYNAMIC, DYNAMIC),
    ("linear", "linear"),
)


def tasks(results: Json) -> list[str]:
    """What was trained."""
    return list(results["settings"]["steps"])


def names_of(results: Json, signed: bool, cheap: bool = False) -> list[str]:
    """The codes of m (signed) or of v, or only the cheap ones of them."""
    return [
        code["name"]
        for code in results["codes"]
        if code["signed"] == signed and (code["cheap"] or not cheap)
    ]


def error_of(results: Json, task: str, signed: bool, code: str, block: int, of: str) -> float:
    """An error of a state in a code, the mean over the snapshots."""
    state = "exp_avg" if signed else "exp_avg_sq"
    return next(
        float(row[of])
        for row in results["states"]
        if (row["task"], row["block"], row["state"], row["code"]) == (task, block, state, code)
    )


def score(
    results: Json, m: str, v: str, block: int, kind: str = "always", of: str = "norm"
) -> float:
    """The error of a pair's updates, the geometric mean over tasks and snapshots."""
    return next(
        float(row[kind][of])
        for row in results["updates"]
        if (row["block"], row["m"], row["v"]) == (block, m, v)
    )


def choose(results: Json, block: int = 256) -> list[tuple[str, str, int]]:
    """The pairs to train with.

    For each family of cheap codes of v, the pair with the smallest error of the updates when
    states are stored at every step; the best of these pairs, and those in ``ALSO``.
    """
    best: dict[str, tuple[float, str, str]] = {}
    for v in names_of(results, signed=False, cheap=True):
        of_m = names_of(results, signed=True, cheap=True)
        found = min((score(results, m, v, block), m, v) for m in of_m)
        family = v.replace(", no zero", "")
        best[family] = min(found, best.get(family, found))
    pairs = [(m, v, block) for _, m, v in sorted(best.values())[:CHOSEN]]
    return list(dict.fromkeys([*pairs, *((m, v, block) for m, v in ALSO)]))


def differences(results: Json, row: Json, key: str) -> list[float]:
    """A training's losses minus those with float32 states, by seed."""
    exact = next(
        one for one in results["training"] if one["task"] == row["task"] and one["m"] == FLOAT32
    )
    return [a - b for a, b in zip(row["losses"][key], exact["losses"][key], strict=True)]


def standard_error(values: list[float]) -> float:
    """Of their mean; NaN of a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
