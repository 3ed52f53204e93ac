"""Fused losses as functions, as torch.nn.functional has them: a gradient comes with its loss."""

import math
import warnings
from typing import Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.nn import _reduction

import fusedopt._extension  # noqa: F401 - it registers the operators

__all__ = ["cross_entropy", "linear_cross_entropy", "mse_loss"]

_cross_entropy = torch.ops.fusedopt.cross_entropy.default
_linear_cross_entropy = torch.ops.fusedopt.linear_cross_entropy.default
_mse_loss = torch.ops.fusedopt.mse_loss.default


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    inplace: bool = ...,
    z_loss: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    inplace: bool = ...,
    z_loss: float = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace: bool = False,
    z_loss: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""torch.nn.functional.cross_entropy, with its gradient worked out in the same pass.

    Of one row of logits x, with the expected shares t of the classes and
    lse = log(sum(exp(x)))::

        loss     = sum(t_i (lse - x_i)) + z_loss lse^2
        gradient = exp(x_i - lse) (sum(t) + 2 z_loss lse) - t_i

    t is the weight of the target's class there and 0 elsewhere; or the weight times the target's
    probability. With label_smoothing e it is t (1 - e) + e weight / classes. A mean is over the
    weights of all targets that are not ignored, or over all rows of probabilities; what z_loss
    adds is averaged over rows without weights.

    Args:
        input: logits, of shape (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or
            float16. Half precision is computed in float32, and its loss is float32 under autocast.
        target: classes, of the input's shape without C, int64, int32 or uint8; or probabilities,
            of the input's shape.
        weight: of each class, shape (C), of the input's dtype, or float32.
        size_average, reduce: as torch has them, deprecated.
        ignore_index: a target that counts for nothing.
        reduction: "mean", "sum", or "none" for the loss of each row.
        label_smoothing: from 0 to 1.
        inplace: the logits become their own gradient, and no memory of their size is needed
            beside them. They are lost: who reads them after the loss reads the gradient. A layer
            that has saved them for its own backward pass raises. Not for leaves that require a
            gradient, nor for probabilities.
        z_loss: by what the square of lse is multiplied; PaLM took 1e-4.
        return_lse: also return lse, of the input's shape without C, float32 or float64. It is not
            differentiable.

    Raises:
        IndexError: a target is no class; nothing has been changed. On a CPU only.
        RuntimeError, ValueError, NotImplementedError: what torch raises for shapes, dtypes and
            devices that do not fit; a second derivative; forward-mode derivatives.

    Its bits are the same with any number of threads, on every instruction set. From PaLM
    (Chowdhery et al. 2022, arXiv:2204.02311) is z_loss, from Szegedy et al. 2016
    (arXiv:1512.00567) label smoothing.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    loss, lse = _cross_entropy(
        input,
        target,
        weight,
        _reduction.get_enum(reduction),
        ignore_index,
        label_smoothing,
        z_loss,
        return_lse,
        inplace,
    )
    return (loss, lse) if return_lse else loss


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.mse_loss, with its gradient worked out in the same pass::

        loss     = mean((x - y)^2), or the sum
        gradient = 2 (x - y) / n of the input, and what is opposite of the target

    Args:
        input, target: of one shape, or such as can be broadcast to one, of which torch warns;
            float32, float64, bfloat16 or float16. Those of different dtypes are promoted.
        size_average, reduce: as torch has them, deprecated.
        reduction: "mean", "sum", or "none", which is torch's own function, as there is nothing to
            be gained.
        weight: of each element; likewise torch's own function.

    Raises:
        RuntimeError, ValueError: what torch raises for shapes, dtypes and devices that do not fit;
            a second derivative.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is not None:
        weighted = {"reduction": reduction, "weight": weight}  # which torch's stub does not have
        return torch.nn.functional.mse_loss(input, target, **weighted)  # type: ignore[arg-type]
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=2,
        )
        input, target = torch.broadcast_tensors(input, target)
    if reduction not in ("mean", "sum"):
        return torch.nn.functional.mse_loss(input, target, reduction=reduction)
    loss: Tensor = _mse_loss(input, target, _reduction.get_enum(reduction))
    return loss


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: object = ...,
    chunk_size: int | None = ...,
    z_loss: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: object = ...,
    chunk_size: int | None = ...,
    z_loss: float = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without all logits at once.

    The logits of some rows at a time are worked out, become their own gradient in place, and are
    multiplied into the gradients of input and weight; then the next rows take their memory.

    Args:
        input: hidden states, of shape (N, H) or (H).
        linear_weight: of shape (C, H). One of shape (C, d1, ..., H) makes losses of K dimensions,
            as in torch; they are worked out from all logits at once, and so is the gradient of
            probabilities.
        target, weight, reduction, label_smoothing, z_loss, return_lse: as in cross_entropy.
        linear_bias: of shape (C) or (C, d1, ...).
        ignore_index: as in cross_entropy; None is -100, and has to be None for probabilities.
        options: torch.nn.LinearCrossEntropyOptions, of which batch_chunk_size is taken as
            chunk_size.
        chunk_size: rows at a time; by default such that the logits of all chunks share a ninth of
            the memory of all logits, or less where that is a lot.

    Gradients are worked out in the forward pass, so that the backward pass only returns them; with
    reduction="none" in the backward pass, from logits that are worked out again. In half precision
    the gradient of the weight is added up in float32.

    Raises: as cross_entropy, and what torch raises for shapes that do not fit.
    """
    shape = tuple(linear_weight.shape)
    classes, features, outer = shape[0] if shape else 0, input.shape[-1:], shape[1:-1]
    fits = (
        input.dim() in (1, 2)
        and len(shape) >= 2
        and shape[-1:] == tuple(features)
        and (linear_bias is None or tuple(linear_bias.shape) == shape[:-1])
        and not (outer and input.dim() == 1)
    )
    is_probable = fits and tuple(target.shape) == (*input.shape[:-1], classes, *outer)
    if not fits or (is_probable and ignore_index is not None):
        _refuse_linear(input, linear_weight, target, linear_bias, ignore_index)
    index = -100 if ignore_index is None else ignore_index
    if chunk_size is None:
        given = getattr(options, "batch_chunk_size", None)
        chunk_size = given if isinstance(given, int) else 0
    elif chunk_size < 1:
        raise ValueError(f"fusedopt: chunk_size is {chunk_size}; expected at least 1, or None")
    wants_target = is_probable and target.requires_grad and torch.is_grad_enabled()
    # Probabilities of another dtype are promoted with the logits.
    if outer or wants_target or (is_probable and target.dtype != input.dtype):
        flat = linear_weight.reshape(math.prod(outer, start=classes), *features)
        bias = None if linear_bias is None else linear_bias.reshape(-1)
        logits = torch.nn.functional.linear(input, flat, bias)
        return cross_entropy(
            logits.reshape(*input.shape[:-1], classes, *outer),
            target,
            weight,
            ignore_index=index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            inplace=not is_probable and not torch.compiler.is_compiling(),
            z_loss=z_loss,
            return_lse=return_lse,
        )
    batched = input.dim() == 2
    loss, lse = _linear_cross_entropy(
        input if batched else input.unsqueeze(0),
        linear_weight,
        target if batched else target.unsqueeze(0),
        linear_bias,
        weight,
        _reduction.get_enum(reduction),
        index,
        label_smoothing,
        z_loss,
        return_lse,
        chunk_size,
    )
    if not batched:
        loss = loss.squeeze(0) if reduction == "none" else loss
        lse = lse.squeeze(0)
    return (loss, lse) if return_lse else loss


def _refuse_linear(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
) -> NoReturn:
    """Has torch say what does not fit, where it has this function."""
    theirs = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if theirs is not None:
        with torch.no_grad():
            theirs(input, linear_weight, target, linear_bias=linear_bias, ignore_index=ignore_index)
    shapes = [tuple(each.shape) for each in (input, linear_weight, target)]
    bias = None if linear_bias is None else tuple(linear_bias.shape)
    raise RuntimeError(
        f"fusedopt: linear_cross_entropy got shapes {shapes} of input, linear_weight and target, "
        f"a linear_bias of {bias} and ignore_index={ignore_index}; expected (N, H), (C, H), (N), "
        "(C), and no ignore_index with probabilities"
    )
