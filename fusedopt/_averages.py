"""Moving averages of weights, which optimizers keep where a group has ema_decay."""

import contextlib
import operator
from collections.abc import Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fusedopt._directions import Part
from fusedopt._extension import _C
from fusedopt._formats import EMA
from fusedopt._masters import note_weights, with_known_weights
from fusedopt._members import Group, Member, can_have_state, list_members
from fusedopt._sharded import is_sharded, local_of, mesh_of, placements_of, wrap
from fusedopt._states import is_begun
from fusedopt._watched_state import ParameterState, values_of

# average + lr * (weights - average), with the weights in place of a gradient.
AS_SGD: Final = {
    **{"momentum": 0, "dampening": 0, "nesterov": False},
    **{"maximize": True, "weight_decay": 1.0},
}
# A kernel that takes a float32 parameter with a gradient of another dtype.
OF_ANY_GRADIENT: Final = {"state_dtype": "int8", "min_8bit_size": 0}


def has_average(group: Mapping[str, Any]) -> bool:
    return group.get("ema_decay") is not None


def check_decay(what: str, decay: Any) -> None:
    """Raise TypeError or ValueError for an ema_decay that is none."""
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"{what}: ema_decay is {decay!r}; expected a number or None")
    if not 0 <= decay < 1:
        raise ValueError(f"{what}: ema_decay is {decay}; expected at least 0 and less than 1")


class _Seen:
    """What was there when all averages were last looked up, to be found again at little cost."""

    def __init__(self, groups: Sequence[Group], state: Mapping[Tensor, Any]) -> None:
        self._state, self._changes = state, _C.changes()
        self._options = [_options_of(group.options) for group in groups]
        self._params = [param for group in groups for param in group.params]
        averaged = [p for g in groups if has_average(g.options) for p in g.params]
        self._waiting = [p for p in averaged if values_of(state, p).get(EMA) is None]
        waiting = set(map(id, self._waiting))
        self._locals = [local_of(p) for p in averaged if id(p) not in waiting]
        self._addresses = [local.data_ptr() for local in self._locals]
        # Others tell of no changes, and shards may be exchanged.
        watched = all(
            type(state.get(p)) is ParameterState for p in averaged if id(p) not in waiting
        )
        self._is_plain = watched and not any(map(is_sharded, averaged))

    def is_there(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        params = [param for group in groups for param in group["params"]]
        return (
            self._is_plain
            and self._state is state
            and self._changes == _C.changes()
            and self._options == [_options_of(group) for group in groups]
            and len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and not any(map(_C.has_gradient, self._waiting))
            and self._addresses == [local.data_ptr() for local in self._locals]
        )


def _options_of(group: Mapping[str, Any]) -> tuple[Any, Any]:
    return group.get("ema_decay"), group.get("state_dtype")


class Averages:
    """Keeps the averages of an optimizer's parameters in their states."""

    def __init__(self, optimizer: str) -> None:
        # A step by the averages' parameters as gradients, without any state.
        self._part = Part(optimizer, _C.Workspace(), frozenset())
        # What the part steps: of each average a plain tensor, whose gradient is the parameter.
        self._stepped: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._seen: _Seen | None = None

    def are_known(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether nothing has changed since update(), so that step() does."""
        return self._seen is not None and self._seen.is_there(groups, state)

    def step(self, found_inf: Any) -> None:
        """Average the same weights as update() has."""
        self._part.found_inf = found_inf
        if self._part.param_groups:
            self._part._step()

    def check(self, groups: Sequence[Group], state: Mapping[Tensor, Any]) -> None:
        """Raise what update() would raise."""
        for group in groups:
            if has_average(group.options):
                check_decay(f"{group.optimizer}: group {group.index}", group.options["ema_decay"])
        for member in _averaged(groups, state):
            _check_average(member, values_of(state, member.param).get(EMA))

    def fresh(
        self, groups: Sequence[Group], state: Mapping[Tensor, Any], workspace: _C.Workspace
    ) -> set[int]:
        """The ids of parameters whose average was made for a step that is still to come."""
        those = (member.param for member in _averaged(groups, state))
        return {id(param) for param in those if is_begun(param, state, workspace)}

    def update(
        self,
        groups: Sequence[Group],
        state: MutableMapping[Tensor, Any],
        fresh: Container[int],
        found_inf: Any,
    ) -> None:
        """Average the weights of all parameters that are stepped; first averages are copies."""
        stepped: dict[tuple[int, bool], list[Tensor]] = {}
        begun = False
        for member in _averaged(groups, state):
            average = values_of(state, member.param).get(EMA)
            if average is None or id(member.param) in fresh:
                begin_averages([member], state)
                begun = True
                continue
            if not _fits(member, average):
                average = state[member.param][EMA] = _converted(member, average)
            tensor = self._tensor_of(member, average)
            key = member.group.index, _is_other(tensor, member.local)
            stepped.setdefault(key, []).append(tensor)
        decays = {group.index: group.options.get("ema_decay") for group in groups}
        part_groups: list[tuple[int, str, dict[str, Any]]] = []
        for (index, other), tensors in stepped.items():
            options = {"params": tensors, "lr": 1 - float(decays[index] or 0), **AS_SGD}
            part_groups.append((index, "sgd", options | (OF_ANY_GRADIENT if other else {})))
        self._part.set_groups(part_groups)
        self.step(found_inf)
        self._seen = None if begun else _Seen(groups, state)

    def _tensor_of(self, member: Member, average: Tensor) -> Tensor:
        """What stands for an average in steps; users see neither it nor its gradient."""
        weights, known = member.local, self._stepped.get(member.param)
        if known is not None:
            found, made = known
            if found is average and made.grad is not None and _is_same_memory(made.grad, weights):
                return made
        tensor: Tensor = local_of(average).detach()
        if tensor.dtype != weights.dtype:
            tensor.grad_dtype = weights.dtype
        tensor.grad = weights.detach()
        self._stepped[member.param] = average, tensor
        return tensor


def begin_averages(members: Iterable[Member], state: MutableMapping[Tensor, Any]) -> None:
    """Make averages of what weights are now."""
    for member in members:
        if member.param not in state:
            state[member.param] = ParameterState()
        average = state[member.param].get(EMA)
        if average is None or not _fits(member, average):
            state[member.param][EMA] = _first_average(member)
        else:
            local_of(average).copy_(member.local.detach())


def _averaged(groups: Sequence[Group], state: Mapping[Tensor, Any]) -> Iterator[Member]:
    """The members that have an average, or are stepped and get one."""
    if not any(has_average(group.options) for group in groups):
        return
    for member in list_members(groups):
        if member.duplicate or not has_average(member.group.options):
            continue
        param = member.param
        if (state.get(param) or _C.has_gradient(param)) and can_have_state(param):
            yield member


def _is_other(average: Tensor, weights: Tensor) -> bool:
    """Whether no plain kernel takes them as a parameter and its gradient."""
    return average.dtype == torch.float32 and weights.dtype in (torch.bfloat16, torch.float16)


def _is_same_memory(grad: Tensor, weights: Tensor) -> bool:
    return (
        grad.data_ptr() == weights.data_ptr()
        and grad.dtype == weights.dtype
        and grad.shape == weights.shape
        and grad.stride() == weights.stride()
    )


def _dtype_of(member: Member) -> torch.dtype:
    """As states have it that cannot be codes."""
    state = torch.float32 if member.format.codes else member.format.state
    return state.to_complex() if member.local.is_complex() else state


def _first_average(member: Member) -> Tensor:
    weights = member.local.detach()
    average = torch.empty_like(weights, dtype=_dtype_of(member)).copy_(weights)
    return wrap(average, member.param) if member.is_sharded else average


def _fits(member: Member, average: Tensor) -> bool:
    local = local_of(average)
    return bool(local.dtype == _dtype_of(member) and local.device == member.local.device)


def _converted(member: Member, average: Tensor) -> Tensor:
    local = local_of(average).to(member.local.device, _dtype_of(member))
    return wrap(local, member.param) if member.is_sharded else local


def _check_average(member: Member, average: Any) -> None:
    if average is None:
        return
    where, param = member.where(EMA), member.param
    if not isinstance(average, Tensor):
        raise TypeError(f"{where} is a {type(average).__name__}; expected a tensor")
    if is_sharded(average) != member.is_sharded:
        raise TypeError(
            f"{where} is {'sharded' if is_sharded(average) else 'a plain tensor'}, but the "
            f"parameter is {'sharded' if member.is_sharded else 'a plain tensor'}; load it with "
            "torch.distributed.checkpoint"
        )
    if average.shape != param.shape or local_of(average).shape != member.local.shape:
        raise ValueError(
            f"{where} has shape {tuple(average.shape)}; expected that of the parameter, "
            f"{tuple(param.shape)}"
        )
    if member.is_sharded and (
        mesh_of(average) != mesh_of(param) or placements_of(average) != placements_of(param)
    ):
        raise ValueError(
            f"{where} is sharded as {placements_of(average)} among {mesh_of(average)}; expected it "
            f"as the parameter, {placements_of(param)} among {mesh_of(param)}"
        )


def averages_of(params: Iterable[Tensor], state: Mapping[Tensor, Any]) -> Iterator[Tensor]:
    """The average of each parameter; the parameter itself where there is none."""
    for param in params:
        average = values_of(state, param).get(EMA)
        yield param.detach() if average is None else average


@contextlib.contextmanager
def swapped(
    params: Sequence[Tensor], state: Mapping[Tensor, Any], workspace: _C.Workspace
) -> Iterator[None]:
    """Within it parameters are their averages; afterwards they are to the bit what they were."""
    known = with_known_weights(params, state, workspace)
    averages = {p: a for p in params if (a := values_of(state, p).get(EMA)) is not None}
    with torch.no_grad():
        before = {param: local_of(param).clone() for param in averages}
        _write(averages)
    # Masters stay those of the weights that come back.
    note_weights(known, state, workspace)
    try:
        yield
    finally:
        with torch.no_grad():
            _write(before)
        note_weights(known, state, workspace)


def _write(values: Mapping[Tensor, Tensor]) -> None:
    for param, value in values.items():
        local_of(param).copy_(local_of(value))
