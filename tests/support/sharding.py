"""What the tests of sharded parameters share: ways to shard, and a run beside an unsharded one."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from .optimizers import Options
from .ranks import DEVICE
from .storing import CHOICES, Choice, richest_with
from .training import RICHEST, Case, assert_same_bits, params_of

# Rows that are blocks, longer, shorter, and too short for codes; fewer rows than ranks; nothing.
SHAPES = ((37, 256), (5, 300), (9, 70), (2, 3, 40), (3, 1000), (33, 7), (130,), (3,), (), (0, 80))

Placements = tuple[Any, ...]
Layout = tuple[tuple[int, ...], Placements]
"""The shape of a mesh, and the placements of tensors with dimensions."""

LAYOUTS: dict[int, dict[str, Layout]] = {
    1: {"shards": ((1,), (Shard(0),))},
    2: {"shards": ((2,), (Shard(0),)), "replicas": ((2,), (Replicate(),))},
    3: {"shards": ((3,), (Shard(0),))},
    4: {
        "shards": ((4,), (Shard(0),)),
        "replicas-of-shards": ((2, 2), (Replicate(), Shard(0))),
        "shards-of-shards": ((2, 2), (Shard(0), Shard(0))),
    },
}


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh(DEVICE, shape)


def sharded(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """What all ranks have as a whole, cut without any of them talking. Scalars are replicated."""
    if tensor.dim() == 0:
        placements = (Replicate(),) * len(placements)
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def whole(tensor: Any) -> Any:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def drawn(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, seed: int, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype) for shape in shapes]


class Pair:
    """A sharded optimizer, and an unsharded one beside it with the same gradients."""

    def __init__(
        self,
        make: Callable[[Sequence[nn.Parameter]], Optimizer],
        mesh: DeviceMesh,
        placements: Placements,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.mesh, self.placements, self.dtype = mesh, placements, dtype
        begin = drawn(shapes, dtype, seed=1)
        self.plain = make([nn.Parameter(t.clone()) for t in begin])
        self.sharded = make([nn.Parameter(sharded(t, mesh, placements)) for t in begin])

    def set_grads(self, step: int, scale: float = 1.0) -> None:
        """Some parameters have none in some steps."""
        params = params_of(self.plain)
        grads = drawn([p.shape for p in params], self.dtype, seed=100 + step, scale=scale)
        for number, (p, q, grad) in enumerate(
            zip(params, params_of(self.sharded), grads, strict=True)
        ):
            skips = step % 3 == 1 and number % 4 == 1
            p.grad = None if skips else grad.clone()
            q.grad = None if skips else sharded(grad, self.mesh, q.placements)

    def train(self, steps: Iterable[int], scale: float = 1.0) -> None:
        for step in steps:
            self.set_grads(step, scale)
            self.plain.step()
            self.sharded.step()

    def assert_same_bits(self) -> None:
        for p, q in zip(params_of(self.plain), params_of(self.sharded), strict=True):
            self._assert_same_bits(q.detach(), p.detach())
            ours, theirs = self.sharded.state[q], self.plain.state[p]
            assert list(ours) == list(theirs)
            for key in theirs:
                self._assert_same_bits(ours[key], theirs[key])

    def _assert_same_bits(self, ours: Any, theirs: Any) -> None:
        if isinstance(ours, DTensor):
            assert ours.shape == theirs.shape
            theirs = sharded(theirs, self.mesh, ours.placements)
            ours, theirs = ours.to_local(), theirs.to_local()
        assert_same_bits(ours, theirs)


def rounds_otherwise(case: Case, dtype: torch.dtype) -> bool:
    """Whether sums of whole parameters, added in another order, may differ in a last bit that is
    seen."""
    return dtype == torch.float64 and case.row.name in ("lamb", "lars", "stable_adamw")


def in_two_groups(
    case: Case, options: Options, codes: Options
) -> Callable[[Sequence[nn.Parameter]], Optimizer]:
    """An optimizer that has codes where sharded parameters can have them."""

    def make(params: Sequence[nn.Parameter]) -> Optimizer:
        with_rows = [p for p in params if p.dim() > 1 and p[0:1].numel() != 7]
        rest = [p for p in params if not any(p is one for one in with_rows)]
        groups = [{"params": with_rows, **codes}, {"params": rest}]
        return case.ours(groups, **options)

    return make


def choices() -> dict[str, tuple[Case, torch.dtype, Options, Options]]:
    """Every class with some ways of storing and every way with some classes, AdamW with all of it:
    options of all, and of those that can have codes. How to shard knows neither."""
    found: dict[str, tuple[Case, torch.dtype, Options, Options]] = {}
    every = {
        "float32": Choice(torch.float32, {}),
        "float64": Choice(torch.float64, {}),
        "bfloat16": Choice(torch.bfloat16, {}),
        **CHOICES,
    }
    for way, (name, choice) in enumerate(every.items()):
        for number, case in enumerate(RICHEST):
            richest = richest_with(case, choice)
            taken = case.row.name == "adamw" or (way + number) % 4 == 0
            if richest is None or not taken:
                continue
            storage = dict(choice.options)
            codes = {
                key: storage.pop(key) for key in ("state_dtype", "min_8bit_size") if choice.codes
            }
            found[f"{name}-{richest}"] = (
                richest,
                choice.param,
                {**richest.options, **storage},
                codes,
            )
    return found
