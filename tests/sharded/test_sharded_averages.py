"""Averages of sharded weights: those of the whole, to the bit, saved and swapped like them."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import DEVICE, Trial, check, check_on_a_gpu, worlds
from support.sharding import LAYOUTS, Layout, Pair, drawn, mesh_of, whole
from support.training import assert_same_bits, params_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fusedopt

CHOICES: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "adamw": (fusedopt.AdamW, torch.float32, {}),
    "sgd": (fusedopt.SGD, torch.float32, {"lr": 0.1}),
    "masters": (fusedopt.AdamW, torch.bfloat16, {"master_bits": 32}),
    "bfloat16": (fusedopt.Lion, torch.bfloat16, {"rounding": "stochastic"}),
    "clipped": (fusedopt.AdamW, torch.float32, {"max_grad_norm": 1e6}),
}


def same_bits(layout: Layout, choice: str) -> None:
    make, dtype, options = CHOICES[choice]
    made = functools.partial(make, ema_decay=0.75, **options)
    pair = Pair(made, mesh_of(layout[0]), layout[1], dtype=dtype)
    pair.train(range(5))
    pair.assert_same_bits()
    ours, theirs = params_of(pair.sharded), params_of(pair.plain)
    for p, average in zip(ours, pair.sharded.ema_params(), strict=True):
        assert isinstance(average, DTensor) and average.placements == p.placements
    before = [p.to_local().clone() for p in ours]
    with pytest.raises(ValueError, match=r"give it the model: swap_ema\(model\)"):
        pair.sharded.swap_ema()
    with pair.sharded.swap_ema(nn.ParameterList(ours)):
        for p, average in zip(ours, pair.plain.ema_params(), strict=True):
            assert_same_bits(whole(p.detach()), average.to(dtype))
    for p, old in zip(ours, before, strict=True):
        assert_same_bits(p.to_local().detach(), old)
    pair.train(range(5, 8))
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(whole(pair.sharded.state[p]["ema"]), pair.plain.state[q]["ema"])


def checkpoints() -> None:
    """By torch.distributed: the averages of the whole model go out and into another one."""
    mesh = mesh_of((dist.get_world_size(),))

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 5)).to(DEVICE)
        fully_shard(model, mesh=mesh)
        return model, fusedopt.AdamW(model.parameters(), lr=1e-2, ema_decay=0.75)

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(drawn([(4, 8)], torch.float32, step)[0]).square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(4))
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    averages = [whole(a).clone() for a in optimizer.ema_params()]
    named = zip(model.named_parameters(), averages, strict=True)
    for (name, _), average in named:
        assert_same_bits(saved["state"][name]["ema"].to(average.device), average)
    other, resumed = made()
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.to_local().copy_(p.to_local())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(model, optimizer, range(4, 7))
    train(other, resumed, range(4, 7))
    for a, b in zip(optimizer.ema_params(), resumed.ema_params(), strict=True):
        assert_same_bits(a.to_local(), b.to_local())


def gathered_weights() -> None:
    """A forward pass in front of a swap, within it, and behind it has the weights of its own."""
    mesh = mesh_of((dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 5)).to(DEVICE)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1, ema_decay=0.75)
    inputs = drawn([(4, 8)], torch.float32, 0)[0]
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    averages = [whole(a) for a in optimizer.ema_params()]
    with torch.no_grad():
        trained = model(inputs)
        with optimizer.swap_ema(model):
            swapped = model(inputs)
        assert torch.equal(model(inputs), trained)
        w1, b1, w2, b2 = averages
        want = (inputs @ w1.T + b1) @ w2.T + b2
    torch.testing.assert_close(swapped, want)
    assert not torch.allclose(swapped, trained)


def an_error_on_one_rank() -> None:
    """With max_grad_norm all processes learn of it, and none has changed anything."""
    pair = Pair(
        functools.partial(fusedopt.AdamW, ema_decay=0.5, max_grad_norm=1.0),
        mesh_of((dist.get_world_size(),)),
        LAYOUTS[dist.get_world_size()]["shards"][1],
    )
    pair.train(range(2))
    optimizer = pair.sharded
    before = [p.to_local().clone() for p in params_of(optimizer)]
    bad = dist.get_rank() == 1
    if bad:
        optimizer.param_groups[0]["ema_decay"] = 2.0
    with pytest.raises((RuntimeError, ValueError), match="ema_decay" if bad else "rank 1"):
        optimizer.step()
    for p, old in zip(params_of(optimizer), before, strict=True):
        assert torch.equal(p.to_local(), old)


def trials(world: int) -> dict[str, Trial]:
    each: dict[str, Trial] = {
        f"{layout}-{choice}": functools.partial(same_bits, LAYOUTS[world][layout], choice)
        for layout in LAYOUTS[world]
        for choice in CHOICES
    }
    each |= {"checkpoints": checkpoints, "gathered-weights": gathered_weights}
    if world > 1:
        each["an-error"] = an_error_on_one_rank
    return each


@worlds({1: "", 2: "", 4: ""}, every=(3,))
def test_averages(world: int, among: str) -> None:
    check(__file__, world, among)


@pytest.mark.usefixtures("cuda")
def test_averages_on_a_gpu() -> None:
    check_on_a_gpu(__file__)
