"""What the demo trains: a model, its data, its optimizer, and how to judge the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.models.batch import Batch, accuracy, cross_entropy
from benchmarks.models.digits import image_batches, load_digits
from benchmarks.models.networks import GPT, digits_classifier
from benchmarks.models.text import load_text, text_batches

CONTEXT = 64
TEXT_BATCH = 8
IMAGE_BATCH = 64


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        name: what tables call it.
        title: what the demo prints above its tables.
        optimizer: the class's name, the same in ``torch.optim`` and in ``fusedopt``.
        options: its arguments.
        weight_decay: of matrices and kernels; biases and norms have none.
        torch_fused: whether torch has a fused step for it.
        fused_loss: whether it is trained with fusedopt's loss as well.
        model: the model before training.
        batches: endless training batches.
        score_name: what ``score`` returns, in words.
        score: judges a trained model on data it has not seen.
    """

    name: str
    title: str
    optimizer: str
    options: dict[str, Any]
    weight_decay: float
    torch_fused: bool
    fused_loss: bool
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
        name="GPT",
        title="GPT: a character-level language model of Python's language reference",
        optimizer="AdamW",
        options={"lr": 1e-3, "betas": (0.9, 0.99)},
        weight_decay=0.1,
        torch_fused=True,
        fused_loss=True,
        model=GPT(len(text.vocabulary), CONTEXT).to(device),
        batches=text_batches(text.train, TEXT_BATCH, CONTEXT, seed),
        score_name="validation loss",
        score=lambda model: cross_entropy(model, validation).item(),
    )


def digits_task(seed: int, device: torch.device) -> Task:
    """A convolutional network on scikit-learn's digits, by RMSprop, which torch has not fused."""
    train, test = load_digits(seed)
    torch.manual_seed(seed)
    return Task(
        name="digits",
        title="digits: a classifier of scikit-learn's handwritten digits",
        optimizer="RMSprop",
        options={"lr": 2e-3},
        weight_decay=1e-3,
        torch_fused=False,
        fused_loss=False,
        model=digits_classifier().to(device),
        batches=image_batches(train, IMAGE_BATCH, seed),
        score_name="test accuracy",
        score=lambda model: accuracy(model, test),
    )
