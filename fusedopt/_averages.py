"""Moving averages of weights, which optimizers keep where a group has ema_decay."""

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fusedopt._directions import Part, set_gradient
from fusedopt._extension import _C
from fusedopt._formats import EMA
from fusedopt._masters import forget_outdated, note_weights, with_known_weights
from fusedopt._members import Group, Member, can_have_state, list_members
from fusedopt._overlap import has_own_elements
from fusedopt._sharded import is_sharded, local_of, mesh_of, placements_of, wrap
from fusedopt._states import check_state, is_begun
from fusedopt._watched_state import OptimizerState, ParameterState, values_of

# average + lr * (weights - average), with the weights in place of a gradient.
AS_SGD: Final = {
    **{"momentum": 0, "dampening": 0, "nesterov": False},
    **{"maximize": True, "weight_decay": 1.0},
}
# A kernel that takes a float32 parameter with a gradient of another dtype.
OF_ANY_GRADIENT: Final = {"state_dtype": "int8", "min_8bit_size": 0}


def has_average(group: Mapping[str, Any]) -> bool:
    return group.get("ema_decay") is not None


def have_averages(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any group has them. Each step asks: a loop takes half as long as any()."""
    for group in groups:  # noqa: SIM110
        if group.get("ema_decay") is not None:
            return True
    return False


def check_decay(what: str, decay: Any) -> None:
    """Raise TypeError or ValueError for an ema_decay that is none."""
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"{what}: ema_decay is {decay!r}; expected a number or None")
    if not 0 <= decay < 1:
        raise ValueError(f"{what}: ema_decay is {decay}; expected at least 0 and less than 1")


class _Seen:
    """What there was when all averages were last looked up, to be found again at little cost.

    It holds no tensors.

    Attributes:
        steps: of each step the index of the group, whether no plain kernel takes the averages and
            their parameters, and the places of these among all parameters.
    """

    def __init__(self, groups: Sequence[Group], state: Mapping[Tensor, Any]) -> None:
        self._changes = _C.changes()  # before anything is looked up
        params = [param for group in groups for param in group.params]
        members = {m.ordinal: m for m in list_members(groups) if has_average(m.group.options)}
        averages = {at: values_of(state, m.param).get(EMA) for at, m in members.items()}
        self.steps: dict[tuple[int, bool], list[int]] = {}
        for at, average in averages.items():
            if average is not None and not members[at].duplicate:
                other = _is_other(local_of(average), members[at].local)
                self.steps.setdefault((members[at].group.index, other), []).append(at)
        self._waiting = [at for at, average in averages.items() if average is None]
        self._options = [_options_of(group.options) for group in groups]
        self._ids = [*map(id, params)]
        there = [params[at] for places in self.steps.values() for at in places]
        self._weights = [_identity_of(local_of(param)) for param in there]
        # Other dictionaries tell of no changes, and shards may be exchanged.
        watched = type(state) is OptimizerState
        watched = watched and all(type(state[param]) is ParameterState for param in there)
        self._is_plain = watched and not any(is_sharded(m.param) for m in members.values())

    def is_there(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        params = [param for group in groups for param in group["params"]]
        return (
            self._is_plain
            and type(state) is OptimizerState
            and self._changes == _C.changes()
            and self._options == [_options_of(group) for group in groups]
            and self._ids == [*map(id, params)]
            and not any(_C.has_gradient(params[at]) for at in self._waiting)
            and self._weights
            == [_identity_of(params[at]) for places in self.steps.values() for at in places]
            and all(params[at] in state for places in self.steps.values() for at in places)
        )


def _identity_of(weights: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return weights.data_ptr(), weights.dtype, weights.shape


def _options_of(group: Mapping[str, Any]) -> tuple[Any, Any]:
    return group.get("ema_decay"), group.get("state_dtype")


class Averages:
    """Keeps the averages of an optimizer's parameters in their states.

    Between steps it holds neither of them.
    """

    def __init__(self, optimizer: str) -> None:
        # A step with parameters for gradients, without any state.
        self._part = Part(optimizer, _C.Workspace(), frozenset())
        self._seen: _Seen | None = None

    def are_known(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether nothing has changed since update(), so that step() does."""
        return self._seen is not None and self._seen.is_there(groups, state)

    def step(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any], found_inf: Any
    ) -> None:
        """Average the weights of the same parameters as update() has."""
        if self._seen is not None:
            self._step(self._seen.steps, groups, state, found_inf)

    def check(self, groups: Sequence[Group], state: Mapping[Tensor, Any]) -> None:
        """Raise what update() would raise."""
        for group in groups:
            if has_average(group.options):
                check_decay(f"{group.optimizer}: group {group.index}", group.options["ema_decay"])
        for member in _averaged(groups, state):
            _ = member.format  # which says how averages are stored
            check_average(member, values_of(state, member.param).get(EMA))

    def fresh(
        self,
        groups: Sequence[Group],
        state: Mapping[Tensor, Any],
        workspace: _C.Workspace,
        made: Mapping[Tensor, bool] | None,
    ) -> set[int]:
        """The ids of parameters whose average was made for a step that is still to come.

        Args:
            made: the averages that were made for it; None: nobody knows, as in a copy.
        """

        def is_made(param: Tensor) -> bool:
            average = values_of(state, param).get(EMA)
            return average is not None and (made is None or average in made)

        those = (member.param for member in _averaged(groups, state))
        return {id(p) for p in those if is_made(p) and is_begun(p, state, workspace)}

    def update(
        self,
        groups: Sequence[Group],
        state: MutableMapping[Tensor, Any],
        fresh: Container[int],
        found_inf: Any,
    ) -> None:
        """Average the weights of all parameters that are stepped; first averages are copies."""
        begun: list[Member] = []
        for member in _averaged(groups, state):
            average = values_of(state, member.param).get(EMA)
            if average is None or id(member.param) in fresh:
                begun.append(member)
            elif not _fits(member, average):
                state[member.param][EMA] = _converted(member, average)
        those = {member.ordinal for member in begun}
        self._seen = _Seen(groups, state)
        self._part._plan = None  # that tells no other storage
        steps = {
            key: [place for place in places if place not in those]
            for key, places in self._seen.steps.items()
        }
        self._step(steps, [group.options for group in groups], state, found_inf)
        if begun:
            self._seen = None
            if found_inf is None or not bool(found_inf):
                begin_averages(begun, state)

    def _step(
        self,
        steps: Mapping[tuple[int, bool], Sequence[int]],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Any],
        found_inf: Any,
    ) -> None:
        params = [param for group in groups for param in group["params"]]
        stepped: list[tuple[int, str, dict[str, Any]]] = []
        averages: list[Tensor] = []
        try:
            for (index, other), places in steps.items():
                those = [local_of(state[params[place]][EMA]) for place in places]
                averages += those
                for average, place in zip(those, places, strict=True):
                    set_gradient(average, local_of(params[place]))
                options = {"params": those, "lr": 1 - float(groups[index]["ema_decay"]), **AS_SGD}
                stepped.append((index, "sgd", options | (OF_ANY_GRADIENT if other else {})))
            self._part.set_groups(stepped)
            self._part.found_inf = found_inf
            if averages:
                self._part._step()
        finally:
            for average in averages:
                average.grad = None
            self._part.let_go()


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


def check_average(member: Member, average: Any) -> None:
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
    if member.is_sharded and average.shape != param.shape:
        raise ValueError(
            f"{where} has the whole shape {tuple(average.shape)}; expected that of the parameter, "
            f"{tuple(param.shape)}"
        )
    if member.is_sharded and (
        mesh_of(average) != mesh_of(param) or placements_of(average) != placements_of(param)
    ):
        raise ValueError(
            f"{where} is sharded as {placements_of(average)} among {mesh_of(average)}; expected it "
            f"as the parameter, {placements_of(param)} among {mesh_of(param)}"
        )
    local = local_of(average)
    check_state(member, {EMA: local})
    if not has_own_elements(local) or (
        local.numel() > 0 and local.data_ptr() == member.local.data_ptr()
    ):
        raise ValueError(
            f"{where} shares memory, with itself or its parameter; expected a tensor of its own"
        )


def averages_of(groups: Sequence[Group], state: Mapping[Tensor, Any]) -> Iterator[Tensor]:
    """The average of each parameter; the parameter itself where there is none."""
    for group in groups:
        for param in group.params:
            average = values_of(state, param).get(EMA) if has_average(group.options) else None
            yield param.detach() if average is None else average


@contextlib.contextmanager
def swapped(
    groups: Sequence[Group], state: Mapping[Tensor, Any], workspace: _C.Workspace
) -> Iterator[None]:
    """Within it parameters are their averages; afterwards they are to the bit what they were.

    Raises:
        TypeError, ValueError: for what cannot be the average of its parameter. Nothing has been
            changed then.
    """
    averages: dict[Tensor, Tensor] = {}
    for member in list_members(groups):
        average = values_of(state, member.param).get(EMA)
        if average is not None and has_average(member.group.options):
            check_average(member, average)
            averages[member.param] = average
    forget_outdated(averages, state, workspace)
    known = with_known_weights(averages, state, workspace)
    with torch.no_grad():
        before = {param: local_of(param).clone() for param in averages}
    try:
        _write(averages)
        # Masters stay those of the weights that come back.
        note_weights(known, state, workspace)
        yield
    finally:
        _write(before)
        note_weights(known, state, workspace)


@torch.no_grad()
def _write(values: Mapping[Tensor, Tensor]) -> None:
    for param, value in values.items():
        local_of(param).copy_(local_of(value))
