"""The step: by a plan, which is made anew where something has changed, and with other processes."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusedopt._counts import FirstCounts
from fusedopt._extension import _C
from fusedopt._flat import FlatGradients, find_buffer
from fusedopt._members import Group, Member, is_ready, list_members
from fusedopt._norms import (
    CutNorm,
    NormGroup,
    SkippedElsewhere,
    check_measured,
    check_norm_group,
    note_untold,
)
from fusedopt._plans import make_plan
from fusedopt._sharded import is_sharded, placed_grad, whole_of
from fusedopt._states import replace_values
from fusedopt._watched_state import held_still

# Plans that are made for one step before it gives up: more than one round is needed only where
# another thread changes what was looked up.
MOST_PLANS: Final = 20
# Those of them for which other threads may change state, too.
FREE_PLANS: Final = 3


class Release(Protocol):
    """What takes steps within the backward pass; see GradientRelease."""

    def before_step(self) -> None:
        """Raise for gradients that came too late."""

    def after_step(self) -> None:
        """End the iteration."""

    def forget(self) -> None:
        """Take it that no parameter was stepped in this iteration."""


class SteppingOptimizer(Optimizer):
    """An optimizer that steps by plans. What its groups mean a subclass says."""

    # Class-level, as unpickling calls no constructor.
    _plan: _C.Plan | None = None
    _flat_gradients: FlatGradients | None = None  # None: not known yet
    _warned_detached = False
    _max_grad_norm: float | None = None
    _norm_group: NormGroup | None = None
    _cut_norm: CutNorm | None = None  # None: all gradients are whole
    _release: "Release | None" = None
    _workspace: _C.Workspace
    # Of parameters whose state names no count, the steps taken on the device since it was made.
    _first_counts: FirstCounts

    @property
    def _name(self) -> str:
        """What errors call it."""
        return type(self).__name__

    def _groups(self, param_groups: Iterable[dict[str, Any]] | None = None) -> list[Group]:
        raise NotImplementedError

    def _rules(self) -> list[str]:
        """The rule of each group."""
        raise NotImplementedError

    def _params(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _state_keys(self) -> set[str]:
        raise NotImplementedError

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # With it GradScaler leaves unscaling and skipping to step(), in which nobody can clip.
        return bool(self.defaults.get("fused"))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it where fused=True; a copy has to know it, too."""

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a class's step, which torch's constructor does once for each class.

        torch's own wrapper names the step to profilers and calls hooks. It takes several times as
        long as a small step, so it is left out where nobody listens.
        """
        recorded = Optimizer.profile_hook_step(func)
        uncompiled = _disable_dynamo(recorded)

        @functools.wraps(func)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return uncompiled(self, *args, **kwargs)
            if (
                _C.is_recorded()
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            ):
                return recorded(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return wrapper

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in one pass.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: for a sparse gradient.
            TypeError, ValueError: for a gradient, parameter, state or option that cannot be taken;
                the message names it. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is None:
            self._step()
        else:
            self._release.before_step()
            self._step()
            self._release.after_step()
        return loss

    def _step(self, grads: list[tuple[Tensor, Tensor]] | None = None) -> bool:
        """Step without hooks, unless another process skips the step.

        Args:
            grads: sharded parameters, each with a plain tensor in place of its gradient.

        Returns:
            Whether no other process skips it.
        """
        state = self.state  # which another thread may replace meanwhile
        if self._cut_norm is not None:
            self._check_no_capture()
            self._cut_norm.begin()
        grads = [] if grads is None else grads
        try:
            missing = self._take_step(self._plan or self._make_plan(state), state, grads)
            if missing is not None:
                self._step_anew(missing, state, grads)
        except SkippedElsewhere:
            return False
        except Exception as error:
            self._tell_others(error)
            raise
        return True

    def _steps_alone(self, index: int, param: Tensor) -> bool:
        """Whether a parameter's step has nothing to do with others, here and elsewhere.

        Args:
            index: of its group.

        Raises:
            RuntimeError: where the group cannot be stepped now.
        """
        if self._max_grad_norm is not None:
            return False
        group = self.param_groups[index]
        return not (is_sharded(param) and _C.measures(self._rules()[index], group))

    def _step_alone(self, param: Tensor, others: Callable[[], list[Tensor]]) -> bool:
        """Step one parameter that has a gradient, unless it has to wait for step().

        Args:
            others: parameters that get their states along with it, if it has none: a plan takes as
                long for one as for all.

        Returns:
            Whether it was stepped. It is not where it does not step alone, or is in no group.
        """
        grads: list[tuple[Tensor, Tensor]] = []
        for _ in range(MOST_PLANS):
            plan = self._plan or self._make_plan(self.state)
            place = plan.place_of(param)
            if place is None or not self._is_at(param, place):
                plan = self._make_plan(self.state)  # groups were changed by hand
                place = plan.place_of(param)
            if place is None or not self._steps_alone(place[1], param):
                return False
            lacks = plan.step(self.param_groups, self.state, None, None, None, [place[0]], grads)
            if lacks is None:
                return True
            grads += self._placed_grads(lacks.gradients)
            if lacks.gradients:
                continue
            new: list[Tensor] = []
            if lacks.states:
                self._check_capture(param)
                new = [param, *others()]
            self._make_plan(self.state, new)
        raise self._error_of_others()

    def _is_at(self, param: Tensor, place: tuple[int, int, int]) -> bool:
        _, index, in_group = place
        groups = self.param_groups
        params = groups[index]["params"] if index < len(groups) else ()
        return in_group < len(params) and params[in_group] is param

    def _without_state(self) -> list[Tensor]:
        """The parameters that step alone, and have no state yet."""
        return [
            param
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
            if not self.state.get(param) and is_ready(param) and self._steps_alone(index, param)
        ]

    def _check_step(
        self, grads: list[tuple[Tensor, Tensor]], positions: list[int] | None = None
    ) -> None:
        """Raise what a step would raise, but for what has to do with other processes' gradients.

        Args:
            grads: to which those are added that were redistributed for it.
            positions: of the parameters whose gradients are looked at; None: all.
        """
        for _ in range(MOST_PLANS):
            plan = self._plan or self._make_plan(self.state)
            lacks = plan.step(
                self.param_groups, self.state, None, None, None, positions, grads, check_only=True
            )
            if lacks is None:
                return
            grads += self._placed_grads(lacks.gradients)
            if not lacks.gradients:
                params = [*self._params()]
                self._make_plan(self.state, [params[i] for i in lacks.states])

    def _take_step(
        self, plan: _C.Plan, state: Mapping[Tensor, Any], grads: list[tuple[Tensor, Tensor]]
    ) -> list[int] | None:
        """Step by a plan; see _C.Plan.step.

        Args:
            grads: what was redistributed for this step, to which more is added.

        Returns:
            None where it is done, else the positions of the parameters that lack state.
        """
        # What GradScaler sets for a step; getattr() takes longer for what is not there.
        own = self.__dict__
        grad_scale, found_inf = own.get("grad_scale"), own.get("found_inf")
        if grad_scale is not None or found_inf is not None:
            grad_scale, found_inf = whole_of(grad_scale), whole_of(found_inf)
        clip, norm = self._max_grad_norm, self._cut_norm
        add_up = (None, None) if norm is None else (norm.add_up, self._add_up_measured)
        while True:
            lacks = plan.step(
                self.param_groups, state, grad_scale, found_inf, clip, None, grads, *add_up
            )
            if lacks is None:
                found = found_inf is not None and norm is not None and not norm.gathered
                if found and norm is not None and self._adds_up():
                    norm.skip()  # for an Inf that this process has found
                return None
            if not lacks.gradients:
                return lacks.states
            grads += self._placed_grads(lacks.gradients)

    def _placed_grads(self, positions: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
        """The gradients of sharded parameters as plain tensors, placed as the parameters are."""
        members = list_members(self._groups())
        those = (members[position] for position in positions)
        what = self._name
        return [(m.param, placed_grad(m.param, f"{what}: {m.name}")) for m in those]

    def _tell_others(self, error: Exception) -> None:
        """Let other processes, that wait for this one's gradients, know that it cannot step."""
        try:
            if not self._adds_up():
                return
            norm = self._cut_norm or self._make_norm()
            if norm.groups and (not norm.gathered or (norm.waits and self._measures())):
                norm.fail()
        except Exception as other:
            note_untold(error, other)

    def _add_up_measured(self, sums: Tensor) -> None:
        assert self._cut_norm is not None
        self._cut_norm.add_up_measured(self._params(), self._param_name, sums)

    def _param_name(self, position: int) -> str:
        return list_members(self._groups())[position].name

    def _adds_up(self) -> bool:
        """Whether a step adds up something over the processes that parameters are cut among."""
        return self._max_grad_norm is not None or self._measures()

    def _measures(self) -> bool:
        """Whether parameters are measured before they are stepped."""
        return any(map(_C.measures, self._rules(), self.param_groups))

    def _check_no_capture(self) -> None:
        if any(map(_C.is_capturing, self._devices())) and self._adds_up():
            raise RuntimeError(
                f"{self._name}: a step whose parameters or gradients are cut among processes, and "
                "that measures them, as max_grad_norm does, cannot be captured into a CUDA graph, "
                "as the host adds up what they have measured"
            )

    def _devices(self) -> set[torch.device]:
        first = next(self._params(), None)
        return set() if first is None else {first.device}

    def _step_anew(
        self,
        missing: list[int],
        state: MutableMapping[Tensor, Any],
        grads: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Step by a new plan, in which the parameters at these positions get their state.

        The first one only tells which parameters lack state, where something else has changed.
        """
        new: dict[int, Tensor] = {}
        before: list[tuple[Tensor, Any]] = []
        try:
            for number in range(MOST_PLANS):
                params = [*self._params()]
                for param in (params[i] for i in missing if i < len(params)):
                    if id(param) not in new:
                        self._check_capture(param)
                        new[id(param)] = param
                        values = state.get(param)
                        before.append((param, dict(values) if values is not None else None))
                with self._states_held(number):
                    found = self._take_step(self._make_plan(state, new.values()), state, grads)
                if found is None:
                    return
                missing = found
            raise self._error_of_others()
        except BaseException:
            for param, values in before:
                replace_values(state, param, values)
                if not values:
                    self._workspace.forget_begun(param)
            raise

    def _error_of_others(self) -> RuntimeError:
        return RuntimeError(
            f"{self._name}: another thread changes parameters or their state faster than they can "
            "be looked up; nothing was stepped"
        )

    def _states_held(self, number: int) -> AbstractContextManager[object]:
        """For the plan of this number: lets no other thread change state, where that may help.

        Steps that wait for other processes never hold it: these may be threads that change state.
        """
        if number < FREE_PLANS:
            return nullcontext()
        waits = self._norm_group is not None or any(map(is_sharded, self._params()))
        return nullcontext() if waits else held_still()

    def _check_capture(self, param: Tensor) -> None:
        if _C.is_capturing(param.device):
            raise RuntimeError(
                f"{self._name}: the first step, which makes the state, cannot be "
                "captured into a CUDA graph; take a step before capture begins"
            )

    def _make_plan(self, state: MutableMapping[Tensor, Any], new: Iterable[Tensor] = ()) -> _C.Plan:
        """Look up everything that steps walk over; make state for the parameters in new."""
        if self._max_grad_norm is not None:
            self._check_norm_group(self._params())
        self._check_measured()
        norm = self._make_norm()
        self._plan = make_plan(
            self._name,
            self._groups(),
            state,
            new={id(param) for param in new},
            keys=self._state_keys(),
            first_counts=self._first_counts,
            workspace=self._workspace,
            norm=norm,
            flat_grad=self._flat_grad,
        )
        self._cut_norm = norm if norm.groups else None
        self._flat_gradients = None
        return self._plan

    def _make_norm(self) -> CutNorm:
        group = None if self._norm_group is None else self._norm_group.group
        return CutNorm(self._name, self._params(), group)

    def _check_measured(self) -> None:
        """Raise ValueError for parameters that are measured, and cannot be."""
        given = self._norm_group is not None
        for rule, group in zip(self._rules(), self.param_groups, strict=True):
            if _C.measures(rule, group):
                check_measured(self._name, group["params"], given)

    def _check_norm_group(self, params: Iterable[Tensor]) -> None:
        check_norm_group(self._name, params, given=self._norm_group is not None)

    def _flat_grad(self, member: Member) -> int:
        """The address of a member's flat gradient; 0 for none. Warns of a lost parameter."""
        buffer = find_buffer(member.param)
        if buffer is None:
            return 0
        if buffer.holds(member.param):
            return buffer.slots[id(member.param)].grad_address
        if not self._warned_detached:
            self._warned_detached = True
            warnings.warn(
                f"{self._name}: {member.name} was moved into a flat buffer and is no "
                "longer there (module.to(), param.data = ...); it is stepped where it is now, on "
                "its own. Make FlatParameters anew to have it flat again.",
                stacklevel=2,
            )
        return 0
