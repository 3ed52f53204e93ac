"""max_grad_norm with sharded parameters: one norm of all gradients, the same bits on all ranks."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from support.ranks import Trial, check, check_on_a_gpu, worlds
from support.sharding import LAYOUTS, Layout, Pair, drawn, mesh_of, sharded
from support.training import params_of
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import fusedopt


def norms_of_all_ranks(norm: torch.Tensor) -> list[float]:
    everybodys = [torch.zeros_like(norm) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, norm)
    return [float(each) for each in everybodys]


def make_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return fusedopt.AdamW(params, lr=1e-2, max_grad_norm=0.5)


def as_unsharded(layout: Layout) -> None:
    """Up to one unit in the last place of the norm, and exactly the same on all ranks."""
    pair = Pair(make_adamw, mesh_of(layout[0]), layout[1])
    for step in range(4):
        pair.train([step], scale=(0.001, 1.0, 30.0, 1.0)[step])
        ours, theirs = pair.sharded.grad_norm, pair.plain.grad_norm
        assert len(set(norms_of_all_ranks(ours))) == 1
        in_float32 = 2**29  # units in the last place of float64 in one of float32
        assert abs(float(ours) - float(theirs)) <= math.ulp(float(theirs)) * in_float32
    for p, q in zip(params_of(pair.plain), params_of(pair.sharded), strict=True):
        local = sharded(p.detach(), pair.mesh, q.placements).to_local()
        torch.testing.assert_close(q.to_local(), local, rtol=1e-5, atol=1e-6)


def as_torchs(layout: Layout) -> None:
    """clip_grad_norm_ on DTensors, and then torch's step."""
    mesh, placements = mesh_of(layout[0]), layout[1]
    pair = Pair(make_adamw, mesh, placements)
    theirs = [nn.Parameter(q.detach().clone()) for q in params_of(pair.sharded)]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(3):
        pair.set_grads(step)
        for p, q in zip(theirs, params_of(pair.sharded), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        norm = nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False).full_tensor()
        optimizer.step()
        pair.sharded.step()
        torch.testing.assert_close(pair.sharded.grad_norm, norm, rtol=1e-6, atol=0)
    for p, q in zip(theirs, params_of(pair.sharded), strict=True):
        torch.testing.assert_close(q.to_local(), p.to_local(), rtol=1e-5, atol=1e-6)


def one_collective(layout: Layout) -> None:
    pair = Pair(make_adamw, mesh_of(layout[0]), layout[1])
    pair.train(range(2))
    pair.set_grads(2)
    with CommDebugMode() as debug:
        pair.sharded.step()
    cut = any(isinstance(p, Shard) and n > 1 for p, n in zip(layout[1], layout[0], strict=True))
    both = len([p for p in layout[1] if isinstance(p, Shard)])
    assert debug.get_total_counts() == (both if cut else 0), debug.get_comm_counts()
    unclipped = Pair(lambda params: fusedopt.AdamW(params), pair.mesh, pair.placements)
    unclipped.train(range(2))
    unclipped.set_grads(2)
    with CommDebugMode() as debug:
        unclipped.sharded.step()
    assert debug.get_total_counts() == 0


def no_gradient_here() -> None:
    """A rank without any gradient takes part: all have the norm of the others'."""
    mesh = mesh_of((dist.get_world_size(),))
    begin = drawn([(8, 64)], torch.float32, 1)[0]
    param = nn.Parameter(sharded(begin, mesh, (Shard(0),)))
    optimizer = fusedopt.AdamW([param], max_grad_norm=1.0)
    grad = sharded(torch.ones(8, 64), mesh, (Shard(0),))
    for step in range(3):
        others = dist.get_rank() > 0 or step == 1
        param.grad = grad.clone() if others else None
        optimizer.step()
        rows = 8 if step == 1 else 8 - math.ceil(8 / dist.get_world_size())
        torch.testing.assert_close(float(optimizer.grad_norm), math.sqrt(rows * 64))


def several_meshes() -> None:
    """Two meshes and plain tensors: a collective for each group that cuts something."""
    world = dist.get_world_size()
    both = mesh_of((2, world // 2))
    flat = mesh_of((world,))
    tensors = drawn([(8, 64), (16, 32), (5, 7), (6, 64)], torch.float32, 3)
    placed = [
        sharded(tensors[0], both, (Shard(0), Shard(1))),
        sharded(tensors[1], flat, (Shard(0),)),
        tensors[2],
        sharded(tensors[3], both, (Replicate(), Shard(0))),
    ]
    params = [nn.Parameter(t.clone()) for t in placed]
    plain = [nn.Parameter(t.clone()) for t in tensors]
    ours, alone = make_adamw(params), make_adamw(plain)
    for step in range(3):
        grads = drawn([t.shape for t in tensors], torch.float32, 50 + step)
        for p, q, grad in zip(params, plain, grads, strict=True):
            q.grad = grad.clone()
            is_sharded = isinstance(p, DTensor)
            p.grad = sharded(grad, p.device_mesh, p.placements) if is_sharded else grad.clone()
        with CommDebugMode() as debug:
            ours.step()
        # Of two ranks there is but one group; groups of one rank cut nothing.
        assert debug.get_total_counts() == (3 if world > 2 else 1)
        alone.step()
        assert len(set(norms_of_all_ranks(ours.grad_norm))) == 1
        torch.testing.assert_close(ours.grad_norm, alone.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(params, plain, strict=True):
        if isinstance(p, DTensor):
            local = sharded(q.detach(), p.device_mesh, p.placements).to_local()
            torch.testing.assert_close(p.to_local(), local, rtol=1e-5, atol=1e-6)


def an_error_on_one_rank() -> None:
    """Others learn of it, and nothing is stepped anywhere."""
    mesh = mesh_of((dist.get_world_size(),))
    begin = drawn([(8, 64), (4, 64)], torch.float32, 1)
    params = [nn.Parameter(sharded(t, mesh, (Shard(0),))) for t in begin]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    for p in params:
        p.grad = sharded(torch.ones(p.shape), mesh, p.placements)
    optimizer.step()
    before = [p.to_local().clone() for p in params]
    bad = dist.get_rank() == 1
    if bad:
        optimizer.param_groups[0]["lr"] = float("nan")
    message = "group 0: lr|lr" if bad else "nothing was stepped, as rank 1 of the process group"
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        optimizer.step()
    assert all(torch.equal(p.to_local(), old) for p, old in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert not torch.equal(params[0].to_local(), before[0]) or before[0].numel() == 0


def an_inf_on_one_rank() -> None:
    """found_inf that ranks do not agree on: none of them steps, and none waits."""
    mesh = mesh_of((dist.get_world_size(),))
    param = nn.Parameter(sharded(torch.ones(8, 64), mesh, (Shard(0),)))
    optimizer = fusedopt.AdamW([param], max_grad_norm=1.0)
    for step, found in enumerate((0.0, 1.0, 0.0)):
        param.grad = sharded(torch.ones(8, 64), mesh, (Shard(0),))
        optimizer.found_inf = torch.tensor(found if dist.get_rank() == 0 else 0.0)
        before = param.to_local().clone()
        optimizer.step()
        assert torch.equal(param.to_local(), before) == bool(found), step
    assert float(optimizer.state[param]["step"]) == 2


def trials(world: int) -> dict[str, Trial]:
    each = {
        f"{name}-{layout}": functools.partial(trial, LAYOUTS[world][layout])
        for name, trial in (
            ("as-unsharded", as_unsharded),
            ("as-torchs", as_torchs),
            ("one-collective", one_collective),
        )
        for layout in LAYOUTS[world]
    }
    if world > 1:
        each |= {"no-gradient-here": no_gradient_here, "an-error": an_error_on_one_rank}
        each |= {"an-inf": an_inf_on_one_rank}
    if world % 2 == 0:
        each |= {"several-meshes": several_meshes}
    return each


@worlds({1: "", 2: "", 4: ""}, every=(3,))
def test_clipping(world: int, among: str) -> None:
    check(__file__, world, among)


@pytest.mark.usefixtures("cuda")
def test_clipping_on_a_gpu() -> None:
    check_on_a_gpu(__file__)
