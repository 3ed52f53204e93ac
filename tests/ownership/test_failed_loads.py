"""A load that fails, for whatever reason and wherever, leaves everything bit for bit as it was."""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.storing import BF16, F32
from support.training import (
    RICHEST,
    Case,
    assert_same_bits,
    assert_unchanged,
    make_params,
    params_of,
    saved,
    snapshot,
    train,
)
from torch.optim import Optimizer

import fusedopt
from fusedopt import _checkpoint, _masters, _members, _optimizer, _states
from fusedopt._formats import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (F32, {}),
    "int8": (F32, {"state_dtype": "int8", "min_8bit_size": 0}),
    "masters": (BF16, {"master_bits": 32}),
    "flat": (F32, {"flat": True}),
}


def make(format_: str, seed: int, case: Case | None = None) -> Optimizer:
    dtype, options = FORMATS[format_]
    cls: Any = fusedopt.AdamW if case is None else case.ours
    params = make_params(dtype, seed=seed)
    groups = [{"params": params[:2], "mine": [1]}, {"params": params[2:], "lr": 0.05}]
    return cls(groups, **({} if case is None else case.options), **options)


@contextlib.contextmanager
def nothing_changes(optimizer: Optimizer) -> Iterator[None]:
    """Nor do the objects themselves become others, and it trains on as if nothing had been."""
    before, state, groups = snapshot(optimizer), optimizer.state, optimizer.param_groups
    each = [*groups]
    entries = [optimizer.state[p] for p in params_of(optimizer) if p in optimizer.state]
    tensors = [dict(values) for values in entries]
    defaults = dict(optimizer.defaults)
    yield
    assert optimizer.state is state and optimizer.param_groups is groups
    assert all(a is b for a, b in zip(groups, each, strict=True))
    now = [optimizer.state[p] for p in params_of(optimizer) if p in optimizer.state]
    assert all(a is b for a, b in zip(now, entries, strict=True))
    for values, old in zip(now, tensors, strict=True):
        assert values.keys() == old.keys() and all(values[key] is old[key] for key in old)
    assert optimizer.defaults == defaults
    assert_unchanged(optimizer, before)


def change_state(act: Callable[[dict[str, Any]], object]) -> Callable[[Any], object]:
    return lambda loaded: act(loaded["state"][3])


def first_tensor(values: dict[str, Any]) -> str:
    return next(key for key in values if key not in NUMBERS)


DAMAGES: dict[str, Callable[[Any], object]] = {
    "shape": change_state(lambda v: v.update({first_tensor(v): torch.zeros(7, 7)})),
    "text": change_state(lambda v: v.update({first_tensor(v): "text"})),
    "integers": change_state(
        lambda v: v.update({first_tensor(v): torch.zeros(v[first_tensor(v)].shape).int()})
    ),
    "a list as a state": lambda loaded: loaded["state"].update({3: [1]}),
    "fewer groups": lambda loaded: loaded["param_groups"].pop(),
    "more groups": lambda loaded: loaded["param_groups"].append({"params": []}),
    "a shorter group": lambda loaded: loaded["param_groups"][1]["params"].pop(),
    "NaN lr": lambda loaded: loaded["param_groups"][1].update(lr=float("nan")),
    "lr in words": lambda loaded: loaded["param_groups"][1].update(lr="much"),
    "no groups": lambda loaded: loaded.pop("param_groups"),
    "no state": lambda loaded: loaded.pop("state"),
    "no params": lambda loaded: loaded["param_groups"][0].pop("params"),
}


@every_class
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("steps", [0, 2])
def test_damaged(case: Case, damage: str, steps: int) -> None:
    start, optimizer, twin = make("plain", 1, case), make("plain", 0, case), make("plain", 0, case)
    train(start, range(20, 23))
    for each in (optimizer, twin):
        train(each, range(steps))
    loaded = saved(start)
    DAMAGES[damage](loaded)
    with nothing_changes(optimizer), pytest.raises((TypeError, ValueError, KeyError)):
        optimizer.load_state_dict(loaded)
    for each in (optimizer, twin):
        train(each, range(2, 4))
    assert_same_bits(params_of(optimizer), params_of(twin))


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("format_", FORMATS)
def test_missing_keys(key: str, format_: str) -> None:
    start, optimizer = make(format_, 1), make(format_, 0)
    for each in (start, optimizer):
        train(each, range(2))
    loaded = saved(start)
    for stored in [k for k in loaded["state"][3] if k in (key, f"{key}_code")]:
        del loaded["state"][3][stored]
    with nothing_changes(optimizer), pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(loaded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_not_finite(value: float) -> None:
    start, optimizer = make("int8", 1), make("int8", 0)
    for each in (start, optimizer):
        train(each, range(2))
    loaded = saved(start)
    loaded["state"][5]["exp_avg_scale"][0] = value
    with nothing_changes(optimizer), pytest.raises(ValueError, match="exp_avg_scale"):
        optimizer.load_state_dict(loaded)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("position", ["first", "last"])
def test_hooks_that_fail(format_: str, position: str) -> None:
    start, optimizer = make(format_, 1), make(format_, 0)
    for each in (start, optimizer):
        train(each, range(2))

    def fail(opt: Optimizer, loaded: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.register_load_state_dict_pre_hook(fail, prepend=position == "first")
    for _ in range(2):
        with nothing_changes(optimizer), pytest.raises(ZeroDivisionError):
            optimizer.load_state_dict(saved(start))
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    handle.remove()
    optimizer.load_state_dict(saved(start))
    assert_same_bits(saved(optimizer)["state"], saved(start)["state"])


MODULES = (_checkpoint, _states, _masters, _members, _optimizer)


def internal_functions() -> list[tuple[types.ModuleType, str]]:
    """Every function that these modules call by name, wherever it is from."""
    return [
        (module, name)
        for module in MODULES
        for name, value in sorted(vars(module).items())
        if inspect.isfunction(value) and value.__module__.startswith("fusedopt.")
    ]


@pytest.mark.parametrize("format_", FORMATS)
def test_an_error_anywhere(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first, second and third call, and so on, of each of our own functions."""
    start, optimizer = make(format_, 1), make(format_, 0)
    for each in (start, optimizer):
        train(each, range(2))
    loaded, failed = saved(start), 0
    for module, name in internal_functions():
        original = getattr(module, name)
        for number in (1, 2, 3, 7):
            left = number

            def failing(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise MemoryError
                return original(*args, **kwargs)

            with monkeypatch.context() as patch, nothing_changes_unless_loaded(optimizer) as done:
                patch.setattr(module, name, failing)
                try:
                    optimizer.load_state_dict(loaded)
                    done.append(True)
                except MemoryError:
                    failed += 1
            if done:  # it was not called so often
                optimizer.load_state_dict(saved(make_again(format_)))
                break
    assert failed > 5


@contextlib.contextmanager
def nothing_changes_unless_loaded(optimizer: Optimizer) -> Iterator[list[bool]]:
    done: list[bool] = []
    check = nothing_changes(optimizer)
    check.__enter__()
    yield done
    if not done:
        check.__exit__(None, None, None)


def make_again(format_: str) -> Optimizer:
    optimizer = make(format_, 0)
    train(optimizer, range(2))
    return optimizer


def test_masters_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """load_master_params with an iterator that fails half-way."""
    optimizer = make("masters", 0)
    train(optimizer, range(2))
    masters = [*optimizer.master_params()]

    def half() -> Iterator[Any]:
        yield from masters[:3]
        raise OSError

    with nothing_changes(optimizer), pytest.raises(OSError):
        optimizer.load_master_params(half())
