"""The first steps on a GPU: ``python -m benchmarks.gpu.smoke``.

Says which GPU, driver and build there are, then takes two steps of few elements by every optimizer
and way of storing there and on the CPU: five elements, whole blocks and a part of one, rows, some
of them misaligned, with an Inf; and works out losses and their gradients, of rows that a warp, a
block or many blocks take. These have the same bits, or the exit status is 1 and all else is not
worth a look.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
import fusedopt.nn.functional as losses
from fusedopt._extension import _C

SHAPES = ((5,), (5003,), (9, 300), (3, 768))
OPTIMIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("AdamW", {}),
    ("SGD", {"momentum": 0.9}),
    ("RMSprop", {}),
)
STORAGE: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.bfloat16, {"state_dtype": torch.bfloat16}),
    (torch.float32, {"state_dtype": "int8", "min_8bit_size": 0}),
    (torch.bfloat16, {"master_bits": 32}),
    (torch.bfloat16, {"rounding": "stochastic"}),
)


LOGITS = ((5, 10), (3, 2500), (300, 1100))


def about(device: torch.device) -> Iterator[str]:
    """What is there."""
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, fusedopt {fusedopt.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield (
            f"{properties.name}: capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB; {torch.cuda.device_count()} of them"
        )
        yield f"driver for CUDA {_driver()}, built by CUDA {_C.cuda_version}"


def _driver() -> str:
    version = torch._C._cuda_getDriverVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """The same on every device; those of one element more begin askew."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).flatten()
    values[::17] = 0
    values[-1] = math.inf if seed == 3 else 1e-30
    room = torch.empty(len(values) + 1, dtype=dtype, device=device)
    found = room[seed % 2 :][: len(values)]
    found.copy_(values)
    return found.view(shape)


def step(name: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Parameters and their states after two steps."""
    params = [Parameter(drawn(shape, 0, dtype, device)) for shape in SHAPES]
    optimizer = getattr(fusedopt, name)(params, lr=0.1, **options)
    for seed in (2, 3):
        for p in params:
            p.grad = drawn(tuple(p.shape), seed, dtype, device)
        optimizer.step()
    found = {}
    for number, p in enumerate(params):
        of_param = {"param": p.detach(), **optimizer.state[p]}
        found |= {f"{key} of parameter {number}": value for key, value in of_param.items()}
    return {key: value.cpu() for key, value in found.items() if isinstance(value, Tensor)}


def loss(shape: tuple[int, int], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Losses of these logits, and their gradients."""
    logits, values = (drawn(shape, seed, dtype, device).detach() for seed in (4, 6))
    target = torch.arange(shape[0], device=device) * 7 % shape[1]
    found: dict[str, Tensor] = {}
    for name, function, other in (
        ("cross_entropy", losses.cross_entropy, target),
        ("mse_loss", losses.mse_loss, values),
    ):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, other)
        value.backward()
        assert leaf.grad is not None
        found |= {name: value.detach().cpu(), f"gradient of {name}": leaf.grad.cpu()}
    return found


def bits(tensor: Tensor) -> Tensor:
    """NaNs may differ in theirs."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differences(device: str) -> Iterator[str]:
    """Which optimizers, storages, losses and tensors have other bits than on the CPU."""
    for name, own in OPTIMIZERS:
        for dtype, storage in STORAGE:
            there, here = (step(name, {**own, **storage}, dtype, on) for on in (device, "cpu"))
            yield from differences_of(f"{name} {storage} of {dtype}", there, here)
    for shape in LOGITS:
        for dtype in (torch.float32, torch.bfloat16):
            there, here = (loss(shape, dtype, on) for on in (device, "cpu"))
            yield from differences_of(f"losses of {shape} of {dtype}", there, here)


def differences_of(what: str, there: dict[str, Tensor], here: dict[str, Tensor]) -> Iterator[str]:
    for key, value in here.items():
        differ = bits(value) != bits(there[key])
        if differ.any():
            where = int(differ.nonzero()[0]) // value.element_size()
            got, expected = (float(x.reshape(-1)[where]) for x in (there[key], value))
            yield f"{what}: element {where} of {key} is {got}, expected {expected}"


def main(argv: list[str] | None = None) -> int:
    """Take the steps; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(argv).device
    for line in about(torch.device(device)):
        print(line)
    wrong = list(differences(device))
    print("\n".join(wrong) or f"the first steps on {device} have the CPU's bits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
