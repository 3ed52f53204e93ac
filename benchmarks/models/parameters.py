"""A model's parameters: in groups by their weight decay, and moved by one rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases and norms."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Move every weight to the next larger floating-point number."""
    for parameter in model.parameters():
        parameter.copy_(parameter.nextafter(torch.full_like(parameter, torch.inf)))
