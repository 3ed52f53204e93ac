"""Schedule-free optimizers of sharded parameters: train() and eval() as without sharding."""

import functools
from typing import Any

import pytest
import torch
from support.ranks import Trial, check, check_on_a_gpu, worlds
from support.sharding import LAYOUTS, Layout, Pair, mesh_of, whole
from support.training import assert_same_bits, params_of

import fusedopt

CHOICES: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "adamw": (fusedopt.ScheduleFreeAdamW, torch.float32, {"lr": 1e-2, "warmup_steps": 3}),
    "sgd": (fusedopt.ScheduleFreeSGD, torch.float64, {"lr": 0.1}),
    "masters": (fusedopt.ScheduleFreeAdamW, torch.bfloat16, {"lr": 1e-2, "master_bits": 32}),
    "24-bits": (fusedopt.ScheduleFreeSGD, torch.bfloat16, {"lr": 0.1, "master_bits": 24}),
}


def same_bits(layout: Layout, choice: str) -> None:
    """In both modes, and in training that goes on."""
    make, dtype, options = CHOICES[choice]
    made = functools.partial(make, **options)
    pair: Any = Pair(made, mesh_of(layout[0]), layout[1], dtype=dtype)

    def assert_same() -> None:
        pairs = zip(params_of(pair.plain), params_of(pair.sharded), strict=True)
        for p, q in pairs:
            assert_same_bits(whole(q.detach()), p.detach())
        masters = zip(pair.plain.master_params(), pair.sharded.master_params(), strict=True)
        for p, q in masters:
            assert_same_bits(whole(q), p)

    for turn in range(3):
        for optimizer in (pair.plain, pair.sharded):
            optimizer.train()
        pair.train(range(3 * turn, 3 * turn + 3))
        assert_same()
        for optimizer in (pair.plain, pair.sharded):
            optimizer.eval()
        assert_same()


def trials(world: int) -> dict[str, Trial]:
    return {
        f"{layout}-{choice}": functools.partial(same_bits, LAYOUTS[world][layout], choice)
        for layout in LAYOUTS[world]
        for choice in CHOICES
    }


@worlds({1: "", 2: "", 4: ""}, every=(3,))
def test_schedule_free_in_shards(world: int, among: str) -> None:
    check(__file__, world, among)


@pytest.mark.usefixtures("cuda")
def test_schedule_free_in_shards_on_a_gpu() -> None:
    check_on_a_gpu(__file__)
