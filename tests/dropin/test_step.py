"""What a step and zero_grad leave: grad mode, versions, the profiler's names, gradients."""

import pytest
import torch
from support.training import RICHEST, Case, make_params, params_of, set_grads, train

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


def test_step_leaves_grad_mode_alone() -> None:
    for enabled in (True, False):
        optimizer = fusedopt.AdamW(make_params())
        set_grads(params_of(optimizer), 0)
        with torch.set_grad_enabled(enabled):
            optimizer.step()
            assert torch.is_grad_enabled() is enabled
        assert all(p.requires_grad and p.is_leaf for p in params_of(optimizer))


@every_class
def test_a_stale_graph_is_noticed(case: Case) -> None:
    for flat in (False, True):
        params = make_params()
        optimizer = case.ours(params, **case.options, flat=flat)
        loss = (params[0] * params[0]).sum()
        loss.backward(retain_graph=True)
        versions = [p._version for p in params]
        optimizer.step()
        assert params[0]._version > versions[0]
        if not flat:  # these have no gradient
            assert [p._version for p in params[1:]] == versions[1:]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_class
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_profiler_names(case: Case, flat: bool) -> None:
    optimizer = case.ours(make_params(), **case.options, flat=flat)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, [0])
        optimizer.zero_grad()
    names = {event.name for event in profile.events()}
    name = case.ours.__name__
    assert f"Optimizer.step#{name}.step" in names
    assert f"Optimizer.zero_grad#{name}.zero_grad" in names


@every_class
def test_step_is_hooked_once(case: Case) -> None:
    """torch wraps the class's step by its first instance; ours is not to be wrapped twice."""
    optimizer = case.ours(make_params(), **case.options)
    case.ours(make_params(), **case.options)
    assert case.ours.step.hooked
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


@every_class
def test_zero_grad(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    set_grads(params_of(optimizer), 0)
    grads = [p.grad for p in params_of(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    for p, grad in zip(params_of(optimizer), grads, strict=True):
        assert p.grad is grad and not grad.any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params_of(optimizer))
