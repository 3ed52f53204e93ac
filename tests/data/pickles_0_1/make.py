"""Makes the files beside it: optimizers of fusedopt 0.1.0 after three steps, and what comes next.

    python tests/data/pickles_0_1/make.py

was run with version 0.1.0, whose classes pickle as fusedopt.adam.Adam and the like. Files made with
a later version would prove nothing.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt

HOME = Path(__file__).parent
BF16 = torch.bfloat16
OPTIMIZERS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "adam": ("Adam", torch.float32, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw": ("AdamW", torch.float32, {"lr": 1e-2, "amsgrad": True, "max_grad_norm": 0.5}),
    "adamw_int8": ("AdamW", BF16, {"state_dtype": "int8", "min_8bit_size": 9, "master_bits": 24}),
    "adamw_master": ("AdamW", BF16, {"master_bits": 32, "state_dtype": BF16}),
    "adamw_random": ("AdamW", BF16, {"rounding": "stochastic", "seed": 5}),
    "rmsprop": ("RMSprop", torch.float32, {"momentum": 0.9, "centered": True}),
    "rmsprop_inside": ("RMSprop", torch.float32, {"eps_inside_sqrt": True}),
    "sgd": ("SGD", torch.float32, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
}


def make_params(dtype: torch.dtype) -> list[nn.Parameter]:
    """More than a block of codes, transposed; fewer; a scalar; one that never has a gradient."""
    values = (torch.randn(43, 7).mT, torch.randn(5), torch.randn(()), torch.randn(2))
    return [nn.Parameter(v.to(dtype)) for v in values]


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=False):  # the last has none
        param.grad = grad.clone()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    for name, (cls, dtype, options) in OPTIMIZERS.items():
        torch.manual_seed(0)
        params = make_params(dtype)
        groups = [{"params": [("weight", params[0])]}, {"params": [("b", params[1])], "lr": 0.1}]
        groups += [{"params": [("scalar", params[2]), ("frozen", params[3])]}]
        optimizer = getattr(fusedopt, cls)(groups, **options)
        grads = [[torch.randn_like(p) for p in params[:3]] for _ in range(5)]
        for t in range(3):
            step(optimizer, params, grads[t])
        optimizer.state[params[0]]["of_the_user"] = [1, torch.ones(2)]
        (HOME / f"{name}.pickle").write_bytes(pickle.dumps(optimizer))
        torch.save(optimizer, HOME / f"{name}.pt")
        torch.save(optimizer.state_dict(), HOME / f"{name}_state_dict.pt")
        start = [p.detach().clone() for p in params]
        for t in range(3, 5):
            step(optimizer, params, grads[t])
        expected = {
            "class": cls,
            "options": options,
            "start": start,
            "grads": grads[3:],
            "params": [p.detach() for p in params],
            "masters": [*optimizer.master_params()],
        }
        torch.save(expected, HOME / f"{name}_expected.pt")
        if name == "adamw_int8":
            report = fusedopt.memory_report(optimizer)
            (HOME / "memory_report.pickle").write_bytes(pickle.dumps((report, str(report))))


if __name__ == "__main__":
    main()
