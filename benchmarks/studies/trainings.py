"""What all studies train: two models, their data, and the settings."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.models.batch import Batch
from benchmarks.models.networks import GPT, digits_classifier
from benchmarks.models.text import load_text, text_batches

BETAS, EPS = (0.9, 0.999), 1e-8
CONTEXT, TEXT_BATCH, IMAGE_BATCH = 64, 8, 64
WIDTH, HEADS, GPT_BLOCKS = 64, 4, 2
# By task.
RATES = {"GPT": 2e-3, "digits": 2e-3}
DECAYS = {"GPT": 0.1, "digits": 1e-2}
STEPS = {"GPT": 240, "digits": 300}
SEEDS = 5  # trainings of each kind
LAST = 20  # losses at the end of a training, whose mean is reported


@dataclass
class ModelAndData:
    """A model before training, its endless batches, and a batch that it has not seen."""

    model: nn.Module
    batches: Iterator[Batch]
    unseen: Batch


def model_and_data(task: str, seed: int) -> ModelAndData:
    """New ones, the same for the same seed."""
    if task == "digits":
        # Needs scikit-learn, which tables and codes do without.
        from benchmarks.models.digits import image_batches, load_digits

        train, test = load_digits(seed)
        torch.manual_seed(seed)
        return ModelAndData(digits_classifier(), image_batches(train, IMAGE_BATCH, seed), test)
    text = load_text()
    unseen = next(text_batches(text.validation, 128, CONTEXT, seed))
    torch.manual_seed(seed)
    model = GPT(len(text.vocabulary), CONTEXT, WIDTH, HEADS, GPT_BLOCKS)
    return ModelAndData(model, text_batches(text.train, TEXT_BATCH, CONTEXT, seed), unseen)


def rate_at(task: str, step: int, steps: int) -> float:
    """A cosine from the task's learning rate to zero."""
    return RATES[task] * 0.5 * (1 + math.cos(math.pi * step / steps))


def note(what: str, start: float, result: str) -> None:
    """Print one line about what was done, and how long it took."""
    print(f"{what}  {result}  {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
