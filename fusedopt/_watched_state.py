"""Optimizer state that tells when it was changed.

A step borrows the tensors that it walks over from these dictionaries. So that it need not look into
a thousand of them to find that one was exchanged, they tell of their changes. Changes of a tensor's
content need no telling: the memory is the tensor's own.
"""

import contextlib
import copy
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from torch.utils import _pytree as pytree

from fusedopt._extension import _C

# One thread at a time changes such dictionaries, so that what a change drops is what it holds: it
# lives until the change is known, as another thread may be about to step. Hashes of tensors are
# computed in Python, so that the GIL alone would not do.
_changing = threading.RLock()


def _renew_lock() -> None:
    # A thread that held it does not exist in the child.
    global _changing
    _changing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def held_still() -> contextlib.AbstractContextManager[object]:
    """Within it no other thread changes such a dictionary; it waits.

    Nothing of the user's that may wait for another thread should run in it.
    """
    return _changing


class _WatchedDict(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        with _changing:
            dropped = dict.get(self, key)
            dict.__setitem__(self, key, value)
            _C.note_change()
        del dropped

    def __delitem__(self, key: Any) -> None:
        with _changing:
            dropped = dict.get(self, key)
            dict.__delitem__(self, key)
            _C.note_change()
        del dropped

    def pop(self, *args: Any) -> Any:
        with _changing:
            dropped = dict.pop(self, *args)
            _C.note_change()
        return dropped

    def popitem(self) -> tuple[Any, Any]:
        with _changing:
            dropped = dict.popitem(self)
            _C.note_change()
        return dropped

    def setdefault(self, key: Any, default: Any = None) -> Any:
        with _changing:
            if key not in self:
                self[key] = default
            return dict.__getitem__(self, key)

    def clear(self) -> None:
        with _changing:
            dropped = dict(self)
            dict.clear(self)
            _C.note_change()
        del dropped

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self


class ParameterState(_WatchedDict):
    """The state of one parameter: torch's own keys, live tensors. Copies of it are plain dicts."""

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        memo[id(self)] = made
        made.update((key, copy.deepcopy(value, memo)) for key, value in self.items())
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.load with weights_only knows an OrderedDict, but no call of dict.
        return OrderedDict, (), None, None, iter(self.items())


class OptimizerState(_WatchedDict, defaultdict[Any, Any]):
    """The state of all parameters, `optimizer.state`: a defaultdict, as torch's.

    What is put in stays itself. Copies of it are plain dictionaries.
    """

    def __init__(self, default_factory: Callable[[], Any] | None = dict, *args: Any) -> None:
        super().__init__(default_factory)
        self.update(*args)

    def __missing__(self, param: Any) -> Any:
        state = ParameterState() if self.default_factory is dict else super().__missing__(param)
        self[param] = state
        return state

    def copy(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        return defaultdict(dict, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, plain(self))


def values_of(state: Mapping[Any, Any], param: Any) -> dict[str, Any]:
    """The state of a parameter; an empty one where there is none."""
    values = state.get(param)
    return values if isinstance(values, dict) else {}


def plain(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state mapping as plain dictionaries that share its tensors."""
    return {
        param: dict(values) if isinstance(values, ParameterState) else values
        for param, values in state.items()
    }


def watched(state: Mapping[Any, Any]) -> OptimizerState:
    """A copy's or a checkpoint's state, which nobody else has yet, as one that tells of changes."""
    return OptimizerState(
        dict,
        {
            param: ParameterState(values) if type(values) in (dict, OrderedDict) else values
            for param, values in state.items()
        },
    )


# For pytrees a dict of another class than their own would be a leaf.
def _register(cls: type[Any], made: Callable[[dict[Any, Any]], Any]) -> None:
    def flatten(state: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
        return [*state.values()], [*state]

    def unflatten(values: Iterable[Any], keys: list[Any]) -> Any:
        return made(dict(zip(keys, values, strict=True)))

    def flatten_with_keys(
        state: dict[Hashable, Any],
    ) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[Any]]:
        return [(pytree.MappingKey(key), value) for key, value in state.items()], [*state]

    pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)


_register(ParameterState, ParameterState)
_register(OptimizerState, lambda values: OptimizerState(dict, values))
