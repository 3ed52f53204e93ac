"""The errors of states in a code, and of the updates made of them, during a float32 training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.batch import cross_entropy
from benchmarks.report.case import Json
from benchmarks.studies.codes.adamw import AdamW, Moments, gradients, update_of
from benchmarks.studies.codes.candidates import BLOCKS, SIGNED, UNSIGNED
from benchmarks.studies.trainings import DECAYS, model_and_data, note, rate_at


def errors_of(x: Tensor, decoded: Tensor) -> Json:
    """Relative errors of numbers that are not zero, and the share of them that became zero.

    The drift is the median of the errors with their signs.
    """
    kept = x != 0
    x, decoded = x[kept], decoded[kept]
    signed = (decoded - x).double() / x.double()
    median, p99 = signed.abs().quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {
        "median": median,
        "p99": p99,
        "drift": signed.median().item(),
        "zeroed": (decoded == 0).double().mean().item(),
    }


def errors_of_update(u: Tensor, exact: Tensor) -> Json:
    """The norm of the error over that of the update, and its 99th percentile over the RMS."""
    difference = (u - exact).double()
    exact = exact.double()
    p99 = difference.abs().kthvalue(math.ceil(0.99 * len(exact))).values
    return {
        "norm": (difference.norm() / exact.norm()).item(),
        "p99": (p99 / exact.square().mean().sqrt()).item(),
    }


def observe(task: str, snapshots: tuple[int, ...]) -> tuple[list[Json], list[Json]]:
    """Train with float32 states, and look at every snapshot at what codes would make of them.

    Beside the training, every code stores its own moving average of the same gradients.

    Returns:
        A row for each state in each code, and one for each update made of two codes.
    """
    start = time.perf_counter()
    one, steps = model_and_data(task, 0), max(snapshots)
    optimizer = AdamW(one.model, DECAYS[task])
    flat, exact = optimizer.parts[0]
    size = sum(flat.sizes)
    followers = [
        (code, block, Moments(size, (code, None) if code.signed else (None, code), block))
        for code in SIGNED + UNSIGNED
        for block in BLOCKS
    ]
    states: list[Json] = []
    updates: list[Json] = []
    for step, batch in enumerate(islice(one.batches, steps), 1):
        cross_entropy(one.model, batch).backward()
        with torch.no_grad():
            gradient = gradients(flat)
            followed = {
                (code.signed, code.name, block): moments.step(gradient)[0 if code.signed else 1]
                for code, block, moments in followers
            }
        optimizer.step(rate_at(task, step - 1, steps))
        if step in snapshots:
            of_states, of_updates = snapshot(step, flat.used, exact.stored, followed)
            states += [{"task": task, **row} for row in of_states]
            updates += of_updates
    note(f"{task}: states of {int(flat.used.sum()):,} elements", start, "")
    return states, updates


def snapshot(
    step: int,
    used: Tensor,
    exact: list[Tensor],
    followed: dict[tuple[bool, str, int], Tensor],
) -> tuple[list[Json], list[Json]]:
    """The errors of all codes after a step, and of the updates of all pairs of them."""
    states: list[Json] = []
    updates: list[Json] = []
    u = update_of(*(state[used] for state in exact), step)
    for block in BLOCKS:
        once: dict[tuple[bool, str], Tensor] = {}
        for code in SIGNED + UNSIGNED:
            state = exact[0] if code.signed else exact[1]
            decoded = code.decode(*code.encode(state, block), block)[used]
            once[code.signed, code.name] = decoded
            stored_once = errors_of(state[used], decoded)
            stored_always = errors_of(state[used], followed[code.signed, code.name, block][used])
            states.append(
                {
                    "block": block,
                    "state": "exp_avg" if code.signed else "exp_avg_sq",
                    "code": code.name,
                    **{key: stored_once[key] for key in ("median", "p99", "zeroed")},
                    "always": stored_always["p99"],
                    "drift": stored_always["drift"],
                }
            )
        for m in SIGNED:
            for v in UNSIGNED:
                of_once = update_of(once[True, m.name], once[False, v.name], step)
                of_always = update_of(
                    followed[True, m.name, block][used], followed[False, v.name, block][used], step
                )
                updates.append(
                    {
                        "block": block,
                        "m": m.name,
                        "v": v.name,
                        "always": errors_of_update(of_always, u),
                        "once": errors_of_update(of_once, u),
                    }
                )
    return states, updates


def averaged(rows: list[Json], mean: Callable[[list[float]], float]) -> list[Json]:
    """One row for all of the same names: the means of their errors, with six digits."""
    alike: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows:
        names = tuple(value for value in row.values() if isinstance(value, str | int))
        alike.setdefault(names, []).append(row)
    return [mean_of(same, mean) for same in alike.values()]


def mean_of(values: list[Any], mean: Callable[[list[float]], float]) -> Any:
    """The mean of numbers, or of each number in dictionaries; of all else, the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean_of([value[key] for value in values], mean) for key in first}
    return float(f"{mean(values):.6g}") if isinstance(first, float) else first
