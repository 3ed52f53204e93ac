"""Gradients of shards that are freed in the backward pass, after they were reduced: the bits of
ordinary steps; and what gives gradients only after the hooks of parameters."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import DEVICE, Trial, check, check_on_a_gpu, worlds
from support.sharding import drawn, mesh_of
from support.training import assert_same_bits
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedopt

CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (fusedopt.AdamW, {}),
    "int8": (fusedopt.AdamW, {"state_dtype": "int8", "min_8bit_size": 1}),
    "masters": (fusedopt.AdamW, {"master_bits": 32}),
    "sgd": (fusedopt.SGD, {"lr": 0.1}),
    "clipped": (fusedopt.AdamW, {"max_grad_norm": 0.1}),
    "lamb": (fusedopt.LAMB, {"lr": 1e-2}),
    "averages": (fusedopt.AdamW, {"ema_decay": 0.75}),
}
WAITING = ("clipped", "lamb")  # which have to do with other processes


class Training:
    def __init__(self, choice: str, released: bool, accumulates_shards: bool) -> None:
        make, options = CHOICES[choice]
        dtype = torch.bfloat16 if choice == "masters" else torch.float32
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64)) for _ in range(3)]
        self.model = nn.Sequential(*layers).to(DEVICE, dtype)
        mesh = mesh_of((dist.get_world_size(),))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = make(self.model.parameters(), **options)
        self.release = fusedopt.GradientRelease(self.optimizer) if released else None
        self.accumulates_shards = accumulates_shards
        self.left = 0
        self.dtype = dtype

    def step(self, number: int, microbatches: int) -> None:
        for part in range(microbatches):
            last = part == microbatches - 1
            inputs = drawn([(4, 64)], self.dtype, 10 * number + part + 100 * dist.get_rank())[0]
            self.model.set_requires_gradient_sync(last or self.accumulates_shards)
            loss = self.model(inputs.to(DEVICE)).float().square().mean() / microbatches
            if self.release is None or last or not self.accumulates_shards:
                loss.backward()
            else:
                with self.release.accumulate():
                    loss.backward()
        self.left = sum(p.grad is not None for p in self.model.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad()


def same_bits(choice: str, microbatches: int, accumulates_shards: bool) -> None:
    released, ordinary = (Training(choice, each, accumulates_shards) for each in (True, False))
    for number in range(5):
        released.step(number, microbatches)
        ordinary.step(number, microbatches)
    count = len([*released.model.parameters()])
    assert released.left == (count if choice in WAITING else 0)
    assert ordinary.left == count
    pairs = zip(released.model.parameters(), ordinary.model.parameters(), strict=True)
    for p, q in pairs:
        assert_same_bits(p.to_local().detach(), q.to_local().detach())
        ours, theirs = released.optimizer.state[p], ordinary.optimizer.state[q]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            local = [v.to_local() if hasattr(v, "to_local") else v for v in (value, theirs[key])]
            assert_same_bits(*local)


def with_mixed_precision() -> None:
    """Gradients that were reduced in float32 of weights that were gathered in bfloat16."""
    found: list[list[torch.Tensor]] = []
    for released in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).to(DEVICE)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mesh=mesh_of((dist.get_world_size(),)), mp_policy=policy)
        optimizer = fusedopt.AdamW(model.parameters())
        release = fusedopt.GradientRelease(optimizer) if released else None
        for number in range(4):
            inputs = drawn([(4, 16)], torch.float32, number + 9 * dist.get_rank())[0].to(DEVICE)
            model(inputs).float().square().mean().backward()
            assert all((p.grad is None) == (release is not None) for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.to_local().detach() for p in model.parameters()])
    for got, want in zip(*found, strict=True):
        assert_same_bits(got, want)


def others_are_refused() -> None:
    """DistributedDataParallel in the first backward pass, FSDP1 at once."""
    model = nn.Linear(8, 8).to(DEVICE)
    before = model.weight.detach().clone()
    wrapped = DistributedDataParallel(model)
    optimizer = fusedopt.AdamW(model.parameters())
    release = fusedopt.GradientRelease(optimizer)
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel, which adds .*FSDP2"):
        wrapped(torch.ones(2, 8, device=DEVICE)).sum().backward()
    assert torch.equal(model.weight, before)
    release.remove()
    flattened = FullyShardedDataParallel(
        nn.Linear(8, 8), device_id=torch.device(DEVICE), use_orig_params=True
    )
    with pytest.raises(ValueError, match=r"has flattened; use fully_shard \(FSDP2\)"):
        fusedopt.GradientRelease(fusedopt.AdamW(flattened.parameters()))


def another_model_is_parallel() -> None:
    """Which is no business of this one's."""
    wrapped = DistributedDataParallel(nn.Linear(8, 8).to(DEVICE))
    model = nn.Linear(8, 8).to(DEVICE)
    fusedopt.GradientRelease(optimizer := fusedopt.AdamW(model.parameters()))
    model(wrapped(torch.ones(2, 8, device=DEVICE))).sum().backward()
    assert model.weight.grad is None
    optimizer.step()


def trials(world: int) -> dict[str, Trial]:
    found: dict[str, Trial] = {
        f"{choice}, {count} microbatches": functools.partial(same_bits, choice, count, True)
        for choice in CHOICES
        for count in (1, 3)
    }
    found["adamw, unsharded sums"] = functools.partial(same_bits, "adamw", 3, False)
    others = (with_mixed_precision, others_are_refused, another_model_is_parallel)
    return found | {trial.__name__: trial for trial in others}


@worlds({2: ""}, every=(1, 3))
def test_release(world: int, among: str) -> None:
    check(__file__, world, among)


@pytest.mark.usefixtures("cuda")
def test_release_on_a_gpu() -> None:
    check_on_a_gpu(__file__)
