"""The data that the demo trains on. Nothing is downloaded.

The text is Python's language reference, which every Python brings along for ``help()``; the images
of handwritten digits come with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from sklearn import datasets
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs and what the model should make of them

VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.25
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


def load_digits(seed: int) -> tuple[Batch, Batch]:
    """1,797 images (1, 8, 8) with values from 0 to 1 and their digits, as (train, test)."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([int(len(order) * TEST_FRACTION)])
    return (images[train], labels[train]), (images[test], labels[test])


def image_batches(train: Batch, batch: int, seed: int) -> Iterator[Batch]:
    """Endless random draws of (batch, 1, 8, 8) images and their (batch,) labels."""
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        yield images[chosen], labels[chosen]
