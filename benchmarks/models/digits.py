"""Images of handwritten digits, which come with scikit-learn, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn import datasets

from benchmarks.models.batch import Batch

TEST_FRACTION = 0.25


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
