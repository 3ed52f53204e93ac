"""The tables of the study: errors of states and of updates, and losses of trainings."""

from __future__ import annotations

import math
from statistics import fmean, stdev

from benchmarks.report.case import Json
from benchmarks.report.tables import table
from benchmarks.studies.codes.candidates import BLOCKS
from benchmarks.studies.codes.results import (
    FLOAT32,
    NUDGED,
    differences,
    error_of,
    names_of,
    score,
    standard_error,
    tasks,
)

ERROR_COLUMNS = ("median", "p99", "zeroed", "always", "drift")


def error_rows(results: Json) -> list[list[str]]:
    return [
        [
            "m" if code["signed"] else "v",
            code["name"],
            str(block),
            *(
                percent(error_of(results, task, code["signed"], code["name"], block, of))
                for task in tasks(results)
                for of in ERROR_COLUMNS
            ),
        ]
        for code in results["codes"]
        for block in BLOCKS
    ]


def percent(share: float) -> str:
    """With three digits, large ones as a factor; 0% is exactly zero."""
    return "0%" if share == 0 else f"{100 * share:.3g}%" if abs(share) < 10 else f"{share:.2g}x"


def update_table(results: Json, block: int) -> str:
    """Rows are codes of v, columns codes of m."""
    of_m = names_of(results, True)
    return table(
        ("v \\ m", *of_m),
        (
            [v]
            + [
                f"{percent(score(results, m, v, block))}, "
                f"{percent(score(results, m, v, block, 'once'))}"
                for m in of_m
            ]
            for v in names_of(results, False)
        ),
        left=1,
    )


def training_rows(results: Json) -> list[list[str]]:
    rows = []
    for row in results["training"]:
        cells = []
        for key in ("unseen", "train"):
            losses = row["losses"][key]
            spread = stdev(losses) if len(losses) > 1 else math.nan
            apart = differences(results, row, key)
            cells += [
                f"{fmean(losses):.4f} ± {spread:.4f}",
                "" if row["m"] == FLOAT32 else f"{fmean(apart):+.5f} ± {standard_error(apart):.5f}",
            ]
        block = str(row["block"] or "-")
        rows.append([row["task"], row["m"], "" if row["m"] == NUDGED else row["v"], block, *cells])
    return rows
