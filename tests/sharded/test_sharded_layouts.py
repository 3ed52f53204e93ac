"""fully_shard and parallelize_module, alone and together: trained as torch's for-loop trains it."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Trial, check, worlds
from support.sharding import mesh_of, whole
from support.training import RICHEST_IN_TORCH, Case
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fusedopt
from fusedopt._formats import NUMBERS
from fusedopt._sharded import runs_of

WIDTH = 24


class Model(nn.Module):
    """An embedding, linear layers, a norm and a scalar; sizes that do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        for number, p in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(number)
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        result: Tensor = self.head(x + self.down(torch.tanh(self.up(x))))
        return result


def batch(step: int) -> Tensor:
    """The same on all ranks, so that the mean over ranks is each one's."""
    return torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int) -> None:
    model(batch(step)).square().mean().backward()


def fsdp(model: nn.Module, **given: Any) -> nn.Module:
    for layer in (model.up, model.down):
        fully_shard(layer, **given)
    return fully_shard(model, **given)


def fsdp_mixed(model: nn.Module) -> nn.Module:
    return fsdp(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def fsdp_offloaded(model: nn.Module) -> nn.Module:
    return fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def hsdp(model: nn.Module) -> nn.Module:
    return fsdp(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


COLUMN_AND_ROW = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = mesh_of((dist.get_world_size(),))
    return parallelize_module(model, mesh, COLUMN_AND_ROW)


def sequence_parallel(model: nn.Module) -> nn.Module:
    """The norm's parameters are replicated, their gradients partial sums."""
    mesh = mesh_of((dist.get_world_size(),))
    plan = {
        "norm": SequenceParallel(use_local_output=True),
        **COLUMN_AND_ROW,
    }
    return parallelize_module(model, mesh, plan)


def fsdp_and_tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], COLUMN_AND_ROW)
    return fsdp(model, mesh=mesh["dp"])


WAYS: dict[str, tuple[tuple[int, ...], Callable[[nn.Module], nn.Module]]] = {
    "fsdp": ((1, 2, 3, 4), fsdp),
    "fsdp-mixed": ((2,), fsdp_mixed),
    "fsdp-offloaded": ((2,), fsdp_offloaded),
    "hsdp": ((4,), hsdp),
    "tensor-parallel": ((2,), tensor_parallel),
    "sequence-parallel": ((2,), sequence_parallel),
    "fsdp-tensor-parallel": ((4,), fsdp_and_tensor_parallel),
}


def clip_by_hand(params: list[nn.Parameter], largest: float) -> None:
    """torch's function refuses DTensors beside plain tensors."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = sum(float(whole(grad).double().square().sum()) for grad in grads) ** 0.5
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(min(1.0, largest / (norm + 1e-6)))


# torch's Rprop writes where a mask tells it to, which a DTensor cannot do.
SHARDED_IN_TORCH = [case for case in RICHEST_IN_TORCH if case.row.name != "rprop"]


def as_torch(case: Case, way: str, clip: float | None) -> None:
    models = [WAYS[way][1](Model()) for _ in range(2)]
    ours = case.ours(models[0].parameters(), max_grad_norm=clip, **case.options)
    theirs = case.counterpart(models[1].parameters(), foreach=False, **case.options)
    for step in range(4):
        ours.zero_grad()
        backward(models[0], step)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.grad = None if p.grad is None else p.grad.detach().clone()
        ours.step()
        if clip is not None:
            clip_by_hand([*models[1].parameters()], clip)
        theirs.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=2e-5, atol=2e-6)
        assert set(ours.state[p]) == set(theirs.state[q])
        for key, value in ours.state[p].items():
            other = theirs.state[q][key]
            assert type(value) is type(other) or key in NUMBERS, key
            if isinstance(value, DTensor):
                assert value.device_mesh == p.device_mesh and value.placements == p.placements
            torch.testing.assert_close(whole(value), whole(other), rtol=2e-5, atol=2e-6)


def partial_gradients() -> None:
    """They are summed first, once, also where state is still to be made."""
    mesh = mesh_of((dist.get_world_size(),))
    param = nn.Parameter(DTensor.from_local(torch.ones(5, 70), mesh, [Replicate()]))
    plain = nn.Parameter(torch.ones(5, 70))
    ours = fusedopt.SGD([param], lr=0.1, momentum=0.9, max_grad_norm=1000.0)
    theirs = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    for step in range(3):
        mine = torch.full((5, 70), float(dist.get_rank() + step))
        param.grad = DTensor.from_local(mine, mesh, [Partial()])
        plain.grad = torch.full(
            (5, 70), float(sum(rank + step for rank in range(dist.get_world_size())))
        )
        ours.step()
        theirs.step()
        assert isinstance(param.grad, DTensor) and param.grad.placements == (Partial(),)
    torch.testing.assert_close(param.to_local(), plain.detach())


def resharded() -> None:
    """Parameters given other local tensors, placements and states are noticed."""
    mesh = mesh_of((dist.get_world_size(),))
    begin = torch.randn(9, 70, generator=torch.Generator().manual_seed(3))
    pair = []
    for cls in (fusedopt.AdamW, torch.optim.AdamW):
        local = DTensor.from_local(begin.clone(), mesh, [Replicate()])
        pair.append((p := nn.Parameter(local), cls([p])))
    for step in range(6):
        for p, optimizer in pair:
            if step == 2:
                p._local_tensor = p._local_tensor.clone()
            elif step == 3:
                p.grad = None
                other = nn.Parameter(p.detach().redistribute(mesh, [Shard(0)]))
                torch.utils.swap_tensors(p, other)
                state = optimizer.state[p]
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].redistribute(mesh, [Shard(0)])
            elif step == 4:
                state = optimizer.state[p]
                state["exp_avg"]._local_tensor = state["exp_avg"]._local_tensor * 2
            grad = torch.randn(9, 70, generator=torch.Generator().manual_seed(step))
            p.grad = DTensor.from_local(grad, mesh, [Replicate()]).redistribute(mesh, p.placements)
            optimizer.step()
    torch.testing.assert_close(whole(pair[0][0]), whole(pair[1][0]), rtol=1e-5, atol=1e-6)


def copied() -> None:
    """deepcopy, closures, hooks and a learning rate that is a tensor, as with plain parameters."""
    model = fsdp(Model())
    optimizer = fusedopt.AdamW(model.parameters(), lr=torch.tensor(1e-2))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        backward(model, 0)
        return torch.tensor(1.5)

    assert optimizer.step(closure) == 1.5
    assert seen == ["before", "after"]
    optimizer.zero_grad()  # torch cannot copy a DTensor that has a gradient
    other = copy.deepcopy(optimizer)
    for each in (optimizer, other):
        for p in each.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    other.step()
    for p, q in zip(
        optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(p.to_local(), q.to_local()) and p.to_local() is not q.to_local()
    with pytest.raises(ValueError, match="flat=True with sharded parameters"):
        fusedopt.AdamW(model.parameters(), flat=True)


def where_strided_shards_lie() -> None:
    """The elements of this rank are those that the runs name, of all layouts and uneven sizes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for rows in (*range(1, 14), 40):
        model = nn.Linear(3, rows)
        numbers = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
        model.weight.data.copy_(numbers)
        parallelize_module(model, mesh["tp"], ColwiseParallel())
        fully_shard(model, mesh=mesh["dp"])
        flat = [n for begin, size in runs_of(model.weight) for n in range(begin, begin + size)]
        assert model.weight.to_local().flatten().tolist() == flat, rows


def trials(world: int) -> dict[str, Trial]:
    each: dict[str, Trial] = {}
    for way, (sizes, _) in WAYS.items():
        for case in SHARDED_IN_TORCH if world in sizes else ():
            for clip in (None, 0.05):
                name = f"{way}-{case}-{'clipped' if clip else 'as-it-is'}"
                each[name] = functools.partial(as_torch, case, way, clip)
    if world == 2:
        each |= {"partial": partial_gradients, "resharded": resharded, "copied": copied}
    if world == 4:
        each |= {"where-strided-shards-lie": where_strided_shards_lie}
    return each


@worlds({2: "ed", 4: "adamw"}, every=(1, 2, 3, 4))
def test_layouts(world: int, among: str) -> None:
    check(__file__, world, among)
