"""Closures and hooks: called when torch.optim calls them, with the same arguments."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.training import CASES, RICHEST, Case, assert_close, both, make_params, params_of, train
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    from torch.optim import optimizer as module

    yield
    assert not module._global_optimizer_pre_hooks and not module._global_optimizer_post_hooks


@every_class
def test_closure(case: Case) -> None:
    ours, theirs = both(case)
    losses = []
    for optimizer in (ours, theirs):
        calls = []

        def closure(optimizer: Optimizer = optimizer, calls: list[float] = calls) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum(((p - 1) ** 2).sum() for p in params_of(optimizer))
            loss.backward()
            calls.append(loss.item())
            return loss

        with torch.no_grad():
            returned = [optimizer.step(closure) for _ in range(3)]
            returned.append(optimizer.step(closure=closure))
        assert calls == [loss.item() for loss in returned]
        losses.append(calls)
        assert optimizer.step() is None
    torch.testing.assert_close(*losses)
    assert_close(ours, theirs)


@every_class
def test_step_hooks(case: Case) -> None:
    """Of instances and global ones: called in torch's order, with torch's arguments."""
    logs = []
    for optimizer in both(case):
        log: list[Any] = []

        def note(name: str, optimizer: Optimizer = optimizer, log: list[Any] = log) -> Any:
            def hook(opt: Optimizer, args: Any, kwargs: Any) -> None:
                assert opt is optimizer
                log.append((name, params_of(opt)[2].item(), len(args), sorted(kwargs)))

            return hook

        handles = [
            optimizer.register_step_post_hook(note("post")),
            optimizer.register_step_pre_hook(note("pre")),
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        train(optimizer, range(2))
        optimizer.step(closure=lambda: None)
        for handle in handles:
            handle.remove()
        train(optimizer, range(2))
        logs.append(log)
    ours, theirs = logs
    assert [entry[0] for entry in ours] == ["global pre", "pre", "post", "global post"] * 3
    assert [(e[0], *e[2:]) for e in ours] == [(e[0], *e[2:]) for e in theirs]
    torch.testing.assert_close([e[1] for e in ours], [e[1] for e in theirs])


def test_step_pre_hook_changes_the_arguments() -> None:
    optimizer = fusedopt.SGD(make_params())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 3.0), {}))
    assert optimizer.step() == 3.0


def test_step_pre_hook_clips() -> None:
    ours, theirs = both(next(case for case in CASES if case.name == "sgd-momentum"))
    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(
            lambda opt, args, kwargs: nn.utils.clip_grad_norm_(params_of(opt), 0.1) and None
        )
        train(optimizer, range(5))
    assert_close(ours, theirs)


@every_class
def test_state_dict_hooks(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    log: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: log.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda opt: log.append("first"), prepend=True)

    def in_place(opt: Optimizer, state_dict: dict[str, Any]) -> None:
        assert type(state_dict["state"]) is dict and type(state_dict["state"][0]) is dict
        state_dict["state"][0]["mine"] = 1
        state_dict["extra"] = True

    optimizer.register_state_dict_post_hook(in_place)
    optimizer.register_state_dict_post_hook(lambda opt, d: {**d, "replaced": True})
    saved = optimizer.state_dict()
    assert log == ["first", "pre"]
    assert saved["extra"] and saved["replaced"] and saved["state"][0]["mine"] == 1
    assert "mine" not in optimizer.state[params_of(optimizer)[0]]


@every_class
def test_state_dict_post_hook_that_prepends(case: Case) -> None:
    """A hook that is first still sees plain dictionaries, and leaves no trace of ours."""
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    seen: list[type] = []
    optimizer.register_state_dict_post_hook(
        lambda opt, d: seen.append(type(d["state"][0])), prepend=True
    )
    hooks = len(optimizer._optimizer_state_dict_post_hooks)
    optimizer.state_dict()
    assert seen == [dict] and len(optimizer._optimizer_state_dict_post_hooks) == hooks


@every_class
def test_load_hooks(case: Case) -> None:
    """Hooks that change what is loaded, in place or by returning another dictionary."""
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        saved = copy.deepcopy(optimizer.state_dict())
        renamed = {**saved, "state": {k: {"old": v} for k, v in saved["state"].items()}}
        log: list[str] = []

        def rename(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {
                **state_dict,
                "state": {k: dict(v["old"]) for k, v in state_dict["state"].items()},
            }

        def double(opt: Optimizer, state_dict: dict[str, Any]) -> None:
            for values in state_dict["state"].values():
                for key in values:
                    values[key] = values[key] * 2
            state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
            state_dict["param_groups"][0]["lr"] = 0.5

        optimizer.register_load_state_dict_pre_hook(double)
        optimizer.register_load_state_dict_pre_hook(rename, prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda opt, log=log: log.append("post"))
        hooks = len(optimizer._optimizer_load_state_dict_pre_hooks)
        optimizer.load_state_dict(renamed)
        assert log == ["post"] and optimizer.param_groups[0]["lr"] == 0.5
        assert len(optimizer._optimizer_load_state_dict_pre_hooks) == hooks
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)


@every_class
def test_load_post_hook_sees_and_changes_what_was_loaded(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))

        def double(opt: Optimizer) -> None:
            for p in params_of(opt):
                for value in opt.state[p].values():
                    value.mul_(2)

        optimizer.register_load_state_dict_post_hook(double)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)
