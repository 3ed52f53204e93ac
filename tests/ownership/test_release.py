"""Memory that the user lets go of is free at once: an optimizer holds nothing besides its state."""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.storing import BF16, CHOICES, Choice
from support.training import (
    RICHEST,
    Case,
    assert_close,
    assert_same_bits,
    both,
    make_params,
    params_of,
    saved,
    set_grads,
    states_of,
    train,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

import fusedopt
from fusedopt._formats import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


def watch(tensors: Any) -> list[StorageWeakRef]:
    """References that do not keep the memory of these tensors alive."""
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


def watch_states(optimizer: Optimizer) -> list[StorageWeakRef]:
    return watch(
        v
        for p in params_of(optimizer)
        for v in optimizer.state[p].values()
        if isinstance(v, Tensor)
    )


def assert_free(watched: list[StorageWeakRef]) -> None:
    """No garbage collection was needed for it."""
    assert watched and all(each.expired() for each in watched)


def each(optimizer: Optimizer, act: Callable[[Any, Tensor], object]) -> None:
    for p in params_of(optimizer):
        act(optimizer.state, p)


def set_item(state: Any, p: Tensor) -> None:
    state[p] = {}


def delete(state: Any, p: Tensor) -> None:
    del state[p]


WAYS: dict[str, Callable[[Optimizer], object]] = {
    "clear": lambda o: o.state.clear(),
    "assign": lambda o: setattr(o, "state", defaultdict(dict)),
    "delete": lambda o: each(o, delete),
    "pop": lambda o: each(o, lambda state, p: state.pop(p)),
    "popitem": lambda o: [o.state.popitem() for _ in range(len(o.state))],
    "empty dictionaries": lambda o: each(o, set_item),
    "emptied dictionaries": lambda o: each(o, lambda state, p: state[p].clear()),
    "popped keys": lambda o: each(o, lambda s, p: [s[p].pop(key) for key in [*s[p]]]),
    "popped items": lambda o: each(o, lambda s, p: [s[p].popitem() for _ in range(len(s[p]))]),
    "update": lambda o: o.state.update({p: {} for p in params_of(o)}),
}


@every_class
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("planned", ["after a step", "after one without gradients", "loaded"])
def test_states_dropped(case: Case, way: str, planned: str) -> None:
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        if planned == "after one without gradients":
            optimizer.zero_grad()
            optimizer.step()
        elif planned == "loaded":
            optimizer.load_state_dict(saved(optimizer))
        watched = watch_states(optimizer)
        WAYS[way](optimizer)
        assert_free(watched)
        train(optimizer, range(2, 4))
    assert_close(*pair)


@every_class
def test_states_of_one_parameter_dropped(case: Case) -> None:
    """Where they have memory of their own."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        p, q, *_ = params_of(optimizer)
        for param in (p, q):
            optimizer.state[param] = {k: v.clone() for k, v in optimizer.state[param].items()}
        train(optimizer, range(2, 4))
        watched = watch(optimizer.state[p].values())
        del optimizer.state[p]
        assert_free(watched)
        key = next(key for key in case.state_keys if key not in NUMBERS)
        watched = watch([optimizer.state[q][key]])
        optimizer.state[q][key] = optimizer.state[q][key] * 2
        assert_free(watched)
        train(optimizer, range(4, 6))
    assert_close(*pair)


@every_class
def test_states_replaced_by_none(case: Case) -> None:
    """None cannot be stepped by torch.optim; but nobody may have to step it."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        watched = watch_states(optimizer)
        for p in params_of(optimizer):
            optimizer.state[p] = None
        assert_free(watched)
        for p in params_of(optimizer):
            p.grad = None
        optimizer.step()
        for p in params_of(optimizer):
            assert optimizer.state[p] is None
            optimizer.state[p] = {}
        train(optimizer, range(2, 4))
        watched = watch_states(optimizer)
        for p in params_of(optimizer):
            for key in optimizer.state[p]:
                optimizer.state[p][key] = None
        assert_free(watched)
        optimizer.state.clear()
        train(optimizer, range(4, 6))
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("way", ["tensors", "dictionaries", "data"])
def test_states_replaced_by_rounded_copies(case: Case, way: str) -> None:
    """To save memory while something else needs it."""
    optimizer, twin = (case.ours(make_params(), **case.options) for _ in range(2))
    for one in (optimizer, twin):
        train(one, range(2))
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        for key, value in twin.state[q].items():
            if key not in NUMBERS:
                value.copy_(optimizer.state[p][key].bfloat16())
    watched = watch(v for s in states_of(optimizer) for k, v in s.items() if k not in NUMBERS)
    for p in params_of(optimizer):
        rounded = {k: v.bfloat16() for k, v in optimizer.state[p].items() if k not in NUMBERS}
        if way == "dictionaries":
            count = {k: v for k, v in optimizer.state[p].items() if k in NUMBERS}
            optimizer.state[p] = count | rounded
        elif way == "tensors":
            optimizer.state[p].update(rounded)
        else:
            for key, value in rounded.items():
                optimizer.state[p][key].data = value
    assert_free(watched)
    rounded.clear()
    value = None
    watched = watch(v for s in states_of(optimizer) for k, v in s.items() if k not in NUMBERS)
    for one in (optimizer, twin):
        train(one, range(2, 4))
    assert_free(watched)  # the rounded ones, as wider ones have taken their places
    assert_same_bits(params_of(optimizer), params_of(twin))
    assert_same_bits(states_of(optimizer), states_of(twin))


@every_class
@pytest.mark.parametrize("way", ["a new list", "an item", "deleted", "no groups"])
def test_parameters_replaced(case: Case, way: str) -> None:
    """Weights, gradients and states of the old ones are free."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        group = optimizer.param_groups[0]
        watched = watch(t for p in params_of(optimizer) for t in (p, p.grad))
        watched += watch_states(optimizer)
        optimizer.state.clear()
        new = make_params(torch.float64, seed=5)
        if way == "a new list":
            group["params"] = new
        elif way == "an item":
            for i, p in enumerate(new):
                group["params"][i] = p
                del p
        elif way == "deleted":
            del group["params"][:]
        else:
            optimizer.param_groups = []
            del group
        assert_free(watched)
        if way == "deleted":
            optimizer.step()
            group["params"].extend(new)
        elif way == "no groups":
            optimizer.step()
            optimizer.add_param_group({"params": new})
        train(optimizer, range(2, 4))
    assert_close(*pair)


@every_class
def test_gradients_and_data_replaced(case: Case) -> None:
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        watched = watch(p.grad for p in params_of(optimizer))
        optimizer.zero_grad()
        assert_free(watched)
        set_grads(params_of(optimizer), 2)
        optimizer.step()
        watched = watch(t for p in params_of(optimizer) for t in (p, p.grad))
        for p in params_of(optimizer):
            p.grad = None
            p.data = p.data + 1
        assert_free(watched)
        train(optimizer, range(3, 5))
    assert_close(*pair)


@every_class
def test_a_failed_step_holds_nothing(case: Case) -> None:
    """Of the states that it would have made, and of the gradients."""
    for optimizer in both(case):
        train(optimizer, range(1))
        bad = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer.add_param_group({"params": [bad]})
        bad.grad = torch.sparse_coo_tensor(
            torch.tensor([[1]]), torch.ones(1, dtype=torch.float64), (3,), check_invariants=False
        )
        if case.ours is fusedopt.SGD and not isinstance(optimizer, fusedopt.SGD):
            continue  # torch's takes sparse gradients
        with pytest.raises(RuntimeError):
            optimizer.step()
        sys.last_value = sys.last_traceback = None
        watched = watch_states(optimizer) + watch(
            t for p in params_of(optimizer) if p is not bad for t in (p, p.grad)
        )
        optimizer.state.clear()
        optimizer.param_groups.clear()
        assert_free(watched)


@every_class
def test_the_optimizer_gone(case: Case) -> None:
    for number in range(2):
        optimizer = both(case)[number]
        train(optimizer, range(2))
        watched = watch_states(optimizer)
        watched += watch(t for p in params_of(optimizer) for t in (p, p.grad))
        del optimizer
        assert_free(watched)


@every_class
def test_states_loaded_over(case: Case) -> None:
    """What was there before, and the checkpoint itself."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        loaded = copy.deepcopy(optimizer.state_dict())
        watched = watch_states(optimizer)
        optimizer.load_state_dict(loaded)
        # torch.optim keeps tensors of the right dtype and device as they are.
        if isinstance(optimizer, case.ours):
            watched += watch(v for s in loaded["state"].values() for v in s.values())
        del loaded
        assert_free(watched)
        train(optimizer, range(2, 4))
    assert_close(*pair)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_states_in_other_formats(choice: Choice, flat: bool) -> None:
    """Codes, scales and masters as well."""
    optimizer = fusedopt.AdamW(choice.params(((33, 7), (5,))), **choice.options, flat=flat)
    for way in ("clear", "assign", "delete", "emptied dictionaries"):
        train(optimizer, range(2))
        if choice.masters:
            [*optimizer.master_params()]
        watched = watch_states(optimizer)
        WAYS[way](optimizer)
        assert_free(watched)


def test_a_copy_holds_nothing_of_the_first() -> None:
    optimizer = fusedopt.AdamW(make_params(BF16), master_bits=32)
    train(optimizer, range(2))
    watched = watch_states(optimizer) + watch(p for p in params_of(optimizer))
    twin = copy.deepcopy(optimizer)
    del optimizer
    assert_free(watched)
    train(twin, range(2, 4))
