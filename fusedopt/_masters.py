"""Master weights: what is stored beside a parameter for them, and conversions of that."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt._storage import MASTER, REMAINDER, REMAINDERS, Storage


def bits_of(values: Tensor) -> Tensor:
    """Those of a float32 or bfloat16, the latter's as the upper half, as int64."""
    if values.dtype == torch.bfloat16:
        return (values.view(torch.int16).long() & 0xFFFF) << 16
    return values.view(torch.int32).long() & 0xFFFFFFFF


def floats_of(bits: Tensor) -> Tensor:
    """The float32 of these bits."""
    bits = bits & 0xFFFFFFFF
    return torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)


def master_of(param: Tensor, values: Mapping[str, Any]) -> Tensor | None:
    """The master weights in a state, as float32; None where it has none."""
    if values.get(MASTER) is not None:
        exact = values[MASTER].detach().to(param.device, torch.float32)
        changed = exact.to(torch.float16).view(torch.int16) != param.detach().view(torch.int16)
        return torch.where(changed, param.detach().float(), exact)
    if values.get(REMAINDER) is None:
        return None
    remainder = values[REMAINDER].to(param.device)
    unit = 1 if remainder.dtype == torch.int16 else 256
    return floats_of(bits_of(param.detach()) + remainder.long() * unit)


def split(master: Tensor, master_bits: int) -> tuple[Tensor, Tensor]:
    """Master weights as bfloat16 and remainder, ties away from zero."""
    bits = bits_of(torch.where(master.isnan(), torch.nan, master))
    if master_bits == 24:
        bits = (bits + 0x80) & 0xFFFFFF00
    high = (bits + 0x8000) >> 16
    remainder = bits - (high << 16)
    if master_bits == 24:
        remainder >>= 8
    high = torch.where(high >= 2**15, high - 2**16, high).to(torch.int16)
    return high.view(torch.bfloat16), remainder.to(REMAINDERS[master_bits])


def remainder_of(master: Tensor, param: Tensor, master_bits: int) -> Tensor:
    """What makes a parameter as nearly the master as it can; zero where it is another number."""
    difference = bits_of(master) - bits_of(param.detach())
    unit = 1 if master_bits == 32 else 256
    remainder = (difference + unit // 2) // unit
    limits = torch.iinfo(REMAINDERS[master_bits])
    near = difference.abs() <= 2**15
    remainder = torch.where(near, remainder.clamp(limits.min, limits.max), 0)
    return remainder.to(REMAINDERS[master_bits])


def convert_master(values: Mapping[str, Any], param: Tensor, storage: Storage) -> dict[str, Tensor]:
    if not storage.master_bits:
        return {}
    key = REMAINDER if param.dtype == torch.bfloat16 else MASTER
    value = values.get(key)
    if value is not None and value.dtype == storage.spec(key, param).dtype:
        return {key: value}
    if not values:
        return {}
    if key == MASTER:  # a remainder says nothing of a float16
        return {key: param.detach().float()}
    # The parameter is its own master, unless there is another one.
    master = param.detach().float() if value is None else master_of(param, {REMAINDER: value})
    if values.get(MASTER) is not None:
        master = values[MASTER].to(param.device)
    assert master is not None
    return {key: remainder_of(master, param, storage.master_bits)}
