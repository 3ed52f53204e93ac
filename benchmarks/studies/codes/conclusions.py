"""The best code by every criterion, next to the dynamic map."""

from __future__ import annotations

from statistics import fmean, geometric_mean

from benchmarks.report.case import Json
from benchmarks.studies.codes.candidates import BLOCKS
from benchmarks.studies.codes.dynamic import DYNAMIC
from benchmarks.studies.codes.results import (
    NUDGED,
    differences,
    error_of,
    names_of,
    score,
    standard_error,
    tasks,
)
from benchmarks.studies.codes.tables import percent


def conclusions(results: Json) -> list[str]:
    """The best code by every criterion, and how the dynamic map does."""
    lines = []
    for signed, state in ((True, "m"), (False, "v")):
        cheap = names_of(results, signed, cheap=True)
        for of, what in (
            ("median", "median error, stored once"),
            ("p99", "99th percentile of the error, stored once"),
            ("always", "99th percentile of the error, stored at every step"),
            ("drift", "drift, stored at every step"),
        ):
            for block in BLOCKS:
                found = {
                    name: geometric_mean(
                        max(abs(error_of(results, task, signed, name, block, of)), 1e-12)
                        for task in tasks(results)
                    )
                    for name in [*cheap, DYNAMIC]
                }
                best = min(cheap, key=lambda name: found[name])
                lines.append(
                    f"{state}, {what}, blocks of {block}: `{best}`, {percent(found[best])} "
                    f"(dynamic map {percent(found[DYNAMIC])})."
                )
    of_m, of_v = (names_of(results, signed, cheap=True) for signed in (True, False))
    for kind, how in (("once", "stored once"), ("always", "stored at every step")):
        for of, what in (("norm", "norm"), ("p99", "99th percentile over RMS")):
            for block in BLOCKS:
                error, m, v = min(
                    (score(results, m, v, block, kind, of), m, v) for m in of_m for v in of_v
                )
                dynamic = score(results, DYNAMIC, DYNAMIC, block, kind, of)
                lines.append(
                    f"Update, {what} of the error, {how}, blocks of {block}: m `{m}`, v `{v}`, "
                    f"{percent(error)} (dynamic map {percent(dynamic)})."
                )
    for task in tasks(results):
        rows = [r for r in results["training"] if r["task"] == task and r["block"]]
        nudged = next(r for r in results["training"] if r["task"] == task and r["m"] == NUDGED)
        apart = {
            f"m `{r['m']}`, v `{r['v']}`, blocks of {r['block']}": differences(results, r, "unseen")
            for r in rows
        }
        nearest = min(apart, key=lambda name: abs(fmean(apart[name])))
        farthest = max(apart, key=lambda name: abs(fmean(apart[name])))
        floor = standard_error(differences(results, nudged, "unseen"))
        lines += [
            f"{task}, loss nearest to float32's: {nearest}, {fmean(apart[nearest]):+.5f} ± "
            f"{standard_error(apart[nearest]):.5f}; farthest: {farthest}, "
            f"{fmean(apart[farthest]):+.5f} ± {standard_error(apart[farthest]):.5f}; rounding "
            f"alone: ± {floor:.5f}.",
        ]
    return lines
