"""Optimizers inside of Muon: one averages gradients, the other steps by what these have become."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusedopt._counts import FirstCounts
from fusedopt._extension import _C
from fusedopt._formats import MASTERS, ORDER
from fusedopt._members import Group
from fusedopt._rules import state_keys
from fusedopt._sharded import is_sharded, local_of, wrap
from fusedopt._step import SteppingOptimizer

ALIGNED = 64  # elements


class PartGroup(Group):
    """A group whose parameters errors call as another optimizer does: by its "labels", if any."""

    def named(self) -> Iterator[tuple[str, Tensor]]:
        labels = self.options.get("labels")
        yield from zip(labels, self.params, strict=True) if labels else super().named()


class Part(SteppingOptimizer):
    """Steps some parameters by the states of another optimizer, to which all else belongs.

    Attributes:
        rules: of its groups.
        indices: what errors call these.
        found_inf, grad_scale: as GradScaler gives them to an optimizer.
    """

    found_inf: Any = None
    grad_scale: Any = None

    def __init__(self, name: str, workspace: _C.Workspace, others: frozenset[str]) -> None:
        """Others: keys of states that are not for this one."""
        # None of what torch's constructor makes is asked for.
        self._called = name
        self._others = others
        self._workspace = workspace
        self._first_counts: FirstCounts = {}
        # Nothing of it is kept, so that it need not tell of changes.
        self.state = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self.rules: list[str] = []
        self.indices: list[int] = []

    @property
    def _name(self) -> str:
        return self._called

    def _groups(self, param_groups: Iterable[dict[str, Any]] | None = None) -> list[Group]:
        those = self.param_groups if param_groups is None else param_groups
        return [
            PartGroup(self._called, index, options, rule, {}, self._others)
            for index, options, rule in zip(self.indices, those, self.rules, strict=True)
        ]

    def _rules(self) -> list[str]:
        return self.rules

    def _state_keys(self) -> set[str]:
        return state_keys(set(self.rules))

    def set_groups(self, groups: list[tuple[int, str, dict[str, Any]]]) -> None:
        """The index, the rule and the options of each."""
        self.indices = [index for index, _, _ in groups]
        self.rules = [rule for _, rule, _ in groups]
        self.param_groups = [options for _, _, options in groups]

    def let_go(self) -> None:
        """Hold nothing between steps that belongs to the other optimizer."""
        self.set_groups([])
        self.state.clear()
        self.found_inf = self.grad_scale = None


class Directions:
    """Where parameters are to go: tensors like them, which have memory only while they are lent."""

    def __init__(self) -> None:
        # Parameters are not kept alive.
        self._of = WeakTensorKeyDictionary()
        self._idle = WeakTensorKeyDictionary()
        self._buffers: list[tuple[Tensor, int]] = []

    def of(self, param: Tensor) -> Tensor:
        """A parameter's direction; an empty tensor where it has none yet."""
        found: Tensor | None = self._of.get(param)
        if found is None:
            found = self._idle.setdefault(param, torch.empty(0))
        return found

    def lend(self, params: Iterable[Tensor]) -> None:
        """Give memory to the directions of these parameters, and of others that have one.

        Where some fit their parameters no longer, all are made anew.
        """
        if not all(_is_like(direction, param) for param, direction in self._of.items()):
            self._of, self._buffers = WeakTensorKeyDictionary(), []
        missing: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            if param not in self._of:
                local = local_of(param)
                missing.setdefault((local.device, local.dtype), []).append(param)
        for (device, dtype), alike in missing.items():
            begins = [0]
            for param in alike:
                begins.append(begins[-1] + -(-local_of(param).numel() // ALIGNED) * ALIGNED)
            buffer = torch.empty(begins[-1], dtype=dtype, device=device)
            self._buffers.append((buffer, buffer.untyped_storage().nbytes()))
            for param, begin in zip(alike, begins, strict=False):
                like = torch.empty_like(local_of(param), device="meta")
                tensor = buffer.as_strided(like.shape, like.stride(), begin)
                direction = wrap(tensor, param) if is_sharded(param) else tensor
                self._of[param] = direction.requires_grad_()
        for buffer, size in self._buffers:
            buffer.untyped_storage().resize_(size)

    def take_back(self) -> None:
        """Free the memory of all directions, and let go of gradients."""
        for direction in self._of.values():
            direction.grad = None
        for buffer, _ in self._buffers:
            buffer.untyped_storage().resize_(0)


class Parts:
    """What an optimizer steps by.

    Attributes:
        average: takes gradients, and makes directions of those of matrices.
        apply: steps matrices by what directions have become.
    """

    def __init__(self, name: str, workspace: _C.Workspace) -> None:
        self.directions = Directions()
        self.average = Part(name, workspace, MASTERS)
        self.apply = Part(name, workspace, frozenset({ORDER}))

    def let_go(self) -> None:
        """Hold nothing between steps."""
        self.directions.take_back()
        self.average.let_go()
        self.apply.let_go()


def _is_like(direction: Tensor, param: Tensor) -> bool:
    if is_sharded(param) != is_sharded(direction):
        return False
    there, local = local_of(direction), local_of(param)
    return bool(
        there.shape == local.shape and there.dtype == local.dtype and there.device == local.device
    )


def set_gradient(tensor: Tensor, grad: Tensor) -> None:
    """Of whatever dtype."""
    if getattr(tensor, "grad_dtype", tensor.dtype) != grad.dtype:
        tensor.grad_dtype = grad.dtype
    tensor.grad = grad


@contextlib.contextmanager
def swapped_gradients(grads: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within it these plain parameters have other gradients, in the dtype of their own."""
    own = {param: param.grad for param in grads}
    try:
        for param, grad in grads.items():
            before = own[param]
            param.grad = grad if before is None else grad.to(before.dtype)
        yield
    finally:
        for param, before in own.items():
            param.grad = before


@contextlib.contextmanager
def as_matrices(tensors: Sequence[Tensor], *, batch: bool) -> Iterator[list[Tensor]]:
    """Tensors as matrices or, with batch, batches of them, to be changed in place."""
    views = [t if t.dim() == 2 else t.flatten(0, -3) if batch else t.flatten(1) for t in tensors]
    yield views
    for tensor, view in zip(tensors, views, strict=True):
        # What does not lie so in memory was copied.
        if view.data_ptr() != tensor.data_ptr():
            tensor.copy_(view.view(tensor.shape))
