"""Counts of steps that a device keeps, so that the host need not know which steps took place.

Where the state of a rule names no count, a first count beside the state tells whether the device
has taken the first step or skipped it so far.
"""

from collections.abc import Container, Iterable, Mapping, MutableMapping, Set
from typing import Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._formats import MASTERS
from fusedopt._members import Group, Member
from fusedopt._rules import rule_info, state_keys

FirstCounts = dict[Tensor, Tensor]


def make_first_counts(
    first_counts: FirstCounts, members: Iterable[Member], new: Container[int]
) -> None:
    """Let the device tell a first step from later ones, where it may skip one."""
    together: dict[torch.device, list[Tensor]] = {}
    for member in members:
        if id(member.param) in new and member.counts_on_device and not member.duplicate:
            keys = member.keys
            if keys and "step" not in keys:
                together.setdefault(member.local.device, []).append(member.param)
    for device, params in together.items():
        counts = _C.flat_steps([0.0] * len(params), device)
        first_counts.update(zip(params, counts, strict=True))


def drop_first_counts(
    first_counts: FirstCounts,
    state: MutableMapping[Tensor, Any],
    members: Iterable[Member],
    names: Set[str],
) -> None:
    """Forget the first counts of parameters whose steps the host counts now.

    Args:
        names: all keys that states have by a rule.
    """
    if not first_counts:
        return
    by_param = {id(member.param): member for member in members}
    for param, count in list(first_counts.items()):
        member = by_param.get(id(param))
        if member is None or not member.counts_on_device or count.device != member.local.device:
            if float(count) == 0:
                for key in names - MASTERS:
                    state.get(param, {}).pop(key, None)
            del first_counts[param]


def without_skipped_first(
    packed: dict[Any, Any], first_counts: FirstCounts, groups: Iterable[Group]
) -> dict[Any, Any]:
    """Without the buffers of parameters whose first step the device has skipped so far.

    By parameter or, as in a state_dict, by its number.
    """
    values = _values({id(param): count for param, count in first_counts.items()})
    number = 0
    for group in groups:
        for param in group.params:
            if values.get(id(param)) == 0:
                names = state_keys([group.rule]) - MASTERS
                for key in {number, param} & packed.keys():
                    packed[key] = {k: v for k, v in packed[key].items() if k not in names}
            number += 1
    return packed


def lineages(
    state: Mapping[Tensor, Any],
    first_counts: FirstCounts,
    members: Iterable[Member],
    captured: bool,
) -> dict[int, int]:
    """Numbers the parameters whose steps the device counts, by their counts.

    Args:
        captured: whether a graph has been captured. What that does to the counts when it is
            replayed, nobody tells.
    """
    counts: dict[int, Tensor] = {}
    others: dict[str, dict[int, Tensor]] = {}
    for member in members:
        if member.counts_on_device:
            param = member.param
            values = state.get(param, {})
            count = values.get("step", first_counts.get(param))
            if count is not None:
                counts[id(param)] = count
                for key in rule_info(member.rule)["numbers"]:
                    others.setdefault(key, {})[id(param)] = values[key]
    if captured or any(_C.is_capturing(count.device) for count in counts.values()):
        return {key: number for number, key in enumerate(counts, start=1)}
    # Those with the same numbers go on to have them.
    known = [_values(counts), *(_values(others[key]) for key in sorted(others))]
    taken = {key: tuple(values.get(key, 0.0) for values in known) for key in counts}
    numbers = {value: number for number, value in enumerate(sorted(set(taken.values())), 1)}
    return {key: numbers[value] for key, value in taken.items()}


def _values(counts: Mapping[int, Tensor]) -> dict[int, float]:
    """The values of these tensors of one element, in one go for each device."""
    devices = {count.device for count in counts.values()}
    result: dict[int, float] = {}
    for device in devices:
        here = {key: count for key, count in counts.items() if count.device == device}
        result.update(zip(here, torch.stack([*here.values()]).tolist(), strict=True))
    return result
