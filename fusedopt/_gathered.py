"""Matrices that are cut among processes, brought together whole, each on one of them."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._norms import device_of, gather_values, note_untold
from fusedopt._sharded import cut_dims, is_sharded, local_of, mesh_of, placements_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def agree(
    optimizer: str, groups: Sequence["ProcessGroup"], positions: Sequence[int], *, skips: bool
) -> bool:
    """Whether one of the processes skips the step.

    Args:
        positions: of the parameters that take part, the same ones on all processes.

    Raises:
        RuntimeError: where another process cannot step, or has gradients of others.
    """
    mark = float(zlib.crc32(repr(positions).encode()))
    failure = ""
    for group in _turns(groups):
        rows = gather_values([float(bool(failure)), float(skips), mark], group)
        for rank, (failed, others_skip, others_mark) in enumerate(rows):
            skips = skips or bool(others_skip)
            who = f"rank {rank} of the process group '{group.group_name}'"
            if failed:
                failure = failure or f"{who} cannot step; see what it raises"
            elif others_mark != mark:
                failure = failure or (
                    f"{who} has gradients of other matrices than this one; expected the same ones "
                    "on all processes that share them"
                )
    if failure:
        raise RuntimeError(f"{optimizer}: nothing was stepped, as {failure}")
    return skips


def tell_failed(groups: Sequence["ProcessGroup"], error: Exception) -> None:
    """Let the processes that are about to agree know that this one cannot step."""
    try:
        for group in _turns(groups):
            gather_values([1.0, 0.0, 0.0], group)
    except Exception as other:
        note_untold(error, other)


def _turns(groups: Sequence["ProcessGroup"]) -> Iterator["ProcessGroup"]:
    """All of them as often as there are groups: then all processes know what one of them knows, be
    it in another group, and none waits for one that has given up."""
    for _ in groups:
        yield from groups


Change = Callable[[list[Tensor]], None]
"""Changes whole tensors in place."""


def change_whole(tensors: Iterable[Tensor], dtype: torch.dtype, change: Change) -> None:
    """Change tensors, of which sharded ones are whole then: those of a process group on one process
    each, rounded to this dtype. All processes call it with the same tensors in the same order."""
    plain: list[Tensor] = []
    others: list[Tensor] = []
    by_cut: dict[tuple[Any, ...], list[_Cut]] = {}
    for tensor in tensors:
        if not is_sharded(tensor) or not (dims := cut_dims(tensor)):
            plain.append(local_of(tensor))
        elif (cut := _cut_of(tensor, dims)) is None:
            others.append(tensor)
        else:
            by_cut.setdefault((cut.group, cut.local.device), []).append(cut)
    change(plain)
    for cuts in by_cut.values():
        _change_in_turn(cuts, dtype, change)
    for tensor in others:
        _change_everywhere(tensor, change)


@dataclass(frozen=True)
class _Cut:
    """A tensor that one process group has, each process a run along one dimension."""

    local: Tensor
    shape: torch.Size
    dim: int
    group: "ProcessGroup"

    def shape_on(self, rank: int) -> list[int]:
        """The shape of a process's part."""
        size, count = self.shape[self.dim], self.group.size()
        each = -(-size // count)
        shape = list(self.shape)
        shape[self.dim] = max(0, min(each, size - rank * each))
        return shape


def _cut_of(tensor: Tensor, dims: Sequence[tuple[int, int]]) -> _Cut | None:
    from torch.distributed.tensor import Shard

    (mesh_dim, dim), *more = dims
    if more or type(placements_of(tensor)[mesh_dim]) is not Shard:
        return None
    group = mesh_of(tensor).get_group(mesh_dim)
    return _Cut(local_of(tensor), tensor.shape, dim, group)


def _owners(cuts: Sequence[_Cut]) -> list[int]:
    """Which process has each of them whole: the largest first, to the one with the least so far.

    What a matrix costs goes with its elements and its shorter side.
    """
    costs = [cut.shape.numel() * min(cut.shape[-2:]) for cut in cuts]
    loads = [0] * cuts[0].group.size()
    owners = [0] * len(cuts)
    for number in sorted(range(len(cuts)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def _change_in_turn(cuts: Sequence[_Cut], dtype: torch.dtype, change: Change) -> None:
    group, owners = cuts[0].group, _owners(cuts)
    rank, ranks = group.rank(), range(group.size())
    mine = [cut for cut, owner in zip(cuts, owners, strict=True) if owner == rank]
    sent = [[c for c, owner in zip(cuts, owners, strict=True) if owner == to] for to in ranks]
    here = [[cut.local.shape for cut in those] for those in sent]
    there = [[torch.Size(cut.shape_on(of)) for cut in mine] for of in ranks]

    parts = [cut.local.to(dtype) for those in sent for cut in those]
    received = _exchange(parts, here, there, dtype, cuts[0])
    whole = [
        torch.cat([parts[number] for parts in received], cut.dim).contiguous()
        for number, cut in enumerate(mine)
    ]
    change(whole)
    back = [
        w.narrow(cut.dim, begin, shape[cut.dim])
        for of in ranks
        for w, cut, shape, begin in zip(whole, mine, there[of], _begins(mine, of), strict=True)
    ]
    for those, parts in zip(sent, _exchange(back, there, here, dtype, cuts[0]), strict=True):
        for cut, part in zip(those, parts, strict=True):
            cut.local.copy_(part)


def _begins(cuts: Sequence[_Cut], rank: int) -> list[int]:
    sizes = [[cut.shape_on(of)[cut.dim] for of in range(rank)] for cut in cuts]
    return [sum(each) for each in sizes]


def _exchange(
    parts: Sequence[Tensor],
    sent: Sequence[Sequence[torch.Size]],
    received: Sequence[Sequence[torch.Size]],
    dtype: torch.dtype,
    like: _Cut,
) -> list[list[Tensor]]:
    """What each process has for this one.

    Args:
        parts: what this one has, for one process after the other.
        sent, received: the shapes of what is for, and comes from, each process.
    """
    from torch import distributed

    device = device_of(like.group, like.local.device)
    empty = like.local.new_empty(0, dtype=dtype)
    out = torch.cat([empty, *(part.reshape(-1) for part in parts)]).to(device)
    sizes = [[sum(map(math.prod, shapes)) for shapes in those] for those in (sent, received)]
    into = out.new_empty(sum(sizes[1]))
    distributed.all_to_all_single(into, out, sizes[1], sizes[0], group=like.group)
    result = []
    here = into.to(like.local.device)
    for shapes, values in zip(received, here.split(sizes[1]), strict=True):
        pieces = values.split([math.prod(shape) for shape in shapes])
        result.append([piece.view(s) for piece, s in zip(pieces, shapes, strict=True)])
    return result


def _change_everywhere(tensor: Any, change: Change) -> None:
    """Where a tensor is cut in another way: each process changes all of it."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = mesh_of(tensor)
    whole = tensor.full_tensor().clone(memory_format=torch.contiguous_format)
    change([whole])
    placed = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local_of(tensor).copy_(local_of(placed.redistribute(mesh, placements_of(tensor))))
