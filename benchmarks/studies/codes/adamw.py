"""AdamW in plain torch, with states that are stored in a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.codes.candidates import BLOCKS
from benchmarks.studies.codes.code import Code
from benchmarks.studies.trainings import BETAS, EPS

SMALLEST = 4096  # the fewest elements of a parameter whose states are encoded


class Flat:
    """Tensors one after another in one buffer, each from a multiple of the largest block on.

    So no block spans two tensors. The elements between them are zero and stay zero.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.gaps = [-tensor.numel() % max(BLOCKS) for tensor in tensors]
        self.sizes = [t.numel() + gap for t, gap in zip(tensors, self.gaps, strict=True)]
        self.used = self.gather([torch.ones_like(tensor) for tensor in tensors]) != 0

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """Tensors of these shapes in a new buffer."""
        parts = []
        for tensor, gap in zip(tensors, self.gaps, strict=True):
            parts += [tensor.reshape(-1), tensor.new_zeros(gap)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def scatter(self, buffer: Tensor) -> list[Tensor]:
        """The tensors that lie in a buffer."""
        parts = buffer.split(self.sizes) if self.sizes else ()
        return [
            part[: tensor.numel()].view_as(tensor)
            for part, tensor in zip(parts, self.tensors, strict=True)
        ]


class Moments:
    """Adam's two moving averages of a buffer, encoded after every step where there are codes.

    Updates use the averages before they are encoded, as a fused step does.
    """

    def __init__(self, size: int, codes: tuple[Code | None, Code | None], block: int) -> None:
        self.codes = [code and code.fresh() for code in codes]
        self.block, self.steps = block, 0
        self.stored: list[Any] = [self.store(code, torch.zeros(size)) for code in self.codes]

    def store(self, code: Code | None, values: Tensor) -> Any:
        return values if code is None else code.encode(values, self.block)

    def load(self, code: Code | None, stored: Any) -> Tensor:
        return stored if code is None else code.decode(*stored, self.block)

    def step(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Both averages with one more gradient."""
        self.steps += 1
        m, v = (self.load(*pair) for pair in zip(self.codes, self.stored, strict=True))
        m = m + (1 - BETAS[0]) * (gradient - m)
        v = v + (1 - BETAS[1]) * (gradient * gradient - v)
        self.stored = [self.store(*pair) for pair in zip(self.codes, (m, v), strict=True)]
        return m, v


def update_of(m: Tensor, v: Tensor, steps: int) -> Tensor:
    """What Adam subtracts, before the learning rate."""
    m_hat = m / (1 - BETAS[0] ** steps)
    v_hat = v / (1 - BETAS[1] ** steps)
    return m_hat / (v_hat.sqrt() + EPS)


class AdamW:
    """AdamW whose states of large parameters are encoded; biases and norms are not decayed."""

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float,
        codes: tuple[Code | None, Code | None] = (None, None),
        block: int = 256,
    ) -> None:
        self.weight_decay = weight_decay
        parameters = list(model.parameters())
        large = Flat([p for p in parameters if p.numel() >= SMALLEST])
        small = Flat([p for p in parameters if p.numel() < SMALLEST])
        self.parts = [
            (large, Moments(sum(large.sizes), codes, block)),
            (small, Moments(sum(small.sizes), (None, None), block)),
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all parameters by their gradients."""
        for flat, moments in self.parts:
            m, v = moments.step(gradients(flat))
            updates = flat.scatter(update_of(m, v, moments.steps))
            for parameter, update in zip(flat.tensors, updates, strict=True):
                if parameter.dim() > 1:
                    parameter.mul_(1 - rate * self.weight_decay)
                parameter.sub_(update, alpha=rate)
                parameter.grad = None


def gradients(flat: Flat) -> Tensor:
    """The gradients of all parameters, in a buffer."""
    return flat.gather([p.grad for p in flat.tensors if p.grad is not None])
