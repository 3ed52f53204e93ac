"""Sharded parameters, torch's DTensors: their plain memory, and where it lies in the whole.

A step works on the plain tensor of this process. State is sharded as the parameter is: of its mesh
and placements, so that torch's checkpoints know where each part of it belongs.
"""

import copy
import functools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._extension import _C

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

SHORTEST_ROW = 64
"""Shorter rows would have too many scales: blocks do not end with them."""

Runs = list[tuple[int, int]]
"""Where the elements of a shard lie in the whole, in order: begins of runs, and their lengths."""


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, which with world size 1, or replicated, may be whole."""
    # Nobody has one who has not imported this.
    module = sys.modules.get("torch.distributed.tensor")
    dtensor = getattr(module, "DTensor", None)
    if dtensor is None or not isinstance(tensor, dtensor):
        return False
    _know(dtensor)
    return True


@functools.cache
def _know(dtensor: type["DTensor"]) -> None:
    _C.know_dtensor(dtensor)


def local_of(tensor: Any) -> Any:
    """The plain tensor of this process, which any other tensor is itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def whole_of(value: Any) -> Any:
    """A number that may be a DTensor, as all processes have it; None: there is none."""
    return value.full_tensor() if value is not None and is_sharded(value) else value


def mesh_of(tensor: Tensor) -> Any:
    return tensor.device_mesh  # type: ignore[attr-defined]


def placements_of(tensor: Tensor) -> tuple[Any, ...]:
    placements: tuple[Any, ...] = tensor.placements  # type: ignore[attr-defined]
    return placements


def reshard(model: Any) -> None:
    """Let FSDP2's modules in a model let go of weights that they have gathered; None: there are
    none."""
    # Nobody has one who has not imported this.
    module_of_fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if model is None or module_of_fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, module_of_fsdp):
            module.reshard()


def _dim_of(placement: Any) -> int | None:
    """The dimension that a placement shards; None: it shards none."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def cut_dims(tensor: Tensor) -> list[tuple[int, int]]:
    """The dimensions of the mesh that cut a tensor, each with the dimension that it cuts."""
    mesh = mesh_of(tensor)
    return [
        (mesh_dim, dim)
        for mesh_dim, placement in enumerate(placements_of(tensor))
        if (dim := _dim_of(placement)) is not None and mesh.size(mesh_dim) > 1
    ]


def groups_of(tensor: Tensor) -> tuple["ProcessGroup", ...]:
    """The process groups that a tensor is cut among."""
    if not is_sharded(tensor):
        return ()
    return tuple(mesh_of(tensor).get_group(mesh_dim) for mesh_dim, _ in cut_dims(tensor))


def runs_of(tensor: Tensor) -> Runs:
    """Where the elements of this process lie in the whole tensor.

    Where another dimension than the first one is cut they count as one run, that begins with a
    block, in the room of one of their own: what is drawn at random for them is a sequence of the
    shard.
    """
    local = local_of(tensor)
    if local is tensor:
        return [(0, local.numel())]
    cut = cut_dims(tensor)
    if local.numel() == 0 or not cut:
        return [(0, local.numel())]
    row = math.prod(tensor.shape[1:])
    if any(dim != 0 for _, dim in cut):
        number = 0
        mesh = mesh_of(tensor)
        for mesh_dim, _ in cut:
            number = number * mesh.size(mesh_dim) + mesh.get_local_rank(mesh_dim)
        return [(number * -(-tensor.numel() // _C.block) * _C.block, local.numel())]
    return [(begin * row, size * row) for begin, size in _runs_of_rows(tensor, cut)]


def _runs_of_rows(tensor: Tensor, cut: Sequence[tuple[int, int]]) -> Runs:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, placements = mesh_of(tensor), placements_of(tensor)
    if not any(isinstance(placements[mesh_dim], _StridedShard) for mesh_dim, _ in cut):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        return [(offset[0], shape[0])]
    rows = torch.arange(tensor.shape[0], device="cpu")
    for mesh_dim, _ in cut:
        shards, _ = placements[mesh_dim]._split_tensor(
            rows, mesh.size(mesh_dim), with_padding=False, contiguous=False
        )
        rows = shards[mesh.get_local_rank(mesh_dim)]
    breaks = torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1
    begins = [0, *breaks.tolist()]
    ends = [*begins[1:], rows.numel()]
    return [(int(rows[a]), b - a) for a, b in zip(begins, ends, strict=True)]


def has_same_blocks(tensor: Tensor) -> bool:
    """Whether the blocks of codes are the same ones in the whole and in its shards.

    Those of a sharded one have to end with rows, which only long rows have; see _formats.
    """
    if not is_sharded(tensor):
        return True
    if tensor.dim() < 2 or not tensor.is_contiguous():
        return False
    if math.prod(tensor.shape[1:]) < SHORTEST_ROW:
        return False
    mesh = mesh_of(tensor)
    cut = cut_dims(tensor)
    if all(dim == 0 for _, dim in cut):
        return True
    of_second = [mesh.size(mesh_dim) for mesh_dim, dim in cut if dim == 1]
    if any(dim > 1 for _, dim in cut) or len(of_second) > 1:
        return False
    # Equal parts, each of whole blocks, so that the scales are cut alike.
    part = tensor.shape[1] // of_second[0]
    return (
        bool(tensor.shape[1] % of_second[0] == 0)
        and part * math.prod(tensor.shape[2:]) % _C.block == 0
    )


def wrap(local: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of this process as a sharded one, of the mesh and placements of another one.

    Args:
        shape: of the whole; None: that of the other one, and its strides.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    stride = like.stride() if shape is None else torch.empty(shape, device="meta").stride()
    size = torch.Size(like.shape if shape is None else shape)
    # from_local would move it to the mesh's device, where offloaded shards are not.
    spec = copy.copy(like._spec)  # type: ignore[attr-defined]
    spec.tensor_meta = TensorMeta(size, stride, local.dtype)
    made: Tensor = DTensor(local.detach(), spec, requires_grad=False)
    return made


def placed_grad(param: Tensor, what: str) -> Tensor:
    """The gradient of a sharded parameter, placed as this is and arrived: a plain tensor.

    Raises:
        ValueError: for one of another mesh.
    """
    grad = param.grad
    assert grad is not None
    if mesh_of(grad) != mesh_of(param):
        raise ValueError(
            f"{what} is of {mesh_of(param)} but its gradient of {mesh_of(grad)}; expected the same "
            "mesh"
        )
    with torch.no_grad():
        if placements_of(grad) != placements_of(param):
            grad = grad.redistribute(mesh_of(param), placements_of(param))  # type: ignore[attr-defined]
        local: Tensor = local_of(grad)
    wait = getattr(local, "wait", None)  # of a collective that is on its way
    return wait() if wait is not None else local


def check_mesh(what: str, param: Tensor) -> None:
    """Raise ValueError for a parameter whose mesh this process is not part of, or a partial one."""
    mesh = mesh_of(param)
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{what} is sharded among {mesh}, which this process (rank {_rank()}) is not part of; "
            "give the optimizer the parameters that this process has a part of"
        )
    for placement in placements_of(param):
        if placement.is_partial():
            raise ValueError(
                f"{what} has the placements {placements_of(param)}: a parameter is not a sum of "
                "what processes have; redistribute it to Shard or Replicate"
            )


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank()
