"""What is measured, as data: optimizers with their options, and the shapes of parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from benchmarks.models.shapes import (
    GPT_2_MEDIUM,
    GPT_2_SMALL,
    LLAMA_3_8B_ENDS,
    LLAMA_3_8B_LAYER,
    LLAMA_3_8B_LAYERS,
    RESNET_50,
    VIT_B_16,
    Shapes,
)


@dataclass(frozen=True)
class OptimizerSetup:
    """One optimizer with the options and dtypes that every implementation of it gets.

    Attributes:
        name: how the command line and the tables call it.
        class_name: the class's name, the same in ``torch.optim`` and in ``fusedopt``.
        states: number of state tensors per parameter, each of the parameter's shape.
        options: constructor arguments, whatever an implementation's defaults are.
        dtype: of parameters, gradients and states.
        max_grad_norm: where not None, the gradients are clipped by their global norm as well.
        loss_scale: where not None, what a GradScaler multiplied the gradients by: each call
            unscales, clips, steps, updates the scaler and resets the gradients.
        masters: whether weights are kept with more precision than ``dtype`` has, in whatever way
            an implementation offers; the dtype of its states is then its own choice, too.
    """

    name: str
    class_name: str
    states: int
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_grad_norm: float | None = None
    loss_scale: float | None = None
    masters: bool = False

    @property
    def bytes_per_parameter(self) -> int:
        """The bytes that a step must move: it reads p, g and states, and writes p and states.

        To clip, it reads all gradients once more before, for their norm. With masters, it reads and
        writes float32 states and the half of a float32 that is not in the parameter.
        """
        if self.masters:
            return 3 * self.dtype.itemsize + 2 * 2 + 2 * 4 * self.states
        return self.dtype.itemsize * (3 + 2 * self.states + (self.max_grad_norm is not None))


@dataclass(frozen=True)
class Scenario:
    """A set of parameter tensors.

    Attributes:
        name: how the command line and the tables call it.
        shapes: of the tensors, without those of layers.
        layer: the shapes of one layer's tensors.
        layers: how many of these there are.
        groups: how many parameter groups the tensors are dealt out to, evenly and in order.
        without: implementations that are left out, as they cannot differ from another here.
        note: what the tables say about it.
    """

    name: str
    shapes: Shapes
    layer: Shapes = ()
    layers: int = 0
    groups: int = 1
    without: tuple[str, ...] = ()
    note: str = ""

    @property
    def tensors(self) -> Shapes:
        """The shape of each tensor."""
        return self.shapes + self.layers * self.layer

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(prod(shape) for shape in self.tensors)

    def fitting(self, elements: int) -> Scenario:
        """This scenario or, with a note, one like it that has at most so many elements.

        It has fewer layers or, with a single tensor, a smaller one. ValueError if neither helps.
        """
        if self.elements <= elements:
            return self
        if self.layers:
            layers = (elements - replace(self, layers=0).elements) // sum(map(prod, self.layer))
            if layers > 0:
                return replace(self, layers=layers, note=f"{layers} of {self.layers} layers")
        elif self.shapes == ((self.elements,),) and elements > 0:
            size = 1 << (elements.bit_length() - 1)
            return replace(self, shapes=((size,),), note=f"{size:,} elements")
        raise ValueError(
            f"{self.name} does not fit: there is memory for {elements:,} elements in each "
            "implementation"
        )


KI, MI, GI = 2**10, 2**20, 2**30
# Given to all implementations, as other packages have other defaults than torch.
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
RMSPROP = {"alpha": 0.99, "eps": 1e-8}
LION = {"betas": (0.9, 0.99), "weight_decay": 1e-2}
# A step of AdamW hardly depends on the scale of its gradients, so that a missing clip would go
# unnoticed. With an eps as large as the clipped gradients it does depend on it.
ADAMW_CLIP = {**ADAMW, "eps": 1e-4}

OPTIMIZERS = {
    setup.name: setup
    for setup in (
        OptimizerSetup("AdamW", "AdamW", states=2, options=ADAMW),
        OptimizerSetup("SGD", "SGD", states=1, options={"momentum": 0.9}),
        OptimizerSetup("RMSprop", "RMSprop", states=1, options=RMSPROP),
        OptimizerSetup("Lion", "Lion", states=1, options=LION),
        OptimizerSetup("AdEMAMix", "AdEMAMix", states=3, options={"weight_decay": 1e-2}),
        OptimizerSetup("ADOPT", "ADOPT", states=2),
        OptimizerSetup("Adan", "Adan", states=4),
        OptimizerSetup("RAdam", "RAdam", states=2),
        OptimizerSetup("Adagrad", "Adagrad", states=1),
        OptimizerSetup("Adamax", "Adamax", states=2),
        OptimizerSetup("Adadelta", "Adadelta", states=2),
        OptimizerSetup("Rprop", "Rprop", states=2),
        OptimizerSetup("NAdam", "NAdam", states=2),
        OptimizerSetup("ASGD", "ASGD", states=1),
        OptimizerSetup("ScheduleFreeAdamW", "ScheduleFreeAdamW", states=2),
        OptimizerSetup("ScheduleFreeSGD", "ScheduleFreeSGD", states=1),
        OptimizerSetup("AdamW-bf16", "AdamW", states=2, options=ADAMW, dtype=torch.bfloat16),
        OptimizerSetup(
            "AdamW-master", "AdamW", states=2, options=ADAMW, dtype=torch.bfloat16, masters=True
        ),
        OptimizerSetup("AdamW-clip", "AdamW", states=2, options=ADAMW_CLIP, max_grad_norm=1.0),
        OptimizerSetup(
            "AdamW-pipeline",
            "AdamW",
            states=2,
            options=ADAMW_CLIP,
            max_grad_norm=1.0,
            loss_scale=65536.0,
        ),
    )
}
PLAIN = ("AdamW", "SGD", "RMSprop")
OTHER_RULES = (
    *("Lion", "AdEMAMix", "ADOPT", "Adan", "RAdam", "Adagrad", "Adamax", "Adadelta", "Rprop"),
    *("NAdam", "ASGD", "ScheduleFreeAdamW", "ScheduleFreeSGD"),
)

# With tensors as large as this only the memory's bandwidth counts, not how tensors lie or how a
# step is launched.
HUGE = ("fusedopt-flat", "fusedopt-graph", "torch-fused-graph")
# Far slower than the floor with any large tensor, and without room next to a large model.
FAR_FROM_THE_FLOOR = (
    *("torch-forloop", "torch-foreach", "torch-optimi"),
    *("bitsandbytes", "bitsandbytes-8bit", "torchao-8bit", "torchao-4bit", "torchao-fp8"),
)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("1x64Mi", ((64 * MI,),)),
        Scenario("1000x1Ki", 1000 * ((1 * KI,),)),
        Scenario("200x100K", 200 * ((100_000,),)),
        Scenario("1x1Gi", ((1 * GI,),), without=HUGE),
        Scenario(
            "Llama-3-8B",
            LLAMA_3_8B_ENDS,
            layer=LLAMA_3_8B_LAYER,
            layers=LLAMA_3_8B_LAYERS,
            without=HUGE,
        ),
        Scenario("Llama-3-8B-layer", LLAMA_3_8B_LAYER),
        Scenario("ResNet-50", RESNET_50),
        Scenario("ViT-B-16", VIT_B_16, without=FAR_FROM_THE_FLOOR),
        Scenario("GPT-2-small", GPT_2_SMALL, without=FAR_FROM_THE_FLOOR),
        Scenario("GPT-2-medium", GPT_2_MEDIUM, without=FAR_FROM_THE_FLOOR),
        Scenario("500-groups", 500 * ((4 * KI,),), groups=500),
    )
}

# What is measured by default, by the type of device: scenarios, and the optimizers in each.
SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "1x64Mi": (*PLAIN, "AdamW-bf16", "AdamW-master", *OTHER_RULES),
        "1000x1Ki": (*PLAIN, *OTHER_RULES),
        "500-groups": ("AdamW",),
        "200x100K": (*PLAIN, "AdamW-clip"),
        "1x1": ("AdamW", "SGD"),
        "ResNet-50": ("AdamW", "SGD"),
        "ViT-B-16": ("AdamW",),
        "GPT-2-small": ("AdamW", *OTHER_RULES),
    },
    "cuda": {
        "1x1Gi": PLAIN,
        "Llama-3-8B": ("AdamW", "AdamW-bf16", "AdamW-master", "AdamW-pipeline"),
        "ResNet-50": (*PLAIN, "AdamW-pipeline"),
        "1000x1Ki": PLAIN,
        "500-groups": ("AdamW",),
    },
}
# The part of the CPU's suite that is measured with --quick.
QUICK_SUITE: dict[str, tuple[str, ...]] = {
    "1x64Mi": ("AdamW", "AdamW-bf16"),
    "1000x1Ki": ("AdamW",),
    "500-groups": ("AdamW",),
    "200x100K": ("AdamW", "RMSprop"),
    "1x1": ("SGD",),
}

# How a step's time grows: with the number of tensors, of groups, and of elements.
SCALING = {
    "tensors": tuple(f"{count}x256" for count in (1, 10, 100, 1_000, 10_000, 100_000)),
    "groups": tuple(f"{count}x1Ki-groups" for count in (1, 10, 100, 1_000, 5_000)),
    "elements": tuple(f"1x{size}" for size in ("1K", "10K", "100K", "1M", "10M", "100M")),
}
SCALING_IMPLEMENTATIONS = ("torch-fused", "fusedopt", "fusedopt-flat")

UNITS = {"": 1, "Ki": KI, "Mi": MI, "Gi": GI, "K": 10**3, "M": 10**6, "G": 10**9}
PATTERN = re.compile(r"([1-9]\d*)x([1-9]\d*)(|[KMG]i?)(-groups)?")


def find_scenario(name: str) -> Scenario:
    """The scenario of this name, or the one that a name like 200x100K or 500x4Ki-groups describes.

    200 tensors of 100,000 elements in one group; 500 of 4,096, each in a group of its own.
    """
    if name in SCENARIOS:
        return SCENARIOS[name]
    found = PATTERN.fullmatch(name)
    if not found:
        raise ValueError(
            f"unknown scenario {name}; known are {', '.join(SCENARIOS)}, and tensors x elements "
            "like 200x100K, 1x64Mi or, each in a group of its own, 500x4Ki-groups"
        )
    tensors = int(found[1])
    shape = (int(found[2]) * UNITS[found[3]],)
    return Scenario(name, tensors * (shape,), groups=tensors if found[4] else 1)


def choose_cases(
    device_type: str,
    optimizers: list[str] | None,
    scenarios: list[str] | None,
    quick: bool = False,
) -> list[tuple[OptimizerSetup, Scenario]]:
    """The cases that these choices ask for; None where nothing was chosen.

    Optimizers and scenarios that were both chosen are all combined. Otherwise the device's suite
    says what goes with what, and a scenario that is not in it gets the plain optimizers.
    """
    suite = QUICK_SUITE if quick and device_type == "cpu" else SUITES[device_type]
    if scenarios is None:
        scenarios = list(suite)
        allowed = suite
    else:
        allowed = {name: suite.get(name, PLAIN) for name in scenarios}
        if optimizers is not None:
            allowed = dict.fromkeys(scenarios, tuple(optimizers))
    return [
        (OPTIMIZERS[optimizer], find_scenario(scenario))
        for scenario in scenarios
        for optimizer in optimizers or allowed[scenario]
        if optimizer in allowed[scenario]
    ]
