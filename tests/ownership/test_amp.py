"""GradScaler with every value of fused: hooks, skipped steps and clipping, as with torch.optim."""

import inspect
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST_IN_TORCH,
    Case,
    assert_close,
    both,
    params_of,
    set_grads,
    train,
)
from torch import nn
from torch.optim import Optimizer

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
every_fused = pytest.mark.parametrize("fused", [True, None, False], ids=str)
PATTERNS = {"good": (), "bad first": (0,), "bad later": (2, 3), "all bad": range(5)}


def options(case: Case, fused: Any) -> dict[str, Any]:
    has_fused = "fused" in inspect.signature(case.row.theirs).parameters
    return {"fused": fused} if has_fused else {}


def give_scaled(optimizer: Optimizer, scaler: torch.amp.GradScaler, step: int, bad: bool) -> None:
    set_grads(params_of(optimizer), step)
    factor = float(scaler.scale(torch.ones(())))
    for p in params_of(optimizer):
        p.grad.mul_(factor)
    if bad:
        params_of(optimizer)[3].grad[1, 1] = torch.inf


@every_class
@every_fused
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("clip", [False, True], ids=["as it is", "clipped"])
def test_hooks_and_skipped_steps(case: Case, fused: Any, pattern: str, clip: bool) -> None:
    """A step that is skipped calls hooks only where step() itself skips it: with fused=True."""
    logs: list[list[Any]] = []
    pair = both(case, **options(case, fused))
    for optimizer in pair:
        log: list[Any] = []
        optimizer.register_step_pre_hook(lambda *_, log=log: log.append("pre"))
        optimizer.register_step_post_hook(lambda *_, log=log: log.append("post"))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(5):
            give_scaled(optimizer, scaler, step, step in PATTERNS[pattern])
            if clip:
                scaler.unscale_(optimizer)
                norm = float(nn.utils.clip_grad_norm_(params_of(optimizer), 0.5))
                log.append(round(norm, 9) if norm < 1e9 else None)
            scaler.step(optimizer)
            scaler.update()
            log.append((scaler.get_scale(), len(optimizer.state)))
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        logs.append(log)
    # torch's fused steps make states even in a first step that is skipped.
    if fused is True and 0 in PATTERNS[pattern]:
        logs = [[e if not isinstance(e, tuple) else e[0] for e in log] for log in logs]
    assert logs[0] == logs[1]
    # And a buffer of theirs, made in such a step, is whatever there was in its memory.
    unknown = case.row.name == "sgd" and 0 in PATTERNS[pattern]
    if not (fused is True and (unknown or pattern == "all bad")):
        assert_close(*pair)


@every_class
@every_fused
def test_who_skips_and_unscales(case: Case, fused: Any) -> None:
    ours, theirs = both(case, **options(case, fused))
    for optimizer in (ours, theirs):
        flag = getattr(optimizer, "_step_supports_amp_scaling", False)
        assert bool(flag) is bool(options(case, fused).get("fused"))
        # Nor does a step, a group or a checkpoint change it.
        train(optimizer, range(1))
        optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})
        optimizer.load_state_dict(optimizer.state_dict())
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == flag


@every_class
@every_fused
@pytest.mark.parametrize("by", ["closure", "retry", "two scalers"])
def test_odd_ways(case: Case, fused: Any, by: str) -> None:
    pair = both(case, **options(case, fused))
    logs: list[list[Any]] = []
    for optimizer in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        log: list[Any] = []
        for step in range(4):
            give_scaled(optimizer, scaler, step, bad=step == 1)
            if by == "closure":
                with pytest.raises(RuntimeError, match="[Cc]losure"):
                    scaler.step(optimizer, closure=lambda: None)
            if by == "retry":
                scaler.unscale_(optimizer)
                with pytest.raises(RuntimeError, match="unscale_"):
                    scaler.unscale_(optimizer)
            log.append(scaler.step(optimizer))
            scaler.update()
            if by == "two scalers":
                other = torch.amp.GradScaler("cpu", init_scale=4.0)
                give_scaled(optimizer, other, step + 10, bad=step == 2)
                other.step(optimizer)
                other.update()
                log.append(other.get_scale())
        logs.append(log)
    assert logs[0] == logs[1]
    assert_close(*pair)


@every_class
def test_gradients_after_a_scaled_step(case: Case) -> None:
    """Unless step() itself unscales them, they are unscaled, whoever looks at them then."""
    pair = both(case)
    for optimizer in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        give_scaled(optimizer, scaler, 0, bad=False)
        scaler.step(optimizer)
        set_grads(twin := [p.detach().clone() for p in params_of(optimizer)], 0)
        for p, q in zip(params_of(optimizer), twin, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)
    assert_close(*pair)
