"""Small steps of everything, for a memory checker to watch: ``python -m benchmarks.gpu.sanitize``.

Every optimizer takes a few steps with empty, tiny, odd-sized and misaligned tensors, in every kind
of storage, eagerly and, unless memory is not cached (see below), as a CUDA graph. The tests check
that results are right; here only accesses to memory matter.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor has memory of its own, so that a checker sees
every access beyond its end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt

STEPS = 3
SIZES = (0, 1, 3, 1023, 4099)
OPTIMIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
)
INT8 = {"state_dtype": "int8", "min_8bit_size": 0}
STORAGE: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (  # the dtype of parameters, and options
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"state_dtype": torch.bfloat16}),
    (torch.float16, {}),
    (torch.float32, INT8),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master_bits": 32}),
    (torch.bfloat16, {"master_bits": 24, **INT8}),
    (torch.bfloat16, {"rounding": "stochastic", **INT8}),
    (torch.float16, {"master_bits": 32}),
)
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"flat": True},
    {"max_grad_norm": 1.0},
    {"capturable": True},
    {"capturable": True, "max_grad_norm": 1.0},
    {"capturable": True, "max_grad_norm": 1.0, "flat": True},
)


def random(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers, made on the CPU, so that few kernels but ours run."""
    return torch.randn(size).to(dtype).to(device)


def make_params(dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    """One of each size, and one that starts in the middle of memory."""
    whole = [random(size, dtype, device) for size in SIZES]
    return [Parameter(values) for values in (*whole, random(1001, dtype, device)[1:])]


def set_grads(params: list[Parameter]) -> None:
    """New gradients, written into the old ones where there are any."""
    for param in params:
        grad = random(param.numel(), param.dtype, param.device)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def make(
    name: str, dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[list[Parameter], Optimizer]:
    """Parameters, and an optimizer of two groups of them."""
    params = make_params(dtype, device)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-2}]
    optimizer: Optimizer = getattr(fusedopt, name)(groups, **options)
    set_grads(params)
    return params, optimizer


def eager_steps(device: torch.device) -> Iterator[str]:
    """Steps in every way; yields what has been done."""
    for (name, options), (dtype, storage), way in product(OPTIMIZERS, STORAGE, WAYS):
        if options.get("centered") and "int8" in storage.values():
            continue  # is refused
        params, optimizer = make(name, dtype, device, **options, **storage, **way)
        for _ in range(STEPS):
            optimizer.step()
            set_grads(params)
        yield f"{name} {options} {dtype} {storage} {way}"


def scaled_steps(device: torch.device) -> Iterator[str]:
    """Steps with a GradScaler, one of which is skipped; yields what has been done."""
    for way in WAYS:
        params, optimizer = make("AdamW", torch.float32, device, **way)
        scaler = torch.amp.GradScaler(device.type)
        scaler.scale(torch.ones((), device=device))
        for step in range(STEPS):
            if step == 1:
                grad = params[-1].grad
                assert grad is not None
                grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            set_grads(params)
        yield f"AdamW with a GradScaler, {way}"


def replayed_steps(device: torch.device) -> Iterator[str]:
    """Replays of a CUDA graph of a step; yields what has been done."""
    for (name, options), way in product(OPTIMIZERS, WAYS):
        if not way.get("capturable"):
            continue
        params, optimizer = make(name, torch.float32, device, **options, **way)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(STEPS):
            set_grads(params)
            graph.replay()
        yield f"{name} {options} {way} in a graph"


def main(argv: list[str] | None = None) -> int:
    """Take all steps; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device = parser.parse_args(argv).device
    torch.manual_seed(0)
    done = [*eager_steps(device), *scaled_steps(device)]
    if device.type == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        done += replayed_steps(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"benchmarks.gpu.sanitize: {len(done)} optimizers took their steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
