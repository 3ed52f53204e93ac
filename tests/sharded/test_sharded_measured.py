"""Rules that measure whole parameters, of shards: as without sharding up to rounding, the same on
all ranks, by one collective after all agreed to step."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Trial, check, check_on_a_gpu, worlds
from support.sharding import LAYOUTS, Layout, Pair, drawn, mesh_of, sharded, whole
from support.training import params_of
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode

import fusedopt

Make = Callable[..., Any]
CHOICES: dict[str, tuple[Make, torch.dtype, dict[str, Any]]] = {
    "lamb": (fusedopt.LAMB, torch.float32, {"lr": 1e-2, "weight_decay": 0.1}),
    "lars": (fusedopt.LARS, torch.float32, {"lr": 0.5, "weight_decay": 0.1}),
    "stable": (fusedopt.StableAdamW, torch.float32, {"lr": 1e-2}),
    "cautious": (fusedopt.AdamW, torch.float32, {"lr": 1e-2, "cautious": True}),
    "lion": (fusedopt.Lion, torch.float32, {"lr": 1e-3, "cautious": True}),
    "clipped": (fusedopt.LAMB, torch.float32, {"lr": 1e-2, "max_grad_norm": 0.5}),
    "masters": (fusedopt.LAMB, torch.bfloat16, {"lr": 1e-2, "master_bits": 32}),
    "float64": (fusedopt.LAMB, torch.float64, {"lr": 1e-2}),
}


def as_unsharded(layout: Layout, choice: str) -> None:
    """Sums are added in another order: of float32 the same, nearly always."""
    make, dtype, options = CHOICES[choice]
    pair = Pair(functools.partial(make, **options), mesh_of(layout[0]), layout[1], dtype=dtype)
    pair.train(range(5))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for p, q in zip(params_of(pair.plain), params_of(pair.sharded), strict=True):
        torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=tolerance, atol=tolerance)


def collectives(layout: Layout) -> None:
    """For each group that cuts something one to agree and one for all sums, and no more."""
    made = functools.partial(fusedopt.LAMB, lr=1e-2, max_grad_norm=1.0)
    pair = Pair(made, mesh_of(layout[0]), layout[1])
    pair.train(range(2))
    pair.set_grads(2)
    with CommDebugMode() as debug:
        pair.sharded.step()
    cut = any(isinstance(p, Shard) and n > 1 for p, n in zip(layout[1], layout[0], strict=True))
    groups = len([p for p in layout[1] if isinstance(p, Shard)])
    assert debug.get_total_counts() == (2 * groups if cut else 0), debug.get_comm_counts()


def made_here(**options: Any) -> tuple[list[nn.Parameter], Any]:
    mesh = mesh_of((dist.get_world_size(),))
    begin = drawn([(8, 64), (4, 64)], torch.float32, 1)
    params = [nn.Parameter(sharded(t, mesh, (Shard(0),))) for t in begin]
    optimizer = fusedopt.LAMB(params, lr=1e-2, weight_decay=0.1, **options)
    for p in params:
        p.grad = sharded(torch.ones(p.shape), mesh, p.placements)
    optimizer.step()
    return params, optimizer


def check_nothing_is_stepped(params: list[nn.Parameter], optimizer: Any, match: str) -> None:
    before = [p.to_local().clone() for p in params]
    counts = [optimizer.state[p]["step"].clone() for p in params]
    with pytest.raises((RuntimeError, ValueError), match=match):
        optimizer.step()
    for p, old, count in zip(params, before, counts, strict=True):
        assert torch.equal(p.to_local(), old)
        assert torch.equal(optimizer.state[p]["step"], count)


def an_error_on_one_rank() -> None:
    params, optimizer = made_here()
    bad = dist.get_rank() == 1
    if bad:
        optimizer.param_groups[0]["lr"] = float("nan")
    message = "lr" if bad else "nothing was stepped, as rank 1 of the process group.*cannot step"
    check_nothing_is_stepped(params, optimizer, message)
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()


def other_gradients_on_one_rank() -> None:
    params, optimizer = made_here()
    grad = params[1].grad
    if dist.get_rank() == 1:
        params[1].grad = None
    check_nothing_is_stepped(params, optimizer, "has a gradient on some of the processes")
    params[1].grad = grad
    optimizer.step()


def an_inf_on_one_rank() -> None:
    """That a gradient scaler has found: none of the ranks steps."""
    params, optimizer = made_here()
    before = [p.to_local().clone() for p in params]
    optimizer.found_inf = torch.tensor(float(dist.get_rank() == 1))
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p.to_local(), old)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert not old.numel() or not torch.equal(p.to_local(), old)


def an_error_while_others_wait() -> None:
    """After they have agreed to step: others hear of it in the next collective."""
    params, optimizer = made_here()
    cut_norm = optimizer._cut_norm
    assert cut_norm is not None
    bad = dist.get_rank() == 1
    with pytest.MonkeyPatch.context() as patch:
        if bad:

            def broken(*_: object) -> None:
                raise MemoryError("broken")

            patch.setattr(optimizer, "_add_up_measured", broken)
        before = [p.to_local().clone() for p in params]
        with pytest.raises((RuntimeError, MemoryError), match="broken" if bad else "rank 1"):
            optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p.to_local(), old)
    optimizer.step()


def trials(world: int) -> dict[str, Trial]:
    each: dict[str, Trial] = {
        f"{layout}-{choice}": functools.partial(as_unsharded, LAYOUTS[world][layout], choice)
        for layout in LAYOUTS[world]
        for choice in CHOICES
    }
    each |= {
        f"collectives-{layout}": functools.partial(collectives, LAYOUTS[world][layout])
        for layout in LAYOUTS[world]
    }
    if world > 1:
        each |= {
            "an-error": an_error_on_one_rank,
            "other-gradients": other_gradients_on_one_rank,
            "an-inf": an_inf_on_one_rank,
            "an-error-while-others-wait": an_error_while_others_wait,
        }
    return each


@worlds({1: "", 2: "", 4: ""}, every=(3,))
def test_measured(world: int, among: str) -> None:
    check(__file__, world, among)


@pytest.mark.usefixtures("cuda")
def test_measured_on_a_gpu() -> None:
    check_on_a_gpu(__file__)
