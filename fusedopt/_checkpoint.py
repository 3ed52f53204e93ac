"""States on their way into an optimizer: out of a state_dict, a copy or a pickle."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fusedopt._averages import check_average, has_average
from fusedopt._formats import CODE, EMA, MASTERS, NUMBERS, ORDER, OWN_OPTIONS, SCALE, part_of
from fusedopt._members import Group, Member
from fusedopt._rules import state_keys
from fusedopt._sharded import local_of
from fusedopt._states import allocate, check_state, convert, local_values
from fusedopt._watched_state import OptimizerState, values_of, watched

# torch's load_state_dict casts the state of a parameter in a way that no subclass can change, but
# passes on what has any other key. So all states travel under this one.
LOADED: Final = object()

# Under this key a copied or pickled optimizer has what is known of its state besides.
COPIED: Final = "_copied"

# Who puts states of FSDP1's parameters together, and how far up the stack, behind what others wrap
# around an optimizer.
SAVERS_OF_FSDP1: Final = ("torch.distributed.fsdp.", "torch.distributed.checkpoint.state_dict")
MOST_FRAMES: Final = 6


class Copied(NamedTuple):
    """What a copy of an optimizer has to know of its state.

    Attributes:
        watched: whether the dictionaries are the optimizer's own, rather than a user's.
        begun: the parameters whose state was made for a step that is still to come.
        known_weights: those of which it is known to which weights their masters belong.
    """

    watched: bool = True
    begun: Sequence[Tensor] = ()
    known_weights: Sequence[Tensor] = ()


def with_own_options(group: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """A group with those options of ours that a checkpoint leaves as they are."""
    theirs = {key: value for key, value in group.items() if key not in OWN_OPTIONS}
    own = {key: ours[key] for key in OWN_OPTIONS if key in ours}
    if own.get("ema_decay") is not None and group.get("ema_decay") is not None:
        own["ema_decay"] = group["ema_decay"]  # that there are averages is ours, how fast is theirs
    return theirs | own


def check_saved_by(frame: FrameType | None, groups: Iterable[Group]) -> None:
    """Raise TypeError for ways of storing that FSDP1's functions cannot save, before they try.

    These take all that has dimensions for as long as the flat parameter, all of one dtype where
    views of it are stepped, and load no integers. What a rank saves of its own is its own affair.
    Options decide, which are the same on all ranks; which states there are depends on the rank.

    Args:
        frame: who asks for the state_dict.
    """
    for _ in range(MOST_FRAMES):
        if frame is None:
            return
        if str(frame.f_globals.get("__name__", "")).startswith(SAVERS_OF_FSDP1):
            break
        frame = frame.f_back
    else:
        return
    for group in groups:
        flattened = [p for p in group.params if getattr(p, "_fsdp_flattened", False)]
        bits = group.options.get("master_bits")
        of_masters = [p for p in flattened if p.dtype == torch.bfloat16 and bits is not None]
        whole = all(getattr(p, "_is_flat_param", False) for p in of_masters)
        if flattened and group.options.get("state_dtype") == "int8":
            refused = 'state_dtype="int8"'
        elif of_masters and not (whole and bits == 32):
            refused = f"master_bits={bits}"
        else:
            continue
        raise TypeError(
            f"{group.optimizer}: parameter group {group.index}: states with {refused} cannot be "
            "saved by functions for FullyShardedDataParallel, which take every state for one of "
            "the parameter's shape and of one dtype; save each rank's optimizer.state_dict() and "
            "load it at the same number of ranks, or use fully_shard, with which all of it can be "
            "saved"
        )


def options_when_loaded(
    loaded: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> list[dict[str, Any]] | None:
    """What groups will be with the options of loaded ones; None where these are not as long."""
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in loaded]:
        return None
    return [
        {
            **with_own_options({**defaults, **theirs}, ours),
            "params": ours["params"],
            "param_names": ours.get("param_names"),
        }
        for ours, theirs in zip(groups, loaded, strict=True)
    ]


def states_by_param(
    loaded: Mapping[str, Any],
    members: Sequence[Member],
    present: Mapping[Any, Any],
    given: "Given",
) -> dict[Any, Any]:
    """The states in a state_dict by parameter.

    Args:
        members: in the order of the state_dict, with the options that it gives them.
        present: the optimizer's own states.
        given: what they were when a state_dict last showed them to somebody.

    Raises:
        TypeError, ValueError: for a state that does not belong to its parameter.
    """
    numbers = [number for group in loaded["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, members, strict=True))
    needed = {
        # Without a momentum buffer, SGD's first step is still to come.
        number: set(member.names) if "step" in member.names else set()
        for number, member in by_number.items()
        if number in loaded["state"]
    }
    states: dict[Any, Any] = {}
    for number, values in loaded["state"].items():
        member = by_number.get(number)
        if member is None:
            states[number] = values
        else:
            _check_loaded(member, values, needed[number])
            if has_average(member.group.options):
                check_average(member, values.get(EMA))
            _check_filled(member, values, values_of(present, member.param), given)
            states[member.param] = values
    return states


def _check_loaded(member: Member, values: Any, needed: set[str]) -> None:
    where = f"{member.group.optimizer}: the state of {member.name}"
    if not isinstance(values, Mapping):
        raise TypeError(f"{where} is a {type(values).__name__}; expected a dictionary")
    names = state_keys([member.rule])
    known = local_values(
        member, {k: v for k, v in values.items() if k in names and v is not None}, names
    )
    if lacking := _lacking_in(known, needed):
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    for key in NUMBERS & known.keys():
        if isinstance(number := known[key], Tensor):
            known[key] = number.detach().cpu()
    check_state(member, known)
    for key, value in known.items():
        if part_of(key) == SCALE and not bool(value.isfinite().all()):
            raise ValueError(f"{where} has a {key} that is not finite; is the checkpoint damaged?")


Given = dict[tuple[int, str], int]
"""Versions of state tensors, by the id of their parameter and their key."""


def versions_of(state: Mapping[Any, Any]) -> Given:
    """Of all tensors of a state, which tell whether somebody has written them since."""
    return {
        (id(param), key): _version_of(value)
        for param, values in state.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _version_of(value: Tensor) -> int:
    local = local_of(value)
    own = 0 if value.is_inference() else value._version
    return own if local is value else own + local._version


def _check_filled(
    member: Member, values: Mapping[str, Any], own: Mapping[str, Any], given: Given
) -> None:
    """Raise where the checkpoint filled a part of the state only, and the rest is our own.

    torch.distributed's functions read a checkpoint into a state_dict that they have made of ours,
    on some ranks only: what the checkpoint does not have stays what it was, and a count of steps
    comes with moments of zero.
    """
    where = f"{member.group.optimizer}: the state of {member.name}"
    how = (
        "was it stored in another way? Load it into an optimizer with the same state_dtype first, "
        "or pass a copy of the state_dict where it is meant"
    )
    twice = sorted({key.removesuffix(CODE) for key in values if part_of(key) == CODE} & {*values})
    if twice:
        raise ValueError(f"{where} has {', '.join(twice)} in codes and without; {how}")
    names = {*member.names} - NUMBERS
    judged = {"step", *names, *(n + part for n in names for part in (CODE, SCALE))}
    tensors = {k: local_of(v) for k, v in values.items() if k in judged and isinstance(v, Tensor)}
    tensors = {k: v for k, v in tensors.items() if v.numel() > 0}
    # A checkpoint may also have been read into them.
    live = {
        k
        for k, v in tensors.items()
        if _is_same_memory(v, local_of(own.get(k)))
        and _version_of(own[k]) == given.get((id(member.param), k), _version_of(own[k]))
    }
    if live and live != tensors.keys():
        raise ValueError(
            f"{where}: {', '.join(sorted(live))} are the optimizer's own tensors, but not "
            f"{', '.join(sorted(tensors.keys() - live))}: the checkpoint has filled a part only; "
            f"{how}"
        )


def _is_same_memory(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.device == b.device and a.data_ptr() == b.data_ptr()


def _lacking_in(values: Mapping[str, Any], needed: Iterable[str]) -> list[str]:
    """What a state with any of its rule's keys has to have besides."""
    lacking = []
    for key in values:
        for one, other in ((CODE, SCALE), (SCALE, CODE)):
            if part_of(key) == one and key.removesuffix(one) + other not in values:
                lacking.append(key.removesuffix(one) + other)
    if not values.keys() - MASTERS - {ORDER}:
        return lacking
    stored = values.keys() | {key.removesuffix(CODE) for key in values}
    return sorted({*lacking, *(set(needed) - stored)})


def own_states(
    states: Mapping[Any, Any], members: Sequence[Member], names: set[str]
) -> OptimizerState:
    """Copies of these states, those of parameters in flat buffers.

    Args:
        names: all keys that are not the user's.
    """
    by_param = {member.param: member for member in members if not member.duplicate}
    known, rest = {}, {}
    for param, values in states.items():
        if not (isinstance(param, Tensor) and isinstance(values, Mapping)):
            rest[param] = copy.deepcopy(values)
            continue
        users = {k: v for k, v in values.items() if k not in names or v is None}
        rest[param] = copy.deepcopy(users)
        known[param] = {k: v for k, v in values.items() if k in names and v is not None}
        if param in by_param:
            member = by_param[param]
            known[param] = convert(local_values(member, known[param], names), member)
    for param, values in allocate(members, known).items():
        # In the order in which they were.
        values |= rest[param]
        kept = {k: values[k] for k in states[param] if k in values}
        rest[param] = kept | values
    return watched(rest)
