"""Master weights: what is stored beside a parameter for them, and how they are read and set."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._formats import OLD_REMAINDER, REMAINDER, WHOLE_MASTER, master_key
from fusedopt._members import Member
from fusedopt._sharded import is_sharded, local_of, wrap
from fusedopt._watched_state import ParameterState, values_of


def convert_master(values: Mapping[str, Any], member: Member) -> dict[str, Tensor]:
    """What a member's format keeps for its master, out of a state of any format."""
    bits = member.format.master_bits
    if not bits:
        return {}
    param = member.local.detach()
    key = master_key(param)
    value = _stored(values, key)
    if value is not None and value.dtype == member.spec(key).dtype:
        return {key: value}
    if not values:
        return {}
    if key == WHOLE_MASTER:  # a remainder of another dtype says nothing of it
        return {key: param.float()}
    if values.get(WHOLE_MASTER) is not None:
        master = values[WHOLE_MASTER]
    elif value is not None:
        master = _C.join_master(param, value)
    else:  # the parameter is its own master
        master = param.float()
    return {key: _C.remainder_of(master, param, bits)}


def _stored(values: Mapping[str, Any], key: str) -> Tensor | None:
    """What a state has of a master."""
    value: Tensor | None = values.get(key)
    if value is not None and value.dtype == OLD_REMAINDER:
        return value.view(torch.bfloat16)
    return value


def exact_weights(member: Member, values: Mapping[str, Any]) -> Tensor:
    """What a step works on: the master that values have, else the parameter itself."""
    param = member.local.detach()
    stored = values.get(master_key(param)) if member.format.master_bits else None
    return param if stored is None else _C.join_master(param, stored)


def forget_outdated(
    params: Iterable[Tensor], state: Mapping[Tensor, Any], workspace: _C.Workspace
) -> None:
    """Make weights that somebody has changed their own masters, as the next step would."""
    for param in params:
        remainder = values_of(state, param).get(REMAINDER)
        if remainder is not None and workspace.are_outdated(param, remainder):
            remainder.zero_()
            workspace.forget_weights_of(param)


def with_known_weights(
    params: Iterable[Tensor], state: Mapping[Tensor, Any], workspace: _C.Workspace
) -> list[Tensor]:
    """Those parameters of which it is known to which weights their remainders belong."""
    remainders = ((param, values_of(state, param).get(REMAINDER)) for param in params)
    return [p for p, r in remainders if r is not None and workspace.knows_weights_of(p, r)]


def note_weights(
    params: Iterable[Tensor], state: Mapping[Tensor, Any], workspace: _C.Workspace
) -> None:
    """Note that the remainders of these parameters belong to their weights as they are now."""
    for param in params:
        if (remainder := values_of(state, param).get(REMAINDER)) is not None:
            workspace.note_weights_of(param, remainder)


def read_masters(params: Iterable[Tensor], state: Mapping[Tensor, Any]) -> Iterator[Tensor]:
    """The weights that an optimizer works on: the masters, else the parameters, as copies."""
    for param in params:
        weights = local_of(param).detach()
        half = weights.dtype in (torch.bfloat16, torch.float16)
        stored = None
        if half:
            values = {k: local_of(v) for k, v in values_of(state, param).items()}
            stored = _stored(values, master_key(weights))
        if stored is not None:
            exact = _C.join_master(weights, stored)
        else:
            exact = weights.to(torch.float32 if half else weights.dtype, copy=True)
        yield wrap(exact, param) if is_sharded(param) else exact


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
        shape = tuple(member.param.shape)
        alike = isinstance(master, Tensor) and is_sharded(master) == member.is_sharded
        if not alike or master.shape != shape or local_of(master).shape != member.local.shape:
            got = tuple(master.shape) if alike else type(master).__name__
            raise ValueError(
                f"{optimizer}: load_master_params got {got} for {member.name}; expected a tensor "
                f"of shape {shape}{', sharded as it is' if member.is_sharded else ''}"
            )
    for member, whole in zip(members, masters, strict=True):
        param, master = member.local, local_of(whole)
        half = param.dtype in (torch.bfloat16, torch.float16)
        bits = member.format.master_bits if half else 0
        if bits:
            exact = master.to(param.device, torch.float32)
            weights, stored = _C.split_master(exact, param.dtype, bits)
            param.copy_(weights)
            if member.param not in state:
                state[member.param] = ParameterState()
            if member.is_sharded:
                stored = wrap(stored, member.param)
            state[member.param][master_key(param)] = stored
        else:
            param.copy_(master)
    note_weights((member.param for member in members), state, workspace)
