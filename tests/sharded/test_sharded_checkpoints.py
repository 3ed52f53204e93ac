"""Checkpoints of sharded optimizers: saved at one world size and resumed at others, bit for bit."""

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.ranks import Trial, check
from support.sharding import choices, drawn, in_two_groups, mesh_of, rounds_otherwise, sharded
from support.training import Case, assert_same_bits, params_of, tolerance
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

# Rows that are shared out evenly and not, fewer than ranks, none in codes.
SHAPES = {"a": (37, 256), "b": (5, 300), "c": (2, 3, 40), "d": (130,), "e": (3,), "f": ()}


class Model(nn.Module):
    """Parameters by name; sharded by rows among so many of the ranks, the first ones."""

    def __init__(self, mesh: Any, dtype: torch.dtype, scalars: bool = True) -> None:
        super().__init__()
        for name, begin in zip(SHAPES, drawn(SHAPES.values(), dtype, 1), strict=True):
            if begin.dim() == 0 and not scalars:
                continue
            whole = begin.clone()
            self.register_parameter(
                name, nn.Parameter(whole if mesh is None else sharded(whole, mesh, (Shard(0),)))
            )


def optimizer_of(model: nn.Module, choice: str) -> Optimizer:
    case, _, options, codes = choices()[choice]
    return in_two_groups(case, options, codes)([*model.parameters()])


def set_grads(model: nn.Module, step: int) -> None:
    params = [*model.parameters()]
    for p, grad in zip(
        params, drawn([p.shape for p in params], params[0].dtype, 100 + step), strict=True
    ):
        shards = isinstance(p, DTensor)
        p.grad = sharded(grad, p.device_mesh, p.placements) if shards else grad


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(model, step)
        optimizer.step()
    optimizer.zero_grad()


def checkpoint_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}


def assert_as_plain(model: nn.Module, optimizer: Optimizer, choice: str, steps: int) -> None:
    """As one that was never sharded nor saved."""
    case, dtype, *_ = choices()[choice]
    plain = Model(None, dtype)
    alone = optimizer_of(plain, choice)
    train(plain, alone, range(steps))
    for p, q in zip(params_of(optimizer), params_of(alone), strict=True):
        pairs = [(p.detach(), q.detach())]
        pairs += [(optimizer.state[p].get(key), value) for key, value in alone.state[q].items()]
        for ours, theirs in pairs:
            if isinstance(ours, DTensor):
                cut = sharded(theirs, ours.device_mesh, ours.placements)
                ours, theirs = ours.to_local(), cut.to_local()
            if rounds_otherwise(case, dtype):
                torch.testing.assert_close(ours, theirs, **tolerance(torch.float64))
            else:
                assert_same_bits(ours, theirs)


def save(choice: str, folder: Path) -> None:
    _, dtype, *_ = choices()[choice]
    model = Model(mesh_of((dist.get_world_size(),)), dtype)
    optimizer = optimizer_of(model, choice)
    train(model, optimizer, range(3))
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / choice)


def resume(choice: str, folder: Path) -> None:
    _, dtype, *_ = choices()[choice]
    model = Model(mesh_of((dist.get_world_size(),)), dtype)
    for p in model.parameters():
        p.data.mul_(2)
    optimizer = optimizer_of(model, choice)
    loaded = checkpoint_of(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder / choice)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optim"])
    train(model, optimizer, range(3, 6))
    assert_as_plain(model, optimizer, choice, 6)


def whole(choice: str, options: dict[str, bool]) -> None:
    """Gathered on rank 0, which hands it out again."""
    _, dtype, *_ = choices()[choice]
    mesh = mesh_of((dist.get_world_size(),))
    model = Model(mesh, dtype)
    optimizer = optimizer_of(model, choice)
    train(model, optimizer, range(3))
    given = StateDictOptions(full_state_dict=True, **options)
    gathered = get_optimizer_state_dict(model, optimizer, options=given)
    other = Model(mesh, dtype)
    other.load_state_dict(model.state_dict())
    resumed = optimizer_of(other, choice)
    broadcasts = options.get("cpu_offload", False)
    given = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcasts)
    if broadcasts and dist.get_rank() > 0:
        gathered = {}
    set_optimizer_state_dict(other, resumed, gathered, options=given)
    train(other, resumed, range(3, 6))
    assert_as_plain(other, resumed, choice, 6)


def torchs(case: Case, there: bool, sharded_first: bool) -> None:
    """From ours to torch's or back, from sharded to plain or back.

    torch leaves the states of sharded scalars plain tensors, with which its own step fails.
    """
    mesh = mesh_of((dist.get_world_size(),))
    kinds = [case.ours, case.counterpart]
    first, second = kinds if there else reversed(kinds)
    models = [
        Model(mesh if sharded_first is each else None, torch.float32, scalars=False)
        for each in (True, False)
    ]
    optimizers = [
        cls(model.parameters(), **case.options)
        for cls, model in zip((first, second), models, strict=True)
    ]
    train(models[0], optimizers[0], range(3))
    full = StateDictOptions(full_state_dict=True)
    # torch's optimizers take the tensors as they are.
    checkpoint = copy.deepcopy(get_optimizer_state_dict(models[0], optimizers[0], options=full))
    weights = {
        k: v.full_tensor() if isinstance(v, DTensor) else v
        for k, v in models[0].state_dict().items()
    }
    for name, p in models[1].named_parameters():
        is_sharded = isinstance(p, DTensor)
        p.data.copy_(sharded(weights[name], mesh, p.placements) if is_sharded else weights[name])
    set_optimizer_state_dict(models[1], optimizers[1], checkpoint, options=full)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3, 5))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        ours, theirs = (t.full_tensor() if isinstance(t, DTensor) else t for t in (p, q))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Mixed(nn.Module):
    """Shards of columns, in codes, and a plain tensor beside them."""

    def __init__(self) -> None:
        super().__init__()
        mesh = mesh_of((dist.get_world_size(),))
        width = 256 * dist.get_world_size()
        columns, plain = drawn([(16, width), (5, 70)], torch.float32, 3)
        self.columns = nn.Parameter(sharded(columns, mesh, (Shard(1),)))
        self.plain = nn.Parameter(plain)


def mixed(folder: Path) -> None:
    case, _, options, codes = choices()["float32-int8-adamw-amsgrad"]
    runs = []
    for _ in range(3):
        model = Mixed()
        runs.append((model, case.ours(model.parameters(), **options, **codes)))
    (model, optimizer), (loaded_model, loaded), (_, by_state_dict) = runs
    train(model, optimizer, range(3))
    assert "exp_avg_code" in optimizer.state[model.columns]
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / "mixed")
    checkpoint = checkpoint_of(loaded_model, loaded)
    dcp.load(checkpoint, checkpoint_id=folder / "mixed")
    loaded_model.load_state_dict(checkpoint["model"])
    set_optimizer_state_dict(loaded_model, loaded, checkpoint["optim"])
    by_state_dict.load_state_dict(optimizer.state_dict())
    runs[2][0].load_state_dict(model.state_dict())
    for each, its_optimizer in runs:
        # A group more, so that the plan is made anew.
        extra = nn.Parameter(torch.ones(3))
        its_optimizer.add_param_group({"params": [extra]})
        train(each, its_optimizer, range(3, 5))
    for other, its_optimizer in runs[1:]:
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            local, its_local = (t.to_local() if isinstance(t, DTensor) else t for t in (p, q))
            assert_same_bits(local.detach(), its_local.detach())
            for key, value in optimizer.state[p].items():
                theirs = its_optimizer.state[q][key]
                both = [t.to_local() if isinstance(t, DTensor) else t for t in (value, theirs)]
                assert_same_bits(*both)


def wrong_shapes() -> None:
    """All ranks say which parameter it is."""
    mesh = mesh_of((dist.get_world_size(),))
    param = nn.Parameter(sharded(torch.ones(8, 70), mesh, (Shard(0),)))
    other = nn.Parameter(sharded(torch.ones(16, 70), mesh, (Shard(0),)))
    (cls,) = {case.ours for case, *_ in choices().values() if case.row.name == "adamw"}
    ours, theirs = cls([param]), cls([other])
    other.grad = other.detach().clone()
    theirs.step()
    state = theirs.state_dict()
    with pytest.raises(
        ValueError, match=r"AdamW: state '.*' of parameter 0 of group 0 has the whole"
    ):
        ours.load_state_dict(state)
    plain = cls([nn.Parameter(torch.ones(8, 70))])
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is sharded, .* is a plain tensor"):
        plain.load_state_dict(state)
    if dist.get_world_size() > 1:
        whole = nn.Parameter(torch.ones(8, 70))
        whole.grad = torch.ones(8, 70)
        plain = cls([whole])
        plain.step()
        with pytest.raises(ValueError, match="is a plain tensor of the whole parameter's shape"):
            ours.load_state_dict(plain.state_dict())


def trials(world: int) -> dict[str, Trial]:
    each: dict[str, Trial] = {"wrong-shapes-24-int8": wrong_shapes}
    folder = Path(os.environ["FUSEDOPT_TESTS_FOLDER"])
    for choice, (case, *_) in choices().items():
        if world == 2:
            each[f"save-{choice}"] = functools.partial(save, choice, folder)
        each[f"resume-{choice}"] = functools.partial(resume, choice, folder)
        if world == 2 and case.row.name == "adamw":
            for name, options in {"here": {}, "from-rank-0": {"cpu_offload": True}}.items():
                each[f"whole-{name}-{choice}"] = functools.partial(whole, choice, options)
    each["mixed-24-int8"] = functools.partial(mixed, folder)
    if world == 2:
        for case in {case.name: case for case, *_ in choices().values()}.values():
            if case.row.theirs is None or case.name not in NAMES:
                continue
            for there in (True, False):
                for first in (True, False):
                    way = f"{'to' if there else 'from'}-{'sharded' if first else 'plain'}"
                    each[f"torchs-{case}-{way}"] = functools.partial(torchs, case, there, first)
    return each


NAMES = {"adamw-amsgrad", "sgd-nesterov-decay", "rmsprop-all"}


@pytest.mark.parametrize(
    ("to", "among"),
    [
        pytest.param((3,), "24-int8", id="to-3-24-int8"),
        pytest.param((1, 3, 4), "", id="to-any-number", marks=pytest.mark.slow),
    ],
)
def test_from_two_ranks(tmp_path: Path, to: tuple[int, ...], among: str) -> None:
    for world in (2, *to):
        check(__file__, world, among, {"FUSEDOPT_TESTS_FOLDER": str(tmp_path)})
