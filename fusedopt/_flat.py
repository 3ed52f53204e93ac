"""Parameters, and on request their gradients, in one buffer per device and dtype."""

import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedopt._extension import _C
from fusedopt._overlap import check_overlap


class Slot(NamedTuple):
    """Where a parameter lies in a flat buffer."""

    number: int
    address: int
    grad_address: int  # 0 where gradients are not flat


class FlatBuffer:
    """One buffer of FlatParameters: the parameters of one device and dtype, one behind the other.

    Every parameter starts at a multiple of 64 elements; what lies between is zero.
    """

    def __init__(self, params: list[Tensor], gradients: bool) -> None:
        self.params = params
        self.data, views = _C.flat_tensors([p.detach() for p in params], params[0].dtype)
        for param, view in zip(params, views, strict=True):
            view.copy_(param.detach())
        self.grads: Tensor | None = None
        self._grad_views: list[Tensor] = []
        if gradients:
            self.grads, self._grad_views = _C.flat_tensors(views, params[0].dtype)
            for param, grad in zip(params, self._grad_views, strict=True):
                if param.grad is not None:
                    grad.copy_(param.grad)
        # Nothing is moved before all of it is in place.
        grad_addresses = [grad.data_ptr() for grad in self._grad_views] or [0] * len(params)
        self.slots: dict[int, Slot] = {}
        for i, (param, view) in enumerate(zip(params, views, strict=True)):
            param.data = view
            self.slots[id(param)] = Slot(i, view.data_ptr(), grad_addresses[i])
        if gradients:
            self._attach(params)
        known = weakref.ref(self, functools.partial(_forget, [*self.slots]))
        for param in params:
            _buffers_of.setdefault(id(param), []).append(known)

    def zero_grad(self) -> bool:
        """Fill the flat gradients with zero, and make them the parameters' gradients again.

        Frozen parameters have no gradient afterwards; those that have left the buffer keep theirs.
        Returns whether there were none of these.
        """
        assert self.grads is not None
        self.grads.zero_()
        return self._attach(self.params)

    def zero_grad_of(self, param: Tensor) -> None:
        self._grad_views[self.slots[id(param)].number].zero_()
        self._attach([param])

    def _attach(self, params: list[Tensor]) -> bool:
        slots = [self.slots[id(param)] for param in params]
        return _C.attach_gradients(
            params,
            [self._grad_views[slot.number] for slot in slots],
            [slot.address for slot in slots],
            [slot.grad_address for slot in slots],
        )

    def holds(self, param: Tensor) -> bool:
        """Whether a parameter still is where it was put."""
        return (
            param.data_ptr() == self.slots[id(param)].address
            and param.dtype == self.data.dtype
            and param.device == self.data.device
        )

    def holds_gradient(self, param: Tensor) -> bool:
        """Whether a parameter, and its flat gradient, are where they were put."""
        slot = self.slots[id(param)]
        return (
            self.grads is not None
            and self.holds(param)
            and self._grad_views[slot.number].data_ptr() == slot.grad_address
        )


# Those that a parameter was moved into, by its id. A buffer keeps its parameters alive.
_buffers_of: dict[int, list[weakref.ref[FlatBuffer]]] = {}


def _forget(ids: list[int], gone: weakref.ref[FlatBuffer]) -> None:
    for key in ids:
        _buffers_of[key].remove(gone)
        if not _buffers_of[key]:
            del _buffers_of[key]


def find_buffer(param: Tensor) -> FlatBuffer | None:
    """The flat buffer that a parameter lies in, else one that it was moved into and has left."""
    left = None
    for known in _buffers_of.get(id(param), ()):
        buffer = known()
        if buffer is not None:
            if buffer.holds(param):
                return buffer
            left = buffer
    return left


def are_flat(params: Sequence[Tensor], optimizer: str) -> bool:
    """Whether parameters are in flat buffers with flat gradients already.

    Raises:
        ValueError: where only some are, so that an optimizer could not have all of them flat.
    """
    buffers = [find_buffer(param) for param in params]
    held = [b is not None and b.holds(p) for b, p in zip(buffers, params, strict=True)]
    flat = [b is not None and b.holds_gradient(p) for b, p in zip(buffers, params, strict=True)]
    if any(held) and not all(flat):
        raise ValueError(
            f"{optimizer}: flat=True, but some of the parameters are in FlatParameters already, "
            "with others that are not, or without gradients; make one "
            "FlatParameters(..., gradients=True) of all of them instead"
        )
    return all(flat)


@dataclass(frozen=True)
class FlatGradients:
    """Those of some parameters whose gradients are flat.

    Attributes:
        buffers: whose parameters are all among them.
        shared: the others, and the buffer of each, which has further parameters.
        are_all: whether every parameter has a flat gradient.
    """

    buffers: list[FlatBuffer]
    shared: list[tuple[Tensor, FlatBuffer]]
    are_all: bool

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> "FlatGradients":
        mine = {id(param): param for param in params}
        flat = {
            key: buffer
            for key, param in mine.items()
            if (buffer := find_buffer(param)) is not None and buffer.holds_gradient(param)
        }
        distinct = {id(buffer): buffer for buffer in flat.values()}
        own = {key: b for key, b in distinct.items() if all(flat.get(p) is b for p in b.slots)}
        shared = [(mine[key], b) for key, b in flat.items() if id(b) not in own]
        return cls([*own.values()], shared, len(flat) == len(mine))

    def zero(self) -> bool:
        """Fill them with zero; whether all parameters of the buffers are where they were put."""
        intact = [buffer.zero_grad() for buffer in self.buffers]
        for param, buffer in self.shared:
            buffer.zero_grad_of(param)
        return all(intact)


class FlatParameters:
    """Moves parameters into one contiguous buffer per (device, dtype) and makes them views of it.

    An optimizer of this package then walks over each buffer in one go. With ``gradients=True`` the
    gradients are flat, too: ``backward()`` accumulates into them, ``zero_grad()`` is one fill, and
    a step walks over one span per buffer. Flat gradients always exist, so that a parameter that
    took no part in the loss has a gradient of zero rather than none: it is stepped (weight decay
    and momentum act on it) where a parameter without a gradient is left alone.

    Args:
        params: a module, or parameters, or (name, parameter) pairs. A parameter that occurs twice
            is moved once and stays tied.
        gradients: whether gradients are flat. Gradients that exist are kept.

    Attributes:
        buffers: one 1-d tensor per (device, dtype), with every parameter at a multiple of 64
            elements and zeros in between.
        grads: the same for gradients; empty without ``gradients``.

    Raises:
        TypeError: for anything but dense floating-point or complex tensors.
        ValueError: for no parameters, or parameters that overlap in memory.

    Keep the object as long as the parameters are in use: it is what keeps the layout known.
    """

    __module__ = "fusedopt"

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        gradients: bool = False,
    ) -> None:
        self._module = params if isinstance(params, nn.Module) else None
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        names: dict[int, str] = {}
        for name, param in _named(params):
            _check(name, param)
            names[id(param)] = name
            kind = (param.device, param.dtype)
            by_kind.setdefault(kind, []).append(param)
        if not by_kind:
            raise ValueError("FlatParameters: got no parameters")
        everything = [p for alike in by_kind.values() for p in alike]
        check_overlap(everything, "FlatParameters", lambda p: names[id(p)])
        self._buffers = [FlatBuffer(alike, gradients) for alike in by_kind.values()]

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer.data for buffer in self._buffers]

    @property
    def grads(self) -> list[Tensor]:
        return [buffer.grads for buffer in self._buffers if buffer.grads is not None]

    def zero_grad(self) -> None:
        """Fill the flat gradients with zero, and make them the parameters' gradients again."""
        for buffer in self._buffers:
            if buffer.grads is None:
                for param in buffer.params:
                    param.grad = None
            else:
                buffer.zero_grad()

    def is_intact(self) -> bool:
        """Whether every parameter still is a view of its buffer (and belongs to the module)."""
        if self._module is not None:
            current = {id(p) for p in self._module.parameters()}
            if current != {id(p) for buffer in self._buffers for p in buffer.params}:
                return False
        return all(buffer.holds(p) for buffer in self._buffers for p in buffer.params)


def _named(
    params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(params, nn.Module):
        yield from params.named_parameters()
        return
    if isinstance(params, Tensor):
        raise TypeError("FlatParameters: got one tensor; expected a module or several parameters")
    seen: set[int] = set()
    for i, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (f"parameter {i}", item)
        if id(param) not in seen:
            seen.add(id(param))
            yield name, param


def _check(name: str, param: Tensor) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"FlatParameters: {name} is a {type(param).__name__}; expected a tensor")
    if param.layout != torch.strided or not (param.is_floating_point() or param.is_complex()):
        raise TypeError(
            f"FlatParameters: {name} is a {param.dtype} tensor of layout {param.layout}; "
            "expected a dense floating-point or complex tensor"
        )
    if param.device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"FlatParameters: {name} is on {param.device}; expected a CPU or a CUDA device"
        )
