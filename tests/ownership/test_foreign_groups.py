"""Groups taken from another optimizer, ours or torch's: whole, sliced or appended by hand."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST_IN_TORCH,
    Case,
    assert_close,
    assert_same_bits,
    clone_params,
    make_params,
    params_of,
    saved,
    train,
)
from torch.optim import Optimizer

import fusedopt
from fusedopt._formats import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)


def whole(mine: Optimizer, other: Optimizer) -> None:
    mine.param_groups = other.param_groups


def sliced(mine: Optimizer, other: Optimizer) -> None:
    mine.param_groups = other.param_groups[:1]


def appended(mine: Optimizer, other: Optimizer) -> None:
    mine.param_groups.append(other.param_groups[0])


def extended(mine: Optimizer, other: Optimizer) -> None:
    mine.param_groups += other.param_groups


def first_of_all(mine: Optimizer, other: Optimizer) -> None:
    mine.param_groups.insert(0, other.param_groups[1])


def item(mine: Optimizer, other: Optimizer) -> None:
    mine.param_groups[0] = other.param_groups[0]


def added(mine: Optimizer, other: Optimizer) -> None:
    mine.add_param_group(other.param_groups[1])


def added_copy(mine: Optimizer, other: Optimizer) -> None:
    mine.add_param_group({**other.param_groups[0]})


def with_states(mine: Optimizer, other: Optimizer) -> None:
    mine.param_groups += other.param_groups
    mine.state.update(other.state)


WAYS: dict[str, Callable[[Optimizer, Optimizer], None]] = {
    way.__name__: way
    for way in (
        *(whole, sliced, appended, extended, first_of_all, item, added, added_copy),
        with_states,
    )
}
THEN: dict[str, Callable[[Optimizer], Optimizer]] = {
    "step": lambda o: o,
    "state_dict": lambda o: (o.state_dict(), o)[1],
    "load_state_dict": lambda o: (o.load_state_dict(saved(o)), o)[1],
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


def two_groups(cls: Any, case: Case, seed: int) -> Optimizer:
    params = make_params(torch.float64, seed=seed)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    optimizer: Optimizer = cls(groups, **case.options)
    return optimizer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize(
    ("case", "source"), [*zip(RICHEST_IN_TORCH, ["ours", "torch"], strict=False)], ids=str
)
def test_groups_of_another(case: Case, way: str, then: str, source: str) -> None:
    pair = []
    for cls in case.classes:
        optimizer = two_groups(cls, case, 0)
        other = two_groups(case.ours if source == "ours" else case.counterpart, case, 1)
        train(optimizer, range(2))
        train(other, range(2))
        WAYS[way](optimizer, other)
        # torch.optim makes no state_dict where there are states of other parameters.
        for p in optimizer.state.keys() - {*params_of(optimizer)}:
            del optimizer.state[p]
        optimizer = THEN[then](optimizer)
        train(optimizer, range(2, 4))
        optimizer = THEN[then](optimizer)
        train(optimizer, range(4, 6))
        pair.append(optimizer)
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("source", ["ours", "torch"])
def test_the_groups_stay_the_others(case: Case, source: str) -> None:
    """The same dictionaries, in which neither step nor checkpoint puts anything."""
    for cls in case.classes:
        optimizer = two_groups(cls, case, 0)
        other = two_groups(case.ours if source == "ours" else case.counterpart, case, 1)
        groups = other.param_groups
        keys = [list(group) for group in groups]
        optimizer.param_groups = groups
        optimizer.state.clear()  # of those that it had, if the constructor makes states
        optimizer.step()
        train(optimizer, range(2))
        optimizer.state_dict()
        assert optimizer.param_groups is groups and other.param_groups is groups
        assert [list(group) for group in groups] == keys
        groups[0]["lr"] = 0.5
        before = [p.detach().clone() for p in params_of(other)]
        train(optimizer, range(2, 3))
        train(other, range(2, 3))
        assert all(not torch.equal(p, q) for p, q in zip(params_of(other), before, strict=True))


@every_class
def test_a_group_without_what_torch_lacks(case: Case) -> None:
    """Ours has no other keys than torch's, unless the user gave something else than the default."""
    ours, theirs = (two_groups(cls, case, 0) for cls in case.classes)
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert a.keys() == b.keys()
    assert ours.defaults.keys() == theirs.defaults.keys()
    assert repr(ours) == repr(theirs)
    given = {"min_8bit_size": 7, "seed": 3, "state_dtype": "int8"}
    if case.row.takes_codes(case.options):
        optimizer = case.ours(make_params(), **case.options, **given)
        for key, value in given.items():
            assert optimizer.param_groups[0][key] == optimizer.defaults[key] == value
        assert not {"master_bits", "rounding"} & optimizer.param_groups[0].keys()


@every_class
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_dtypes_in_groups_are_strings(case: Case, name: str) -> None:
    """Given as torch.dtype or by name, for all or in one group; a checkpoint is plain then."""
    dtype = getattr(torch, name)
    for given in (dtype, name):
        optimizers = [
            case.ours(make_params(torch.bfloat16), **case.options, state_dtype=given),
            case.ours(
                [{"params": make_params(torch.bfloat16), "state_dtype": given}], **case.options
            ),
        ]
        for optimizer in optimizers:
            stored = optimizer.param_groups[0].get("state_dtype", "float32")
            assert isinstance(stored, str) and stored == name
            train(optimizer, range(2))
            for p in params_of(optimizer):
                values = optimizer.state[p]
                assert all(v.dtype == dtype for k, v in values.items() if k not in NUMBERS)
            twin = case.ours(clone_params(params_of(optimizer)), **case.options, state_dtype=given)
            twin.load_state_dict(saved(optimizer))
            for one in (optimizer, twin):
                train(one, range(2, 4))
            assert_same_bits(params_of(optimizer), params_of(twin))
        assert not any(
            isinstance(value, torch.dtype)
            for optimizer in optimizers
            for group in (*optimizer.param_groups, optimizer.defaults)
            for value in group.values()
        )


def test_groups_of_another_class() -> None:
    """What it lacks of its options is taken from the defaults, as in no other place than here."""
    start = torch.optim.SGD(make_params(torch.float64), lr=0.1)
    train(start, range(2))
    optimizer = fusedopt.SGD(make_params(torch.float64, seed=2), lr=0.2, momentum=0.9)
    optimizer.param_groups = start.param_groups
    train(optimizer, range(2))
    control = torch.optim.SGD(make_params(torch.float64), lr=0.1)
    train(control, [*range(2), *range(2)])
    assert_close(optimizer, control)
