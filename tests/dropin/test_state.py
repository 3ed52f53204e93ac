"""optimizer.state as torch.optim has it: laid out alike, live, and free to be replaced."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.training import CASES, RICHEST, Case, assert_close, both, params_of, set_grads, train
from torch import Tensor, nn

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(6, 5),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(6, 10)[:, ::2],
    "complex": lambda: torch.randn(6, 5, dtype=torch.complex64),
    "float64": lambda: torch.randn(6, 5, dtype=torch.float64),
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_laid_out_as_torchs(case: Case, layout: str) -> None:
    value = LAYOUTS[layout]()
    ours, theirs = (
        cls([nn.Parameter(copy.deepcopy(value))], **case.options) for cls in case.classes
    )
    for step in range(2):
        for optimizer in (ours, theirs):
            train(optimizer, [step])
    [p], [q] = params_of(ours), params_of(theirs)
    assert p.stride() == q.stride()
    assert list(ours.state.get(p, {})) == list(theirs.state.get(q, {}))
    for key, state in theirs.state.get(q, {}).items():
        mine = ours.state[p][key]
        assert (mine.shape, mine.stride(), mine.dtype) == (state.shape, state.stride(), state.dtype)
        assert mine.device == state.device and type(mine) is type(state)
        torch.testing.assert_close(mine, state)
    torch.testing.assert_close(p, q)


@every_case
def test_state_without_a_gradient(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        optimizer.step()
        assert len(optimizer.state) == (len(params_of(optimizer)) if case.row.states_at_once else 0)
        set_grads(params_of(optimizer)[:2], 0)
        optimizer.step()
    assert len(ours.state) == len(theirs.state)
    assert_close(ours, theirs)


@every_class
def test_states_are_live(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        for p in params_of(optimizer):
            for value in optimizer.state[p].values():
                value.mul_(2)
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)


@every_class
def test_states_can_be_replaced_and_removed(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        first, second, *_ = params_of(optimizer)
        for key, value in optimizer.state[first].items():
            optimizer.state[first][key] = value * 2
        del optimizer.state[second]
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.state.clear()
        train(optimizer, range(6, 9))
    assert_close(ours, theirs)
    for optimizer in (ours, theirs):
        # How a restart is often written.
        optimizer.state = type(theirs.state)(dict)
        train(optimizer, range(9, 12))
    assert_close(ours, theirs)
