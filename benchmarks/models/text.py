"""A text to train on: the language reference that every Python has for ``help()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

from benchmarks.models.batch import Batch

VALIDATION_FRACTION = 0.1
TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


@dataclass(frozen=True)
class Text:
    """A text as token numbers, one for each character."""

    vocabulary: str
    train: Tensor
    validation: Tensor


def load_text() -> Text:
    """Python's language reference (465 KB), its last tenth kept for validation."""
    text = "\n".join(topics.values()).translate(TO_ASCII).encode("ascii", "ignore").decode()
    vocabulary = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(vocabulary)}
    tokens = torch.tensor([number[character] for character in text])
    split = int(len(tokens) * (1 - VALIDATION_FRACTION))
    return Text(vocabulary, tokens[:split], tokens[split:])


def text_batches(tokens: Tensor, batch: int, context: int, seed: int) -> Iterator[Batch]:
    """Endless random excerpts: (batch, context) tokens, and for each of them the next one."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    while True:
        start = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        excerpt = tokens[start + window]
        yield excerpt[:, :-1], excerpt[:, 1:]
