"""States of parameters: what they have to be, and conversions from one storage to another."""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt._codes import decode, encode, order_of
from fusedopt._masters import convert_master
from fusedopt._storage import CODE, ORDER, REMAINDER, SCALE, Storage, is_part, shape_of


def check_part(key: str, value: Tensor, param: Tensor, where: str) -> None:
    """Raise ValueError where a tensor cannot be that of the parameter."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    shape = shape_of(key, param)
    if key == ORDER:
        dtypes = (torch.int64,)
    elif key == REMAINDER:
        dtypes = (torch.int16, torch.int8)
    elif key.endswith(CODE):
        dtypes = (torch.uint8,)
    if value.dtype not in dtypes or tuple(value.shape) != shape:
        raise ValueError(
            f"{where} is of dtype {value.dtype} and shape {tuple(value.shape)}; expected "
            f"{' or '.join(map(str, dtypes))} and {shape}"
        )
    if key == ORDER:
        strides = value.tolist()
        sizes = tuple(param.shape)
        reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if param.numel() > 0 and (min(strides, default=0) < 0 or reach != param.numel() - 1):
            raise ValueError(f"{where} is {strides}, which are no strides of a dense {sizes}")


def convert(
    values: Mapping[str, Any], param: Tensor, storage: Storage, squares: Container[str]
) -> dict[str, Any]:
    """A state in the form that a storage wants, of whatever storage it was.

    What has that form already is passed on as it is. States are decoded, or encoded with each
    element rounded to nearest; a remainder is rounded to the bits that there are, and one that is
    not wanted is dropped, so that the parameter is the master rounded as it was.

    Args:
        squares: the names of states that are never negative.
    """
    result = {k: v for k, v in values.items() if not is_part(k)}
    order = order_of(param)
    old_order = values.get(ORDER)
    same_order = (order is None) == (old_order is None) and (
        order is None or bool((order == old_order.cpu()).all())  # type: ignore[union-attr]
    )
    codes = storage.state == torch.uint8
    for name in dict.fromkeys(k.removesuffix(CODE) for k in values if k.endswith(CODE)):
        code, scale = values[name + CODE], values.get(name + SCALE)
        if scale is None or name in result and not codes:
            continue
        if codes and same_order:
            result |= {name + CODE: code, name + SCALE: scale}
            result.pop(name, None)
        elif name not in result:
            result[name] = decode(code, scale, old_order, param, name in squares)
    if codes:
        for name in [k for k in result if not is_part(k) and k != "step"]:
            code, scale = encode(result.pop(name), param, name in squares)
            result |= {name + CODE: code, name + SCALE: scale}
        if order is not None and any(k.endswith(CODE) for k in result):
            result[ORDER] = order
    return result | convert_master(values, param, storage)
