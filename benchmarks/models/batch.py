"""A batch of training data, and how well a model does on it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # inputs and targets


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss in nats, per character or per image."""
    logits, targets = predict(model, batch)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def accuracy(model: nn.Module, batch: Batch) -> float:
    """The fraction of images that get the right class."""
    logits, labels = predict(model, batch)
    return (logits.argmax(dim=-1) == labels).double().mean().item()


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's logits and the targets, both on the model's device."""
    device = next(model.parameters()).device
    inputs, targets = batch
    return model(inputs.to(device)), targets.to(device)
