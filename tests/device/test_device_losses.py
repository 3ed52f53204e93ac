"""Losses on a device: the CPU's bits, every shape of launches, and targets that are no class."""

from collections.abc import Callable

import pytest
import torch
from support.accelerator import HOST_RUN
from torch import Tensor

import fusedopt.nn.functional as ours

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# A warp, a block, and many blocks for a row; see csrc/device/losses/launches.h.
SHAPES = [(0, 10), (1, 1), (70, 10), (33, 1000), (3, 2500), (2, 50257), (300, 1100)]

Outcome = tuple[Tensor, ...]


def outcome(run: Callable[..., Tensor], tensors: dict[str, Tensor], device: str) -> Outcome:
    """The loss and all gradients, after a backward pass from another gradient than one, too."""
    results: list[Tensor] = []
    for factor in (1.0, 0.375):
        placed = {name: tensor.detach().clone().to(device) for name, tensor in tensors.items()}
        for tensor in placed.values():
            if tensor.is_floating_point():
                tensor.requires_grad_()
        loss = run(**placed)
        loss.backward(torch.full_like(loss, factor))
        results += [loss.detach().cpu()]
        results += [tensor.grad.cpu() for tensor in placed.values() if tensor.grad is not None]
    return tuple(results)


def assert_same(
    run: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: dict[str, Tensor], cuda: str
) -> None:
    """The bits of the CPU's loops; where the host stands for the device, torch's in float64."""
    on_device = outcome(run, tensors, cuda)
    if HOST_RUN:
        wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        for got, expected in zip(on_device, outcome(theirs, wide, "cpu"), strict=True):
            bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(got.dtype, 1e-4)
            largest = expected.nan_to_num().abs().max() if expected.numel() else torch.zeros(())
            least = bound * float(largest) / 100 + torch.finfo(got.dtype).smallest_normal / 512
            want = expected.to(got.dtype)
            torch.testing.assert_close(got, want, rtol=bound, atol=least, equal_nan=True)
        return
    for got, expected in zip(on_device, outcome(run, tensors, "cpu"), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(
    shape: tuple[int, int], dtype: torch.dtype, reduction: str, cuda: str
) -> None:
    logits = (torch.randn(shape) * 3).to(dtype)
    target = torch.randint(shape[1], shape[:1])
    target[1::5] = -100
    weight = (torch.rand(shape[1]) + 0.5).to(dtype)
    for options in ({}, {"label_smoothing": 0.125}):

        def run(logits: Tensor, target: Tensor, options: dict[str, float] = options) -> Tensor:
            of_classes = weight.to(logits.device)
            return ours.cross_entropy(logits, target, of_classes, reduction=reduction, **options)

        def theirs(logits: Tensor, target: Tensor, options: dict[str, float] = options) -> Tensor:
            return torch.nn.functional.cross_entropy(
                logits, target, weight.to(logits), reduction=reduction, **options
            )

        assert_same(run, theirs, {"logits": logits, "target": target}, cuda)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_probabilities(dtype: torch.dtype, cuda: str) -> None:
    logits = torch.randn(40, 1100).to(dtype)
    target = torch.rand(40, 1100).softmax(1).to(dtype)
    theirs = torch.nn.functional.cross_entropy
    assert_same(
        lambda logits, target: ours.cross_entropy(logits, target.detach(), label_smoothing=0.25),
        lambda logits, target: theirs(logits, target.detach(), label_smoothing=0.25),
        {"logits": logits, "target": target},
        cuda,
    )


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_cross_entropy_in_place(shape: tuple[int, int], cuda: str) -> None:
    """The logits' memory has the gradient afterwards, the same as from another memory."""
    leaf = (torch.randn(shape) * 3).to(cuda).requires_grad_()
    target = torch.randint(shape[1], shape[:1]).to(cuda)
    ours.cross_entropy(leaf, target).backward()
    logits = leaf * 1
    ours.cross_entropy(logits, target, inplace=True)
    torch.testing.assert_close(logits.detach(), leaf.grad, rtol=0, atol=0)


def test_a_target_that_is_no_class(cuda: str) -> None:
    """A device cannot raise: the loss and its row are NaN, other rows are as they were."""
    logits = torch.randn(9, 33).to(cuda).requires_grad_()
    target = torch.randint(33, (9,)).to(cuda)
    right = ours.cross_entropy(logits, target, reduction="none").detach()
    target[4] = 33
    losses = ours.cross_entropy(logits, target, reduction="none")
    losses.sum().backward()
    wrong = torch.arange(9, device=cuda) == 4
    assert logits.grad is not None
    assert logits.grad.isnan().all(1).equal(wrong)
    torch.testing.assert_close(losses.detach()[~wrong], right[~wrong], rtol=0, atol=0)
    assert losses[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16385, 100_003])
def test_mse_loss(size: int, dtype: torch.dtype, cuda: str) -> None:
    tensors = {"input": torch.randn(size).to(dtype), "target": torch.randn(size).to(dtype)}
    assert_same(ours.mse_loss, torch.nn.functional.mse_loss, tensors, cuda)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(reduction: str, cuda: str) -> None:
    """Its products are torch's, which are not the same everywhere."""
    tensors = {"input": torch.randn(50, 16), "linear_weight": torch.randn(70, 16)}
    target = torch.randint(70, (50,))

    def run(input: Tensor, linear_weight: Tensor) -> Tensor:
        return ours.linear_cross_entropy(
            input, linear_weight, target.to(input.device), reduction=reduction, chunk_size=13
        )

    def theirs(input: Tensor, linear_weight: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(input, linear_weight)
        return torch.nn.functional.cross_entropy(
            logits, target.to(input.device), reduction=reduction
        )

    on_device, want = outcome(run, tensors, cuda), outcome(theirs, tensors, "cpu")
    for got, expected in zip(on_device, want, strict=True):
        torch.testing.assert_close(got, expected)
