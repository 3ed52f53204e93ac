"""Who is measured, as a table: each implementation of an optimizer step."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.scenarios import OptimizerSetup

LEARNING_RATE = 1e-3


def always_available(setup: OptimizerSetup, device: torch.device) -> str | None:
    """None: the implementation can run everything."""
    return None


def torch_fused_unavailable(setup: OptimizerSetup, device: torch.device) -> str | None:
    """Why torch has no usable fused step for this optimizer, or None."""
    if "fused" not in inspect.signature(getattr(torch.optim, setup.class_name)).parameters:
        return f"torch.optim.{setup.class_name} has no fused step"
    if setup.class_name == "SGD" and setup.dtype.itemsize == 2 and device.type == "cpu":
        return "torch's fused SGD skips half-precision parameters on a CPU (pytorch#191763)"
    return None


def fusedopt_unavailable(setup: OptimizerSetup, device: torch.device) -> str | None:
    """Why fusedopt cannot run this optimizer, or None."""
    try:
        fusedopt = importlib.import_module("fusedopt")
    except ImportError as error:
        return f"fusedopt cannot be imported: {error}"
    if not hasattr(fusedopt, setup.class_name):
        return f"fusedopt has no {setup.class_name}"
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an optimizer's step.

    Attributes:
        name: how the command line and the tables call it.
        module: the module that has the optimizer classes.
        options: constructor arguments that select this implementation.
        unavailable: says why it cannot run a given optimizer on a device, or returns None.
        states_take_dtype: whether the dtype of the states must be asked for by ``state_dtype``.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    unavailable: Callable[[OptimizerSetup, torch.device], str | None] = always_available
    states_take_dtype: bool = False

    def build(
        self, setup: OptimizerSetup, data: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[Parameter], Optimizer]:
        """Make parameters and an optimizer of their own from (value, gradient) pairs.

        The values are copied. Where the optimizer brings its own gradient buffers (flat
        gradients), the gradients are copied into them.
        """
        params = [Parameter(value.to(setup.dtype, copy=True)) for value, _ in data]
        options = {"lr": LEARNING_RATE, **setup.options, **self.options}
        if self.states_take_dtype and setup.dtype != torch.float32:
            options["state_dtype"] = setup.dtype
        optimizer_class = getattr(importlib.import_module(self.module), setup.class_name)
        optimizer: Optimizer = optimizer_class(params, **options)
        for param, (_, grad) in zip(params, data, strict=True):
            if param.grad is None:
                param.grad = grad.to(setup.dtype, copy=True)
            else:
                param.grad.copy_(grad)
        return params, optimizer


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("torch-forloop", "torch.optim", {"foreach": False}),
        Implementation("torch-foreach", "torch.optim", {"foreach": True}),
        Implementation("torch-fused", "torch.optim", {"fused": True}, torch_fused_unavailable),
        Implementation("fusedopt", "fusedopt", {}, fusedopt_unavailable, states_take_dtype=True),
        Implementation(
            "fusedopt-flat",
            "fusedopt",
            {"flat": True},
            fusedopt_unavailable,
            states_take_dtype=True,
        ),
    )
}
