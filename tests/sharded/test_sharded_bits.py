"""The same bits at every world size: shards of rows are stepped as the whole is."""

import functools

import pytest
import torch
from support.ranks import Trial, check, check_on_a_gpu, worlds
from support.sharding import (
    LAYOUTS,
    Layout,
    Pair,
    choices,
    drawn,
    in_two_groups,
    mesh_of,
    rounds_otherwise,
)
from support.training import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from fusedopt._sharded import runs_of


def same_bits(layout: Layout, choice: str) -> None:
    case, dtype, options, codes = choices()[choice]
    mesh, placements = mesh_of(layout[0]), layout[1]
    pair = Pair(in_two_groups(case, options, codes), mesh, placements, dtype=dtype)
    pair.train(range(5))
    pair.assert_same_bits()


def same_bits_strided(choice: str, several_runs: bool) -> None:
    """FSDP2 over tensor parallelism, and shards that are several runs of rows."""
    case, dtype, options, codes = choices()[choice]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole, sharded = [], []
    for number, (rows, width) in enumerate([(37, 256), (11, 300), (5, 70), (1, 1000), (40, 64)]):
        (begin,) = drawn([(rows, width)], dtype, number)
        whole.append(nn.Parameter(begin))
        if several_runs:
            placements = [Shard(0), _StridedShard(0, split_factor=3)]
            cut = distribute_tensor(begin, mesh, placements, src_data_rank=None)
            sharded.append(nn.Parameter(cut))
            continue
        layer = nn.Linear(width, rows, bias=False).to(dtype)
        layer.weight.data.copy_(begin)
        parallelize_module(layer, mesh["tp"], ColwiseParallel())
        fully_shard(layer, mesh=mesh["dp"])
        sharded.append(layer.weight)
    assert any(len(runs_of(p)) > 1 for p in sharded) == several_runs

    def part(p: DTensor, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().flatten()
        pieces = [flat[begin : begin + size] for begin, size in runs_of(p)]
        return torch.cat(pieces).view(p.to_local().shape)

    pair = [case.ours(params, **options, **codes) for params in (sharded, whole)]
    for step in range(4):
        grads = drawn([p.shape for p in whole], dtype, 100 + step)
        for p, q, grad in zip(sharded, whole, grads, strict=True):
            q.grad = grad
            p.grad = DTensor.from_local(
                part(p, grad),
                p.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
        for optimizer in pair:
            optimizer.step()
    for p, q in zip(sharded, whole, strict=True):
        assert_same_bits(p.to_local().detach(), part(p, q))
        for key, value in pair[0].state[p].items():
            theirs = pair[1].state[q][key]
            if isinstance(value, DTensor) and value.shape == p.shape:
                assert_same_bits(value.to_local(), part(p, theirs))


def trials(world: int) -> dict[str, Trial]:
    each = {
        f"{layout}-{choice}": functools.partial(same_bits, LAYOUTS[world][layout], choice)
        for layout in LAYOUTS[world]
        for choice, (case, dtype, *_) in choices().items()
        # Of the many layouts of a larger world all but one are for one class.
        if layout == "shards" or case.row.name == "adamw"
        if not rounds_otherwise(case, dtype)
    }
    if world == 4:
        for choice, (case, *_) in choices().items():
            if case.row.name == "adamw":
                for runs in (False, True):
                    trial = functools.partial(same_bits_strided, choice, runs)
                    each[f"strided-{'runs-' if runs else ''}{choice}"] = trial
    return each


@worlds({4: "adamw"}, every=LAYOUTS)
def test_same_bits(world: int, among: str) -> None:
    check(__file__, world, among)


@pytest.mark.usefixtures("cuda")
def test_same_bits_on_a_gpu() -> None:
    check_on_a_gpu(__file__)
