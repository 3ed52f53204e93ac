"""Master weights: what is stored beside a parameter for them, and how they are read and set."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._members import Member
from fusedopt._storage import MASTER, REMAINDER, REMAINDERS, master_key


def split_master(master: Tensor, master_bits: int) -> tuple[Tensor, Tensor]:
    """Master weights as bfloat16 and remainder, ties away from zero."""
    bits = _bits_of(torch.where(master.isnan(), torch.nan, master))
    if master_bits == 24:
        bits = (bits + 0x80) & 0xFFFFFF00
    high = (bits + 0x8000) >> 16
    remainder = bits - (high << 16)
    if master_bits == 24:
        remainder >>= 8
    high = torch.where(high >= 2**15, high - 2**16, high).to(torch.int16)
    return high.view(torch.bfloat16), remainder.to(REMAINDERS[master_bits])


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The master weights, in float32, of a bfloat16 parameter."""
    unit = 1 if remainder.dtype == torch.int16 else 256
    bits = (_bits_of(param) + remainder.long() * unit) & 0xFFFFFFFF
    return torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)


def remainder_of(master: Tensor, param: Tensor, master_bits: int) -> Tensor:
    """What makes a parameter as nearly the master as it can; zero where it is another number."""
    difference = _bits_of(master) - _bits_of(param)
    unit = 1 if master_bits == 32 else 256
    remainder = (difference + unit // 2) // unit
    limits = torch.iinfo(REMAINDERS[master_bits])
    near = difference.abs() <= 2**15
    remainder = torch.where(near, remainder.clamp(limits.min, limits.max), 0)
    return remainder.to(REMAINDERS[master_bits])


def float16_master_of(param: Tensor, master: Tensor) -> Tensor:
    """The master weights of a float16 parameter: itself where it is not what they round to."""
    changed = master.to(torch.float16).view(torch.int16) != param.view(torch.int16)
    return torch.where(changed, param.float(), master)


def _bits_of(values: Tensor) -> Tensor:
    """Those of a float32 or bfloat16, the latter's as the upper half, as int64."""
    if values.dtype == torch.bfloat16:
        return (values.view(torch.int16).long() & 0xFFFF) << 16
    return values.view(torch.int32).long() & 0xFFFFFFFF


def convert_master(values: Mapping[str, Any], member: Member) -> dict[str, Tensor]:
    """What a member's storage keeps for its master, out of a state of any storage."""
    bits = member.storage.master_bits
    if not bits:
        return {}
    param = member.local.detach()
    key = master_key(param)
    value = values.get(key)
    if value is not None and value.dtype == member.spec(key).dtype:
        return {key: value}
    if not values:
        return {}
    if key == MASTER:  # a remainder says nothing of a float16
        return {key: param.float()}
    if values.get(MASTER) is not None:
        master = values[MASTER].to(param.device)
    elif value is not None:
        master = join_master(param, value.to(param.device))
    else:  # the parameter is its own master
        master = param.float()
    return {key: remainder_of(master, param, bits)}


def forget_outdated(
    params: Iterable[Tensor], state: Mapping[Tensor, Any], workspace: _C.Workspace
) -> None:
    """Make weights that somebody has changed their own masters, as the next step would."""
    for param in params:
        if workspace.are_outdated(param):
            if (remainder := state.get(param, {}).get(REMAINDER)) is not None:
                remainder.zero_()
            workspace.forget_weights_of(param)


def read_masters(params: Iterable[Tensor], state: Mapping[Tensor, Any]) -> Iterator[Tensor]:
    """The weights that an optimizer works on: the masters, else the parameters, as copies."""
    for param in params:
        weights = param.detach()
        values = state.get(param, {})
        if values.get(MASTER) is not None:
            master = values[MASTER].detach().to(weights.device, torch.float32)
            yield float16_master_of(weights, master)
        elif values.get(REMAINDER) is not None:
            yield join_master(weights, values[REMAINDER].to(weights.device))
        else:
            half = weights.dtype in (torch.bfloat16, torch.float16)
            yield weights.to(torch.float32 if half else weights.dtype, copy=True)


@torch.no_grad()
def load_masters(
    optimizer: str,
    masters: Sequence[Tensor],
    members: Sequence[Member],
    state: MutableMapping[Tensor, Any],
    workspace: _C.Workspace,
) -> None:
    """Set parameters, and what is stored beside them, from what read_masters() yields."""
    if len(masters) != len(members):
        raise ValueError(
            f"{optimizer}: load_master_params got {len(masters)} tensors; expected one for "
            f"each of {len(members)} parameters"
        )
    for member, master in zip(members, masters, strict=True):
        shape = tuple(member.local.shape)
        if not isinstance(master, Tensor) or master.shape != shape:
            got = tuple(master.shape) if isinstance(master, Tensor) else type(master).__name__
            raise ValueError(
                f"{optimizer}: load_master_params got {got} for {member.name}; expected a tensor "
                f"of shape {shape}"
            )
    for member, master in zip(members, masters, strict=True):
        param, bits = member.local, member.storage.master_bits
        if bits and master_key(param) == REMAINDER:
            exact = master.to(param.device, torch.float32)
            high, remainder = split_master(exact, bits)
            param.copy_(high)
            state[member.param][REMAINDER] = remainder
        else:
            param.copy_(master)
            if bits:
                copied = master.to(param.device, torch.float32, copy=True)
                state[member.param][MASTER] = copied
        workspace.note_weights_of(param)
