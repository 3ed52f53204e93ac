"""One way to run an optimizer's step: whether it can run a case, and how it is set up for it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from benchmarks.measure.scenarios import OptimizerSetup, Scenario
from benchmarks.measure.work import Work

LEARNING_RATE = 1e-3
STEPS_WITHOUT_GROWTH = 10**9  # a GradScaler's scale then stays as it is
Data = list[tuple[Tensor, Tensor]]  # a value and a gradient for each parameter


def always_available(setup: OptimizerSetup, device: torch.device) -> str | None:
    """None: the implementation can run everything."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an optimizer's step.

    Attributes:
        name: how the command line and the tables call it.
        module: the module that has the optimizer classes.
        options: constructor arguments that select this implementation.
        classes: by the name of torch's class, the name of the one that does the same work, and
            constructor arguments that make it do so; None where the names are torch's.
        package: the name of the package that an installer knows; empty for torch and for ours.
        devices: the types of devices that it is measured on.
        dtypes: of parameters for which its states have the same dtype.
        exact: whether its results are torch's up to rounding.
        most_tensors: how many it can take in reasonable time, as it compiles a step for them or
            is called for each; None for any number.
        most_shapes: the same for the number of different shapes.
        compiled: whether the step is compiled by torch.compile.
        ours: whether it clips and unscales within the step, and takes the dtype of its states.
        setups: the names of the only setups that it is for; None: all without masters.
        copies_masters: whether it steps float32 copies of the parameters by copies of the
            gradients, and copies the result back.
        graph: whether a CUDA graph of the step is replayed.
        unavailable: says why it cannot run a given optimizer on a device, or returns None.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, tuple[str, dict[str, Any]]] | None = None
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    exact: bool = True
    most_tensors: int | None = None
    most_shapes: int | None = None
    compiled: bool = False
    ours: bool = False
    setups: tuple[str, ...] | None = None
    copies_masters: bool = False
    graph: bool = False
    unavailable: Callable[[OptimizerSetup, torch.device], str | None] = always_available

    def missing(self) -> str | None:
        """Why the module cannot be imported, or None."""
        package = self.module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{self.package or package} is not installed"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # other projects' modules may raise anything
            return f"{self.module} cannot be imported: {first_line(error)}"
        return None

    def installed_version(self) -> str | None:
        """The version of the package of another project; None if there is none."""
        try:
            return version(self.package) if self.package else None
        except PackageNotFoundError:
            return None

    def why_not(
        self, setup: OptimizerSetup, scenario: Scenario, device: torch.device
    ) -> str | None:
        """Why it is not measured in a case; None if it is, empty if the case is none of its own.

        The module must be importable.
        """
        if setup.masters if self.setups is None else setup.name not in self.setups:
            return ""
        if setup.dtype not in self.dtypes:
            return "its states have another dtype"
        if self.classes is not None and setup.class_name not in self.classes:
            return f"it has no {setup.class_name}"
        tensors = scenario.tensors
        if self.most_tensors is not None and len(tensors) > self.most_tensors:
            return f"{scenario.name} has too many tensors for it"
        if self.most_shapes is not None and len(set(tensors)) > self.most_shapes:
            return f"{scenario.name} has too many shapes for it"
        if self.graph and setup.loss_scale is not None:
            return "a GradScaler cannot be captured in a CUDA graph"
        name, _ = self.class_of(setup)
        optimizer_class = getattr(importlib.import_module(self.module), name, None)
        if optimizer_class is None:
            return f"{self.module} has no {name}"
        if self.graph and "capturable" not in inspect.signature(optimizer_class).parameters:
            return f"{self.module}.{name} is not capturable"
        return self.unavailable(setup, device)

    def class_of(self, setup: OptimizerSetup) -> tuple[str, dict[str, Any]]:
        """The name of the class for an optimizer, and arguments that this class needs."""
        return (setup.class_name, {}) if self.classes is None else self.classes[setup.class_name]

    def build(self, setup: OptimizerSetup, scenario: Scenario, data: Data) -> Work:
        """Make parameters and an optimizer of their own from values and gradients.

        The values are copied. Where the optimizer brings its own gradient buffers (flat
        gradients), the gradients are copied into them.
        """
        params = [Parameter(value.to(setup.dtype, copy=True)) for value, _ in data]
        name, needed = self.class_of(setup)
        options = {"lr": LEARNING_RATE, **setup.options, **self.options, **needed}
        if self.ours:
            if setup.dtype != torch.float32 and not setup.masters:
                options["state_dtype"] = setup.dtype
            if setup.max_grad_norm is not None:
                options["max_grad_norm"] = setup.max_grad_norm
            if setup.loss_scale is not None:
                options["capturable"] = True  # unscale and skip on the device
        optimizer_class = getattr(importlib.import_module(self.module), name)
        if self.copies_masters:
            return self._with_copies(params, data, optimizer_class, options)
        optimizer: Optimizer = optimizer_class(grouped(params, scenario.groups), **options)
        for param, (_, grad) in zip(params, data, strict=True):
            if param.grad is None:
                param.grad = grad.to(setup.dtype, copy=True)
            else:
                param.grad.copy_(grad)
        if setup.loss_scale is not None:
            return self._pipeline(setup, setup.loss_scale, params, optimizer, data)
        if self.compiled:
            optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
        return Work(self._clipped_step(setup, params, optimizer), params)

    def _with_copies(
        self,
        params: list[Parameter],
        data: Data,
        optimizer_class: Callable[..., Optimizer],
        options: dict[str, Any],
    ) -> Work:
        """A step of float32 copies, whose gradients are cast into buffers that stay."""
        masters = [Parameter(param.detach().float()) for param in params]
        grads = [grad.to(param.dtype) for param, (_, grad) in zip(params, data, strict=True)]
        for master in masters:
            master.grad = torch.empty_like(master)
        optimizer = optimizer_class(masters, **options)

        @torch.no_grad()
        def call() -> None:
            for master, grad in zip(masters, grads, strict=True):
                assert master.grad is not None
                master.grad.copy_(grad)
            optimizer.step()
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)

        return Work(call, params, alive=(optimizer, grads))

    def _clipped_step(
        self, setup: OptimizerSetup, params: list[Parameter], optimizer: Optimizer
    ) -> Callable[[], object]:
        """A step, after clipping where the step does not clip by itself."""
        max_norm = setup.max_grad_norm
        if max_norm is None or self.ours:
            return optimizer.step

        def call() -> None:
            clip_grad_norm_(params, max_norm)
            optimizer.step()

        return call

    def _pipeline(
        self,
        setup: OptimizerSetup,
        scale: float,
        params: list[Parameter],
        optimizer: Optimizer,
        data: Data,
    ) -> Work:
        """Everything that follows a backward pass of a scaled loss.

        Before each call, untimed, the gradients come back as the backward pass would leave them.
        """
        device = params[0].device
        scaler = torch.amp.GradScaler(
            device.type, init_scale=scale, growth_interval=STEPS_WITHOUT_GROWTH
        )
        scaler.scale(torch.ones((), device=device))  # makes the scale's tensor
        grads = [param.grad for param in params]
        max_norm = setup.max_grad_norm

        def prepare() -> None:
            for param, grad, (_, plain) in zip(params, grads, data, strict=True):
                assert grad is not None
                torch.mul(plain, scale, out=grad)
                param.grad = grad

        def call() -> None:
            if not self.ours:
                scaler.unscale_(optimizer)
                if max_norm is not None:
                    clip_grad_norm_(params, max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return Work(call, params, prepare)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def grouped(params: list[Parameter], groups: int) -> list[Any]:
    """The parameters, dealt out to so many groups, each with a learning rate of its own."""
    if groups == 1:
        return list(params)
    size = len(params) // groups
    return [
        {
            "params": params[group * size : (group + 1) * size],
            "lr": LEARNING_RATE * (1 - group / (2 * groups)),
        }
        for group in range(groups)
    ]
