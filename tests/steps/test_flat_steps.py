"""Steps and zero_grad of flat parameters: as if they were not flat, in as few spans as can be."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.flat import Model, check_layout, fit, values
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_equal,
    assert_same_bits,
    make_params,
    params_of,
    train,
)
from torch.optim import Optimizer

import fusedopt
from fusedopt import FlatParameters

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


# -- steps ------------------------------------------------------------------------------------


@every_class
def test_spans(case: Case) -> None:
    """One span per buffer with flat gradients, one per parameter with handed-over ones, or where
    parameters are measured."""
    kinds = (torch.float32, torch.bfloat16)
    params = [p for kind in kinds for p in make_params(kind)]
    expected = len(params) if case.measures else len(kinds)
    flat = FlatParameters(params, gradients=True)
    optimizer = case.ours(params, **case.options)
    for _ in range(3):
        flat.grads[0].normal_()
        optimizer.step()
        assert optimizer._plan.span_count == expected
        optimizer.zero_grad()
    train(optimizer, [0])
    assert optimizer._plan.span_count == len(params)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer._plan.span_count == expected


@every_class
def test_spans_of_groups(case: Case) -> None:
    """Groups of different options are spans of their own; those of equal ones may be one."""
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    optimizer = case.ours(groups, **case.options)
    flat.zero_grad()
    optimizer.step()
    assert optimizer._plan.span_count == (len(params) if case.measures else 2)


@every_class
def test_a_skipped_parameter_splits_the_span(case: Case) -> None:
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    optimizer = case.ours(params, **case.options)
    optimizer.step()
    params[2].grad = None
    before = params[2].detach().clone()
    flat.grads[0].fill_(0.5)
    optimizer.step()
    assert optimizer._plan.span_count == (len(params) - 1 if case.measures else 2)
    assert_same_bits(params[2].detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_same_bits_as_plain_parameters(case: Case, dtype: torch.dtype) -> None:
    plain = case.ours(make_params(dtype), **case.options)
    optimizer = case.ours(make_params(dtype), **case.options, flat=True)
    grads = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(params_of(plain), params_of(optimizer), strict=True):
            p.grad = torch.randn(p.shape, generator=grads, dtype=torch.float64).to(dtype)
            q.grad.copy_(p.grad)
        plain.step()
        optimizer.step()
        assert optimizer._plan.span_count == (len(params_of(plain)) if case.measures else 1)
    assert_equal(optimizer, plain)
    [flat] = optimizer._flats
    check_layout(flat, params_of(optimizer))


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model(case: Case, dtype: torch.dtype) -> None:
    """Trained flat and not: the same losses and parameters, to the last bit."""
    plain = Model().to(dtype)
    # Zero gradients step where none skip, so what has no gradient is left out.
    trained = [n for n, p in plain.named_parameters() if p.requires_grad and "unused" not in n]
    runs = []
    for kind in ("plain", "handed over", "flat"):
        model = copy.deepcopy(plain)
        flat = kind != "plain" and FlatParameters(model, gradients=kind == "flat")
        params = [p for n, p in model.named_parameters() if n in trained]
        optimizer = case.ours(params, **case.options)
        losses = fit(model, optimizer, range(8))
        assert not flat or flat.is_intact()
        runs.append((losses, values(model)))
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


@pytest.mark.parametrize("eps", [0.0, 1e-50, 1e-8])
@pytest.mark.parametrize("inside", [False, True])
def test_padding_stays_zero(eps: float, inside: bool) -> None:
    """Also where 0 / (0 + eps) is none, as when eps is zero in float32."""
    makers: list[Callable[..., Optimizer]] = [
        lambda params: fusedopt.RMSprop(params, eps=eps, eps_inside_sqrt=inside, momentum=0.9)
    ]
    if not inside:
        makers.append(lambda params: fusedopt.AdamW(params, eps=eps))
        makers.append(lambda params: fusedopt.Adam(params, eps=eps, amsgrad=True))
    for make in makers:
        params = make_params()
        flat = FlatParameters(params, gradients=True)
        optimizer = make(params)
        for _ in range(3):
            for p in params:
                p.grad.fill_(1.0)
            optimizer.step()
            check_layout(flat, params)
            assert all(p.isfinite().all() for p in params)


# -- zero_grad --------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_keeps_flat_gradients(set_to_none: bool) -> None:
    model = Model()
    optimizer = fusedopt.AdamW(model.parameters(), flat=True)
    [flat] = optimizer._flats
    addresses = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.requires_grad}
    for step in range(3):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert not flat.grads[0].any()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad.data_ptr() == addresses[name]
        assert flat.is_intact()


def test_zero_grad_by_the_model() -> None:
    """model.zero_grad() takes the flat gradients away; all is well all the same."""
    model, plain = Model(), Model()
    optimizer = fusedopt.AdamW(model.parameters(), flat=True)
    reference = fusedopt.AdamW(plain.parameters())
    for step in range(4):
        for m in (model, plain):
            m.zero_grad()
            m.loss(step).backward()
        optimizer.step()
        reference.step()
    assert_same_bits(values(model), values(plain))
    assert optimizer._plan.span_count > 1
    optimizer.zero_grad()
    model.loss(9).backward()
    reference.zero_grad()
    plain.loss(9).backward()
    [flat] = optimizer._flats
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert_same_bits(p.grad, q.grad)
    assert flat.grads[0].any()


def test_zero_grad_between_two_optimizers() -> None:
    """Each zeroes the gradients of its own parameters only."""
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    first, second = fusedopt.SGD(params[:3]), fusedopt.AdamW(params[3:])
    for _ in range(2):
        for p in params:
            p.grad.fill_(1)
        first.zero_grad()
        assert not any(p.grad.any() for p in params[:3])
        assert all(p.grad.eq(1).all() for p in params[3:])
        second.zero_grad(set_to_none=False)
        assert not flat.grads[0].any()
        first.step()
        second.step()
    params[0].grad = torch.ones_like(params[0])
    params[4].grad = torch.ones_like(params[4])
    first.zero_grad()
    assert not params[0].grad.any() and params[4].grad.all()
    params[1].grad.fill_(1)
    assert flat.grads[0].eq(1).sum() == params[1].numel()


def test_two_optimizers_of_all_parameters() -> None:
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    first, second = fusedopt.SGD(params), fusedopt.AdamW(params)
    plain = make_params()
    plain_first, plain_second = fusedopt.SGD(plain), fusedopt.AdamW(plain)
    for _ in range(3):
        for p, q in zip(params, plain, strict=True):
            p.grad.fill_(0.5)
            q.grad = torch.full_like(q, 0.5)
        for optimizer in (first, second, plain_first, plain_second):
            optimizer.step()
        first.zero_grad()
        assert not flat.grads[0].any()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in plain])


def test_zero_grad_of_torchs_optimizer() -> None:
    """It takes the gradients away, which is slower, never wrong."""
    model, plain = Model(), Model()
    flat = FlatParameters(model, gradients=True)
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (model, plain)]
    flat.zero_grad()
    model.zero_grad()
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        fit(m, optimizer, range(3))
    assert_same_bits(values(model), values(plain))
    assert flat.is_intact()
