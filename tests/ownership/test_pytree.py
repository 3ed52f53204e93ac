"""opt.state under torch.utils._pytree, and rebuilt, copied and merged as any dictionary is."""

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_close,
    assert_same_bits,
    both,
    params_of,
    states_of,
    train,
)
from torch import Tensor
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


def doubled(value: Any) -> Any:
    return value * 2 if isinstance(value, Tensor) else value


# Each gives the state of a parameter another form, in which the values are the same or twice those.
OF_ONE: dict[str, Callable[[Any], Any]] = {
    "tree_map": lambda s: pytree.tree_map(doubled, s),
    "tree_map_only": lambda s: pytree.tree_map_only(Tensor, doubled, s),
    "tree_map_with_path": lambda s: pytree.tree_map_with_path(lambda _, v: doubled(v), s),
    "unflatten": lambda s: pytree.tree_unflatten(*pytree.tree_flatten(s)),
    "type": lambda s: type(s)({k: v * 2 for k, v in s.items()}),
    "type of pairs": lambda s: type(s)([(k, v * 2) for k, v in s.items()]),
    "type by name": lambda s: type(s)(**{k: v * 2 for k, v in s.items()}),
    "type of itself": lambda s: type(s)(s),
    "copy": lambda s: s.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "dict": lambda s: dict(s),
    "or": lambda s: s | {"step": s["step"] + 1} if "step" in s else s | {},
    "ror": lambda s: {"step": torch.tensor(0.0)} | s if "step" in s else {} | s,
    "comprehension": lambda s: {k: v.clone() for k, v in s.items()},
    "json": lambda s: {
        k: torch.tensor(v, dtype=s[k].dtype)
        for k, v in json.loads(json.dumps({k: v.tolist() for k, v in s.items()})).items()
    },
}


@every_class
@pytest.mark.parametrize("how", OF_ONE)
def test_the_state_of_a_parameter(case: Case, how: str) -> None:
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        for p in params_of(optimizer):
            made = OF_ONE[how](optimizer.state[p])
            assert isinstance(made, dict) and list(made) == list(optimizer.state[p])
            assert made is not optimizer.state[p]
            optimizer.state[p] = made
        train(optimizer, range(2, 4))
    assert_close(*pair)


def as_default(state: Any, values: Any) -> Any:
    return type(state)(dict, values)


OF_ALL: dict[str, Callable[[Any], Any]] = {
    "tree_map": lambda s: pytree.tree_map(doubled, s),
    "tree_map_only": lambda s: pytree.tree_map_only(Tensor, doubled, s),
    "unflatten": lambda s: pytree.tree_unflatten(*pytree.tree_flatten(s)),
    "type": lambda s: as_default(s, {p: {k: v * 2 for k, v in e.items()} for p, e in s.items()}),
    "type of itself": lambda s: as_default(s, s),
    "type, then filled": lambda s: filled(type(s)(dict), s),
    "copy": lambda s: s.copy(),
    "copy.copy": copy.copy,
    "dict": lambda s: dict(s),
    "defaultdict": lambda s: defaultdict(dict, s),
    "or": lambda s: s | {},
    "ror": lambda s: {} | s,
    "comprehension": lambda s: {p: {**e} for p, e in s.items()},
}


def filled(new: Any, state: Any) -> Any:
    for p, values in state.items():
        new[p].update(values)
    return new


@every_class
@pytest.mark.parametrize("how", OF_ALL)
def test_the_state_of_all(case: Case, how: str) -> None:
    pair = both(case)
    kinds = []
    for optimizer in pair:
        train(optimizer, range(2))
        made = OF_ALL[how](optimizer.state)
        kinds.append(isinstance(made, defaultdict))
        assert isinstance(made, dict) and made is not optimizer.state
        assert [id(p) for p in made] == [id(p) for p in optimizer.state]
        optimizer.state = made
        train(optimizer, range(2, 4))
    assert kinds[0] == kinds[1]
    assert_close(*pair)


@every_class
def test_in_place(case: Case) -> None:
    """The tensors are changed where they lie."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        before = [dict(values) for values in states_of(optimizer)]
        pytree.tree_map_(lambda v: v.mul_(2), optimizer.state)
        p = params_of(optimizer)[0]
        pytree.tree_map_only_(Tensor, lambda v: v.mul_(0.5), optimizer.state[p])
        for values, old in zip(states_of(optimizer), before, strict=True):
            assert all(values[key] is old[key] for key in old)
        train(optimizer, range(2, 4))
    assert_close(*pair)


@every_class
def test_leaves(case: Case) -> None:
    """The same number of them, in the same order, and no node that pytree does not know."""
    leaves, specs = [], []
    for optimizer in both(case):
        train(optimizer, range(2))
        flat, spec = pytree.tree_flatten(optimizer.state)
        assert all(isinstance(leaf, Tensor) for leaf in flat)
        of_one, _ = pytree.tree_flatten([optimizer.state[p] for p in params_of(optimizer)])
        assert_same_bits(flat, of_one)
        leaves.append(flat)
        specs.append((spec.num_leaves, spec.num_nodes))
        whole, _ = pytree.tree_flatten(optimizer.state_dict())
        assert sum(isinstance(leaf, Tensor) for leaf in whole) == len(flat)
        assert pytree.tree_all(lambda v: isinstance(v, Tensor), optimizer.state)
    torch.testing.assert_close(*leaves)
    assert specs[0] == specs[1]


@every_class
def test_comparisons_and_views(case: Case) -> None:
    """What a dictionary can be asked."""
    for optimizer in both(case):
        train(optimizer, range(2))
        p = params_of(optimizer)[0]
        state = optimizer.state[p]
        assert dict(state).keys() == state.keys() == set(case.state_keys)
        assert isinstance(state, dict) and isinstance(optimizer.state, defaultdict)
        assert optimizer.state.default_factory is dict
        assert optimizer.state.get(torch.ones(1)) is None and len(optimizer.state) == 6
        assert all(a is b for a, b in zip(state.values(), dict(state).values(), strict=True))
        assert {**state}.keys() == state.keys() and repr(state).startswith("{")
        state |= {"mine": 1}
        assert optimizer.state[p] is state and state.pop("mine") == 1
        assert state.setdefault("mine", 2) == 2 and state.popitem() == ("mine", 2)
        assert type(state).fromkeys(["a"], 1) == {"a": 1}
