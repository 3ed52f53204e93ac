"""What a plan can do beyond an ordinary step: some members only, and a rule for each group."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_equal,
    assert_same_bits,
    make_params,
    on,
    params_of,
    set_grads,
    states_of,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt
from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


def step_some(optimizer: Any, positions: list[int]) -> None:
    """A step over the members at these positions; state and plan have to be there."""
    groups, state, norm = optimizer.param_groups, optimizer.state, optimizer.max_grad_norm
    done = optimizer._plan.step(groups, state, None, None, norm, positions=positions)
    assert done is None


@every_class
@pytest.mark.parametrize("flat", [False, True], ids=["apart", "flat"])
def test_partial_steps_are_the_ordinary_step_in_parts(case: Case, flat: bool, device: str) -> None:
    """In any order, and whatever is stepped between them."""
    whole, parts = (
        case.ours(on(device, make_params()), **case.options, flat=flat) for _ in range(2)
    )
    count = len(params_of(whole))
    for optimizer in (whole, parts):
        train(optimizer, range(2))
    for step in range(2, 5):
        for optimizer in (whole, parts):
            set_grads(params_of(optimizer), step)
        whole.step()
        step_some(parts, [*range(1, count, 2)])
        step_some(parts, [])
        for position in reversed(range(0, count, 2)):
            step_some(parts, [position])
    assert_equal(parts, whole)


def test_a_partial_step_leaves_all_others_alone() -> None:
    optimizer = fusedopt.AdamW([{"params": make_params()}, {"params": make_params(seed=1)}])
    train(optimizer, range(2))
    params = params_of(optimizer)
    before = [(p.detach().clone(), p._version) for p in params]
    states = [{k: v.clone() for k, v in state.items()} for state in states_of(optimizer)]
    set_grads(params, 5)
    stepped = [1, len(params) - 1]
    step_some(optimizer, stepped)
    for i, (param, (weights, version)) in enumerate(zip(params, before, strict=True)):
        state = states_of(optimizer)[i]
        assert float(state["step"]) == float(states[i]["step"]) + (i in stepped)
        if i not in stepped:
            assert_same_bits(param.detach(), weights)
            assert_same_bits(state["exp_avg"], states[i]["exp_avg"])
            assert param._version == version
        elif param.numel() > 0:
            assert not torch.equal(param, weights)


def test_a_partial_step_reads_no_other_group() -> None:
    optimizer = fusedopt.AdamW([{"params": make_params()}, {"params": make_params(seed=1)}])
    train(optimizer, range(2))
    del optimizer.param_groups[1]["lr"]
    set_grads(params_of(optimizer), 5)
    step_some(optimizer, [0])
    with pytest.raises(KeyError, match="group 1: lr is missing"):
        step_some(optimizer, [len(params_of(optimizer)) - 1])


def test_positions_that_are_not_there() -> None:
    optimizer: Any = fusedopt.AdamW(make_params())
    train(optimizer, range(1))
    for position in (len(params_of(optimizer)), -1):
        with pytest.raises(IndexError, match="AdamW: there is no parameter"):
            step_some(optimizer, [position])


def test_a_partial_step_after_memory_was_moved() -> None:
    """It looks at no other memory, so that a plan is made anew, which does: two may overlap now."""
    optimizer: Any = fusedopt.SGD(make_params(), lr=0.5)
    train(optimizer, range(1))
    other, moved = params_of(optimizer)[:2]
    set_grads([moved], 5)
    moved.data = moved.data.clone()
    before, gradient = moved.detach().clone(), moved.grad
    lacks = optimizer._plan.step(
        optimizer.param_groups, optimizer.state, None, None, None, positions=[1]
    )
    assert lacks.states == lacks.gradients == []
    optimizer._make_plan(optimizer.state)
    step_some(optimizer, [1])
    assert gradient is not None
    assert torch.equal(moved.detach(), before - 0.5 * gradient)
    other.data = moved.data
    with pytest.raises(ValueError, match="overlap"):
        optimizer._make_plan(optimizer.state)


# -- a rule for each group -----------------------------------------------------------------------

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": True, "amsgrad": False}
SGD = {"momentum": 0.9, "dampening": 0.0, "nesterov": False}
BOTH = {"lr": 1e-2, "weight_decay": 0.1, "maximize": False, "capturable": False}


class AdamWAndSgd(FusedOptimizer):
    """AdamW, or SGD in groups that say so."""

    _rule = "adam"

    def __init__(
        self, params: Any, max_grad_norm: float | None = None, capturable: bool = False
    ) -> None:
        defaults = ADAM | SGD | BOTH | {"rule": "adam", "capturable": capturable}
        options = storage_options(None, 4096, None, "nearest", 0)
        self._init(options, False, max_grad_norm, {"params": params, "defaults": defaults})

    def _rule_of(self, group: Mapping[str, Any]) -> str:
        return str(group["rule"])


def groups(device: str) -> list[dict[str, Any]]:
    """Three, of which the second one has the other rule."""
    rules = ("adam", "sgd", "adam")
    return [
        {"params": on(device, make_params(seed=seed)), "rule": rule}
        for seed, rule in enumerate(rules)
    ]


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
def test_each_group_by_its_rule(device: str, capturable: bool) -> None:
    mixed = AdamWAndSgd(groups(device), capturable=capturable)
    apart: list[Optimizer] = [
        fusedopt.AdamW(group["params"], lr=1e-2, weight_decay=0.1, capturable=capturable)
        if group["rule"] == "adam"
        else fusedopt.SGD(
            group["params"], lr=1e-2, weight_decay=0.1, momentum=0.9, capturable=capturable
        )
        for group in groups(device)
    ]
    theirs = [p for each in apart for p in params_of(each)]
    for step in range(4):
        set_grads(params_of(mixed), step)
        for ours, param in zip(params_of(mixed), theirs, strict=True):
            param.grad = None if ours.grad is None else ours.grad.clone()
        for optimizer in (mixed, *apart):
            optimizer.step()
    assert_same_bits(params_of(mixed), theirs)
    keys = [set(state) for state in states_of(mixed)]
    assert {"step", "exp_avg", "exp_avg_sq"} in keys and {"momentum_buffer"} in keys


def test_one_norm_for_all_rules() -> None:
    """And a factor that each rule's rows are scaled by."""
    mixed = AdamWAndSgd(groups("cpu"), max_grad_norm=0.5)
    clipped = AdamWAndSgd(groups("cpu"))
    for step in range(3):
        for optimizer in (mixed, clipped):
            set_grads(params_of(optimizer), step)
        norm = torch.nn.utils.clip_grad_norm_(params_of(clipped), 0.5)
        for optimizer in (mixed, clipped):
            optimizer.step()
        assert mixed.grad_norm is not None
        torch.testing.assert_close(mixed.grad_norm, norm)
    for ours, theirs in zip(params_of(mixed), params_of(clipped), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_states_of_rules_change_with_them() -> None:
    param = nn.Parameter(torch.ones(10))
    optimizer = AdamWAndSgd([param])
    param.grad = torch.ones(10)
    optimizer.step()
    optimizer.param_groups[0]["rule"] = "sgd"
    optimizer.state.clear()
    optimizer.step()
    state: dict[str, Tensor] = optimizer.state[param]
    assert set(state) == {"momentum_buffer"}
