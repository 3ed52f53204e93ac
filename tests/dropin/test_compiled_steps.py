"""torch.compile around a step: two breaks of its graph, nothing compiled again, the same bits."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.optimizers import ROWS, Row
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fusedopt

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
MOST_BREAKS = 2  # torch's own, of a step that is compiled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def breaks() -> int:
    return sum(counters["graph_break"].values())


def params_of(count: int = 40) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(8, 8, generator=generator)) for _ in range(count)]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def assert_same(ours: Any, theirs: Any) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@every_row
def test_a_compiled_step(row: Row) -> None:
    params, others = params_of(), params_of()
    optimizer, plain = row.ours(params), row.ours(others)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    counted = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            for each in (params, others):
                set_grads(each, step)
            if step == 3:  # as a schedule does
                for group in (*optimizer.param_groups, *plain.param_groups):
                    group["lr"] = 0.5 * group["lr"]
            compiled()
            plain.step()
            counted.append((breaks(), counters["frames"]["total"]))
    assert_same(params, others)
    assert counted[0][0] <= MOST_BREAKS
    assert len(set(counted)) == 1, "something was compiled again"


def models() -> list[nn.Module]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    return made


def train(model: Callable[..., Tensor], optimizer: Any, wrap: Callable[..., Any]) -> None:
    def iterate(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    compiled = wrap(iterate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        compiled(torch.randn(5, 8, generator=generator))


@pytest.mark.parametrize("options", [{}, {"flat": True}, {"max_grad_norm": 0.1}], ids=str)
@pytest.mark.parametrize("released", [False, True])
def test_a_compiled_iteration(options: dict[str, Any], released: bool) -> None:
    """Forward pass, backward pass and step in one function."""
    if released and options.get("flat"):
        pytest.skip("flat gradients are not released")
    model, other = models()
    optimizer = fusedopt.AdamW(model.parameters(), **options)
    release = fusedopt.GradientRelease(optimizer) if released else None
    train(model, optimizer, lambda call: torch.compile(call, backend="aot_eager"))
    train(other, fusedopt.AdamW(other.parameters(), **options), lambda call: call)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    if release is not None and not options:
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("released", [False, True])
def test_a_compiled_model_outside(released: bool) -> None:
    model, other = models()
    optimizer = fusedopt.AdamW(model.parameters())
    release = fusedopt.GradientRelease(optimizer) if released else None
    train(torch.compile(model, backend="aot_eager"), optimizer, lambda call: call)
    train(other, fusedopt.AdamW(other.parameters()), lambda call: call)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert release is None or all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("released", [False, True])
def test_compiled_autograd(released: bool) -> None:
    """The backward pass is compiled, with the hooks in it."""
    model, other = models()
    optimizer = fusedopt.AdamW(model.parameters())
    release = fusedopt.GradientRelease(optimizer) if released else None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        train(model, optimizer, lambda call: call)
    train(other, fusedopt.AdamW(other.parameters()), lambda call: call)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert release is None or all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_with_the_default_compiler() -> None:
    model, other = models()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, torch.compile)
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), lambda call: call)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
