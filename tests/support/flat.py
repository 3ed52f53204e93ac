"""What the tests of FlatParameters share: a model, its training, and what a layout has to be."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fusedopt import FlatParameters

from .training import assert_same_bits


class Model(nn.Module):
    """Small, but with what real ones have: tied weights, a convolution, a frozen part, a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(memory_format=torch.channels_last)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(self.embed(tokens))
        x = x + self.conv(x[:, None]).mean(1)
        return self.head(self.norm(x) * self.scale)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 11, (6, 9), generator=generator)
        out = self(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())


def fit(model: Model, optimizer: Optimizer, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def check_layout(flat: FlatParameters, params: list[Tensor]) -> None:
    """Everything that the documentation says of buffers, for parameters in their order."""
    assert flat.is_intact()
    kinds = list(dict.fromkeys((p.device, p.dtype) for p in params))
    assert [(b.device, b.dtype) for b in flat.buffers] == kinds
    for number, (device, dtype) in enumerate(kinds):
        members = [p for p in params if (p.device, p.dtype) == (device, dtype)]
        streams = [(flat.buffers[number], members)]
        if flat.grads:
            streams.append((flat.grads[number], [p.grad for p in members]))
        for buffer, tensors in streams:
            assert buffer.dim() == 1 and buffer.dtype == dtype and buffer.is_contiguous()
            assert buffer.data_ptr() % 64 == 0
            used = torch.zeros(buffer.numel(), dtype=torch.bool)
            for tensor in tensors:
                if tensor.numel() == 0:
                    continue
                offset = tensor.data_ptr() - buffer.data_ptr()
                assert offset % 64 == 0 and offset >= 0
                begin = offset // buffer.element_size()
                assert not used[begin : begin + tensor.numel()].any()
                used[begin : begin + tensor.numel()] = True
                # The tensor fills its part densely, in its own order.
                order = torch.as_strided(
                    buffer[begin : begin + tensor.numel()], tensor.shape, tensor.stride()
                )
                assert_same_bits(order, tensor.detach())
            assert not buffer[~used].any()
            assert buffer.numel() < used.sum() + 64 * (len(tensors) + 1)
