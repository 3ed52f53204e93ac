"""How a plan is made, which is what the compiled module walks over in a step."""

from collections.abc import Callable, Container, Mapping, MutableMapping, Sequence, Set
from itertools import islice
from typing import Any

from torch import Tensor

from fusedopt._counts import FirstCounts, drop_first_counts, lineages, make_first_counts
from fusedopt._extension import _C
from fusedopt._members import Group, Member, add_member, check_members, is_ready, list_members
from fusedopt._norms import CutNorm
from fusedopt._states import complete_states, lacks_state, note_begun
from fusedopt._watched_state import OptimizerState, ParameterState


def make_plan(
    optimizer: str,
    groups: Sequence[Group],
    state: MutableMapping[Tensor, Any],
    *,
    new: Container[int],
    keys: Set[str],
    first_counts: FirstCounts,
    workspace: _C.Workspace,
    norm: CutNorm,
    flat_grad: Callable[[Member], int],
) -> _C.Plan:
    """A plan for the parameters of these groups.

    Args:
        optimizer: the name of its class, for errors.
        new: the ids of the parameters whose state is to be made.
        keys: all that states have by a rule.
        norm: that of all parameters, which knows how they are cut.
        flat_grad: the address of a member's flat gradient; 0: it has none.

    Raises:
        TypeError, ValueError: for a parameter that cannot be stepped and has a state or is new.
    """
    members = list_members(groups)
    live = {m for m in members if id(m.param) in new or _is_live(m, state)}
    looked_at = [member for member in members if member in live]
    check_members(looked_at)
    drop_first_counts(first_counts, state, members, keys)
    note_begun(complete_states(state, looked_at, new), state, workspace)
    make_first_counts(first_counts, looked_at, new)
    lineage = lineages(state, first_counts, looked_at, workspace.captured)

    plan = _C.Plan(optimizer, workspace, OptimizerState, ParameterState)
    remaining = iter(members)
    for group in groups:
        plan.add_group(group.rule, group.options, bool(group.options.get("capturable")))
        for member in islice(remaining, len(group.params)):
            param = member.param
            if member not in live:
                plan.add_idle(param)
                continue
            add_member(
                plan,
                member,
                flat_grad=flat_grad(member),
                first_count=first_counts.get(param),
                lineage=lineage.get(id(param), 0),
                cut=norm.number_of(member.ordinal),
            )
    return plan


def _is_live(member: Member, state: Mapping[Tensor, Any]) -> bool:
    """Whether a parameter has its state, or a gradient where it needs no state."""
    param = member.param
    if state.get(param):
        return not lacks_state(state, member)
    return _C.has_gradient(param) and is_ready(param) and not member.keys
