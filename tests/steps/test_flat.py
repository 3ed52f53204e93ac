"""FlatParameters: what it takes, and how it lays out parameters and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.flat import Model, check_layout, fit
from support.training import RICHEST, Case, assert_equal, assert_same_bits, make_params, params_of
from torch import Tensor, nn

import fusedopt
from fusedopt import FlatParameters, _flat

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
both_gradients = pytest.mark.parametrize("gradients", [False, True], ids=["params", "gradients"])

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "odd": lambda: torch.randn(7, 5),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "slot": lambda: torch.randn(64),
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(6, 10)[:, ::2],
    "misaligned": lambda: torch.randn(40)[3:],
}
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


# -- the layout -------------------------------------------------------------------------------


@both_gradients
def test_layout(gradients: bool) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(make().to(d)) for make in LAYOUTS.values() for d in KINDS]
    params += make_params()
    before = [p.detach().clone() for p in params]
    ids = [id(p) for p in params]
    flat = FlatParameters(params, gradients=gradients)
    assert ids == [id(p) for p in params]
    for p, value in zip(params, before, strict=True):
        assert_same_bits(p.detach(), value)
        assert p.is_leaf and p.requires_grad
        # Dense strides stay what they were; others become torch's choice for a dense copy.
        assert p.stride() == torch.empty_like(value).stride()
    if gradients:
        for p in params:
            assert p.grad.stride() == p.stride() and p.grad.dtype == p.dtype and not p.grad.any()
            p.grad.fill_(2)
    assert bool(flat.grads) is gradients
    check_layout(flat, params)


def test_views_are_live() -> None:
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    with torch.no_grad():
        params[1].fill_(3)
        params[1].grad.fill_(4)
    assert flat.buffers[0].eq(3).sum() == params[1].numel()
    assert flat.grads[0].eq(4).sum() == params[1].numel()
    flat.buffers[0].zero_()
    assert not any(p.any() for p in params)


def test_gradients_that_exist_are_kept() -> None:
    params = make_params()
    grads = [torch.randn_like(p) for p in params]
    for p, grad in zip(params[:3], grads, strict=False):
        p.grad = grad.clone()
    flat = FlatParameters(params, gradients=True)
    for p, grad in zip(params[:3], grads, strict=False):
        assert_same_bits(p.grad, grad)
    assert not any(p.grad.any() for p in params[3:])
    flat.zero_grad()
    assert not any(p.grad.any() for p in params)


def test_backward_accumulates_into_flat_gradients() -> None:
    model, plain = Model(), Model()
    flat = FlatParameters(model, gradients=True)
    addresses = [p.grad.data_ptr() for p in model.parameters() if p.requires_grad]
    for step in range(3):
        model.loss(step).backward()
        plain.loss(step).backward()
    mine = [p.grad for p in model.parameters() if p.requires_grad]
    assert [g.data_ptr() for g in mine] == addresses
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert_same_bits(p.grad, q.grad)
    total = sum(g.double().sum() for g in mine)
    torch.testing.assert_close(flat.grads[0].double().sum(), total)


def test_frozen_parameters_get_no_gradient() -> None:
    model = Model()
    flat = FlatParameters(model, gradients=True)
    assert model.frozen.weight.grad is None
    flat.zero_grad()
    assert model.frozen.weight.grad is None
    # Unfrozen later, it has a gradient as any parameter, and is trained.
    optimizer = fusedopt.AdamW(model.parameters())
    model.frozen.requires_grad_(True)
    before = model.frozen.weight.detach().clone()
    fit(model, optimizer, range(2))
    assert model.frozen.weight.ne(before).all()


def test_tied_parameters_stay_tied() -> None:
    model = Model()
    for params in (model, list(model.parameters()), [model.head.weight, model.embed.weight]):
        flat = FlatParameters(params)
        assert model.head.weight is model.embed.weight
        assert flat.is_intact()
    assert flat.buffers[0].numel() == 128  # 11 x 8, once


@pytest.mark.parametrize("kind", ["module", "parameters", "named"])
def test_what_it_takes(kind: str) -> None:
    model = Model()
    given: Any = {
        "module": lambda: model,
        "parameters": model.parameters,
        "named": model.named_parameters,
    }[kind]()
    check_layout(FlatParameters(given), list(model.parameters()))


def test_what_it_refuses() -> None:
    p = nn.Parameter(torch.zeros(8))
    with pytest.raises(TypeError, match="one tensor"):
        FlatParameters(p)
    with pytest.raises(ValueError, match="no parameters"):
        FlatParameters([])
    with pytest.raises(TypeError, match="parameter 1.*int64"):
        FlatParameters([p, torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(TypeError, match="parameter 1.*str"):
        FlatParameters([p, "weight"])
    with pytest.raises(TypeError, match="'?table'?.*sparse"):
        FlatParameters([("first", p), ("table", torch.eye(3).to_sparse())])
    with pytest.raises(ValueError, match="parameter 1.*expanded"):
        FlatParameters([p, torch.zeros(1).expand(5)])
    with pytest.raises(ValueError, match="overlap"):
        FlatParameters([p, p.detach()[2:4]])
    with pytest.raises(TypeError, match="parameter 1.*meta"):
        FlatParameters([p, torch.zeros(3, device="meta")])
    assert p.untyped_storage().nbytes() == 32  # not moved by any of these


# -- in the constructor -----------------------------------------------------------------------


@every_class
def test_flat_groups(case: Case) -> None:
    def groups() -> list[dict[str, Any]]:
        return [
            {"params": make_params(), "lr": 0.02},
            {"params": make_params(torch.bfloat16, seed=1) + make_params(seed=2)},
        ]

    optimizer = case.ours(groups(), **case.options, flat=True)
    plain = case.ours(groups(), **case.options)
    for each in (optimizer, plain):
        each.add_param_group({"params": make_params(torch.float64, seed=3), "lr": 0.03})
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    grads = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(params_of(optimizer), params_of(plain), strict=True):
            q.grad = torch.randn(p.shape, generator=grads).to(p.dtype)
            p.grad.copy_(q.grad)
        optimizer.step()
        plain.step()
        assert optimizer._plan.span_count == (len(params_of(plain)) if case.measures else 4)
        optimizer.zero_grad()
        plain.zero_grad()
    assert_equal(optimizer, plain)
    for group in optimizer.param_groups:
        assert all(not p.grad.any() for p in group["params"])


def test_refused_group_is_not_moved() -> None:
    optimizer = fusedopt.AdamW(make_params(), flat=True)
    p = nn.Parameter(torch.zeros(5))
    address = p.data_ptr()
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [p], "lr": float("nan")})
    assert p.data_ptr() == address and len(optimizer.param_groups) == 1
    assert len(optimizer._flats) == 1


def test_buffers_that_are_gone_are_forgotten() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    first = fusedopt.FlatParameters(params)
    second = fusedopt.FlatParameters(params)
    assert [len(_flat._buffers_of[id(p)]) for p in params] == [2, 2]
    keys = [id(p) for p in params]
    del second
    assert [len(_flat._buffers_of[key]) for key in keys] == [1, 1]
    del first
    assert not [key for key in keys if key in _flat._buffers_of]
