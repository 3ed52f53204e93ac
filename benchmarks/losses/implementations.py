"""Who computes losses: fusedopt, torch in several ways, other projects; and the floors below."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

import fusedopt.nn.functional as ours
from benchmarks.losses.cases import (
    BEST_CHUNKED,
    CHUNKED,
    COMPILED,
    COPIED,
    CROSS_ENTROPY,
    CUT,
    IN_PLACE,
    LIGER,
    LINEAR,
    MSE,
    PRODUCTS,
    READ_TWO,
    TORCH,
    UPDATE,
    Case,
)
from benchmarks.report.case import OURS

Function = Callable[..., Tensor]
CHUNKS = (128, 256, 512, 1024)
# torch 2.14 has no "balanced" any longer.
OTHER: Literal["balanced", "accurate"] = (
    "balanced" if TorchVersion(torch.__version__) < "2.14" else "accurate"
)
POLICIES: tuple[Literal["compact", "balanced", "accurate"], ...] = ("compact", OTHER)


class HandOver(torch.autograd.Function):
    """A buffer as the output of a layer, so that a loss may make it its gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(()), None


@dataclass(frozen=True)
class Subject:
    """An implementation, with its tensors.

    Attributes:
        loss: the forward pass.
        leaves: what the backward pass is for.
        note: how it was set up.
    """

    loss: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    note: str = ""

    def call(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Forward and backward pass. What they made is freed with their results."""
        loss = self.loss()
        return loss.detach(), torch.autograd.grad(loss, self.leaves)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: (input, target), or (hidden states, weight, target)."""

    leaves: tuple[Tensor, ...]
    target: Tensor

    @staticmethod
    def of(case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(case.dtype)

        if case.loss == MSE:
            return Inputs((normal(case.shape).requires_grad_(),), normal(case.shape))
        rows, classes = case.shape
        target = torch.randint(classes, (rows,), generator=generator, device=device)
        if case.loss == CROSS_ENTROPY:
            return Inputs((normal(case.shape).requires_grad_(),), target)
        hidden = normal((rows, case.features)).requires_grad_()
        weight = normal((classes, case.features), case.features**-0.5).requires_grad_()
        return Inputs((hidden, weight), target)


def plain_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits at once, by torch."""
    return F.cross_entropy(F.linear(hidden, weight), target)


def in_place_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits at once, which become their gradient."""
    return ours.cross_entropy(F.linear(hidden, weight), target, inplace=True)


THEIRS: dict[str, Function] = {
    CROSS_ENTROPY: F.cross_entropy,
    MSE: F.mse_loss,
    LINEAR: getattr(F, "linear_cross_entropy", plain_linear),
}
OWN: dict[str, Function] = {
    CROSS_ENTROPY: ours.cross_entropy,
    MSE: ours.mse_loss,
    LINEAR: ours.linear_cross_entropy,
}


def liger(case: Case) -> Function:
    """liger-kernel's function."""
    functions = importlib.import_module("liger_kernel.transformers.functional")
    if case.loss == CROSS_ENTROPY:
        return functions.liger_cross_entropy  # type: ignore[no-any-return]
    fused = functions.liger_fused_linear_cross_entropy
    return lambda hidden, weight, target: fused(hidden, weight, target)


def cut(case: Case) -> Function:
    """cut-cross-entropy's function."""
    module = importlib.import_module("cut_cross_entropy")
    return module.linear_cross_entropy  # type: ignore[no-any-return]


# Other projects' are written for GPUs. None of them has been tried yet.
PEERS: dict[str, tuple[Callable[[Case], Function], tuple[str, ...]]] = {
    LIGER: (liger, (CROSS_ENTROPY, LINEAR)),
    CUT: (cut, (LINEAR,)),
}


def chunked(options: object, inputs: Inputs) -> Subject:
    """torch's linear cross-entropy with options."""
    function = THEIRS[LINEAR]
    size = getattr(options, "batch_chunk_size", None)
    return Subject(
        lambda: function(*inputs.leaves, inputs.target, options=options),
        inputs.leaves,
        f"{options.acc_policy}, {size} rows" if size else "",  # type: ignore[attr-defined]
    )


def best_chunked(inputs: Inputs) -> Subject:
    """The quickest of several options, each tried twice."""
    rows = len(inputs.target)
    tried = [
        chunked(
            torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=size, chunking_method=None, acc_policy=policy
            ),
            inputs,
        )
        for policy, size in itertools.product(POLICIES, CHUNKS)
        if size <= rows or size == min(CHUNKS)
    ]
    seconds = [float("inf")] * len(tried)
    for _ in range(2):
        for number, subject in enumerate(tried):
            start = time.perf_counter()
            subject.call()
            seconds[number] = min(seconds[number], time.perf_counter() - start)
    return tried[seconds.index(min(seconds))]


def makers(case: Case, inputs: Inputs, compiled: bool) -> dict[str, Callable[[], Subject]]:
    """What makes each implementation of a case, the one that the others have to agree with first.

    Making one may take long or fail.
    """

    def plain(function: Function) -> Subject:
        return Subject(lambda: function(*inputs.leaves, inputs.target), inputs.leaves)

    def in_place() -> Subject:
        if case.loss == LINEAR:
            return plain(in_place_linear)
        # It stays no leaf, however often it becomes a gradient: an ordinary number each time.
        leaf = torch.zeros((), device=inputs.target.device, requires_grad=True)
        logits = HandOver.apply(leaf, inputs.leaves[0].detach().clone())
        return Subject(lambda: ours.cross_entropy(logits, inputs.target, inplace=True), (logits,))

    def peer(make: Callable[[Case], Function]) -> Callable[[], Subject]:
        return lambda: plain(make(case))

    theirs = THEIRS[case.loss]
    found: dict[str, Callable[[], Subject]] = {
        TORCH: lambda: plain(theirs),
        OURS: lambda: plain(OWN[case.loss]),
    }
    if case.loss != MSE:
        found[IN_PLACE] = in_place
    if compiled:
        found[COMPILED] = lambda: plain(torch.compile(theirs, dynamic=False))
    if case.loss == LINEAR and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found[CHUNKED] = lambda: chunked(torch.nn.LinearCrossEntropyOptions(), inputs)
        found[BEST_CHUNKED] = lambda: best_chunked(inputs)
    for name, (make, losses) in PEERS.items():
        if inputs.target.is_cuda and case.loss in losses:
            found[name] = peer(make)
    return found


def floors(case: Case, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """What a loss cannot do without, in memory that is there already."""
    leaves = [leaf.detach() for leaf in inputs.leaves]
    if case.loss == LINEAR:
        hidden, weight = leaves
        logits = hidden @ weight.T
        to_hidden, to_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def products() -> None:
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=to_hidden)
            torch.mm(logits.T, hidden, out=to_weight)

        return {PRODUCTS: products}
    x, written = leaves[0], torch.ones_like(leaves[0])
    if case.loss == MSE:
        return {READ_TWO: lambda: torch.sub(x, inputs.target, out=written)}
    changed = x.clone()
    return {UPDATE: lambda: changed.mul_(-1.0), COPIED: lambda: written.copy_(x)}
