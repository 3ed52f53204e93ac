"""What became slower between two runs: ``python -m benchmarks.report new.json --compare old.json``.

Machines differ in speed, and so does one machine from hour to hour. So each time is taken as a
multiple of the read-modify-write's in the same round, and two runs count as different only where
the middle halves of their rounds do not overlap. A target that the earlier run met may not be lost
either, by more than chance.
"""

from __future__ import annotations

from statistics import median, quantiles

from benchmarks.report.case import (
    DEVICE,
    FLAT,
    FLOOR,
    GRAPH,
    OURS,
    WALL,
    Json,
    of_what,
    on_gpu,
    samples,
    times,
)
from benchmarks.report.targets import targets_of

SLOWER = 1.05  # a median that counts as slower is more than so many times the other
LEAST_ROUNDS = 11  # with fewer, the middle halves of two runs lie apart by chance too often
ALIKE = ("processor", "device", "isa", "threads", "torch")  # what two runs should have in common


def multiples(case: Json, name: str) -> list[float] | None:
    """The time of each round as a multiple of the floor's; None where one was not measured."""
    timed = DEVICE if DEVICE in case else WALL
    step, floor = samples(case, name, timed), samples(case, FLOOR, timed)
    if step is None or floor is None:
        return None
    return [a / b for a, b in zip(step, floor, strict=True)]


def is_slower(old: list[float], new: list[float]) -> bool:
    """Whether the new median is higher by more than chance: the middle halves do not overlap."""
    apart = quantiles(new, method="inclusive")[0] > quantiles(old, method="inclusive")[2]
    return apart and median(new) > SLOWER * median(old)


def lost_targets(old: Json, new: Json) -> list[str]:
    """Those that the earlier run met and this one misses, in three quarters of its rounds."""
    if on_gpu(old) != on_gpu(new):
        return []
    lost = []
    for (target, before), (_, now) in zip(targets_of(old), targets_of(new), strict=True):
        was, figures = target.figures(before), target.figures(now)
        if was is None or figures is None or len(figures) < LEAST_ROUNDS:
            continue
        low, _, high = quantiles(figures, method="inclusive")
        if target.meets(median(was)) and not (target.meets(low) or target.meets(high)):
            lost.append(
                f"TARGET LOST: {target.title(now)}: {target.shown(median(was))} before, "
                f"{target.shown(median(figures))} now, {target.required()}"
            )
    return lost


def comparison(old: Json, new: Json) -> tuple[str, bool]:
    """A line for each case that both runs have, and for each target lost; whether any became slower
    or was lost."""
    before = {(case["optimizer"], of_what(case)): case for case in old["cases"]}
    lines = [
        f"These runs differ in {key}: {old['provenance'].get(key)} before, "
        f"{new['provenance'].get(key)} now."
        for key in ALIKE
        if old["provenance"].get(key) != new["provenance"].get(key)
    ]
    compared = 0
    regressed = False
    for case in new["cases"]:
        earlier = before.get((case["optimizer"], of_what(case)), {})
        for name in (OURS, FLAT, GRAPH):
            was, now = multiples(earlier, name), multiples(case, name)
            if was is None or now is None:
                continue
            compared += 1
            if min(len(was), len(now)) < LEAST_ROUNDS:
                rounds = f"{len(was)} and {len(now)} rounds"
                lines.append(f"{case['optimizer']} {of_what(case)} {name}: {rounds} are too few")
                continue
            slower, change = is_slower(was, now), median(now) / median(was)
            regressed = regressed or slower
            verdict = "SLOWER" if slower else "faster" if is_slower(now, was) else "the same"
            lines.append(
                f"{case['optimizer']} {of_what(case)} {name}: {times(median(was))} of the floor "
                f"before, {times(median(now))} now, x{change:.2f}: {verdict}"
            )
    lost = lost_targets(old, new)
    lines += lost
    if compared == 0:
        lines.append("The two runs have no case in common.")
    return "\n".join(lines), regressed or bool(lost)
