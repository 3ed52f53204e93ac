"""What is timed: the step of an implementation, or a plain pass over memory to compare it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn import Parameter

from benchmarks.measure.scenarios import GI
from benchmarks.report.case import COPY, FLOOR

# Large enough to show a GPU's bandwidth; more would take memory that the steps need.
MOST_COPIED = 8 * GI


@dataclass(frozen=True)
class Work:
    """What is timed of one implementation in one case.

    Attributes:
        call: one step, with all that the setup adds to it.
        params: what the calls change.
        prepare: has to run before each call, untimed; None where calls can follow at once.
        alive: what must live as long as this, besides what the calls themselves hold.
    """

    call: Callable[[], object]
    params: list[Parameter] = field(default_factory=list)
    prepare: Callable[[], None] | None = None
    alive: object = None


def captured(work: Work) -> Work:
    """The same work as replays of a CUDA graph; it must have been called once before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.call()
    return replace(work, call=graph.replay, alive=work)  # a graph holds none of its tensors


def memory_works(elements: int, device: torch.device) -> dict[str, Work]:
    """A copy, and a read-modify-write, each of so many float32: eight bytes per element."""
    source, target, buffer = (torch.ones(elements, device=device) for _ in range(3))
    return {
        COPY: Work(lambda: target.copy_(source)),
        FLOOR: Work(lambda: buffer.add_(1)),
    }
