"""Sizes and layouts of memory that other optimizers stepped wrongly; tests name the threads."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_close,
    assert_equal,
    assert_same_bits,
    both,
    clone_params,
    make_params,
    params_of,
    train,
)
from torch import Tensor, nn

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


# -- sizes ------------------------------------------------------------------------------------


def free_memory() -> int:
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


@pytest.mark.slow
def test_more_elements_than_an_int32_counts() -> None:
    # DeepSpeed#7640, apex#1825: nothing, or only a part, was updated.
    numel = 2**31 + 100
    if free_memory() < 6 * numel:
        pytest.skip("needs 13 GB of free memory")
    # numpy's zeros cost nothing until something is written to them.
    p, grad = (torch.from_numpy(np.zeros(numel, np.int16)).view(torch.bfloat16) for _ in range(2))
    p.grad = grad
    edges = (0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, numel - 1)
    for edge in edges:
        p.grad[edge] = 1
    fusedopt.SGD([p], lr=1.0).step()
    assert [float(p[edge]) for edge in edges] == [-1.0] * len(edges)


@every_class
def test_empty_parameters(case: Case) -> None:
    # TransformerEngine#3202, #3207: read out of bounds, or those before were skipped.
    shapes = ((0,), (33,), (0, 4), (5, 7), (3, 0, 2), (2, 2), (0,))
    ours, theirs = both(case, lambda: make_params(torch.float64, shapes))
    for flat in (False, True):
        alone = case.ours(make_params(shapes=((0,), (3, 0))), **case.options, flat=flat)
        train(alone, range(2))
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
    assert_close(ours, theirs)


# -- layouts ----------------------------------------------------------------------------------


def transposed(grad: Tensor) -> Tensor:
    return grad.mT.contiguous().mT


def spread(grad: Tensor) -> Tensor:
    wide = grad.new_full((*grad.shape[:-1], 2 * grad.shape[-1]), torch.nan)
    wide[..., ::2] = grad
    return wide[..., ::2]


def expanded(grad: Tensor) -> Tensor:
    """What a sum hands over: one element for all."""
    return grad.flatten()[:1].view([1] * grad.dim()).expand(grad.shape)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "channels_last": lambda grad: grad.contiguous(memory_format=torch.channels_last),
    "spread": spread,
    "expanded": expanded,
    "reversed": lambda grad: grad.flip(0).contiguous().flip(0),
    "misaligned": lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape),
}


@every_class
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_laid_out_otherwise(case: Case, form: str, channels_last: bool) -> None:
    # pytorch#106951, #126585: memory was walked along as if the strides were the parameter's.
    def make() -> list[nn.Parameter]:
        memory = torch.channels_last if channels_last else torch.contiguous_format
        return [nn.Parameter(torch.randn(4, 3, 6, 5).contiguous(memory_format=memory))]

    torch.manual_seed(0)
    ours = case.ours(make(), **case.options)
    plain = case.ours(clone_params(params_of(ours)), **case.options)
    for _ in range(3):
        grad = FORMS[form](torch.randn(4, 3, 6, 5))
        [p], [q] = params_of(ours), params_of(plain)
        p.grad = grad
        q.grad = torch.empty_like(q).copy_(grad)
        before = grad.clone()
        ours.step()
        plain.step()
        assert_same_bits(grad, before)
    assert_equal(ours, plain)


@every_class
def test_conjugate_and_negative_gradients(case: Case) -> None:
    # Lazy views: their memory holds the conjugate, or the negative, of what they are.
    def grads(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        first = torch.randn(33, generator=generator, dtype=torch.complex64)
        second = torch.randn(33, generator=generator, dtype=torch.complex64)
        return [first.conj(), second.conj().imag]

    def make() -> list[nn.Parameter]:
        return [
            nn.Parameter(torch.ones(33, dtype=torch.complex64)),
            nn.Parameter(torch.ones(33)),
        ]

    assert grads(0)[0].is_conj() and grads(0)[1].is_neg()
    lazy, plain = case.ours(make(), **case.options), case.ours(make(), **case.options)
    for step in range(3):
        for p, q, grad in zip(params_of(lazy), params_of(plain), grads(step), strict=True):
            p.grad, q.grad = grad, grad.resolve_conj().resolve_neg().contiguous()
        lazy.step()
        plain.step()
    assert_equal(lazy, plain)


@every_class
def test_conjugate_and_negative_parameters(case: Case) -> None:
    """Views of that kind are leaves, too: their own values are trained."""
    memory = torch.randn(2, 9, dtype=torch.complex64)
    for view in (lambda t: t[0].conj(), lambda t: t[1].conj().imag):
        lazy = view(memory.clone()).requires_grad_()
        plain = nn.Parameter(lazy.detach().resolve_conj().resolve_neg().clone())
        optimizers = [case.ours([p], **case.options) for p in (lazy, plain)]
        for step in range(3):
            for optimizer in optimizers:
                train(optimizer, [step])
        assert_same_bits(lazy.detach(), plain.detach())


@every_class
def test_accumulated_gradients(case: Case) -> None:
    """The same gradient tensor over several steps, added to in place."""
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        for step in range(4):
            params = params_of(optimizer)
            fresh = make_params(torch.float64, seed=step)
            for p, g in zip(params, fresh, strict=True):
                p.grad = g.detach() if p.grad is None else p.grad.add_(g.detach())
            if step % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
    assert_close(ours, theirs)


def test_gradients_at_addresses_used_before() -> None:
    """An allocator hands out the same memory again: an address alone tells nothing."""
    optimizer, reference = fusedopt.SGD(make_params()), torch.optim.SGD(make_params())
    for each in (optimizer, reference):
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            params = params_of(each)
            order = torch.randperm(len(params), generator=generator).tolist()
            for i in order[: 1 + order[0]]:
                params[i].grad = torch.randn(params[i].shape, generator=generator)
            each.step()
            each.zero_grad()
    assert_close(optimizer, reference)
