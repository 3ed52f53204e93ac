"""max_grad_norm: the same as torch.nn.utils.clip_grad_norm_ and then a step."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.accelerator import HOST_RUN
from support.cases import STORAGES, storage_id
from support.training import (
    CASES,
    RICHEST,
    Case,
    assert_close,
    assert_same_bits,
    assert_unchanged,
    make_params,
    on,
    params_of,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn

import fusedopt
from fusedopt._extension import _C

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
MAX_NORMS = [0.0, 0.3, 1e9, math.inf]


@pytest.mark.parametrize("max_norm", MAX_NORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_torch_does_it(case: Case, max_norm: float, device: str) -> None:
    """In float64, as what is compared here is not how the two round."""
    ours = case.ours(on(device, make_params(torch.float64)), **case.options, max_grad_norm=max_norm)
    theirs = case.counterpart(on(device, make_params(torch.float64)), **case.options)
    assert ours.grad_norm is None
    for step in range(4):
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), step)
        handed_over = [p.grad.clone() for p in params_of(ours)]
        norm = torch.nn.utils.clip_grad_norm_(params_of(theirs), max_norm)
        ours.step()
        theirs.step()
        assert ours.grad_norm.device.type == device and ours.grad_norm.shape == ()
        torch.testing.assert_close(ours.grad_norm, norm.float())
        assert_same_bits(handed_over, [p.grad for p in params_of(ours)])  # only read
    assert_close(ours, theirs)


@pytest.mark.parametrize("storage", STORAGES, ids=storage_id)
def test_the_norm_is_exact(storage: tuple[torch.dtype, ...], device: str) -> None:
    """Of gradients over many magnitudes; the square of the largest is beyond float32."""
    param, grad, state = storage
    random = torch.Generator().manual_seed(0)
    sizes = [(), (1000,), (3, 0), (20011,), (64, 65), (16384,), (16385,)]
    largest = 30000.0 if torch.float16 in storage else 1e25
    params = []
    for size in sizes:
        p = torch.zeros(size, dtype=param, device=device)
        values = torch.randn(size, generator=random, dtype=torch.float64)
        values *= 10 ** (torch.rand(size, generator=random, dtype=torch.float64) * -8)
        p.grad_dtype = grad
        p.grad = (values * largest).to(grad).to(device)
        params.append(p)
    exact = [torch.view_as_real(p.grad) if p.is_complex() else p.grad for p in params]
    squares = torch.cat([g.flatten().cpu().double() for g in exact]).square()
    optimizer = fusedopt.SGD(params, max_grad_norm=1.0, momentum=0.9, state_dtype=state)
    optimizer.step()
    expected = np.float32(math.sqrt(math.fsum(squares.tolist())))
    assert float(optimizer.grad_norm) == expected


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@every_class
def test_a_norm_that_is_not_finite(case: Case, bad: float, device: str) -> None:
    """As with error_if_nonfinite=False: zeros for Inf, NaN for NaN, and NaN where Inf stood."""
    ours = case.ours(on(device, make_params(torch.float64)), **case.options, max_grad_norm=1.0)
    theirs = case.counterpart(on(device, make_params(torch.float64)), **case.options)
    for optimizer in (ours, theirs):
        set_grads(params_of(optimizer), 0)
        params_of(optimizer)[0].grad[3, 3] = bad
    torch.nn.utils.clip_grad_norm_(params_of(theirs), 1.0)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert not math.isfinite(float(ours.grad_norm))
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@every_class
def test_missing_and_frozen_gradients(case: Case, device: str) -> None:
    ours = case.ours(on(device, make_params(torch.float64)), **case.options, max_grad_norm=0.1)
    theirs = case.counterpart(on(device, make_params(torch.float64)), **case.options)
    for step, without in enumerate([{0, 1}, {2}, {0, 1, 2, 3, 4, 5}, set()]):
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), step)
            for index in without:
                params_of(optimizer)[index].grad = None
        norm = torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.1)
        for optimizer in (ours, theirs):
            optimizer.step()
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    assert_close(ours, theirs)


@every_class
def test_together_with_a_grad_scale(case: Case, device: str) -> None:
    ours, plain = (
        case.ours(on(device, make_params()), **case.options, max_grad_norm=0.5) for _ in range(2)
    )
    for step in range(3):
        set_grads(params_of(ours), step)
        with torch.no_grad():
            for p in params_of(ours):
                p.grad *= 1024
        ours.grad_scale = torch.tensor(1024.0, device=device)
        ours.step()
        train(plain, [step])
        assert_same_bits(ours.grad_norm, plain.grad_norm)
    assert_same_bits(params_of(ours), params_of(plain))


def norm_and_params(params: list[Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
    optimizer = fusedopt.AdamW(params, lr=0.1, max_grad_norm=0.7, **options)
    for step in range(3):
        for i, p in enumerate(params):
            random = torch.Generator().manual_seed(100 * step + i)
            grad = torch.randn(p.shape, generator=random) * 10.0 ** (i % 5 - 2)
            p.grad.copy_(grad) if p.grad is not None else setattr(p, "grad", grad.to(p.device))
        optimizer.step()
    assert optimizer.grad_norm is not None
    return optimizer.grad_norm.cpu(), [p.detach().cpu() for p in params]


def test_the_same_bits_everywhere(device: str) -> None:
    """On every instruction set and device, with any number of threads, flat or not."""

    def make(where: str) -> list[Tensor]:
        shapes = [(50000,), (3, 5), (), (129,), (16384,), (333, 77)]
        return [torch.zeros(shape, device=where, requires_grad=True) for shape in shapes]

    _C.set_isa("baseline")
    torch.set_num_threads(1)
    expected = norm_and_params(make("cpu"))
    for isa in ("baseline", "avx2", "avx512"):
        try:
            _C.set_isa(isa)
        except ValueError:
            continue
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for flat in (False, True):
                assert_same_bits(norm_and_params(make(device), flat=flat), expected)


def test_a_step_skipped_by_the_host(device: str) -> None:
    optimizer = fusedopt.AdamW(on(device, make_params()), max_grad_norm=1.0)
    train(optimizer, [0])
    set_grads(params_of(optimizer), 1)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert_unchanged(optimizer, before)
    assert math.isnan(float(optimizer.grad_norm))


def test_without_any_gradient(device: str) -> None:
    optimizer = fusedopt.AdamW(on(device, make_params()), max_grad_norm=1.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == 0


def test_max_grad_norm_can_be_changed(device: str) -> None:
    ours = fusedopt.SGD(on(device, make_params()), lr=1.0)
    theirs = torch.optim.SGD(on(device, make_params()), lr=1.0)
    for step, max_norm in enumerate([None, 0.5, 0.25, None]):
        ours.max_grad_norm = max_norm
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), step)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params_of(theirs), max_norm)
        for optimizer in (ours, theirs):
            optimizer.step()
    assert_close(ours, theirs)


@pytest.mark.skipif(bool(HOST_RUN), reason="needs a CPU and a GPU that are not the same")
@pytest.mark.cuda
def test_parameters_on_several_devices(cuda: str) -> None:
    """The norm is that of all of them; it is on the CPU then."""

    def make() -> list[nn.Parameter]:
        return [
            nn.Parameter(p.detach().to(cuda if i % 2 else "cpu"))
            for i, p in enumerate(make_params(torch.float64))
        ]

    ours = fusedopt.AdamW(make(), max_grad_norm=0.5)
    theirs = torch.optim.AdamW(make())
    for step in range(3):
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), step)
        norm = torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.5)
        for optimizer in (ours, theirs):
            optimizer.step()
        assert ours.grad_norm.device.type == "cpu"
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_max_grad_norm_that_makes_no_sense(bad: float) -> None:
    with pytest.raises(
        ValueError, match=r"AdamW: max_grad_norm is (-1.0|nan); expected at least 0"
    ):
        fusedopt.AdamW(make_params(), max_grad_norm=bad)
    optimizer = fusedopt.AdamW(make_params(), max_grad_norm=1.0)
    with pytest.raises(TypeError, match="max_grad_norm is '1'; expected a number"):
        optimizer.max_grad_norm = "1"
    assert optimizer.max_grad_norm == 1.0
