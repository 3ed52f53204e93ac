"""AveragingOptimizer, what an optimizer does with averages of the weights: steps, shows, swaps."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fusedopt._averages import (
    Averages,
    averages_of,
    begin_averages,
    has_average,
    have_averages,
    swapped,
)
from fusedopt._formats import EMA
from fusedopt._members import list_members
from fusedopt._sharded import is_sharded, reshard, whole_of
from fusedopt._states import is_begun, note_begun
from fusedopt._step import SteppingOptimizer


class AveragingOptimizer(SteppingOptimizer):
    """An optimizer that keeps averages of the weights where a group has ema_decay."""

    # Class-level, as unpickling calls no constructor.
    _averages: Averages | None = None  # None: they were not asked for yet
    _begun_averages: WeakTensorKeyDictionary | None = None  # None: not known, as in a copy
    _is_swapped = False

    def _step(self, grads: list[tuple[Tensor, Tensor]] | None = None) -> bool:
        if not have_averages(self.param_groups):
            return self._update(grads)
        if self._averages is None:
            self._averages = Averages(type(self).__name__)
        if self._cut_norm is not None:
            self._cut_norm.begin()
        averages, groups, fresh = self._averages, self._groups(), set[int]()
        try:
            if self._is_swapped:
                raise RuntimeError(
                    f"{type(self).__name__}: step() within swap_ema(); leave it first"
                )
            if not averages.are_known(self.param_groups, self.state):
                averages.check(groups, self.state)
                fresh = averages.fresh(groups, self.state, self._workspace, self._begun_averages)
        except Exception as error:
            self._tell_others(error)
            raise
        if not self._update(grads):
            return False
        found_inf = whole_of(getattr(self, "found_inf", None))
        if averages.are_known(self.param_groups, self.state):
            averages.step(self.param_groups, self.state, found_inf)
        else:
            averages.update(groups, self.state, fresh, found_inf)
        return True

    def _update(self, grads: list[tuple[Tensor, Tensor]] | None) -> bool:
        """A step without averages."""
        return super()._step(grads)

    def _steps_alone(self, index: int, param: Tensor) -> bool:
        self._check_not_swapped("a step")
        if not super()._steps_alone(index, param):
            return False
        # In a first step the average, which is to be the weights after it, is not made yet.
        return not has_average(self.param_groups[index]) or bool(
            self.state.get(param) and not is_begun(param, self.state, self._workspace)
        )

    def _begin_averages(self, params: Sequence[Tensor]) -> None:
        """Make averages for a step that is still to come, as states are made."""
        those = {id(param) for param in params}
        members = [
            member
            for member in list_members(self._groups())
            if id(member.param) in those and has_average(member.group.options)
            if EMA not in self.state.get(member.param, {})
        ]
        begin_averages(members, self.state)
        made = self._begun_averages or WeakTensorKeyDictionary()
        made.update((self.state[member.param][EMA], True) for member in members)
        self._begun_averages = made
        note_begun((member.param for member in members), self.state, self._workspace)

    def ema_params(self) -> Iterator[Tensor]:
        """The averages of the weights that ema_decay asks for, in the order of the groups.

        They are those of the last step, not copies. Where a parameter has none, as it has never
        been stepped, its average is itself.

        Raises:
            RuntimeError: where no group has ema_decay.
        """
        self._check_averages()
        return averages_of(self._groups(), self.state)

    def swap_ema(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """A context in which parameters are their averages, for evaluating or saving a model.

        Afterwards they are to the bit what they were, as are masters. A step within it is an error.
        It takes the memory of a copy of the parameters.

        Args:
            model: of sharded parameters; weights that FSDP2 has gathered are let go of at both
                ends, as they are other ones then.

        Raises:
            RuntimeError: where no group has ema_decay, and within another one.
            TypeError, ValueError: for an average that cannot be its parameter's, and for sharded
                parameters without the model. Nothing has been changed then.
        """
        self._check_averages()
        self._check_not_swapped("swap_ema()")
        if model is None and any(map(is_sharded, self._params())):
            raise ValueError(
                f"{type(self).__name__}: swap_ema() of sharded parameters, whose weights may have "
                "been gathered; give it the model: swap_ema(model)"
            )
        return self._swapped(model)

    @contextlib.contextmanager
    def _swapped(self, model: nn.Module | None) -> Iterator[None]:
        self._check_not_swapped("swap_ema()")
        reshard(model)
        with swapped(self._groups(), self.state, self._workspace):
            self._is_swapped = True
            try:
                yield
            finally:
                self._is_swapped = False
                reshard(model)

    def _check_averages(self) -> None:
        if not have_averages(self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: there are no averages of the weights; give ema_decay= to "
                "the optimizer, or to a group of it"
            )

    def _check_not_swapped(self, what: str) -> None:
        if self._is_swapped:
            raise RuntimeError(
                f"{type(self).__name__}: {what} within swap_ema(), where parameters are their "
                "averages; leave it first"
            )
