"""FusedOptimizer, which all optimizers are: the constructor, parameter groups and the step."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt._averages import check_decay, has_average
from fusedopt._averaging import AveragingOptimizer
from fusedopt._checkpoint import (
    COPIED,
    LOADED,
    Copied,
    Given,
    check_saved_by,
    options_when_loaded,
    own_states,
    states_by_param,
    versions_of,
    with_own_options,
)
from fusedopt._compiling import uncompiled
from fusedopt._counts import (
    without_skipped_first,
)
from fusedopt._extension import _C
from fusedopt._flat import FlatGradients, FlatParameters, are_flat
from fusedopt._formats import name_of
from fusedopt._masters import (
    forget_outdated,
    load_masters,
    note_weights,
    read_masters,
    with_known_weights,
)
from fusedopt._members import Group, can_have_state, check_members, is_ready, list_members
from fusedopt._norms import NormGroup
from fusedopt._overlap import has_own_elements
from fusedopt._rules import state_keys
from fusedopt._sharded import is_sharded, local_of
from fusedopt._states import is_begun, note_begun
from fusedopt._watched_state import OptimizerState, plain, watched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedOptimizer(AveragingOptimizer):
    """What all optimizers share.

    A subclass names its rule, by which the compiled module knows its maths. Where torch.optim has a
    class for it, it is a base as well: constructor, defaults and checks stay torch's.
    """

    _rule: str
    # Options with which states must not be codes, and why.
    _unsafe_in_int8: Mapping[str, str] = {}
    # Whether the constructor makes states, as that of torch's class does.
    _states_at_once = False

    # Class-level, as unpickling calls no constructor.
    _flats: tuple[FlatParameters, ...] = ()
    _own_defaults: Mapping[str, Any] = {}
    _given: Given = {}
    _flat = False
    _in_constructor = False

    def _init(
        self,
        options: Mapping[str, Any],
        flat: bool,
        max_grad_norm: float | None,
        args: dict[str, Any],
        differentiable: bool = False,
        norm_group: "ProcessGroup | None" = None,
    ) -> None:
        """Call the constructor of the other base, or torch's Optimizer, with args.

        Options are those of a group that this constructor does not know.
        """
        if differentiable:
            twin = self._twin()
            instead = "" if twin is None else f"; use torch.optim.{twin.__name__} for it"
            raise ValueError(
                f"{type(self).__name__}: differentiable=True is not supported: fused kernels have "
                f"no autograd formula{instead}"
            )
        self._own_defaults = dict(options)
        self._flat = flat
        self._workspace = _C.Workspace()
        self._first_counts = {}
        self._norm_group = None if norm_group is None else NormGroup(norm_group)
        self.max_grad_norm = max_grad_norm
        self._in_constructor = True
        try:
            super().__init__(**args)
        finally:
            del self._in_constructor
        self.defaults.update(options)
        self.state = OptimizerState(dict, self.state)
        self._make_states_early(self.param_groups)
        if self._states_at_once:
            those = [p for p in self._params() if can_have_state(p)]
            self._make_plan(self.state, [p for p in those if has_own_elements(local_of(p))])

    @classmethod
    def _twin(cls) -> type[Optimizer] | None:
        """The class of torch.optim that this one stands in for, where there is one."""
        bases = (base for base in cls.__mro__ if base.__module__.startswith("torch.optim."))
        return next((base for base in bases if base is not Optimizer), None)

    # -- parameter groups ---------------------------------------------------------------------

    def _rule_of(self, group: Mapping[str, Any]) -> str:
        """The rule that a group's parameters are updated by."""
        return self._rule

    def _group(self, index: int, options: dict[str, Any]) -> Group:
        rule = self._rule_of(options)
        return Group(type(self).__name__, index, options, rule, self._unsafe_in_int8)

    def _check_group(self, index: int, group: Mapping[str, Any]) -> None:
        """Raise ValueError where options of a group make no sense together."""

    def _groups(self, param_groups: Iterable[dict[str, Any]] | None = None) -> list[Group]:
        """The parameter groups, or what these would be as such."""
        all_options = self.param_groups if param_groups is None else param_groups
        return [self._group(index, options) for index, options in enumerate(all_options)]

    def _rules(self) -> list[str]:
        return [self._rule_of(group) for group in self.param_groups]

    def _state_keys(self) -> set[str]:
        """All keys that a state has by a rule of any group."""
        return state_keys(set(self._rules()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        index = len(self.param_groups)
        if isinstance(param_group, dict):
            for key, default in self._own_defaults.items():
                param_group.setdefault(key, default)
            if "state_dtype" in param_group:
                param_group["state_dtype"] = name_of(param_group["state_dtype"])
        super().add_param_group(param_group)
        added = self._group(index, self.param_groups[index])
        try:
            added.check_options()
            self._check_group(index, added.options)
            if has_average(added.options):
                check_decay(f"{type(self).__name__}: group {index}", added.options["ema_decay"])
            if self._max_grad_norm is not None:
                self._check_norm_group(added.params)
            # Others are looked at when they first have a gradient, as in torch.
            check_members(m for m in list_members([added]) if is_ready(m.param))
            if self._flat and any(is_sharded(p) for p in added.params):
                raise ValueError(
                    f"{type(self).__name__}: flat=True with sharded parameters, whose memory is "
                    "where FSDP has put it; use flat=False, a step costs the same"
                )
            if self._flat and added.params and not are_flat(added.params, type(self).__name__):
                self._flats += (FlatParameters(added.params, gradients=True),)
            self._plan = None
            # A plan is of all groups: one for each that a constructor adds takes ever longer.
            if not self._in_constructor:
                self._make_states_early([added.options])
        except Exception:
            self.param_groups.pop()
            raise

    def _make_states_early(self, added: list[dict[str, Any]]) -> None:
        """Make states of new groups that cannot wait for a step.

        Flat gradients always exist: torch's checkpoint code, which makes state by a step where
        there is no gradient yet, leaves it to us. Shards have to have state on all processes, also
        where one of these has no gradient; then all parameters have it.
        """
        if self._flat:
            early = [p for group in added for p in group["params"] if p.requires_grad]
        elif any(is_sharded(p) for p in self._params()):
            early = [p for p in self._params() if is_ready(p)]
        else:
            return
        if early:
            self._make_plan(self.state, early)
            self._begin_averages(early)

    # -- the step -----------------------------------------------------------------------------

    @property
    def max_grad_norm(self) -> float | None:
        """What the norm of all gradients is clipped to in a step; None: it is not clipped."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None:
            if not isinstance(value, int | float):
                raise TypeError(
                    f"{type(self).__name__}: max_grad_norm is {value!r}; expected a number or None"
                )
            if not value >= 0:
                raise ValueError(
                    f"{type(self).__name__}: max_grad_norm is {value}; expected at least 0, or None"
                )
            groups = getattr(self, "param_groups", ())
            self._check_norm_group(p for g in groups for p in g["params"])
        self._max_grad_norm = value

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step with max_grad_norm, before it was clipped.

        A float32 tensor of no dimension, on the parameters' device (on the CPU where they are on
        several, or cut among processes); None before the first such step. Reading it does not
        wait for the device.
        """
        return self._workspace.grad_norm

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's: plain dictionaries, the tensors themselves (not copies of them).

        Raises:
            TypeError: where functions for FSDP1 ask for states that they cannot take.
        """

        def to_plain_state(_: Optimizer, state_dict: dict[str, Any]) -> None:
            packed = plain(state_dict["state"])
            state_dict["state"] = without_skipped_first(packed, self._first_counts, self._groups())

        check_saved_by(sys._getframe(1), self._groups())
        self._forget_outdated_masters()
        handle = self.register_state_dict_post_hook(to_plain_state, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()
            self._given = versions_of(self.state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's class of the same name.

        States are copied and keep this optimizer's dtypes (torch would round them to the
        parameter's); hyper-parameters are taken from the state_dict.

        Raises:
            TypeError, ValueError: for a state that does not belong to its parameter. Nothing has
                been changed then.
        """

        # The hook is the last one, and sees what the user's hooks made of the state_dict.
        def check(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            options = options_when_loaded(loaded["param_groups"], self.param_groups, self.defaults)
            if options is None:
                return loaded  # torch's own check comes next, and says so
            members = list_members(self._groups(options))
            return {
                **loaded,
                "state": {LOADED: states_by_param(loaded, members, self.state, self._given)},
            }

        self._check_not_swapped("load_state_dict()")
        handle = self.register_load_state_dict_pre_hook(check)
        before = {**self.__dict__, "defaults": dict(self.defaults)}
        try:
            super().load_state_dict(dict(state_dict))
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        finally:
            handle.remove()
        self._workspace.forget_states()
        if self._release is not None:
            self._release.forget()

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_swapped("a copy")
        self._forget_outdated_masters()
        state = {
            **super().__getstate__(),
            "_max_grad_norm": self._max_grad_norm,
            "_norm_group": self._norm_group,
            # A plain tuple, as private classes have no place in pickles.
            COPIED: tuple(
                Copied(
                    isinstance(self.state, OptimizerState),
                    [p for p in self._params() if is_begun(p, self.state, self._workspace)],
                    with_known_weights(self._params(), self.state, self._workspace),
                )
            ),
        }
        if self._first_counts:
            packed = plain(self.state)
            state["state"] = without_skipped_first(packed, self._first_counts, self._groups())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_workspace" not in self.__dict__:
            self._workspace = _C.Workspace()
        self._first_counts = {}
        given = dict(state)
        states, copied = given.pop("state", {}), Copied(*given.pop(COPIED, ()))
        before = self.__dict__.get("param_groups", [])
        # torch would convert counts of steps in it, and trips over a state that has none.
        super().__setstate__({**given, "state": {}})
        if self._twin() is None:  # torch adds an option that only its own classes have
            self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)
        if LOADED in states:
            for group, ours in zip(self.param_groups, before, strict=True):
                own = with_own_options(group, ours)
                group.clear()
                group.update(own)
            members = list_members(self._groups())
            states = own_states(states[LOADED], members, self._state_keys())
        elif copied.watched and not isinstance(states, OptimizerState):
            states = watched(states)
        self.state = states
        note_weights(copied.known_weights, states, self._workspace)
        note_begun(copied.begun, states, self._workspace)
        self._plan = self._averages = None

    # -- master weights -----------------------------------------------------------------------

    def _forget_outdated_masters(self) -> None:
        forget_outdated(self._params(), self.state, self._workspace)

    def master_params(self) -> Iterator[Tensor]:
        """The weights that the optimizer works on, as float32 copies, in the order of the groups.

        Where a parameter has no master they are the parameter itself (float64 stays float64).
        """
        self._forget_outdated_masters()
        yield from read_masters(self._params(), self.state)

    def load_master_params(self, masters: Iterable[Tensor]) -> None:
        """Set parameters, and what is stored beside them, from what master_params() yields.

        Raises:
            ValueError: for another number of tensors or other shapes. Nothing has been changed
                then.
        """
        self._check_not_swapped("load_master_params()")
        members = list_members(self._groups())
        load_masters(type(self).__name__, [*masters], members, self.state, self._workspace)

    # -- gradients ----------------------------------------------------------------------------

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; flat ones are filled with zero and stay, whatever set_to_none."""
        if self._flat_gradients is None:
            self._flat_gradients = FlatGradients.of(self._params())
        flat = self._flat_gradients
        if not flat.are_all:
            super().zero_grad(set_to_none)
        if not flat.buffers and not flat.shared:
            return
        with torch.autograd.profiler.record_function(self._zero_grad_profile_name):
            intact = flat.zero()
        if not intact:
            self._flat_gradients = None
            self.zero_grad(set_to_none)
