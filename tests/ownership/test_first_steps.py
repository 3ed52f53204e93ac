"""First steps of parameters, together with whatever else changes before the same step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_close,
    assert_unchanged,
    both,
    make_params,
    params_of,
    set_grads,
    snapshot,
    train,
)
from torch import nn
from torch.optim import Optimizer

import fusedopt

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)

Change = Callable[[Optimizer], object]


def _data(optimizer: Optimizer) -> None:
    p = params_of(optimizer)[1]
    p.data = p.data.clone()


def _data_of_the_new(optimizer: Optimizer) -> None:
    p = params_of(optimizer)[0]
    p.data = p.data.clone()


def _all_data(optimizer: Optimizer) -> None:
    for p in params_of(optimizer):
        p.data = p.data.clone()


def _strides(optimizer: Optimizer) -> None:
    p = params_of(optimizer)[3]
    p.data = p.data.t().contiguous().t()


def _state(optimizer: Optimizer) -> None:
    p = params_of(optimizer)[1]
    if p in optimizer.state:
        optimizer.state[p] = {k: v * 2 for k, v in optimizer.state[p].items()}


def _state_gone(optimizer: Optimizer) -> None:
    optimizer.state.pop(params_of(optimizer)[1], None)


def _data_of_state(optimizer: Optimizer) -> None:
    for value in optimizer.state.get(params_of(optimizer)[1], {}).values():
        value.data = value * 2


def _group(optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": make_params(torch.float64, ((4, 3),), seed=8)})


def _lr(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.25


def _frozen(optimizer: Optimizer) -> None:
    params_of(optimizer)[2].requires_grad_(False)


def _removed(optimizer: Optimizer) -> None:
    del optimizer.param_groups[0]["params"][1]


def _swapped(optimizer: Optimizer) -> None:
    p = params_of(optimizer)[2]
    torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2))


CHANGES: dict[str, Change] = {
    change.__name__[1:]: change
    for change in (
        *(_data, _data_of_the_new, _all_data, _strides, _state, _state_gone, _data_of_state),
        *(_group, _lr, _frozen, _removed, _swapped),
    )
}


def begin(optimizer: Optimizer, steps: str) -> None:
    """Some steps, of which the first parameter, and the fifth, take no part."""
    params = params_of(optimizer)
    if steps == "without a gradient":
        optimizer.step()
    elif steps == "others":
        for step in range(2):
            set_grads([params[1], params[2], params[3]], step)
            optimizer.step()
    for p in params:
        p.grad = None


def give(optimizer: Optimizer) -> None:
    set_grads([p for p in params_of(optimizer) if p.requires_grad], 7)


@every_class
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", ["without a gradient", "others"])
def test_a_first_step_with_another_change(case: Case, change: str, steps: str) -> None:
    pair = both(case)
    for optimizer in pair:
        begin(optimizer, steps)
        CHANGES[change](optimizer)
        give(optimizer)
        optimizer.step()
        train(optimizer, range(8, 10))
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", ["without a gradient", "others"])
def test_an_error_in_such_a_step(case: Case, change: str, steps: str) -> None:
    """Nothing has changed then; the step after it was mended is torch's."""
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        begin(optimizer, steps)
        CHANGES[change](optimizer)
        give(optimizer)
    for number in range(len(params_of(ours))):
        p = params_of(ours)[number]
        good = p.grad
        if good is None:
            continue
        for bad in (torch.zeros(2, 9, dtype=torch.float64), torch.zeros_like(p).int()):
            p.grad = None
            p.grad_dtype = None
            p.grad = torch.zeros_like(p)
            p.grad.data = bad
            before = snapshot(ours)
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                ours.step()
            assert_unchanged(ours, before)
        p.grad = good
    for optimizer in (ours, theirs):
        optimizer.step()
        train(optimizer, range(8, 10))
    assert_close(ours, theirs)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("error", [False, True])
def test_the_gradient_is_the_first_buffer(dampening: float, change: str, error: bool) -> None:
    """Of a parameter whose state is made in the second round of planning, too."""
    pair = [
        cls(make_params(torch.float64), lr=0.1, momentum=0.9, dampening=dampening)
        for cls in (fusedopt.SGD, torch.optim.SGD)
    ]
    for optimizer in pair:
        optimizer.step()
        CHANGES[change](optimizer)
        give(optimizer)
        if error and optimizer is pair[0]:
            p = params_of(optimizer)[-1]
            good = p.grad.data
            p.grad.data = torch.zeros(3, dtype=torch.float64)
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                optimizer.step()
            assert len(optimizer.state) == 0
            p.grad.data = good
        optimizer.step()
        for p in params_of(optimizer):
            if p.grad is not None:
                buffer = optimizer.state[p]["momentum_buffer"]
                assert torch.equal(buffer, p.grad) and buffer is not p.grad
    assert_close(*pair)
    for optimizer in pair:
        train(optimizer, range(8, 10))
    assert_close(*pair)


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("SGD", {"dampening": 0.5}, {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.0}),
    ("RMSprop", {}, {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}, {"momentum": 0.0, "centered": False}),
    ("AdamW", {"amsgrad": True}, {"amsgrad": False}),
    ("Adam", {"amsgrad": True}, {"amsgrad": False}),
]


@pytest.mark.parametrize(("name", "start", "then"), OPTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_other_states_wanted_at_the_same_time(
    name: str, start: dict[str, Any], then: dict[str, Any], change: str
) -> None:
    pair = [getattr(m, name)(make_params(torch.float64), **start) for m in (fusedopt, torch.optim)]
    for optimizer in pair:
        begin(optimizer, "others")
        optimizer.param_groups[0].update(then)
        CHANGES[change](optimizer)
        give(optimizer)
        optimizer.step()
        train(optimizer, range(8, 10))
    assert_close(*pair)
    for optimizer in pair:
        # Only SGD's buffer can be wanted by torch.optim where there are states already.
        if name == "SGD":
            optimizer.param_groups[0].update(momentum=0.7)
        _all_data(optimizer)
        train(optimizer, range(10, 12))
    assert_close(*pair)


@every_class
def test_one_parameter_after_the_other(case: Case) -> None:
    """A first step in each of six, and the memory of all before it exchanged each time."""
    pair = both(case)
    for optimizer in pair:
        params = params_of(optimizer)
        for step in range(6):
            for p in params[:step]:
                p.data = p.data.clone()
                optimizer.state[p] = dict(optimizer.state[p])
            set_grads(params[: step + 1], step)
            optimizer.step()
    assert_close(*pair)


@pytest.mark.parametrize("how", ["in place", "another tensor", "another state"])
def test_a_buffer_of_the_user_s_before_the_first_step_is_continued(how: str) -> None:
    """Though a state had been made for that step, as there is for flat parameters."""
    pair = [
        fusedopt.SGD(make_params(), lr=0.1, momentum=0.9, dampening=0.5, flat=True),
        torch.optim.SGD(make_params(), lr=0.1, momentum=0.9, dampening=0.5),
    ]
    for optimizer in pair:
        for p in params_of(optimizer):
            if how == "in place" and "momentum_buffer" in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"].fill_(0.5)
            elif how == "another state":
                optimizer.state[p] = {"momentum_buffer": torch.full_like(p, 0.5).detach()}
            else:
                optimizer.state[p]["momentum_buffer"] = torch.full_like(p, 0.5).detach()
        train(optimizer, range(3))
    assert_close(*pair)
