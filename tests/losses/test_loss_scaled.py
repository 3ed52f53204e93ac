"""Gradients of losses that another gradient than one comes into: scaled, missing, kept, batched."""

import pytest
import torch
from torch import Tensor

import fusedopt.nn.functional as ours

theirs = torch.nn.functional


def gradients(functions: object, scale: float, name: str) -> list[Tensor]:
    """Of float16 tensors under autocast, as a GradScaler makes them."""
    torch.manual_seed(0)
    half = torch.float16
    classes = torch.randint(10, (256,))
    with torch.autocast("cpu", dtype=half):
        if name == "mse_loss":
            leaves = [torch.full((1 << 18,), 0.01, dtype=half)]
            others: tuple[Tensor, ...] = (torch.zeros(1 << 18, dtype=half),)
        elif name == "cross_entropy":
            leaves, others = [torch.zeros(256, 20_000, dtype=half)], (classes,)
        else:
            leaves = [torch.randn(256, 32).to(half), (torch.randn(20_000, 32) / 50).to(half)]
            others = (classes,)
        for leaf in leaves:
            leaf.requires_grad_()
        loss = getattr(functions, name)(*leaves, *others)
        assert loss.dtype == torch.float32
        (loss * scale).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss", "linear_cross_entropy"])
def test_a_scaled_loss_in_float16(name: str) -> None:
    """What is divided by the number of rows vanishes in float16 unless it is scaled before."""
    for got, want in zip(
        gradients(ours, 65536.0, name), gradients(theirs, 65536.0, name), strict=True
    ):
        assert got.dtype == torch.float16
        assert want.count_nonzero() > 0.9 * want.numel()
        torch.testing.assert_close(got, want, rtol=4e-3, atol=float(want.abs().mean()) / 100)


@pytest.mark.parametrize("of_zeros", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ignored_rows_have_no_gradient(dtype: torch.dtype, of_zeros: float) -> None:
    """Whatever comes into them, such as 0 / 0 for padding."""
    target = torch.tensor([1, -100, 3])
    grad = torch.tensor([1.0, of_zeros, 0.5]).to(dtype)
    for given in (target, target.to(torch.int32)):
        logits = torch.randn(3, 5).to(dtype).requires_grad_()
        ours.cross_entropy(logits, given, reduction="none").backward(grad)
        assert logits.grad is not None and logits.grad.isfinite().all()
        assert not logits.grad[1].any()
        hidden = torch.randn(3, 4).to(dtype).requires_grad_()
        weight = torch.randn(5, 4).to(dtype).requires_grad_()
        ours.linear_cross_entropy(hidden, weight, given, reduction="none").backward(grad)
        assert weight.grad is not None and weight.grad.isfinite().all()
        assert hidden.grad is not None and not hidden.grad[1].any()


def test_the_second_derivative_by_what_scales_the_loss() -> None:
    """It is refused, as all second derivatives are, rather than taken for zero."""
    scale = torch.tensor(2.0, requires_grad=True)
    logits = torch.randn(4, 5, requires_grad=True)
    loss = scale * ours.cross_entropy(logits, torch.tensor([1, 2, 3, 0]))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad((grad**2).sum() + scale**2, scale)


def test_a_gradient_of_a_kept_graph_is_the_callers() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    loss = ours.cross_entropy(logits, torch.tensor([1, 2, 3, 0]))
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    want = first.clone()
    first.mul_(2)
    (second,) = torch.autograd.grad(loss, logits)
    assert second.equal(want)


def test_batched_gradients() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([1, 2, 3, 0])
    losses = ours.cross_entropy(logits, target, reduction="none")
    (got,) = torch.autograd.grad(losses, logits, torch.eye(4), is_grads_batched=True)
    want = theirs.cross_entropy(logits, target, reduction="none")
    (expected,) = torch.autograd.grad(want, logits, torch.eye(4), is_grads_batched=True)
    torch.testing.assert_close(got, expected)


def test_probabilities_of_another_dtype_of_a_linear_layer() -> None:
    hidden, weight = torch.randn(6, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    target = torch.rand(6, 5).softmax(1)
    got = ours.linear_cross_entropy(hidden, weight, target)
    want = theirs.cross_entropy(theirs.linear(hidden, weight), target)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)  # torch's logits stay in bfloat16


def test_no_classes() -> None:
    """Of no rows torch has NaN."""
    assert ours.cross_entropy(torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)).isnan()
