"""Schedule-free optimizers: what train() and eval() make of parameters, and when they refuse."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.optimizers.schedule_free import ScheduleFree

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = [fusedopt.ScheduleFreeAdamW, fusedopt.ScheduleFreeSGD]
OPTIONS: dict[str, dict[str, Any]] = {"lr": {"lr": 0.1}, "warmup": {"lr": 0.1, "warmup_steps": 9}}
both = pytest.mark.parametrize("make", CLASSES, ids=lambda c: c.__name__)


def stepped(
    make: Callable[..., ScheduleFree], dtype: torch.dtype = torch.float32, **options: Any
) -> ScheduleFree:
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in ((33, 7), (5,), (), (2000,))
    ]
    unused = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = make([*params, unused], **options)
    optimizer.train()
    for _ in range(12):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return optimizer


def weights(optimizer: ScheduleFree) -> list[torch.Tensor]:
    return [*optimizer.master_params()]


def momentum(optimizer: ScheduleFree) -> float:
    group = optimizer.param_groups[0]
    return float(group.get("momentum", group.get("betas", (0.0,))[0]))


@both
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_eval_is_the_average_of_all_z(make: Any, options: dict[str, Any]) -> None:
    """By its definition: each z weighs as much as lr, squared, was at most until then."""
    param = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = make([param], **options)
    optimizer.train()
    average, total, largest = torch.zeros(50, dtype=torch.float64), 0.0, 0.0
    for step in range(1, 30):
        param.grad = torch.randn_like(param)
        optimizer.step()
        rate = 0.1 * min(1, step / options.get("warmup_steps", 1))
        largest = max(largest, rate)
        total += largest**2
        average += largest**2 / total * (optimizer.state[param]["z"] - average)
    trained = param.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(param.detach(), average, rtol=1e-5, atol=1e-6)
    optimizer.train()
    torch.testing.assert_close(param.detach(), trained, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [
        (torch.float32, {}, 1e-6),
        (torch.float64, {}, 1e-14),
        (torch.complex64, {}, 1e-6),
        (torch.float32, {"state_dtype": "bfloat16"}, 1e-6),
        (torch.bfloat16, {"master_bits": 32}, 1e-6),
        (torch.float16, {"master_bits": 32}, 1e-6),
        (torch.bfloat16, {"master_bits": 24}, 1e-4),
        (torch.bfloat16, {}, 2**-6),
        (torch.bfloat16, {"state_dtype": "bfloat16"}, 2**-6),
        (torch.float32, {"flat": True}, 1e-6),
    ],
    ids=str,
)
def test_back_and_forth(make: Any, dtype: torch.dtype, options: Any, tolerance: float) -> None:
    """Any number of times, and the training goes on as if nobody had looked."""
    optimizer = stepped(make, dtype, lr=0.1, **options)
    before = [w.clone() for w in weights(optimizer)]
    params = optimizer.param_groups[0]["params"]
    for _ in range(3):
        optimizer.eval()
        optimizer.eval()
        for param, y, x in zip(params[:-1], before, weights(optimizer), strict=False):
            z = optimizer.state[param]["z"].to(y.dtype)
            torch.testing.assert_close(
                (1 - momentum(optimizer)) * z + momentum(optimizer) * x,
                y,
                rtol=2 * tolerance,
                atol=2 * tolerance,
            )
        optimizer.train()
        optimizer.train()
    for now, then in zip(weights(optimizer), before, strict=True):
        torch.testing.assert_close(now, then, rtol=4 * tolerance, atol=4 * tolerance)
    assert torch.equal(params[-1], torch.ones_like(params[-1]))


@both
def test_modes_are_saved(make: Any) -> None:
    optimizer = stepped(make, lr=0.1)
    optimizer.eval()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    other = make(params, lr=0.1)
    other.load_state_dict(torch.load(file))
    with pytest.raises(RuntimeError, match=r"step\(\) in evaluation mode"):
        other.step()
    other.train()
    optimizer.train()
    for ours, theirs in zip(weights(other), weights(optimizer), strict=True):
        assert torch.equal(ours, theirs)
    twin = copy.deepcopy(optimizer)
    twin.step()


@both
def test_refused(make: Any) -> None:
    name = make.__name__
    param = nn.Parameter(torch.ones(3))
    optimizer = make([param], lr=0.1)
    with pytest.raises(RuntimeError, match=rf"{name}: eval\(\) before train\(\): group 0"):
        optimizer.eval()
    optimizer.train()
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.eval()
    before = param.detach().clone()
    called = []
    with pytest.raises(RuntimeError, match=rf"{name}: step\(\) in evaluation mode"):
        optimizer.step(lambda: called.append(1))
    assert torch.equal(param, before) and not called
    with pytest.raises(ValueError, match=f"{name}: .*expected more than 0 and less than 1"):
        make([param], **({"momentum": 0.0} if "SGD" in name else {"betas": (0.0, 0.9)}))
    with pytest.raises(ValueError, match="warmup_steps"):
        make([param], warmup_steps=-1)
    with pytest.raises(ValueError, match="'z' is like a weight"):
        make([nn.Parameter(torch.ones(5000))], state_dtype="int8")
