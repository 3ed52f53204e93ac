"""How much memory an optimizer, its parameters and their gradients take."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedopt._formats import MASTERS, ORDER
from fusedopt._members import list_members
from fusedopt._optimizer import FusedOptimizer

CHOICES: dict[str, dict[str, Any]] = {
    "float32 states": {"state_dtype": torch.float32},
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "int8 states": {"state_dtype": "int8"},
    "float32 states, master_bits=32": {"state_dtype": torch.float32, "master_bits": 32},
    "int8 states, master_bits=32": {"state_dtype": "int8", "master_bits": 32},
    "int8 states, master_bits=24": {"state_dtype": "int8", "master_bits": 24},
    'int8 states, rounding="stochastic"': {"state_dtype": "int8", "rounding": "stochastic"},
}


@dataclass(frozen=True)
class Memory:
    """Bytes of some parameters and of what belongs to them."""

    elements: int = 0
    parameters: int = 0
    gradients: int = 0
    states: int = 0
    masters: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states + self.masters

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(memory: Memory) -> Iterator[int]:
    yield from (memory.elements, memory.parameters, memory.gradients, memory.states)
    yield memory.masters


@dataclass(frozen=True)
class MemoryReport:
    """What memory_report() found; its str() is a table.

    Attributes:
        groups: the bytes of each parameter group.
        total: the bytes of all; a parameter in two groups counts once.
        alternatives: what all would take, by the choice; of the choices that are possible for every
            parameter.
    """

    __module__ = "fusedopt"

    groups: tuple[Memory, ...]
    total: Memory
    alternatives: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        head = ("", "elements", "parameters", "gradients", "states", "masters", "total", "/element")
        rows: list[tuple[str, ...]] = [head]
        named = [(f"group {g}", memory) for g, memory in enumerate(self.groups)]
        for name, memory in [*named, ("all", self.total)]:
            numbers = [*_values(memory), memory.total]
            per_element = memory.total / max(1, memory.elements)
            rows.append((name, *(f"{n:,}" for n in numbers), f"{per_element:.2f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        if self.alternatives:
            lines += ["", "all of it would take"]
            width = max(map(len, self.alternatives))
            for choice, taken in self.alternatives.items():
                share = taken / max(1, self.total.elements)
                lines.append(f"  {choice.ljust(width)}  {taken:>16,} bytes  {share:.2f} / element")
        return "\n".join(lines)


def memory_report(optimizer: FusedOptimizer) -> MemoryReport:
    """The bytes of an optimizer's parameters, gradients, states and masters, as they are now.

    Sizes of tensors are added up; what allocators round them up to is not counted. Alternatives
    count the gradients that there are, and states of all parameters, whether they have any yet.

    Raises:
        TypeError: for an optimizer of another package.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"memory_report: got a {type(optimizer).__module__}.{type(optimizer).__name__}; "
            "expected an optimizer of fusedopt"
        )
    seen: set[int] = set()
    total = Memory()
    groups = []
    for group in optimizer.param_groups:
        whole = Memory()
        for param in group["params"]:
            memory = _memory_of(param, optimizer.state.get(param, {}))
            whole += memory
            if id(param) not in seen:
                seen.add(id(param))
                total += memory
        groups.append(whole)
    fixed = total.parameters + total.gradients
    alternatives = {}
    for choice, options in CHOICES.items():
        beside = _bytes_beside(optimizer, options)
        if beside is not None:
            alternatives[choice] = fixed + beside
    return MemoryReport(tuple(groups), total, alternatives)


def _memory_of(param: Tensor, state: dict[str, Any]) -> Memory:
    states = masters = 0
    for key, value in state.items():
        if isinstance(value, Tensor):
            if key in MASTERS:
                masters += value.nbytes
            elif key != ORDER:  # a few numbers that belong to no element
                states += value.nbytes
    gradient = 0 if param.grad is None else param.grad.nbytes
    return Memory(param.numel(), param.nbytes, gradient, states, masters)


def _bytes_beside(optimizer: FusedOptimizer, options: dict[str, Any]) -> int | None:
    """Of states and masters with these options; None where some parameter cannot have them."""
    choice = {"state_dtype": None, "master_bits": None, "rounding": "nearest"} | options
    total = 0
    try:
        groups = optimizer._groups([{**group, **choice} for group in optimizer.param_groups])
        for member in list_members(groups):
            if not member.duplicate:
                total += sum(member.spec(key).bytes_for(member.local) for key in member.keys)
    except (TypeError, ValueError):
        return None
    return total
