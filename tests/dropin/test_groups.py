"""Parameter groups, changed as code for torch.optim does, and options that are tensors."""

import copy
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_close,
    assert_equal,
    both,
    make_params,
    params_of,
    train,
)
from torch import nn
from torch.optim import Optimizer

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


@every_class
def test_add_param_group(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        optimizer.add_param_group({"params": make_params(torch.float64, seed=1), "lr": 0.03})
        optimizer.add_param_group(
            {"params": nn.Parameter(torch.ones(5, dtype=torch.float64)), "weight_decay": 0.5}
        )
        train(optimizer, range(2, 5))
        p = params_of(optimizer)[0]
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": [p]})
        assert len(optimizer.param_groups) == 3
        train(optimizer, range(5, 7))
    assert_close(ours, theirs)


@every_class
def test_groups_with_options_of_their_own(case: Case) -> None:
    ours, theirs = (
        cls(
            [
                {"params": make_params(torch.float64, seed=0)},
                {"params": make_params(torch.float64, seed=1), "lr": 0.1, "weight_decay": 0.3},
                {"params": make_params(torch.float64, seed=2), "maximize": True},
            ],
            **case.options,
        )
        for cls in case.classes
    )
    for optimizer in (ours, theirs):
        train(optimizer, range(5))
    assert_close(ours, theirs)


@every_class
def test_group_options_changed_by_hand(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        for key, value in {"lr": 0.05, "weight_decay": 0.2, "maximize": True}.items():
            optimizer.param_groups[0][key] = value
            train(optimizer, range(2, 4))
        # Parameters, too, are taken out and put in by hand.
        removed = optimizer.param_groups[0]["params"].pop(1)
        train(optimizer, range(4, 6))
        optimizer.param_groups[0]["params"].append(removed)
        train(optimizer, range(6, 8))
    assert_close(ours, theirs)


@every_class
def test_named_parameters(case: Case) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = case.ours(model.named_parameters(), **case.options)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    train(optimizer, range(2))
    # Names of a checkpoint replace those at hand, as in torch.
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"] = ["a", "b", "c", "d"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
    del saved["param_groups"][0]["param_names"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
    model[1].weight.grad.data = torch.zeros(7)
    with pytest.raises(ValueError, match=rf"{case.ours.__name__}.*'c'"):
        optimizer.step()


# -- hyper-parameters that are tensors --------------------------------------------------------


@every_class
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_tensor_lr(case: Case, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.25, dtype=torch.float64)
    ours = case.ours(make_params(), **{**case.options, "lr": lr})
    plain = case.ours(make_params(), **{**case.options, "lr": 0.25})
    for optimizer in (ours, plain):
        train(optimizer, range(2))
    lr.fill_(0.5)
    plain.param_groups[0]["lr"] = 0.5
    for optimizer in (ours, plain):
        train(optimizer, range(2, 4))
    assert_equal(ours, plain)
    assert ours.param_groups[0]["lr"] is lr and float(lr) == 0.5


@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.AdamW])
def test_tensor_betas(cls: type[Optimizer]) -> None:
    betas = (torch.tensor(0.5), torch.tensor([0.75]))
    ours = cls(make_params(), betas=betas)
    plain = cls(make_params(), betas=(0.5, 0.75))
    for optimizer in (ours, plain):
        train(optimizer, range(2))
    for optimizer, beta in ((ours, torch.tensor(0.25)), (plain, 0.25)):
        optimizer.param_groups[0]["betas"] = (beta, 0.75)
        train(optimizer, range(2, 4))
    assert_equal(ours, plain)


def test_tensor_weight_decay() -> None:
    ours = fusedopt.SGD(make_params(), weight_decay=torch.tensor(0.125))
    plain = fusedopt.SGD(make_params(), weight_decay=0.125)
    for optimizer in (ours, plain):
        train(optimizer, range(2))
    assert_equal(ours, plain)


@pytest.mark.parametrize("flat", [False, True])
def test_a_constructor_looks_at_each_group_once(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan for every group it adds would take minutes for thousands of groups."""
    plans = []
    make_plan = fusedopt.AdamW._make_plan

    def counted(self: fusedopt.AdamW, *args: Any) -> Any:
        plans.append(len(self.param_groups))
        return make_plan(self, *args)

    monkeypatch.setattr(fusedopt.AdamW, "_make_plan", counted)
    groups = [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(5)]
    optimizer = fusedopt.AdamW(groups, flat=flat)
    assert plans == ([5] if flat else [])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert plans == ([5, 6] if flat else [])
    assert len(optimizer.state) == (6 if flat else 0)
