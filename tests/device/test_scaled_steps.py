"""Scaled steps on a device: what found_inf, or a GradScaler, skips and does not."""

import copy

import pytest
import torch
from support.device import assert_same, pair, scalar
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_same_bits,
    assert_unchanged,
    make_params,
    on,
    params_of,
    set_grads,
    snapshot,
    states_of,
    train,
)
from torch import nn

import fusedopt
from fusedopt._optimizer import FusedOptimizer

pytestmark = pytest.mark.cuda
every_case = pytest.mark.parametrize("case", EVERY_CASE, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


@every_case
def test_a_skipped_step_changes_nothing(case: Case, cuda: str) -> None:
    """Not even that the first one is still to come."""
    ours, plain = pair(case, cuda)
    taken = 0
    for number, found_inf in enumerate([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]):
        ours.found_inf, ours.grad_scale = scalar(found_inf, cuda), scalar(8.0, cuda)
        set_grads(params_of(ours), number)
        with torch.no_grad():
            for p in params_of(ours):
                p.grad *= 8
        before = [p.detach().clone() for p in params_of(ours)]
        ours.step()
        if found_inf:
            assert_same_bits(before, [p.detach() for p in params_of(ours)])
        else:
            train(plain, [number])
            taken += 1
        for state in states_of(ours):
            assert "step" not in state or float(state["step"]) == taken
    assert_same(ours, plain)


def test_a_checkpoint_after_a_skipped_first_step(cuda: str) -> None:
    options = {"momentum": 0.9, "dampening": 0.5}
    ours = fusedopt.SGD(on(cuda, make_params()), **options, capturable=True)
    ours.found_inf = scalar(1.0, cuda)
    train(ours, [0])
    assert not any(ours.state_dict()["state"].values())
    ours.found_inf = scalar(0.0, cuda)
    train(ours, [1])
    plain = fusedopt.SGD(on(cuda, make_params()), **options)
    train(plain, [1])
    assert_same_bits(ours.state_dict()["state"], plain.state_dict()["state"])
    assert_same(ours, plain)


@every_class
def test_found_inf_where_the_host_counts(case: Case, cuda: str) -> None:
    """Then the host asks for it."""
    _, plain = pair(case, cuda)
    train(plain, [0])
    set_grads(params_of(plain), 1)
    before = snapshot(plain)
    plain.found_inf = scalar(1.0, cuda)
    plain.step()
    assert_unchanged(plain, before)
    plain.found_inf = scalar(0.0, cuda)
    plain.step()
    assert all(float(state.get("step", 2)) == 2 for state in states_of(plain))


@pytest.mark.parametrize("capturable", [False, True])
@every_class
def test_grad_scaler(
    case: Case, capturable: bool, cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one gradient that overflows, in the second step, as with fused=True."""
    monkeypatch.setattr(FusedOptimizer, "_step_supports_amp_scaling", True)
    ours = case.ours(on(cuda, make_params()), **case.options, capturable=capturable)
    plain = case.ours(on(cuda, make_params()), **case.options)
    scaler = torch.amp.GradScaler(cuda, init_scale=1024.0, growth_interval=100)
    scaler.scale(scalar(1.0, cuda))
    for number in range(4):
        set_grads(params_of(ours), number)
        with torch.no_grad():
            for p in params_of(ours):
                p.grad *= scaler.get_scale()
        if number == 1:
            params_of(ours)[2].grad.fill_(torch.inf)
        else:
            train(plain, [number])
        scaler.step(ours)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(ours, plain)


def test_a_copy_after_a_skipped_first_step(cuda: str) -> None:
    ours = fusedopt.SGD(
        on(cuda, make_params()), lr=1.0, momentum=0.9, dampening=0.5, capturable=True
    )
    ours.found_inf = scalar(1.0, cuda)
    train(ours, [0])
    twin = copy.deepcopy(ours)
    ours.found_inf = scalar(0.0, cuda)
    for optimizer in (ours, twin):
        train(optimizer, [1])
    assert_same(ours, twin)


def test_a_first_step_that_was_skipped_before_the_host_counts(cuda: str) -> None:
    options = {"lr": 1.0, "momentum": 0.9, "dampening": 0.5}
    ours = fusedopt.SGD(on(cuda, make_params()), **options, capturable=True)
    plain = fusedopt.SGD(on(cuda, make_params()), **options)
    ours.found_inf = scalar(1.0, cuda)
    train(ours, [0])
    ours.param_groups[0]["capturable"] = False
    del ours.found_inf
    for optimizer in (ours, plain):
        for step in range(1, 4):
            extra = nn.Parameter(torch.zeros(2, device=cuda))
            optimizer.add_param_group({"params": [extra]})  # and a new plan
            train(optimizer, [step])
    assert_same(ours, plain)
