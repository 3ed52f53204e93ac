"""Mixed precision: steps by torch's GradScaler."""

import inspect
from dataclasses import replace

import pytest
import torch
from support.training import (
    CASES,
    RICHEST,
    Case,
    assert_close,
    assert_equal,
    assert_same_bits,
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

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
# Those whose steps can unscale and skip by themselves, with fused=True.
FUSED = [c for c in RICHEST if "fused" in inspect.signature(c.ours).parameters]
every_fused_class = pytest.mark.parametrize("case", FUSED, ids=str)


def with_fused(case: Case) -> Case:
    return replace(case, name=f"{case.name}-fused", options={**case.options, "fused": True})


def scale_grads(optimizer: Optimizer, factor: float) -> None:
    for p in params_of(optimizer):
        p.grad.mul_(factor)


def scaler_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, step: int, bad: bool) -> None:
    """A step with gradients as a scaled loss leaves them, one of them infinite where bad."""
    set_grads(params_of(optimizer), step)
    # Makes the scaler allocate its scale, as any loss does.
    factor = float(scaler.scale(torch.ones(())))
    scale_grads(optimizer, factor)
    if bad:
        params_of(optimizer)[-1].grad.flatten()[-1] = torch.inf
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("case", [*CASES, *map(with_fused, FUSED)], ids=str)
@pytest.mark.parametrize("pattern", ["good", "bad first", "bad later"])
def test_grad_scaler(case: Case, pattern: str) -> None:
    bad = {"good": (), "bad first": (0, 1), "bad later": (2, 4)}[pattern]
    ours = both(case)[0]
    # A fused step of torch's SGD that is skipped leaves a momentum buffer of what is in memory.
    unfused = {key: value for key, value in case.options.items() if key != "fused"}
    theirs = both(replace(case, options=unfused))[1]
    scales = []
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales.append([])
        for step in range(6):
            before = snapshot(optimizer)
            scaler_step(scaler, optimizer, step, step in bad)
            if step in bad:
                assert_unchanged(optimizer, before)
            scales[-1].append(scaler.get_scale())
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    assert scales[0] == scales[1]
    assert_close(ours, theirs)


@every_fused_class
def test_gradients_after_a_scaled_step(case: Case) -> None:
    """They are only read: README says that, other than torch's, they stay scaled."""
    optimizer = both(with_fused(case))[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    set_grads(params_of(optimizer), 0)
    scale_grads(optimizer, float(scaler.scale(torch.ones(()))))
    before = [p.grad.clone() for p in params_of(optimizer)]
    scaler.step(optimizer)
    assert_same_bits([p.grad for p in params_of(optimizer)], before)


@every_class
def test_unscale_and_clip(case: Case) -> None:
    ours, theirs = both(case)
    norms = []
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            set_grads(params_of(optimizer), step)
            scale_grads(optimizer, float(scaler.scale(torch.ones(()))))
            if step == 1:
                params_of(optimizer)[0].grad[0, 0] = torch.nan
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(params_of(optimizer), 0.5))
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(norms[:4], norms[4:], equal_nan=True)
    assert_close(ours, theirs)


@every_fused_class
def test_scaler_with_float16_gradients(case: Case) -> None:
    """torch refuses to unscale those by itself, and leaves it to steps that can."""
    case = with_fused(case)
    optimizer = case.ours(make_params(torch.float16), **case.options)
    twin = case.ours(make_params(torch.float16), **case.options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(3):
        scaler_step(scaler, optimizer, step, bad=step == 1)
        if step != 1:
            train(twin, [step])
    # Scaling by a power of two is exact.
    assert_equal(optimizer, twin)


@every_class
def test_disabled_scaler(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        set_grads(params_of(optimizer), 0)
        scaler.step(optimizer)
        scaler.update()
    assert_close(ours, theirs)


@every_fused_class
def test_only_fused_steps_support_scaling(case: Case) -> None:
    """As with torch: others leave it to the scaler, so that gradients can be clipped before."""
    for options in ({}, {"flat": True}, {"foreach": True}, {"fused": False}):
        assert not case.ours(make_params(), **case.options, **options)._step_supports_amp_scaling
    assert case.ours(make_params(), **case.options, fused=True)._step_supports_amp_scaling


@every_class
def test_a_skipped_step_leaves_versions_alone(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    versions = [p._version for p in params_of(optimizer)]
    scaler_step(scaler, optimizer, 0, bad=True)
    assert [p._version for p in params_of(optimizer)] == versions
