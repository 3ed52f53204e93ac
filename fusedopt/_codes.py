"""States in codes of one byte: the order of their elements, and conversions to and from float32.

Codes have the parameter's shape, and their elements lie in the order of the parameter's memory. Up
to version 0.1 they were of shape (blocks, 256), the last block filled up, and blocks took no notice
of rows: such a checkpoint loads, too.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._formats import (
    BLOCK,
    CODE,
    ORDER,
    SCALE,
    layout_of,
    part_of,
    shape_of,
    shape_of_scales,
)


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor one behind the other as they lie in memory."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return tensor.permute(order).reshape(-1)


def order_of(param: Tensor) -> Tensor | None:
    """The strides that the codes of a parameter are in the order of; None where there is but one.

    The usual ones are stored, too: some checkpoints read only what the optimizer that they are read
    into has by itself.
    """
    if param.dim() < 2:
        return None
    # Strides of dimensions of one element say nothing.
    usual = is_in_order(None, param)
    strides = _usual_strides(param) if usual else layout_of(param).stride()
    return torch.tensor(strides, device="cpu")


def is_in_order(stored: Tensor | None, param: Tensor) -> bool:
    """Whether codes lie in the order of the parameter; None: in the usual one."""
    strides = _usual_strides(param) if stored is None else tuple(stored.tolist())
    wanted = layout_of(param).stride()
    return param.numel() == 0 or all(
        n == 1 or a == b for n, a, b in zip(param.shape, strides, wanted, strict=True)
    )


def _usual_strides(param: Tensor) -> tuple[int, ...]:
    return torch.empty(param.shape, device="meta").stride()


def are_strides_of(order: Any, param: Tensor) -> bool:
    """Whether these may be strides of a dense tensor of the parameter's shape."""
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.shape != (param.dim(),):
        return False
    reach = sum((n - 1) * s for n, s in zip(param.shape, order.tolist(), strict=True))
    return param.numel() == 0 or (
        min(order.tolist(), default=0) >= 0 and reach == param.numel() - 1
    )


def shapes_of(key: str, values: Mapping[str, Any], param: Tensor) -> list[tuple[int, ...]]:
    """The shapes that a tensor of a state may have: codes and scales may be of the old form."""
    if part_of(key) not in (CODE, SCALE):
        return [shape_of(key, param)]
    shape, blocks = tuple(param.shape), -(-param.numel() // BLOCK)
    of_codes = [shape, (blocks, BLOCK)]
    if part_of(key) == CODE:
        return of_codes
    order = values.get(ORDER)
    if order is None:
        strides = torch.empty(shape, device="meta").stride()
    elif are_strides_of(order, param):
        strides = tuple(order.tolist())
    else:  # it is the strides that are wrong
        return [tuple(values[key].shape)]
    of_scales = [shape_of_scales(shape, strides), (blocks,)]
    code = values.get(key.removesuffix(SCALE) + CODE)
    if not isinstance(code, Tensor) or tuple(code.shape) not in of_codes:
        return of_scales
    return [one for one, other in zip(of_scales, of_codes, strict=True) if other == code.shape]


def _row_of(scales: tuple[int, ...], param: Tensor) -> int:
    """The elements of a row that blocks end with, from the shape of the scales."""
    return prod(param.shape[1:]) if len(scales) == 2 else param.numel()


def encode(value: Tensor, param: Tensor, never_negative: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a state, on the CPU."""
    strides = layout_of(param).stride()
    laid = torch.empty_strided(param.shape, strides, dtype=torch.float32, device="cpu")
    laid.copy_(value.detach())
    shape = shape_of(SCALE, param)
    flat = in_memory_order(laid).contiguous()
    codes, scales = _C.encode(flat, _row_of(shape, param), never_negative)
    return codes.view(param.shape), scales.view(shape)


def decode(
    codes: Tensor, scales: Tensor, order: Tensor | None, param: Tensor, never_negative: bool
) -> Tensor:
    """A state in float32, on the CPU."""
    codes = _without_padding(codes, param).reshape(-1)
    row = _row_of(tuple(scales.shape), param)
    flat = _C.decode(codes, scales.reshape(-1), row, never_negative)
    if order is None:
        return flat.view(param.shape)
    return flat.as_strided(param.shape, order.tolist())


def in_blocks_of(
    param: Tensor, codes: Tensor, scales: Tensor, never_negative: bool
) -> tuple[Tensor, Tensor]:
    """Codes and scales of the parameter's order in its blocks: the same ones if they are so."""
    shape = shape_of(SCALE, param)
    if codes.shape == param.shape and scales.shape == shape:
        return codes, scales
    row = prod(param.shape[1:])
    if scales.shape == shape or row % BLOCK == 0 or row == param.numel():  # the same blocks
        return _without_padding(codes, param), scales.reshape(shape)
    return encode(
        decode(codes, scales, order_of(param), param, never_negative), param, never_negative
    )


def _without_padding(codes: Tensor, param: Tensor) -> Tensor:
    """Codes in the parameter's shape; where they were filled up, the last block has other bytes."""
    rest = param.numel() % BLOCK
    if codes.numel() != param.numel():
        last = codes[-1].reshape(BLOCK // 4, 4).T.reshape(-1)[:rest]
        codes = torch.cat([codes[:-1].reshape(-1), last])
    return codes.reshape(param.shape)
