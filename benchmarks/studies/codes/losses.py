"""What is lost by training with states in a code: losses at the end, next to float32 states."""

from __future__ import annotations

import time
from itertools import islice
from statistics import fmean
from typing import Any

import torch

from benchmarks.models.batch import cross_entropy
from benchmarks.models.parameters import nudge
from benchmarks.report.case import Json
from benchmarks.studies.codes.adamw import AdamW
from benchmarks.studies.codes.candidates import BLOCKS, SIGNED, UNSIGNED, named
from benchmarks.studies.codes.code import Code
from benchmarks.studies.codes.results import FLOAT32, NUDGED
from benchmarks.studies.trainings import DECAYS, LAST, RATES, model_and_data, note, rate_at


def train(
    task: str,
    seed: int,
    steps: int,
    codes: tuple[Code | None, Code | None],
    block: int,
    nudged: bool,
) -> Json:
    """Losses of one training: the mean of the last ones, and that of data it has not seen."""
    one = model_and_data(task, seed)
    if nudged:
        nudge(one.model)
    optimizer = AdamW(one.model, DECAYS[task], codes, block)
    losses = []
    for step, batch in enumerate(islice(one.batches, steps)):
        loss = cross_entropy(one.model, batch)
        loss.backward()
        optimizer.step(rate_at(task, step, steps))
        losses.append(loss.item())
    with torch.no_grad():
        unseen = cross_entropy(one.model, one.unseen).item()
    return {"train": fmean(losses[-LAST:]), "unseen": unseen}


def train_all(
    pairs: list[tuple[str, str, int]],
    seeds: int,
    steps: dict[str, int],
    known: dict[tuple[Any, ...], Json],
) -> list[Json]:
    """Trainings with float32 states, with every (m's code, v's code, block), and nudged ones.

    Those that are known already are not done again.
    """
    rows = []
    for task in RATES:
        for m, v, block in [(FLOAT32, FLOAT32, 0), (NUDGED, FLOAT32, 0), *pairs]:
            if (task, m, v, block) in known:
                rows.append(known[task, m, v, block])
                continue
            start = time.perf_counter()
            codes = (named(SIGNED, m), named(UNSIGNED, v)) if block else (None, None)
            done = [
                train(task, seed, steps[task], codes, block or max(BLOCKS), m == NUDGED)
                for seed in range(seeds)
            ]
            losses = {key: [one[key] for one in done] for key in done[0]}
            rows.append({"task": task, "m": m, "v": v, "block": block, "losses": losses})
            note(f"{task}: {m} / {v}, {block}", start, f"{fmean(losses['unseen']):.4f}")
    return rows
