"""Steps of so many parameters that threads share what has to be done for each of them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from support.training import RICHEST, Case, assert_close, assert_equal, params_of
from torch import Tensor
from torch.optim import Optimizer

import fusedopt

TENSORS, ELEMENTS = 600, 128  # more than a step leaves to one thread
EVERY = 7


def make(case: Case, cls: Callable[..., Optimizer], threads: int) -> Optimizer:
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(1)
    params = [
        torch.randn(2, ELEMENTS // 2, generator=random).requires_grad_() for _ in range(TENSORS)
    ]
    groups = [{"params": params[:50]}, {"params": params[50:], "lr": 0.003}]
    return cls(groups, **case.options)


def give_gradients(params: list[Tensor], step: int) -> None:
    random = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=random)
        if i % EVERY == 0:
            param.grad = None if step % 2 else param.grad
        elif i % EVERY == 1:  # laid out otherwise
            param.grad = param.grad.t().contiguous().t()


def move(params: list[Tensor], step: int) -> None:
    """What a look at the parameters has to notice."""
    if step == 2:
        params[300].data = params[300].data.clone()
    if step == 3:
        params[400].data = params[400].data.t().contiguous().t()
    if step == 4:
        params[500].requires_grad_(False)
        params[500].grad = None
    if step == 5:
        torch.utils.swap_tensors(params[10], torch.zeros(2, 64, requires_grad=True))


def train(case: Case, cls: Callable[..., Optimizer], threads: int) -> Optimizer:
    optimizer = make(case, cls, threads)
    params = params_of(optimizer)
    for step in range(7):
        move(params, step)
        give_gradients([p for p in params if p.requires_grad], step)
        optimizer.step()
    return optimizer


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_many_tensors(case: Case) -> None:
    theirs = train(case, case.counterpart, 1)
    alone, shared = train(case, case.ours, 1), train(case, case.ours, 2)
    assert_close(alone, theirs)
    assert_equal(alone, shared)
    assert [p._version for p in params_of(alone)] == [p._version for p in params_of(shared)]


@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_one_of_many_gradients_is_bad(case: Case) -> None:
    """Whatever thread looks at it, nothing is changed, and the step can be taken afterwards."""
    optimizer, twin = make(case, case.ours, 2), make(case, case.ours, 2)
    for each in (optimizer, twin):
        for step in (0, 2):
            give_gradients(params_of(each), step)
            each.step()
    for each in (optimizer, twin):
        give_gradients(params_of(each), 4)
    bad = params_of(optimizer)[577]
    bad.grad.data = torch.zeros(3)
    with pytest.raises(ValueError, match="parameter 527 of group 1"):
        optimizer.step()
    assert_equal(optimizer, twin)
    bad.grad = params_of(twin)[577].grad
    optimizer.step()
    twin.step()
    assert_equal(optimizer, twin)


def test_a_count_that_many_share() -> None:
    """Every step of every parameter counts, whatever thread counts it."""
    counts = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        optimizer = make(next(c for c in RICHEST if c.ours is fusedopt.AdamW), fusedopt.AdamW, 2)
        give_gradients(params_of(optimizer), 0)
        optimizer.step()
        count = torch.tensor(1.0)
        for param in params_of(optimizer):
            optimizer.state[param]["step"] = count
        optimizer.step()
        counts.append(float(count))
    assert counts[0] == counts[1] == 1 + TENSORS


@pytest.mark.parametrize("steps", [0, 1])
def test_gradient_without_memory(steps: int) -> None:
    param = torch.ones(5, requires_grad=True)
    optimizer = fusedopt.SGD([param], lr=0.1)
    param.grad = torch.ones(5)
    for _ in range(steps):
        optimizer.step()
    before = param.detach().clone()
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="parameter 0 of group 0 has a gradient without memory"):
        optimizer.step()
    assert torch.equal(param, before)
