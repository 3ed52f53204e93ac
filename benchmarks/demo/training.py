"""Train one task with several optimizer implementations in lockstep, and time their steps.

All trainings of a task start from the same weights and see the same batches; step n of each is done
before step n + 1 of any. So every implementation meets the same state of the machine, and every
timed optimizer step follows a real backward pass.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from itertools import islice
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import fusedopt
import fusedopt.nn.functional
from benchmarks.demo.tasks import Task
from benchmarks.models.batch import Batch, cross_entropy, predict
from benchmarks.models.parameters import nudge, parameter_groups

UNFUSED, FOREACH, FUSED = "torch for-loop", "torch foreach", "torch fused"
OURS, OURS_FLAT, OURS_LOSS = "fusedopt", "fusedopt flat=True", "fusedopt, and its loss"
ALL_OURS = (OURS, OURS_FLAT, OURS_LOSS)
IMPLEMENTATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    UNFUSED: (torch.optim, {"foreach": False}),
    FOREACH: (torch.optim, {"foreach": True}),
    FUSED: (torch.optim, {"fused": True}),
    OURS: (fusedopt, {}),
    OURS_FLAT: (fusedopt, {"flat": True}),
    OURS_LOSS: (fusedopt, {}),
}
WARM_UP = 10  # steps at the start, where states are made: left out of the step times
ALLOWANCE = 10  # losses may differ by so many times what the moved weights make of them


class Training:
    """One training of a copy of a task's model, with its losses and times.

    Attributes:
        losses: training loss at every step, before the step.
        step_seconds: time of ``optimizer.step()`` at every step.
        training_seconds: time of everything in all steps: forward, backward, optimizer, scheduler.
    """

    def __init__(self, task: Task, implementation: str, steps: int, nudged: bool = False) -> None:
        self.model = copy.deepcopy(task.model)
        if nudged:
            nudge(self.model)
        module, options = IMPLEMENTATIONS[implementation]
        groups = parameter_groups(self.model, task.weight_decay)
        self.optimizer = getattr(module, task.optimizer)(groups, **task.options, **options)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=steps)
        self.loss = fused_cross_entropy if implementation == OURS_LOSS else cross_entropy
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.training_seconds = 0.0

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        start = now()
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()
        before = now()
        self.optimizer.step()
        after = now()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.step_seconds.append(after - before)
        self.training_seconds += now() - start

    @property
    def step_median(self) -> float:
        """Median seconds of an optimizer step after the warm-up."""
        return median(self.step_seconds[WARM_UP:])

    @property
    def step_quartiles(self) -> tuple[float, float]:
        """The middle half of the optimizer steps after the warm-up: from, to, in seconds."""
        low, _, high = quantiles(self.step_seconds[WARM_UP:], n=4)
        return low, high


@dataclass(frozen=True)
class Result:
    """All trainings of a task.

    Attributes:
        task: what was trained.
        trainings: one by each implementation, by name.
        scores: the task's score of each, by name.
        reference: the torch.optim implementation whose losses the others are compared with.
        allowed: the difference of losses that is put down to rounding.
    """

    task: Task
    trainings: dict[str, Training]
    scores: dict[str, float]
    reference: str
    allowed: float

    @property
    def ours(self) -> list[str]:
        """The trainings by fusedopt."""
        return [name for name in ALL_OURS if name in self.trainings]

    @property
    def fastest_torch(self) -> str:
        """The torch.optim implementation with the shortest median step."""
        names = [name for name in self.trainings if name not in ALL_OURS]
        return min(names, key=lambda name: self.trainings[name].step_median)

    def difference(self, name: str) -> float:
        """The largest difference of one's losses from the reference's; NaN if any loss is."""
        return largest_difference(self.trainings[name], self.trainings[self.reference])

    def agrees(self, name: str) -> bool:
        """Whether a training's losses are the reference's up to rounding."""
        return self.difference(name) <= self.allowed  # false for NaN


def train(task: Task, steps: int) -> Result:
    """Train the task with every implementation.

    How far may two correct implementations drift apart? Each rounds in its own way, and training
    amplifies the differences. One more training measures by how much: the reference again, from
    weights moved by one rounding. ``ALLOWANCE`` times its largest difference is allowed. Small
    mistakes are far beyond that: AdamW with eps 1e-7 for 1e-8, or beta2 0.9901 for 0.99, was over
    100 times off.
    """
    left_out = {FUSED: not task.torch_fused, OURS_LOSS: not task.fused_loss}
    names = [name for name in IMPLEMENTATIONS if not left_out.get(name)]
    reference = FUSED if task.torch_fused else FOREACH
    trainings = {name: Training(task, name, steps) for name in names}
    nudged = Training(task, reference, steps, nudged=True)
    batches = islice(task.batches, steps)
    for batch in tqdm(batches, task.name, steps, leave=False, mininterval=1, unit="step"):
        for training in (*trainings.values(), nudged):
            training.step(batch)
    with torch.no_grad():
        scores = {name: task.score(training.model) for name, training in trainings.items()}
    allowed = ALLOWANCE * largest_difference(nudged, trainings[reference])
    return Result(task, trainings, scores, reference, allowed)


def fused_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss by fusedopt, in the memory of the logits."""
    logits, targets = predict(model, batch)
    return fusedopt.nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), inplace=True
    )


def largest_difference(a: Training, b: Training) -> float:
    """The largest difference of two trainings' losses at the same step; NaN if any loss is."""
    return (torch.tensor(a.losses) - torch.tensor(b.losses)).abs().max().item()


def now() -> float:
    """The clock in seconds, once the GPU, if there is one, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
