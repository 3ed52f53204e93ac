"""The models that are trained: a small GPT and a classifier of digits, plain PyTorch modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """One transformer block: causal self-attention, then two linear layers, each added to x."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, time, width)."""
        x = x + self.attend(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Every position looks at itself and at those before it."""
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(batch, time, width))


class GPT(nn.Module):
    """A small GPT: about a million parameters in 114 tensors for a hundred characters."""

    def __init__(
        self, vocabulary: int, context: int = 64, width: int = 96, heads: int = 4, blocks: int = 9
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.initialise(std=1 / math.sqrt(width))

    def initialise(self, std: float) -> None:
        """Normal weights, and smaller ones where many blocks add up."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for linear in (block.project, block.contract):
                nn.init.normal_(linear.weight, std=std / math.sqrt(2 * len(self.blocks)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) token numbers -> (batch, time, vocabulary) logits of the next token."""
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """(batch, time) token numbers -> (batch, time, width): what the head makes logits of."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return self.norm(self.blocks(x))


def digits_classifier(channels: int = 16, classes: int = 10) -> nn.Sequential:
    """A small convolutional network: (batch, 1, 8, 8) images -> (batch, classes) logits.

    It is smooth (GELU and strides instead of ReLU and max-pooling), so that a change in the last
    bits of its weights changes only the last bits of its loss.
    """
    return nn.Sequential(
        nn.Conv2d(1, channels, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 4 * 4, 4 * channels),
        nn.GELU(),
        nn.Linear(4 * channels, classes),
    )
