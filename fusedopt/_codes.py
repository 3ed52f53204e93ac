"""States in codes of one byte: the order of their elements, and conversions to and from float32."""

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._formats import layout_of


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor one behind the other as they lie in memory."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return tensor.permute(order).reshape(-1)


def order_of(param: Tensor) -> Tensor | None:
    """The strides that the codes of a parameter are in the order of; None: the usual ones."""
    layout = layout_of(param)
    return None if layout.is_contiguous() else torch.tensor(layout.stride())


def is_same_order(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool((a.cpu() == b.cpu()).all())


def encode(value: Tensor, param: Tensor, never_negative: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a state, on the CPU."""
    laid = torch.empty_strided(param.shape, layout_of(param).stride(), dtype=torch.float32)
    laid.copy_(value.detach())
    return _C.encode(in_memory_order(laid).contiguous(), never_negative)


def decode(
    codes: Tensor, scales: Tensor, order: Tensor | None, param: Tensor, never_negative: bool
) -> Tensor:
    """A state in float32, on the CPU."""
    codes, scales = codes.cpu().contiguous(), scales.cpu().contiguous()
    flat = _C.decode(codes, scales, param.numel(), never_negative)
    if order is None:
        return flat.view(param.shape)
    return flat.as_strided(param.shape, order.tolist())
