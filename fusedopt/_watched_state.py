"""Optimizer state that tells when it was changed.

A step walks over memory that was looked up once. So that it never has to look into a thousand
dictionaries to find that a state tensor was exchanged, the dictionaries count their changes.
Changes of a tensor's content need no telling: the memory is the tensor's own.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class Changes:
    """How often something was changed."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def _counted(name: str) -> Callable[..., Any]:
    original = getattr(dict, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.changes.count += 1
        return original(self, *args, **kwargs)

    method.__name__ = name
    return method


class _CountingDict(dict):  # type: ignore[type-arg]
    changes: Changes

    __delitem__ = _counted("__delitem__")
    clear = _counted("clear")
    pop = _counted("pop")
    popitem = _counted("popitem")
    __setitem__ = _counted("__setitem__")
    setdefault = _counted("setdefault")
    update = _counted("update")
    __ior__ = _counted("__ior__")


class ParameterState(_CountingDict):
    """The state of one parameter: torch's own keys, live tensors. Copies of it are plain dicts."""

    def __init__(self, values: Mapping[str, Any], changes: Changes) -> None:
        self.changes = changes
        dict.update(self, values)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class OptimizerState(_CountingDict, defaultdict[Tensor, Any]):
    """The state of all parameters, `optimizer.state`. Copies of it are plain dictionaries."""

    def __init__(self, values: Mapping[Any, Any]) -> None:
        self.changes = Changes()
        for param, state in values.items():
            self[param] = state

    def __missing__(self, param: Tensor) -> ParameterState:
        self[param] = {}
        state: ParameterState = dict.__getitem__(self, param)
        return state

    def __setitem__(self, param: Any, state: Any) -> None:
        self.changes.count += 1
        if isinstance(param, Tensor) and isinstance(state, Mapping):
            state = ParameterState(state, self.changes)
        dict.__setitem__(self, param, state)

    def setdefault(self, param: Any, default: Any = None) -> Any:
        if param not in self:
            self[param] = default
        return self[param]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for param, state in dict(*args, **kwargs).items():
            self[param] = state

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def copy(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        return defaultdict(dict, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, plain(self))


def plain(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state mapping as plain dictionaries that share its tensors."""
    return {
        param: dict(values) if isinstance(values, ParameterState) else values
        for param, values in state.items()
    }
