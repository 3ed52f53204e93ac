"""torchao's CPUOffloadOptimizer with fusedopt's classes: an optimizer for each tensor, on the CPU.

`make test-all` installs torchao.
"""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import assert_same_bits
from torch import nn

import fusedopt

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "int8": {"state_dtype": "int8"},
    "masters": {"master_bits": 24},
    "stochastic": {"rounding": "stochastic"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
    ),
]


class Stream:
    """One on which everything has been done at once."""

    def wait_stream(self, other: "Stream") -> None:
        pass

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def host_in_its_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what torchao does on one is done on the host."""
    if device != "cpu":
        return
    from torchao.optim import cpu_offload

    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    empty_like = torch.empty_like

    def pageable(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", pageable)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def model_of(device: str, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) / 8)
    return model.to(device, dtype)


def inputs(device: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(8, 64, generator=generator).to(device, dtype)


@pytest.mark.parametrize("offload_gradients", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("choice", OPTIONS)
def test_training(device: str, choice: str, offload_gradients: bool) -> None:
    """As one optimizer for each tensor, through a checkpoint."""
    from torchao.optim import CPUOffloadOptimizer

    dtype = torch.float32 if choice in ("default", "int8") else torch.bfloat16
    options = {"lr": 0.01, **OPTIONS[choice]}
    model, plain = model_of(device, dtype), model_of(device, dtype)
    make = functools.partial(
        CPUOffloadOptimizer, offload_gradients=offload_gradients, minimal_size=100, **options
    )
    ours = make(model.parameters(), fusedopt.AdamW)
    small = [p for p in plain.parameters() if p.numel() < 100]
    large = [p for p in plain.parameters() if p.numel() >= 100]
    # As it has them: on the host, and no leaves that require gradients.
    hosts = [p.detach().cpu().clone() for p in large]
    alone = [fusedopt.AdamW([host], **options) for host in hosts]
    together = fusedopt.AdamW(small, **options)
    x = inputs(device, dtype)
    for step in range(4):
        if step == 2:
            saved = ours.state_dict()
            # The one before still listens to the gradients of its parameters.
            weights, model = model.state_dict(), model_of(device, dtype)
            model.load_state_dict(weights)
            ours = make(model.parameters(), fusedopt.AdamW)
            ours.load_state_dict(saved)
        batch = next(x)
        model(batch).float().square().mean().backward()
        plain(batch).float().square().mean().backward()
        ours.step()
        ours.zero_grad()
        for p, host, optimizer in zip(large, hosts, alone, strict=True):
            host.grad = p.grad.cpu()
            optimizer.step()
            p.data.copy_(host)
        together.step()
        plain.zero_grad()
    assert_same_bits([*model.parameters()], [*plain.parameters()])


def test_as_documented(device: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "offloading.md"
    (lines,) = re.findall(r"```python needs torchao\n(.*?)```", page.read_text(), re.S)
    names: dict[str, Any] = {"fusedopt": fusedopt, "model": model_of(device, torch.float32)}
    exec(lines, names)
    before = [p.detach().clone() for p in names["model"].parameters()]
    names["model"](next(inputs(device, torch.float32))).square().mean().backward()
    names["optimizer"].step()
    assert not any(map(torch.equal, before, names["model"].parameters()))
