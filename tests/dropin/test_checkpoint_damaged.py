"""Checkpoints that cannot be loaded: refused, by name, and nothing is changed."""

from typing import Any

import pytest
import torch
from support.training import (
    CASES,
    RICHEST,
    SHAPES,
    Case,
    assert_unchanged,
    make_params,
    saved,
    snapshot,
    train,
)
from torch.optim import Optimizer

from fusedopt._formats import NUMBERS

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


DAMAGES = {
    "shape": lambda value: torch.zeros(3, 3),
    "dtype": lambda value: torch.zeros(value.shape, dtype=torch.int64),
    "complex": lambda value: torch.zeros(value.shape, dtype=torch.complex64),
    "type": lambda value: [0.0],
    "text": lambda value: "broken",
    "missing": None,
}


DAMAGED = [
    (case, key, damage)
    for case in CASES
    for key in sorted(case.state_keys)
    for damage in DAMAGES
    # A step is one number, whatever its dtype; where nothing counts steps, and the only state is
    # missing, the first step is to come.
    if not (key in NUMBERS and damage in ("dtype", "complex"))
    and not (damage == "missing" and not case.row.counts_steps)
]


@pytest.mark.parametrize(
    ("case", "key", "damage"), DAMAGED, ids=lambda value: str(value).replace("_", "-")
)
def test_damaged_state_is_refused(case: Case, key: str, damage: str) -> None:
    named = damage in ("shape", "missing")

    def make(seed: int) -> Optimizer:
        params: Any = make_params(seed=seed)
        names = [f"layer{i}.weight" for i in range(len(SHAPES))]
        return case.ours(list(zip(names, params, strict=True)) if named else params, **case.options)

    start, optimizer = make(0), make(1)
    train(start, range(3))
    train(optimizer, range(2))
    state_dict = saved(start)
    state_dict["param_groups"][0]["lr"] = 0.5
    if damage == "missing":
        del state_dict["state"][3][key]
    else:
        state_dict["state"][3][key] = DAMAGES[damage](state_dict["state"][3][key])
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError)) as error:
        optimizer.load_state_dict(state_dict)
    assert case.ours.__name__ in str(error.value) and key in str(error.value)
    assert ("layer3.weight" if named else "parameter 3 of group 0") in str(error.value)
    if damage == "shape" and key not in NUMBERS:
        assert "(3, 3)" in str(error.value) and str(SHAPES[3]) in str(error.value)
    assert_unchanged(optimizer, before)
    # And it is as good as before.
    train(optimizer, range(2, 4))


@every_class
@pytest.mark.parametrize("value", [None, 3, [1], torch.zeros(3)], ids=str)
def test_state_that_is_no_dictionary(case: Case, value: Any) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    state_dict = saved(optimizer)
    state_dict["state"][1] = value
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=f"{case.ours.__name__}.*parameter 1"):
        optimizer.load_state_dict(state_dict)
    assert_unchanged(optimizer, before)


@every_class
def test_checkpoint_of_another_model(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    before = snapshot(optimizer)
    for groups in ([make_params()[:3]], [make_params()[:3], make_params()[3:]]):
        other = case.ours([{"params": group} for group in groups], **case.options)
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(other.state_dict())
        assert_unchanged(optimizer, before)


@every_class
def test_checkpoint_with_options_that_cannot_be(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    state_dict = saved(optimizer)
    state_dict["param_groups"][0]["lr"] = float("nan")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{case.ours.__name__}.*group 0.*lr.*NaN"):
        optimizer.load_state_dict(state_dict)
    assert_unchanged(optimizer, before)


@every_class
def test_a_failing_hook_changes_nothing(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    before = snapshot(optimizer)

    def fail(opt: Optimizer, state_dict: Any) -> None:
        raise RuntimeError("no")

    handle = optimizer.register_load_state_dict_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.load_state_dict(saved(optimizer))
    handle.remove()
    assert_unchanged(optimizer, before)
    optimizer.load_state_dict(saved(optimizer))
    train(optimizer, [2])
