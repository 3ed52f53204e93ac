"""What is measured, as data: optimizers with their options, and the shapes of parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerSetup:
    """One optimizer with the options and dtypes that every implementation of it gets.

    Attributes:
        name: how the command line and the tables call it.
        class_name: the class's name, the same in ``torch.optim`` and in ``fusedopt``.
        states: number of state tensors per parameter, each of the parameter's shape.
        options: constructor arguments beyond the defaults, which are equal everywhere.
        dtype: of parameters, gradients and states.
        scenarios: the scenarios it runs in; empty for all.
    """

    name: str
    class_name: str
    states: int
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    scenarios: tuple[str, ...] = ()

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes a step must move at least: reads p, g and states, writes p and states."""
        return self.dtype.itemsize * (3 + 2 * self.states)


@dataclass(frozen=True)
class Scenario:
    """A set of parameter tensors.

    Attributes:
        name: how the command line and the tables call it.
        shapes: pairs of a number of tensors and their shape.
    """

    name: str
    shapes: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def tensors(self) -> list[tuple[int, ...]]:
        """The shape of each tensor, in order."""
        return [shape for count, shape in self.shapes for _ in range(count)]


OPTIMIZERS = {
    setup.name: setup
    for setup in (
        OptimizerSetup("AdamW", "AdamW", states=2),
        OptimizerSetup("SGD", "SGD", states=1, options={"momentum": 0.9}),
        OptimizerSetup("RMSprop", "RMSprop", states=1),
        OptimizerSetup(
            "AdamW-bf16", "AdamW", states=2, dtype=torch.bfloat16, scenarios=("1x64Mi",)
        ),
    )
}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("1x64Mi", ((1, (64 * 1024 * 1024,)),)),
        Scenario("1000x1Ki", ((1000, (1024,)),)),
        Scenario("200x100K", ((200, (100_000,)),)),
    )
}
