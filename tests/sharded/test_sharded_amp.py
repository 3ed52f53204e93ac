"""GradScaler with sharded parameters: with an Inf on one rank all ranks skip the step, or none."""

import functools

import torch
import torch.distributed as dist
from support.ranks import Trial, check, worlds
from support.sharding import mesh_of
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt


def make(rows: tuple[int, ...]) -> list[nn.Parameter]:
    mesh = mesh_of((dist.get_world_size(),))
    return [
        nn.Parameter(DTensor.from_local(torch.ones(n, 64), mesh, [Shard(0)], run_check=False))
        for n in rows
    ]


def set_grads(params: list[nn.Parameter], scale: float, bad: bool) -> None:
    for number, p in enumerate(params):
        local = torch.full(p.to_local().shape, scale)
        if bad and number == 1 and dist.get_rank() == dist.get_world_size() - 1:
            local[0, 3] = float("inf")
        p.grad = DTensor.from_local(local, p.device_mesh, p.placements, run_check=False)


def with_scaler(fused: bool, unscales: bool, clip: float | None) -> None:
    """As torch.optim with foreach=False; its fused step cannot be had for each setting."""
    params = make((3, 2, 4))
    optimizer = fusedopt.AdamW(params, lr=0.1, fused=fused or None, max_grad_norm=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    taken = 0
    for step in range(4):
        bad = step in (1, 2)
        # Something has to pass through the scaler, so that it has a scale.
        scaler.scale(torch.ones(()))
        set_grads(params, scaler.get_scale(), bad)
        if unscales:
            scaler.unscale_(optimizer)
        before = [p.to_local().clone() for p in params]
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p.to_local(), b) for p, b in zip(params, before, strict=True)]
        assert moved == [not bad] * 3, (step, moved)
        assert scaler.get_scale() == (scale / 2 if bad else scale)
        taken += not bad
        assert all(float(optimizer.state[p]["step"]) == taken for p in params)
    plain = nn.Parameter(torch.ones(2, 64))
    alone = torch.optim.AdamW([plain], lr=0.1)
    for _ in range(taken):
        rows = 9 * dist.get_world_size()
        norm = (rows * 64) ** 0.5
        plain.grad = torch.full((2, 64), 1.0 if clip is None else min(1.0, clip / (norm + 1e-6)))
        alone.step()
    for p in params:
        torch.testing.assert_close(p.to_local()[:2], plain.detach(), rtol=1e-5, atol=1e-6)


def by_hand() -> None:
    """found_inf and grad_scale that somebody sets, replicated DTensors among them."""
    mesh = mesh_of((dist.get_world_size(),))
    params = make((3, 2))
    optimizer = fusedopt.AdamW(params, lr=0.1)
    for found in (0.0, 1.0):
        set_grads(params, 8.0, False)
        before = params[0].to_local().clone()
        optimizer.grad_scale = torch.tensor(8.0)
        value = torch.tensor(found)
        optimizer.found_inf = DTensor.from_local(value, mesh, [Replicate()])
        optimizer.step()
        assert torch.equal(params[0].to_local(), before) == bool(found)


def trials(world: int) -> dict[str, Trial]:
    each: dict[str, Trial] = {"by-hand": by_hand}
    for fused in (False, True):
        for unscales in (False, True):
            for clip in (None, 0.5):
                name = f"fused={fused}-unscales={unscales}-clip={clip}"
                each[name] = functools.partial(with_scaler, fused, unscales, clip)
    return each


@worlds({2: ""}, every=(1, 3))
def test_scaler(world: int, among: str) -> None:
    check(__file__, world, among)
