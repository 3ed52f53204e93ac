"""States in shared memory: what one process steps, the others see, as with torch.optim."""

import os
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from support.training import (
    RICHEST_IN_TORCH,
    Case,
    assert_close,
    assert_same_bits,
    make_params,
    params_of,
    states_of,
    train,
)
from torch import Tensor
from torch.optim import Optimizer

from fusedopt._formats import NUMBERS

SHAPES = ((9, 5), (17,), ())
# How states come into shared memory, with the shape of a count.
WAYS = {
    "moved": (),  # after some steps
    "put there": (),  # before the first step, all of them zero
    "put there, counts as lists": (1,),  # as A3C does
}
WITH_COUNTS = [case for case in RICHEST_IN_TORCH if "step" in case.state_keys]
# Without a count SGD has taken its first step where it has a buffer.
PAIRS = [
    (case, way)
    for case in RICHEST_IN_TORCH
    for way in WAYS
    if case in WITH_COUNTS or way != "put there, counts as lists"
]


def shared(case: Case, way: str, cls: Any) -> Optimizer:
    params = make_params(torch.float64, SHAPES)
    optimizer = cls(params, **case.options)
    if way == "moved":
        train(optimizer, range(2))
        for p in params:
            p.grad = None
    else:
        for p in params:
            state: dict[str, Tensor] = {}
            for key in case.row.ordered_keys(case.options):
                if key == "step":
                    state[key] = torch.zeros(WAYS[way])
                else:
                    state[key] = torch.ones(()) if key in NUMBERS else torch.zeros_like(p)
            optimizer.state[p].update({k: v.detach() for k, v in state.items()})
    for p in params:
        p.share_memory_()
        for value in optimizer.state[p].values():
            value.share_memory_()
    return optimizer


def work(optimizers: list[Optimizer]) -> None:
    """In a spawned process: with what was sent to it, and in a fork with what that inherits."""
    torch.set_num_threads(1)
    for optimizer in optimizers:
        train(optimizer, range(2, 4))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for optimizer in optimizers:
                train(optimizer, range(4, 6))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    # What its own child has stepped, this process sees as well, and goes on from there.
    for optimizer in optimizers:
        train(optimizer, range(6, 7))


Made = list[tuple[Case, str, Optimizer, Optimizer, list[list[Tensor]]]]


@pytest.fixture(scope="module")
def stepped_elsewhere() -> Made:
    """Each of ours, and torch's, and the tensors that they had before."""
    made: Made = []
    for case, way in PAIRS:
        ours, theirs = (shared(case, way, cls) for cls in case.classes)
        made.append((case, way, ours, theirs, [[*s.values()] for s in states_of(ours)]))
    process = mp.get_context("spawn").Process(
        target=work, args=([each for row in made for each in row[2:4]],)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return made


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda n: f"{PAIRS[n][0]}-{PAIRS[n][1]}")
def test_steps_of_other_processes_are_seen(stepped_elsewhere: Made, number: int) -> None:
    case, _, ours, theirs, tensors = stepped_elsewhere[number]
    assert_close(ours, theirs)
    for p, before in zip(params_of(ours), tensors, strict=True):
        assert p.is_shared()
        for value, old in zip(ours.state[p].values(), before, strict=True):
            assert value is old and value.is_shared()
    for optimizer in (ours, theirs):
        train(optimizer, range(7, 9))
    assert_close(ours, theirs)
    if "step" in case.state_keys:
        assert {float(s["step"]) for s in states_of(ours)} <= {9.0, 7.0}


@pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_states_stay_where_they_were_shared(case: Case, way: str) -> None:
    """In one process: no step, planned anew or not, takes them out of shared memory."""
    if case not in WITH_COUNTS and WAYS[way]:
        pytest.skip("it has no count")
    ours, theirs = (shared(case, way, cls) for cls in case.classes)
    before = [dict(values) for values in states_of(ours)]
    for optimizer in (ours, theirs):
        train(optimizer, range(2, 4))
        for p in params_of(optimizer):
            p.grad = None
        optimizer.state[params_of(optimizer)[0]]["mine"] = 1
        train(optimizer, range(4, 6))
        del optimizer.state[params_of(optimizer)[0]]["mine"]
    assert_close(ours, theirs)
    for values, old in zip(states_of(ours), before, strict=True):
        assert values.keys() == old.keys()
        assert all(values[key] is old[key] and values[key].is_shared() for key in old)


@pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
def test_views_of_one_shared_buffer(case: Case) -> None:
    """All states in one block of shared memory, at any offset, one behind the other."""
    ours, theirs = (cls(make_params(torch.float64, SHAPES), **case.options) for cls in case.classes)
    buffers = []
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        buffer = torch.zeros(1000, dtype=torch.float64).share_memory_()
        begin = 1
        for p in params_of(optimizer):
            for key, value in optimizer.state[p].items():
                if key not in NUMBERS:
                    view = buffer[begin : begin + value.numel()].view(value.shape)
                    optimizer.state[p][key] = view.copy_(value)
                    begin += value.numel()
        buffers.append(buffer)
        train(optimizer, range(2, 4))
    torch.testing.assert_close(*buffers)
    assert_close(ours, theirs)


@pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
def test_an_optimizer_unpickled_beside_the_first(case: Case) -> None:
    """What another process gets, in this one: both have the same memory, and see each other."""
    stepped = []
    for cls in case.classes:
        first = shared(case, "moved", cls)
        second = ForkingPickler.loads(ForkingPickler.dumps(first))
        for optimizer in (first, second, first):
            train(optimizer, range(2, 4))
        if "step" in case.state_keys:
            assert float(states_of(first)[0]["step"]) == 8
        assert_same_bits(params_of(first), params_of(second))
        assert_same_bits(states_of(first), states_of(second))
        stepped.append(first)
    assert_close(*stepped)
