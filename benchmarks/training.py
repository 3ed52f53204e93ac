"""Train one task with several optimizer implementations in lockstep, and time their steps.

All runs of a task start from the same weights and see the same batches; step n of each is done
before step n + 1 of any. So every implementation meets the same state of the machine, and each
optimizer step is timed on real gradients, after a real backward pass.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import fusedopt
from benchmarks.data import Batch, image_batches, load_digits, load_text, text_batches
from benchmarks.models import GPT, digits_classifier

WARM_UP = 10  # first steps, which allocate states: left out of the step times
CONTEXT = 64
OURS = ("fusedopt", "fusedopt flat")


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        title: for people.
        optimizer: the class's name, the same in ``torch.optim`` and in ``fusedopt``.
        options: its arguments.
        reference: the implementation of torch.optim that fusedopt's losses are compared with.
        model: the model, on the device.
        batches: endless batches.
        score_name: what ``score`` returns, for people.
        score: judges a trained model on data it has not seen.
    """

    title: str
    optimizer: str
    options: dict[str, Any]
    reference: str
    model: nn.Module
    batches: Iterator[Batch]
    score_name: str
    score: Callable[[nn.Module], float]


def gpt_task(seed: int, device: torch.device) -> Task:
    """A character-level GPT on the Python language reference, by AdamW."""
    text = load_text()
    validation = next(text_batches(text.validation, 128, CONTEXT, seed))
    torch.manual_seed(seed)
    return Task(
        title="GPT on Python's language reference",
        optimizer="AdamW",
        options={"lr": 1e-3, "betas": (0.9, 0.99)},
        reference="torch fused",
        model=GPT(len(text.vocabulary), CONTEXT).to(device),
        batches=text_batches(text.train, 8, CONTEXT, seed),
        score_name="validation loss",
        score=lambda model: loss_of(model, validation).item(),
    )


def digits_task(seed: int, device: torch.device) -> Task:
    """A convolutional network on scikit-learn's digits, by RMSprop, which torch has not fused."""
    train, test = load_digits(seed)
    torch.manual_seed(seed)
    return Task(
        title="digits classifier",
        optimizer="RMSprop",
        options={"lr": 5e-4},
        reference="torch foreach",
        model=digits_classifier().to(device),
        batches=image_batches(train, 64, seed),
        score_name="test accuracy",
        score=lambda model: accuracy(model, test),
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats, per character or per image."""
    inputs, targets = (tensor.to(device_of(model)) for tensor in batch)
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def accuracy(model: nn.Module, batch: Batch) -> float:
    """The fraction of images that get the right class."""
    images, labels = (tensor.to(device_of(model)) for tensor in batch)
    return (model(images).argmax(dim=-1) == labels).float().mean().item()


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases and norms."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(task: Task, implementation: str, model: nn.Module) -> Optimizer:
    """The task's optimizer over the model's parameters."""
    module, options = {
        "torch for-loop": (torch.optim, {"foreach": False}),
        "torch foreach": (torch.optim, {"foreach": True}),
        "torch fused": (torch.optim, {"fused": True}),
        "fusedopt": (fusedopt, {}),
        "fusedopt flat": (fusedopt, {"flat": True}),
    }[implementation]
    make = getattr(module, task.optimizer)
    return make(parameter_groups(model), **task.options, **options)


def now(device: torch.device) -> float:
    """Seconds on a clock, with all the work given to the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Run:
    """One implementation's training of a task: its model, its losses and its times.

    Attributes:
        losses: training loss of every step, before that step.
        step_seconds: time of ``optimizer.step()`` in every step after the warm-up.
        training_seconds: time of everything: forward, backward, step, scheduler.
        score: of the trained model, by the task's ``score``.
    """
