"""Whole training iterations on a CPU: the optimizer's share, and what a faster one changes.

Small models are trained on real data by AdamW of torch.optim and of fusedopt, from the same weights
on the same batches. Every round takes one sample of each implementation, so that all of them see
the same drift of the machine, and ratios are taken per round. A sample is the second of two
iterations in a row: as in any training, it finds in the caches and in the allocator what an
iteration of the same implementation left there. Right after another implementation's it would be
slower for reasons that are not its own: memory that the other gave back to the system has to be
mapped again, which can take as long as a step. An iteration is ``zero_grad()``, the forward pass,
the backward pass and ``step()``; the first and the last are the optimizer's part.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure.progress import Progress
from benchmarks.models.batch import Batch
from benchmarks.models.networks import GPT
from benchmarks.models.text import load_text, text_batches
from benchmarks.report.case import DEFAULT, FLAT, FUSED, ITERATION, OPTIMIZER, OURS, Json

# Neither scikit-learn nor a compiled fusedopt is needed before something is trained: digits and
# optimizers are imported where they are used.

# The module of each implementation's AdamW, and its arguments besides OPTIONS.
IMPLEMENTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    DEFAULT: ("torch.optim", {}),
    FUSED: ("torch.optim", {"fused": True}),
    OURS: ("fusedopt", {}),
    FLAT: ("fusedopt", {"flat": True}),
}
OPTIONS: dict[str, Any] = {"lr": 3e-4}

ROUNDS, SECONDS = 101, 30.0  # for callers: at most, per workload
MIN_ROUNDS = 5
WARM_UP = 2  # rounds that are not timed: states are made, and memory is allocated
TOLERANCE = 1e-4  # of losses: rounding makes a difference of about 1e-6
SEED = 0


@dataclass(frozen=True)
class Workload:
    """What is trained on what.

    Attributes:
        model: makes it, with the weights before training.
        batches: makes its endless training batches.
        batch: one of them in words.
    """

    model: Callable[[], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    batch: str


def gpt(width: int, heads: int, blocks: int, batch: int = 8, context: int = 64) -> Workload:
    """The demo's character-level GPT on the demo's text."""

    def model() -> nn.Module:
        return GPT(len(load_text().vocabulary), context, width, heads, blocks)

    def batches() -> Iterator[Batch]:
        return text_batches(load_text().train, batch, context, SEED)

    return Workload(model, batches, f"{batch} x {context} characters")


def mlp(width: int, hidden: int, batch: int) -> Workload:
    """Wide linear layers with GELU in between, on scikit-learn's images of digits."""

    def model() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(8 * 8, width), nn.GELU()]
        for _ in range(hidden):
            layers += [nn.Linear(width, width), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    def batches() -> Iterator[Batch]:
        from benchmarks.models.digits import image_batches, load_digits

        train, _ = load_digits(SEED)
        return image_batches(train, batch, SEED)

    return Workload(model, batches, f"{batch} images")


WORKLOADS = {
    "GPT-0.1M": gpt(width=48, heads=4, blocks=3),
    "GPT-1M": gpt(width=96, heads=4, blocks=9),
    "GPT-10M": gpt(width=384, heads=6, blocks=6),
    "wide MLP": mlp(width=2048, hidden=2, batch=16),
}


class Iteration(NamedTuple):
    """One iteration's loss, before its step, and its times in seconds."""

    loss: float
    whole: float
    optimizer: float


class Training:
    """The training of a copy of a model by one implementation."""

    def __init__(self, model: nn.Module, implementation: str) -> None:
        self.model = copy.deepcopy(model)
        module, options = IMPLEMENTATIONS[implementation]
        adamw = importlib.import_module(module).AdamW
        self.optimizer = adamw(self.model.parameters(), **(OPTIONS | options))

    def iterate(self, batch: Batch) -> Iteration:
        """Train on one batch."""
        inputs, targets = batch
        start = time.perf_counter()
        self.optimizer.zero_grad()
        cleared = time.perf_counter()
        loss = F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        before = time.perf_counter()
        self.optimizer.step()
        after = time.perf_counter()
        return Iteration(loss.item(), after - start, (cleared - start) + (after - before))

    def sample(self, batches: tuple[Batch, Batch]) -> Iteration:
        """Train on two batches; the second iteration."""
        for batch in batches:
            iteration = self.iterate(batch)
        return iteration


def measure_training(rounds: int, seconds: float, progress: Progress) -> list[Json]:
    """Measure all workloads, each for so many rounds or seconds at most.

    RuntimeError if an implementation's losses are not those of torch's default.
    """
    measured = []
    for name, workload in WORKLOADS.items():
        progress.case(f"training {name}")
        measured.append(measure_workload(name, workload, rounds, seconds, progress))
    return measured


def measure_workload(
    name: str, workload: Workload, rounds: int, seconds: float, progress: Progress
) -> Json:
    """The samples of a workload, one per round, and its size.

    Each round starts with another of the implementations.
    """
    torch.manual_seed(SEED)
    model = workload.model()
    batches = workload.batches()
    names = list(IMPLEMENTATIONS)
    trainings = {one: Training(model, one) for one in names}
    wholes: dict[str, list[float]] = {one: [] for one in names}
    parts: dict[str, list[float]] = {one: [] for one in names}
    gc.collect()
    gc.disable()  # a pause would count for whatever is timed just then
    try:
        start = time.perf_counter()
        for step in range(-WARM_UP, rounds):
            if step == 0:
                start = time.perf_counter()
            if step >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                progress.update(rounds - step)
                break
            pair = next(batches), next(batches)
            first = step % len(names)
            done = {one: trainings[one].sample(pair) for one in names[first:] + names[:first]}
            check_losses(name, 2 * (step + WARM_UP + 1), done)
            if step < 0:
                continue
            for one, iteration in done.items():
                wholes[one].append(iteration.whole)
                parts[one].append(iteration.optimizer)
            progress.update()
    finally:
        gc.enable()
    parameters = list(model.parameters())
    return {
        "workload": name,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
        "batch": workload.batch,
        ITERATION: wholes,
        OPTIMIZER: parts,
    }


def check_losses(workload: str, step: int, done: dict[str, Iteration]) -> None:
    """Raise RuntimeError unless all losses are that of torch's default, but for rounding."""
    expected = done[DEFAULT].loss
    for name, iteration in done.items():
        if not math.isclose(iteration.loss, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise RuntimeError(
                f"{workload}, {name}: the loss at step {step} is {iteration.loss:.7g}, but with "
                f"{DEFAULT} it is {expected:.7g}"
            )
