"""Whole training iterations: torch's loss and AdamW, and fusedopt's loss and AdamW."""

from __future__ import annotations

import copy
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fusedopt
import fusedopt.nn.functional as ours
from benchmarks.losses.cases import IN_PLACE, TORCH
from benchmarks.measure.memory import MemoryEvents
from benchmarks.models.batch import Batch
from benchmarks.models.networks import GPT
from benchmarks.models.text import load_text, text_batches
from benchmarks.report.case import OURS, WALL, Json

LEARNING_RATE = 3e-4
WARM_UP = 2  # rounds: states are made, and memory is allocated
TOLERANCE = 1e-3  # of losses, relative: steps amplify rounding
SEED = 0


@dataclass(frozen=True)
class Model:
    """What is trained on what.

    Attributes:
        make: the model before training.
        batches: endless training batches.
        batch: one of them in words.
        rounds: at most.
    """

    make: Callable[[], GPT]
    batches: Callable[[], Iterator[Batch]]
    batch: str
    rounds: int


def character_gpt() -> GPT:
    """The demo's."""
    return GPT(len(load_text().vocabulary))


def gpt_2_small() -> GPT:
    """Its shapes: the head is the embedding of tokens."""
    model = GPT(50257, context=1024, width=768, heads=12, blocks=12)
    model.head = nn.Linear(768, 50257, bias=False)
    model.head.weight = model.token.weight
    return model


def characters() -> Iterator[Batch]:
    """Of the demo's text."""
    return text_batches(load_text().train, 8, 64, SEED)


def any_tokens() -> Iterator[Batch]:
    """No text has to be there for a time."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        tokens = torch.randint(50257, (4, 129), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


MODELS = {
    "GPT-1M": Model(character_gpt, characters, "8 x 64 characters", 51),
    "GPT-2 small": Model(gpt_2_small, any_tokens, "4 x 128 tokens", 5),
}


def torch_loss(model: GPT, batch: Batch) -> Tensor:
    """By torch."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def in_place_loss(model: GPT, batch: Batch) -> Tensor:
    """By fusedopt, in the memory of the logits."""
    logits = model(batch[0]).flatten(0, -2)
    return ours.cross_entropy(logits, batch[1].flatten(), inplace=True)


def linear_loss(model: GPT, batch: Batch) -> Tensor:
    """By fusedopt, without all logits at once."""
    hidden = model.hidden(batch[0]).flatten(0, -2)
    head = model.head
    return ours.linear_cross_entropy(hidden, head.weight, batch[1].flatten(), linear_bias=head.bias)


WAYS: dict[str, tuple[Callable[[GPT, Batch], Tensor], Callable[..., torch.optim.Optimizer]]] = {
    TORCH: (torch_loss, functools.partial(torch.optim.AdamW, fused=True)),
    OURS: (linear_loss, fusedopt.AdamW),
    IN_PLACE: (in_place_loss, fusedopt.AdamW),
}


class Training:
    """The training of a copy of a model."""

    def __init__(self, model: GPT, way: str) -> None:
        self.model = copy.deepcopy(model)
        self.loss, optimizer = WAYS[way]
        self.optimizer = optimizer(self.model.parameters(), lr=LEARNING_RATE)

    def iterate(self, batch: Batch) -> float:
        """Train on one batch; its loss. No gradient is left."""
        loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def sample(self, batches: tuple[Batch, Batch]) -> tuple[float, float]:
        """Train on two batches; loss and seconds of the second, which finds what the first left."""
        self.iterate(batches[0])
        start = time.perf_counter()
        loss = self.iterate(batches[1])
        return loss, time.perf_counter() - start


def have_once(size: int) -> None:
    """Get so many bytes of memory and give them back: a process that keeps them has them then."""
    torch.ones(size, dtype=torch.uint8)


def measure_model(model: Model, rounds: int) -> Json:
    """Times of iterations, in turns, and the memory of one.

    RuntimeError if losses differ.
    """
    torch.manual_seed(SEED)
    made, batches = model.make(), model.batches()
    trainings = {way: Training(made, way) for way in WAYS}
    have_once(4 * sum(p.nbytes for p in made.parameters()))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    names = list(WAYS)
    gc.collect()
    gc.disable()  # a pause would count for whatever is timed just then
    try:
        for number in tqdm(range(-WARM_UP, min(rounds, model.rounds)), desc=model.batch):
            pair = next(batches), next(batches)
            first = number % len(names)
            done = {way: trainings[way].sample(pair) for way in names[first:] + names[:first]}
            for way, (loss, taken) in done.items():
                if not math.isclose(loss, done[TORCH][0], rel_tol=TOLERANCE):
                    raise RuntimeError(f"{way}: a loss of {loss:.6g}, not {done[TORCH][0]:.6g}")
                if number >= 0:
                    seconds[way].append(taken)
    finally:
        gc.enable()
    batch = next(batches)
    peaks = {}
    for way, training in trainings.items():
        with MemoryEvents(torch.device("cpu")) as events:
            training.iterate(batch)
        peaks[way] = events.peak
    return {WALL: seconds, "peak": peaks}
