"""The first steps on a GPU: ``python -m benchmarks.gpu.smoke``.

Says which GPU, driver and build there are, then takes one step of five elements by every optimizer
and way of storing there and on the CPU. These have the same bits, or the exit status is 1 and all
else is not worth a look.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt._extension import _C

BEGIN = (1.5, -0.25, 1e-3, 0.0, -300.0)
GRAD = (0.1, -2.0, 0.0, 1e-8, 7.0)
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


def step(name: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The parameter and its states after a step of five elements."""
    p = Parameter(torch.tensor(BEGIN, dtype=dtype, device=device))
    p.grad = torch.tensor(GRAD, dtype=dtype, device=device)
    optimizer = getattr(fusedopt, name)([p], lr=0.1, **options)
    optimizer.step()
    found = {"param": p.detach(), **optimizer.state[p]}
    return {key: value.cpu() for key, value in found.items() if isinstance(value, Tensor)}


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def differences(device: str) -> Iterator[str]:
    """Which optimizers, storages and tensors have other bits than on the CPU."""
    for name, own in OPTIMIZERS:
        for dtype, storage in STORAGE:
            there, here = (step(name, {**own, **storage}, dtype, on) for on in (device, "cpu"))
            for key, value in here.items():
                if bits(value) != bits(there[key]):
                    yield f"{name} {storage} of {dtype}: {key} is {there[key]}, expected {value}"


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
