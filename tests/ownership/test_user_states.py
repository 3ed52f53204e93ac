"""Dictionaries and tensors that a user puts into the state: they stay, and are stepped in place."""

import copy
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_close,
    assert_same_bits,
    bits,
    both,
    make_params,
    params_of,
    set_grads,
    states_of,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt
from fusedopt._formats import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
with_counts = pytest.mark.parametrize(
    "case", [case for case in RICHEST if "step" in case.state_keys], ids=str
)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


# -- dictionaries -------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda: defaultdict(lambda: None),
    "subclass": type("Mine", (dict,), {}),
}


@every_class
@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.parametrize("filled", ["by the step", "at once", "by its own name", "piece by piece"])
def test_a_dictionary_stays_itself(case: Case, when: str, filled: str) -> None:
    """Whoever fills it, and by whatever name: `opt.state[p]` is what was put there."""
    source = case.counterpart(make_params(torch.float64, seed=4), **case.options)
    train(source, range(30, 33))
    for_all: list[list[Any]] = []
    pair = both(case)
    for optimizer in pair:
        if when == "later":
            train(optimizer, range(2))
        kinds = itertools.cycle(KINDS.values())
        mine = [next(kinds)() for _ in params_of(optimizer)]
        for p, q, entry in zip(params_of(optimizer), params_of(source), mine, strict=True):
            values = copied(source.state[q])
            if filled == "at once":
                entry.update(values)
            optimizer.state[p] = entry
            if filled == "by its own name":
                entry.update(values)
            elif filled == "piece by piece":
                for key, value in values.items():
                    entry[key] = value
        for_all.append(mine)
        train(optimizer, range(2, 4))
        for p, entry in zip(params_of(optimizer), mine, strict=True):
            assert optimizer.state[p] is entry and set(entry) == set(case.state_keys)
    assert_close(*pair)
    # Changed, emptied and filled again behind the optimizer's back.
    for optimizer, mine in zip(pair, for_all, strict=True):
        for entry in mine[:2]:
            for key in entry:
                entry[key] = entry[key] * 2
        mine[2].clear()
        kept = dict(mine[3])
        mine[3].clear()
        mine[3].update(kept)
        train(optimizer, range(4, 6))
        assert all(optimizer.state[p] is e for p, e in zip(params_of(optimizer), mine, strict=True))
    assert_close(*pair)


@every_class
def test_a_dictionary_filled_after_steps_without_a_gradient(case: Case) -> None:
    pair = both(case)
    for optimizer in pair:
        params = params_of(optimizer)
        train(optimizer, range(2))
        values = copied(optimizer.state[params[0]])
        mine: dict[str, Any] = {}
        optimizer.state[params[0]] = mine
        params[0].grad = None
        optimizer.step()
        assert mine == {} and optimizer.state[params[0]] is mine
        mine.update(values)
        train(optimizer, range(2, 4))
        assert mine.keys() == values.keys()
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("steps", [0, 2])
def test_a_mapping_assigned_as_the_state(case: Case, steps: int) -> None:
    """It is the state from then on: what is done to it by its own name counts."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(steps))
        mine: Any = defaultdict(dict)
        optimizer.state = mine
        train(optimizer, range(2, 4))
        assert optimizer.state is mine
        assert [*mine] == params_of(optimizer)
        assert all(set(values) == set(case.state_keys) for values in mine.values())
        first, second, third, *_ = params_of(optimizer)
        del mine[first]
        mine[second] = {}
        mine[third] = {k: v * 2 for k, v in mine[third].items()}
        train(optimizer, range(4, 6))
        # One that makes nothing by itself, but has all there is.
        optimizer.state = dict(mine)
        train(optimizer, range(6, 8))
    assert_close(*pair)


@every_class
def test_one_dictionary_in_two_optimizers(case: Case) -> None:
    """Both step the same states: a second optimizer with another lr, as some schedules have it."""
    pairs = []
    for cls in case.classes:
        params = make_params(torch.float64)
        first = cls(params, **case.options)
        train(first, range(2))
        second = cls(params, **{**case.options, "lr": 0.5})
        for p in params:
            second.state[p] = first.state[p]
        for optimizer in (first, second, second, first):
            train(optimizer, [2])
        for p in params:
            assert all(first.state[p][k] is second.state[p][k] for k in case.state_keys)
        pairs.append((first, second))
    assert_close(pairs[0][0], pairs[1][0])
    assert_close(pairs[0][1], pairs[1][1])


@every_class
def test_what_else_the_user_keeps_there(case: Case) -> None:
    pair = both(case)
    for optimizer in pair:
        p, q, *_ = params_of(optimizer)
        kept = {"list": [1], "tensor": torch.ones(3)}
        optimizer.state["mine"] = kept
        if case.row.name in ("sgd",):  # torch's others take a state for complete that is not empty
            optimizer.state[p]["mine"] = kept
        train(optimizer, range(2))
        optimizer.state[q]["mine"] = kept
        train(optimizer, range(2, 4))
        assert optimizer.state["mine"] is kept and optimizer.state[q]["mine"] is kept
        del optimizer.state["mine"], optimizer.state[q]["mine"]
        optimizer.state[p].pop("mine", None)
    assert_close(*pair)


@every_class
def test_shallow_copies_share_groups_and_state(case: Case) -> None:
    results = []
    for optimizer in both(case):
        train(optimizer, range(2))
        twin = copy.copy(optimizer)
        assert twin.state is optimizer.state and twin.param_groups is optimizer.param_groups
        assert twin.defaults is optimizer.defaults
        before = [dict(values) for values in states_of(optimizer)]
        for each in (twin, optimizer, twin):
            train(each, range(2, 4))
        for values, old in zip(states_of(optimizer), before, strict=True):
            assert all(values[key] is old[key] for key in old)
        assert_same_bits(states_of(twin), states_of(optimizer))
        twin.param_groups[0]["lr"] = 0.3
        twin.state.pop(params_of(twin)[0])
        for each in (optimizer, twin):
            train(each, [4])
        results.append(optimizer)
    assert_close(*results)


def test_shallow_copies_before_the_first_step() -> None:
    for case in RICHEST:
        results = []
        for optimizer in both(case):
            twin = copy.copy(optimizer)
            assert twin.state is optimizer.state
            for each in (twin, optimizer, twin):
                train(each, range(2))
            results.append(optimizer)
        assert_close(*results)


# -- parameters that grow and shrink ------------------------------------------------------------


def renewed(
    optimizer: Optimizer, number: int, order: str, change: Callable[[Tensor], Tensor]
) -> None:
    """Put a longer or shorter parameter into its group, and its changed states with it."""
    group = optimizer.param_groups[number]
    old = group["params"][0]
    new = nn.Parameter(change(old.detach()))

    def change_states(values: dict[str, Any]) -> None:
        for key in values:
            if key not in NUMBERS:
                values[key] = change(values[key])

    if order == "deleted first":
        stored = optimizer.state[old]
        change_states(stored)
        del optimizer.state[old]
        group["params"][0] = new
        optimizer.state[new] = stored
    elif order == "entered first":
        stored = optimizer.state[old]
        optimizer.state[new] = stored
        group["params"][0] = new
        change_states(stored)
        del optimizer.state[old]
    elif order == "changed last":
        stored = optimizer.state.pop(old)
        optimizer.state[new] = stored
        group["params"] = [new]
        change_states(optimizer.state[new])
    elif order == "a new dictionary":
        values = {**optimizer.state[old]}
        change_states(values)
        group["params"] = [new]
        del optimizer.state[old]
        optimizer.state[new] = values
    else:
        assert order == "never deleted"
        stored = optimizer.state[old]
        change_states(stored)
        group["params"][0] = new
        optimizer.state[new] = stored


@every_class
@pytest.mark.parametrize(
    "order",
    ["deleted first", "entered first", "changed last", "a new dictionary", "never deleted"],
)
def test_points_added_and_pruned(case: Case, order: str) -> None:
    """As Gaussian splatting does: a group for each attribute of the points."""
    pair = []
    for cls in case.classes:
        shapes = ((40, 3), (40, 1), (40, 5, 3))
        params = make_params(torch.float64, shapes)
        optimizer = cls(
            [{"params": [p], "name": f"attribute {i}"} for i, p in enumerate(params)],
            **case.options,
        )
        step = 0
        for size in (7, 33, 5):
            train(optimizer, range(step, step + 2))
            for number in range(3):
                # New rows with states of zero, as if they had taken all the steps.
                renewed(
                    optimizer,
                    number,
                    order,
                    lambda t, size=size: torch.cat([t, t.new_zeros(size, *t.shape[1:])]),
                )
            train(optimizer, range(step + 2, step + 4))
            mask = torch.arange(len(params_of(optimizer)[0])) % 3 > 0
            for number in range(3):
                renewed(optimizer, number, order, lambda t, mask=mask: t[mask])
            step += 4
        train(optimizer, range(step, step + 2))
        # The states of one attribute reset, without another number of points.
        values = optimizer.state[params_of(optimizer)[1]]
        for key in values:
            if key not in NUMBERS:
                values[key] = torch.zeros_like(values[key])
        train(optimizer, range(step + 2, step + 4))
        if order != "never deleted":
            assert len(optimizer.state) == 3
        pair.append(optimizer)
    assert_close(*pair)


# -- tensors ------------------------------------------------------------------------------------


def as_numpy(value: Tensor) -> Tensor:
    """In memory that is numpy's, at an address that is a multiple of nothing but its own size."""
    memory = np.zeros(value.numel() + 3, dtype=value.numpy().dtype)[1 : value.numel() + 1]
    return torch.from_numpy(memory).view(value.shape).copy_(value)


def unaligned(value: Tensor) -> Tensor:
    """At an odd address, as a file that is mapped into memory has it."""
    size = value.numel() * value.element_size()
    memory = bytearray(size + 16)
    flat = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=3)
    return flat.view(value.shape).copy_(value)


def fortran(value: Tensor) -> Tensor:
    strides = [1]
    for size in value.shape[:-1]:
        strides.append(strides[-1] * size)
    return torch.empty_strided(value.shape, strides[: value.dim()], dtype=value.dtype).copy_(value)


LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "alike": lambda v: v.clone(),
    "reversed strides": fortran,
    "every other element": lambda v: torch.stack([v, v], -1)[..., 0],
    "inside another": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
    "numpy": as_numpy,
    "unaligned": unaligned,
    "shared": lambda v: v.clone().share_memory_(),
    "resized": lambda v: torch.empty(0, dtype=v.dtype).resize_(v.shape).copy_(v),
    "parameter": lambda v: nn.Parameter(v.clone(), requires_grad=False),
}
SHAPES = ((33, 7), (5,), (2, 3, 5, 5), (), (1, 9))


@every_class
@pytest.mark.parametrize("put", ["before the first step", "after it", "with its dictionary"])
@pytest.mark.parametrize("parameter", ["contiguous", "transposed"])
def test_tensors_are_stepped_where_they_lie(case: Case, put: str, parameter: str) -> None:
    pair = []
    for cls in case.classes:
        params = make_params(torch.float64, SHAPES * len(LAID))
        ways = [way for way in LAID.values() for _ in SHAPES]
        if parameter == "transposed":
            for p in params:
                p.data = fortran(p.data)
        optimizer = cls(params, **case.options)
        if put == "after it":
            train(optimizer, range(2))
        mine: list[dict[str, Tensor]] = []
        for p, lay in zip(params, ways, strict=True):
            if put == "after it":
                values = dict(optimizer.state[p])
            else:
                values = {
                    k: torch.full((), 0.0 if k == "step" else 1e-4)
                    if k in NUMBERS
                    else torch.zeros_like(p).detach()
                    for k in case.row.ordered_keys(case.options)
                }
            laid = {k: lay(v) if k not in NUMBERS else v.clone() for k, v in values.items()}
            if put == "with its dictionary":
                optimizer.state[p] = laid
            else:
                optimizer.state[p].update(laid)
            mine.append(dict(laid))
        # Other names for the same memory.
        aliases = [{k: v.detach() for k, v in values.items()} for values in mine]
        before = [copied(values) for values in mine]
        train(optimizer, range(2, 4))
        for p, values, alias, old in zip(params, mine, aliases, before, strict=True):
            for key, value in values.items():
                assert optimizer.state[p][key] is value
                if key in NUMBERS or value.numel() > 10:  # few may come to be what they were
                    assert not torch.equal(alias[key], old[key])
                assert_same_bits(alias[key], value.detach())
        # Nor does anything that is planned anew take them away.
        optimizer.add_param_group({"params": make_params(torch.float64, ((3,),))})
        params[1].data = params[1].data.clone()
        train(optimizer, range(4, 6))
        for p, values in zip(params, mine, strict=True):
            assert all(optimizer.state[p][key] is value for key, value in values.items())
        pair.append(optimizer)
    assert_close(*pair)


@with_counts
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("how", ["by itself", "in one tensor"])
def test_counts_are_counted_where_they_lie(case: Case, shape: tuple[int, ...], how: str) -> None:
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(3))
        params = params_of(optimizer)
        together = torch.full((len(params), 2), 3.0)
        mine = []
        for number, p in enumerate(params):
            if how == "by itself":
                count = torch.full(shape, 3.0)
            else:
                count = together[number, 0].view(shape)
            optimizer.state[p]["step"] = count
            mine.append(count)
        train(optimizer, range(3, 5))
        for p, count in zip(params, mine, strict=True):
            if shape != (1, 1):  # the others may be converted
                assert optimizer.state[p]["step"] is count
            assert float(optimizer.state[p]["step"]) == 5
            assert optimizer.state[p]["step"].numel() == 1
            if shape == (1, 1):
                optimizer.state[p]["step"] = torch.tensor(5.0)
        if how == "in one tensor" and shape != (1, 1):
            assert bool((together == torch.tensor([5.0, 3.0])).all())
    assert_close(*pair)


@with_counts
def test_counts_set_by_the_user(case: Case) -> None:
    """In place, as somebody who goes back some steps does, with no one told of it."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(3))
        for p in params_of(optimizer):
            optimizer.state[p]["step"].fill_(1)
        train(optimizer, range(3, 5))
        for p in params_of(optimizer):
            optimizer.state[p]["step"].data = torch.tensor(7.0)
        train(optimizer, range(5, 7))
        for p in params_of(optimizer):
            assert float(optimizer.state[p]["step"]) == 9
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_is_converted_in_the_same_dictionary(case: Case, dtype: torch.dtype) -> None:
    """torch.optim refuses it, or steps in that dtype; the values are the same either way."""
    optimizer, twin = (case.ours(make_params(torch.float64), **case.options) for _ in range(2))
    for each in (optimizer, twin):
        train(each, range(2))
    mine = []
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        values = {k: v.to(dtype) for k, v in optimizer.state[p].items()}
        entry: dict[str, Any] = dict(values)
        optimizer.state[p] = entry
        mine.append(entry)
        for key, value in values.items():
            twin.state[q][key].copy_(value)
    for each in (optimizer, twin):
        train(each, range(2, 4))
    for p, entry in zip(params_of(optimizer), mine, strict=True):
        assert optimizer.state[p] is entry
        for key, value in entry.items():
            assert value.dtype == (torch.float32 if key in NUMBERS else torch.float64)
    assert_same_bits(params_of(optimizer), params_of(twin))
    assert_same_bits(states_of(optimizer), states_of(twin))


@every_class
@pytest.mark.parametrize("how", ["data", "set_", "storage", "swap", "share_memory_", "copy_"])
def test_memory_exchanged_under_a_tensor(case: Case, how: str) -> None:
    """The tensor in the dictionary stays; what it lies on is another memory from now on."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        memories = []
        for p in params_of(optimizer):
            for key in case.state_keys:
                value = optimizer.state[p][key]
                other = value / 2 if key in NUMBERS else value * 2
                other = value + 1 if key == "step" else other
                if how == "data":
                    value.data = other
                elif how == "set_":
                    value.set_(other)
                elif how == "storage":
                    value.set_(
                        other.untyped_storage(), 0, tuple(other.shape), tuple(other.stride())
                    )
                elif how == "swap":
                    alias = other.detach()
                    torch.utils.swap_tensors(value, other)
                    other = alias
                elif how == "copy_":
                    value.copy_(other)
                    other = value.detach()
                else:
                    value.share_memory_()
                    other = value.detach()
                memories.append((value, other, other.clone()))
        train(optimizer, range(2, 4))
        for value, other, before in memories:
            assert value.data_ptr() == other.data_ptr()
            assert not torch.equal(bits(other), bits(before))
    assert_close(*pair)


def test_keys_that_are_numbers_of_other_rules() -> None:
    """ASGD's eta and mu are a user's own where the rule is another: of any shape and dtype."""
    p = nn.Parameter(torch.ones(20))
    optimizer = fusedopt.AdamW([p])
    p.grad = torch.ones(20)
    optimizer.step()
    mine = {"eta": torch.arange(3), "mu": "text", "lr_max": torch.ones(2, dtype=torch.float64)}
    optimizer.state[p].update(mine)
    optimizer.step()
    assert all(optimizer.state[p][key] is value for key, value in mine.items())
    other = fusedopt.AdamW([nn.Parameter(torch.ones(20))])
    other.load_state_dict(optimizer.state_dict())
    (values,) = other.state.values()
    assert values["mu"] == "text"
    for key in ("eta", "lr_max"):
        assert torch.equal(values[key], mine[key]) and values[key].dtype == mine[key].dtype


def test_a_mapped_file(tmp_path: Path) -> None:
    """States in a file: it has them after every step."""
    p = nn.Parameter(torch.ones(1000))
    optimizer = fusedopt.SGD([p], lr=0.1, momentum=0.9)
    file = tmp_path / "momentum"
    buffer = torch.from_file(str(file), shared=True, size=1000)
    optimizer.state[p]["momentum_buffer"] = buffer
    for _ in range(2):
        p.grad = torch.ones(1000)
        optimizer.step()
    assert bool((torch.from_file(str(file), size=1000) == 1.9).all())
    assert optimizer.state[p]["momentum_buffer"] is buffer


@every_class
def test_states_of_another_optimizer_taken_over(case: Case) -> None:
    """The tensors themselves, from ours to torch's and back, without a checkpoint."""
    params = make_params(torch.float64)
    first, second = (cls(params, **case.options) for cls in case.classes)
    alone = case.counterpart(make_params(torch.float64), **case.options)
    for turn in range(4):
        train(first, range(turn, turn + 1))
        train(alone, range(turn, turn + 1))
        tensors = [dict(values) for values in states_of(first)]
        for p in params:
            second.state[p] = first.state[p]
        train(second, range(turn, turn + 1))
        train(alone, range(turn, turn + 1))
        for values, old in zip(states_of(second), tensors, strict=True):
            assert all(values[key] is old[key] for key in old)
        first, second = second, first
    assert_close(first, alone)


@every_class
def test_states_put_in_for_parameters_without_a_gradient(case: Case) -> None:
    """Whatever it is, it is looked at once there is a gradient."""
    pair = both(case)
    for optimizer in pair:
        train(optimizer, range(2))
        p, *rest = params_of(optimizer)
        good = dict(optimizer.state[p])
        p.grad = None
        for bad in (None, {}, {"step": "text"}, {"exp_avg": torch.ones(2)}, 3, [good]):
            optimizer.state[p] = bad
            set_grads(rest, 2)
            optimizer.step()
            assert optimizer.state[p] is bad
        optimizer.state[p] = good
        train(optimizer, range(3, 5))
    assert_close(*pair)
