"""Copies of optimizers: by deepcopy, pickle, files, and in other processes."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.training import (
    CASES,
    CASES_IN_TORCH,
    RICHEST,
    Case,
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    clone_params,
    make_params,
    params_of,
    snapshot,
    train,
)
from torch.optim import Optimizer, lr_scheduler

import fusedopt

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: reload(thing, weights_only=False),
}


def reload(thing: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@every_case
@pytest.mark.parametrize("how", COPIES)
def test_copies_train_on_alike_and_apart(case: Case, how: str) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(3))
    before = snapshot(optimizer)
    twin = COPIES[how](optimizer)
    assert type(twin) is case.ours and repr(twin) == repr(optimizer)
    assert_equal(twin, optimizer)
    train(twin, range(3, 6))
    assert_unchanged(optimizer, before)
    train(optimizer, range(3, 6))
    assert_equal(twin, optimizer)


@every_class
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole(case: Case, how: str) -> None:
    """Whatever the constructor sets is there in a copy, which never saw the constructor."""
    case = replace(case, options={**case.options, "state_dtype": torch.bfloat16})
    optimizer = case.ours(make_params(torch.bfloat16), **case.options)
    for before in (True, False):
        twin = COPIES[how](optimizer)
        assert twin.defaults == optimizer.defaults
        fused = bool(case.options.get("fused"))
        assert twin._step_supports_amp_scaling == optimizer._step_supports_amp_scaling == fused
        twin.add_param_group({"params": make_params(torch.bfloat16, seed=3)})
        assert twin.param_groups[1]["state_dtype"] == "bfloat16"
        calls: list[int] = []
        twin.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        train(twin, range(2))
        assert calls == [1, 1]
        twin.zero_grad()
        twin.load_state_dict(copy.deepcopy(twin.state_dict()))
        train(twin, range(2, 4))
        if before:
            train(optimizer, range(2))


def test_a_copy_of_a_scheduled_optimizer() -> None:
    optimizer = fusedopt.AdamW(make_params())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(optimizer, range(2))
    scheduler.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = snapshot(optimizer)
        train(twin, range(2, 4))
        assert_unchanged(optimizer, before)


@pytest.mark.parametrize("case", CASES_IN_TORCH, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_pickles_are_no_larger_than_torchs(case: Case, flat: bool) -> None:
    shapes = ((1000,),) * 20
    ours = case.ours(make_params(shapes=shapes), **case.options, flat=flat)
    theirs = case.row.theirs(make_params(shapes=shapes), **case.options)
    for optimizer in (ours, theirs):
        train(optimizer, range(1))
        optimizer.zero_grad()

    def saved(thing: Any) -> int:
        file = io.BytesIO()
        torch.save(thing, file)
        return file.tell()

    assert len(pickle.dumps(ours)) < 1.02 * len(pickle.dumps(theirs)) + 1000
    assert saved(ours.state_dict()) < 1.02 * saved(theirs.state_dict()) + 1000


@every_class
def test_state_dict_is_weights_only(case: Case) -> None:
    options = {**case.options, "state_dtype": torch.bfloat16}
    optimizer = case.ours(make_params(torch.bfloat16), **options)
    train(optimizer, range(3))
    twin = case.ours(clone_params(params_of(optimizer)), **options)
    twin.load_state_dict(reload(optimizer.state_dict(), weights_only=True))
    for each in (optimizer, twin):
        train(each, range(3, 6))
    assert_equal(twin, optimizer)


def child(queue: Any, optimizer: Optimizer) -> None:
    train(optimizer, range(3, 6))
    queue.put([p.detach().clone().tolist() for p in params_of(optimizer)])


def test_another_process() -> None:
    """A process gets the optimizer in shared memory: both train the same tensors."""
    context = torch.multiprocessing.get_context("spawn")
    optimizer = fusedopt.AdamW(make_params())
    twin = fusedopt.AdamW(make_params())
    train(optimizer, range(3))
    train(twin, range(6))
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, optimizer))
    process.start()
    values = queue.get(timeout=60)
    process.join()
    assert process.exitcode == 0
    assert values == [p.tolist() for p in params_of(twin)]
    # The parameters are shared, the states were moved to shared memory: this one trains on.
    assert_same_bits(params_of(optimizer), params_of(twin))
    train(optimizer, range(6, 8))


@every_class
def test_states_moved_to_shared_memory(case: Case) -> None:
    optimizer, twin = (case.ours(make_params(), **case.options) for _ in range(2))
    for each in (optimizer, twin):
        train(each, range(3))
    for p in params_of(optimizer):
        p.share_memory_()
        for value in optimizer.state[p].values():
            value.share_memory_()
    for each in (optimizer, twin):
        train(each, range(3, 6))
    assert_equal(optimizer, twin)
