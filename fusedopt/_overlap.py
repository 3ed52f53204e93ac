"""Checks of where tensors lie in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def element_addresses(tensor: Tensor) -> Tensor:
    """The address of every element, in bytes, as a 1-d int64 tensor on the CPU."""
    addresses = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        addresses = (addresses[:, None] + steps).flatten()
    return addresses * tensor.element_size() + tensor.data_ptr()


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in any order."""
    # Most are contiguous, which takes a tenth of the time to find out.
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def has_own_elements(tensor: Tensor) -> bool:
    """Whether each element has memory of its own, and is not shared as in an expanded tensor."""
    if is_dense(tensor):
        return True
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return False
        reach += (size - 1) * step
    return True


def check_overlap(tensors: Sequence[Tensor], what: str, describe: Callable[[Tensor], str]) -> None:
    """Raise ValueError where a tensor's memory overlaps itself (expanded) or another's.

    Two updates of the same memory in one step would depend on their order.
    """
    extents: list[tuple[int, int, Tensor]] = []
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if not is_dense(tensor):
            addresses = element_addresses(tensor)
            if addresses.unique().numel() != tensor.numel():
                raise ValueError(
                    f"{what}: {describe(tensor)} has strides {tuple(tensor.stride())} for shape "
                    f"{tuple(tensor.shape)}: elements share memory (was it expanded?); "
                    "pass a clone of it"
                )
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        begin = tensor.data_ptr()
        extents.append((begin, begin + (last + 1) * tensor.element_size(), tensor))

    # In order of their begin, a tensor can only overlap those before it that reach beyond it.
    extents.sort(key=lambda extent: extent[:2])
    reaching: list[tuple[int, int, Tensor]] = []
    for begin, end, tensor in extents:
        reaching = [other for other in reaching if other[1] > begin]
        for _, _, other in reaching:
            both_dense = is_dense(tensor) and is_dense(other)
            if both_dense or torch.isin(element_addresses(tensor), element_addresses(other)).any():
                raise ValueError(
                    f"{what}: {describe(other)} and {describe(tensor)} overlap in memory; "
                    "pass tied parameters once, as the same tensor"
                )
        reaching.append((begin, end, tensor))
