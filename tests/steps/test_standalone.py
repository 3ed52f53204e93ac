"""An optimizer that torch.optim has no class for: all that the others inherit works for it, too."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import (
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    clone_params,
    make_params,
    params_of,
    snapshot,
    train,
)
from torch import nn
from torch.optim import Optimizer, lr_scheduler

import fusedopt
from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

FIXED = {"dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
OPTIONS = {"lr", "momentum", *FIXED, "params"}


class PlainSgd(FusedOptimizer):
    """SGD with nothing but momentum. It has a rule, but no other base than torch's Optimizer."""

    _rule = "sgd"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.9,
        differentiable: bool = False,
        flat: bool = False,
        max_grad_norm: float | None = None,
        **storage: Any,
    ) -> None:
        options = storage_options(None, 4096, None, "nearest", 0) | storage
        args = {"params": params, "defaults": {"lr": lr, "momentum": momentum, **FIXED}}
        self._init(options, flat, max_grad_norm, args, differentiable)


def both(**options: Any) -> tuple[Optimizer, Optimizer]:
    ours = PlainSgd(make_params(), **options)
    return ours, fusedopt.SGD(make_params(), lr=1e-2, momentum=0.9, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"flat": True}, {"max_grad_norm": 0.5}, {"state_dtype": "int8", "min_8bit_size": 0}],
    ids=str,
)
def test_steps_as_its_rule_does(options: dict[str, Any]) -> None:
    ours, twin = both(**options)
    for each in (ours, twin):
        train(each, range(3))
        each.zero_grad()
        train(each, range(3, 5))
    assert_equal(ours, twin)
    given = options.keys() & {"state_dtype", "min_8bit_size"}
    assert ours.param_groups[0].keys() == OPTIONS | given
    assert ours.defaults.keys() == (OPTIONS | given) - {"params"}


def reloaded(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = PlainSgd(clone_params(params_of(optimizer)), lr=0.7)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES: dict[str, Callable[[Any], Any]] = {
    "state_dict": reloaded,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_train_on(way: str) -> None:
    """And have no option that its constructor never heard of."""
    optimizer = PlainSgd(make_params())
    train(optimizer, range(2))
    twin = COPIES[way](optimizer)
    twin.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert all(group.keys() == OPTIONS for group in twin.param_groups)
    assert twin.state_dict()["param_groups"][0] == optimizer.state_dict()["param_groups"][0]
    for each in (optimizer, twin):
        train(each, range(2, 4))
    assert_same_bits(params_of(twin)[:-1], params_of(optimizer))


def test_a_damaged_checkpoint() -> None:
    optimizer = PlainSgd(make_params())
    train(optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][1]["momentum_buffer"] = torch.zeros(2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="PlainSgd: state 'momentum_buffer' of parameter 1"):
        optimizer.load_state_dict(state_dict)
    assert_unchanged(optimizer, before)


def test_differentiable_names_no_class_of_torch() -> None:
    with pytest.raises(ValueError, match="PlainSgd: differentiable=True is not supported") as error:
        PlainSgd(make_params(), differentiable=True)
    assert "torch.optim" not in str(error.value)


def test_scheduler_scaler_and_report() -> None:
    ours, twin = both()
    for each in (ours, twin):
        scheduler = lr_scheduler.ExponentialLR(each, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            train_scaled(each, scaler, step)
            scheduler.step()
    assert_equal(ours, twin)
    assert str(fusedopt.memory_report(ours)) == str(fusedopt.memory_report(twin))


def train_scaled(optimizer: Optimizer, scaler: torch.amp.GradScaler, step: int) -> None:
    optimizer.zero_grad()
    loss = sum((p * (p + step)).sum() for p in params_of(optimizer))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
