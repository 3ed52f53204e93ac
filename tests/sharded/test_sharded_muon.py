"""Muon with sharded parameters: whole matrices are orthogonalised, as without sharding."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import DEVICE, Trial, check, check_on_a_gpu, worlds
from support.sharding import LAYOUTS, Layout, Pair, drawn, mesh_of, sharded, whole
from support.training import params_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import fusedopt
from fusedopt._orthogonal import NewtonSchulz

SHAPES = ((37, 64), (64, 37), (96, 16), (16, 96), (3, 64), (2, 3, 72), (64, 64), (1, 300), (0, 8))
OTHERS = ((130,), (3,), ())
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "clipped": {"max_grad_norm": 0.5},
    "int8-with-masters": {"state_dtype": "int8", "min_8bit_size": 1, "master_bits": 32},
    "batches": {"ns_view": "batch"},
}


def make(params: Any, **options: Any) -> fusedopt.Muon:
    groups = [{"params": [p for p in params if (p.dim() > 1) is many]} for many in (True, False)]
    return fusedopt.Muon([g for g in groups if g["params"]], lr=0.02, adamw={"lr": 1e-2}, **options)


def as_unsharded(
    layout: Layout, choice: str, shapes: tuple[tuple[int, ...], ...] = (*SHAPES, *OTHERS)
) -> None:
    options = CHOICES[choice]
    dtype = torch.bfloat16 if "master_bits" in options else torch.float32
    made = functools.partial(make, **options)
    if "state_dtype" in options:  # short rows have codes only where they are not sharded
        shapes = tuple(shape for shape in shapes if len(shape) != 2 or shape[1] >= 64)
    pair = Pair(made, mesh_of(layout[0]), layout[1], shapes, dtype)
    begun = [p.detach().clone() for p in params_of(pair.plain)]
    pair.train(range(5))
    if "max_grad_norm" in options:
        torch.testing.assert_close(pair.sharded.grad_norm, pair.plain.grad_norm)
    for p, q, b in zip(params_of(pair.plain), params_of(pair.sharded), begun, strict=True):
        way = float((p.detach() - b).float().norm())
        apart = float((whole(q.detach()) - p.detach()).float().norm())
        assert apart <= 0.02 * way, (tuple(p.shape), apart, way)
    for p in params_of(pair.sharded):
        for key, value in pair.sharded.state[p].items():
            if key not in ("step", "code_stride") and p.dim() > 0:
                assert getattr(value, "placements", None) == p.placements, (key, tuple(p.shape))


def products_are_shared_out() -> None:
    """Each process has its part of the matrices, and each matrix is one process's."""
    world = dist.get_world_size()
    seen: list[tuple[int, ...]] = []
    orthogonalize = NewtonSchulz.orthogonalize

    def watched(self: NewtonSchulz, matrices: Iterable[Tensor]) -> None:
        those = [*matrices]
        seen.extend(tuple(m.shape) for m in those)
        orthogonalize(self, those)

    mesh = mesh_of((world,))
    params = [
        nn.Parameter(sharded(t, mesh, (Shard(0),))) for t in drawn([(24, 8)] * 8, torch.float32, 1)
    ]
    optimizer = fusedopt.Muon(params)
    for p in params:
        p.grad = sharded(torch.ones(p.shape), mesh, p.placements)
    NewtonSchulz.orthogonalize = watched  # type: ignore[method-assign]
    try:
        optimizer.step()
    finally:
        NewtonSchulz.orthogonalize = orthogonalize  # type: ignore[method-assign]
    counts = torch.zeros(world)
    dist.all_gather([*counts.split(1)], torch.tensor([float(len(seen))]))
    assert set(seen) <= {(24, 8)}
    assert counts.sum() == 8 and counts.max() - counts.min() <= 1


def an_error_on_one_rank() -> None:
    """All processes raise, none has changed anything, and they go on."""
    mesh = mesh_of((dist.get_world_size(),))
    begin = drawn([(8, 64), (4, 64)], torch.float32, 1)

    def made() -> fusedopt.Muon:
        return fusedopt.Muon([nn.Parameter(sharded(t, mesh, (Shard(0),))) for t in begin])

    def set_grads(optimizer: Any, step: int) -> None:
        grads = drawn([p.shape for p in params_of(optimizer)], torch.float32, 10 + step)
        for p, grad in zip(params_of(optimizer), grads, strict=True):
            p.grad = sharded(grad, mesh, p.placements)

    bad = dist.get_rank() == 1
    spoil: list[tuple[Callable[[Any], None], str]] = [
        (lambda o: o.param_groups[0].update(lr=float("nan")), "lr"),
        (
            lambda o: o.state[params_of(o)[0]].update(momentum_buffer=torch.ones(2)),
            "momentum_buffer",
        ),
        (lambda o: setattr(params_of(o)[1], "grad", None), "has gradients of other matrices"),
    ]
    for begun in (False, True):
        for change, message in spoil:
            if message == "momentum_buffer" and not begun:
                continue
            optimizer, other = made(), made()
            for each in (optimizer, other):
                set_grads(each, 0)
                if begun:
                    each.step()
            states = {p: dict(s) for p, s in optimizer.state.items()}
            before = [p.to_local().clone() for p in params_of(optimizer)]
            if bad:
                change(optimizer)
            elsewhere = "nothing was stepped, as rank"
            with pytest.raises((RuntimeError, ValueError), match=message if bad else elsewhere):
                optimizer.step()
            for p, old in zip(params_of(optimizer), before, strict=True):
                assert torch.equal(p.to_local(), old)
            optimizer.param_groups[0]["lr"] = 1e-3
            for p, state in states.items():
                optimizer.state[p].update(state)
            set_grads(optimizer, 1)
            set_grads(other, 1)
            optimizer.step()
            other.step()
            for p, q in zip(params_of(optimizer), params_of(other), strict=True):
                assert torch.equal(p.to_local(), q.to_local())


def an_error_with_a_norm_of_others() -> None:
    """Clipping gathers the norm of what is no shard of a matrix, too: nobody waits there."""
    mesh = mesh_of((dist.get_world_size(),))
    bad = dist.get_rank() == 1
    for kind in ("plain", "vectors"):
        (matrix,) = drawn([(8, 6)], torch.float32, 1)
        (vector,) = drawn([(64,)], torch.float32, 2)
        params = [nn.Parameter(matrix), nn.Parameter(vector)]
        options: dict[str, Any] = {"norm_group": dist.group.WORLD}
        if kind == "vectors":
            params[1], options = nn.Parameter(sharded(vector, mesh, (Shard(0),))), {}
        groups = [{"params": [p]} for p in params]
        optimizer: Any = fusedopt.Muon(groups, adamw={}, max_grad_norm=1.0, **options)

        def set_grads(optimizer: Any = optimizer) -> None:
            for p in params_of(optimizer):
                p.grad = torch.ones_like(p.detach())

        set_grads()
        optimizer.step()
        before = [whole(p.detach()).clone() for p in params]
        if bad:
            optimizer.param_groups[0]["lr"] = float("nan")
        with pytest.raises((RuntimeError, ValueError), match=r"lr|nothing was stepped, as rank"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            assert torch.equal(whole(p.detach()), old), kind
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        assert not torch.equal(whole(params[0].detach()), before[0])


def an_error_in_one_of_two_groups() -> None:
    """Processes that share no matrix with the one that fails know of it as well."""
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("across", "along"))
    begin = drawn([(8, 6), (6, 8)], torch.float32, 1)
    params = [
        nn.Parameter(sharded(t, mesh[n], (Shard(0),)))
        for t, n in zip(begin, ("across", "along"), strict=True)
    ]
    optimizer = fusedopt.Muon(params)
    for p in params:
        p.grad = sharded(torch.ones(p.shape), p.device_mesh, p.placements)
    before = [p.to_local().clone() for p in params]
    if dist.get_rank() == 3:
        optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises((RuntimeError, ValueError), match=r"lr|nothing was stepped, as rank"):
        optimizer.step()
    assert all(torch.equal(p.to_local(), old) for p, old in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert not torch.equal(params[0].to_local(), before[0])


def an_inf_on_one_rank() -> None:
    """found_inf that processes do not agree on: none of them steps, and none waits."""
    mesh = mesh_of((dist.get_world_size(),))
    param = nn.Parameter(sharded(drawn([(8, 64)], torch.float32, 1)[0], mesh, (Shard(0),)))
    optimizer: Any = fusedopt.Muon([param])
    for step, found in enumerate((0.0, 1.0, 0.0)):
        param.grad = sharded(torch.ones(8, 64), mesh, (Shard(0),))
        optimizer.found_inf = torch.tensor(found if dist.get_rank() == 0 else 0.0)
        before = whole(param.detach()).clone()
        optimizer.step()
        assert torch.equal(whole(param.detach()), before) == bool(found), step


def fsdp2() -> None:
    """A model of fully_shard goes where the model goes that is not sharded."""
    models = []
    for shards in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 40), nn.Linear(40, 8))
        model = model.to(DEVICE)
        if shards:
            for layer in model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh_of((dist.get_world_size(),)))
            fully_shard(model, mesh=mesh_of((dist.get_world_size(),)))
        models.append(model)
    optimizers = [
        fusedopt.Muon(
            [
                {"params": [p for p in model.parameters() if p.dim() == 2]},
                {"params": [p for p in model.parameters() if p.dim() < 2]},
            ],
            lr=0.02,
            adamw={"lr": 1e-2},
            max_grad_norm=1.0,
        )
        for model in models
    ]
    for step in range(5):
        x = drawn([(16, 24)], torch.float32, step)[0]
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=0, atol=2e-3)


def trials(world: int) -> dict[str, Trial]:
    each: dict[str, Trial] = {
        f"{choice}-{layout}": functools.partial(as_unsharded, LAYOUTS[world][layout], choice)
        for choice in CHOICES
        for layout in LAYOUTS[world]
    }
    each["by-columns"] = functools.partial(as_unsharded, ((world,), (Shard(1),)), "default", SHAPES)
    each |= {"shared-out": products_are_shared_out, "fsdp2": fsdp2}
    if world > 1:
        each |= {"an-error": an_error_on_one_rank, "an-inf": an_inf_on_one_rank}
        each["an-error-with-a-norm"] = an_error_with_a_norm_of_others
    if world == 4:
        each["an-error-in-one-of-two-groups"] = an_error_in_one_of_two_groups
    return each


@worlds({1: "", 2: "", 4: ""}, every=(3,))
def test_muon(world: int, among: str) -> None:
    check(__file__, world, among)


@pytest.mark.usefixtures("cuda")
def test_muon_on_a_gpu() -> None:
    check_on_a_gpu(__file__)
