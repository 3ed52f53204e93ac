"""One case: all implementations of an optimizer in one scenario, set up, checked and timed."""

from __future__ import annotations

import contextlib
import functools
import gc
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.implementation import LEARNING_RATE, Data, Implementation, first_line
from benchmarks.measure.memory import MemoryEvents, free_memory
from benchmarks.measure.progress import Progress
from benchmarks.measure.scenarios import OptimizerSetup, Scenario
from benchmarks.measure.timing import measure
from benchmarks.measure.work import MOST_COPIED, Work, captured, memory_works

USED_OF_FREE_MEMORY = 0.9  # the rest is for fragmentation, and for other processes
DATA_BYTES = 2 * torch.float32.itemsize  # per element, of the values and gradients all start from
TEMPORARIES = 3  # numbers per element that torch's foreach step holds besides


@functools.lru_cache(maxsize=1)
def make_data(scenario: Scenario, device: torch.device) -> Data:
    """The same float32 (value, gradient) pairs for every implementation of a scenario."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        (
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
        )
        for shape in scenario.tensors
    ]


def fit_to_memory(
    scenario: Scenario, setup: OptimizerSetup, implementations: int, device: torch.device
) -> Scenario:
    """The scenario, scaled down where it cannot be held once for each implementation.

    ValueError where that does not help.
    """
    free = free_memory(device)
    of_each = setup.dtype.itemsize * (2 + setup.states)
    per_element = implementations * of_each + DATA_BYTES + TEMPORARIES * setup.dtype.itemsize
    copies = 0
    if device.type == "cuda":
        copies = 3 * min(scenario.elements * setup.bytes_per_parameter, MOST_COPIED) // 2
    else:
        per_element += 3 * setup.bytes_per_parameter // 2
    return scenario.fitting(int(max(0, USED_OF_FREE_MEMORY * free - copies) / per_element))


def first_elements(params: Iterable[Tensor]) -> Tensor:
    """Up to 256 elements of each tensor, in one float32 tensor."""
    return torch.cat([param.detach().flatten()[:256].float() for param in params])


def check_same_work(
    name: str, got: Tensor, initial: Tensor, expected: Tensor | None, dtype: torch.dtype
) -> None:
    """Raise RuntimeError unless an implementation changed its parameters as expected.

    Without anything expected, any change will do.
    """
    if torch.equal(got, initial):
        raise RuntimeError(f"{name}: the steps changed no parameter")
    rtol = 4 * torch.finfo(dtype).eps
    atol = max(1e-5, rtol * LEARNING_RATE)  # steps have about the length of the learning rate
    if expected is not None and not torch.allclose(got, expected, rtol=rtol, atol=atol):
        worst = (got - expected).abs().max().item()
        raise RuntimeError(f"{name}: parameters differ from the others' by up to {worst:.3g}")


def warm_up(
    implementation: Implementation, build: Callable[[], Work], device: torch.device
) -> tuple[Work, int, int]:
    """Build and call twice, the second time as a CUDA graph where the implementation is one.

    Returns:
        What to time, the bytes that the second call allocates, and the most bytes in use at once
        until the first was done: parameters, gradients, states and whatever else.
    """
    with MemoryEvents(device) as first:
        work = build()
        if work.prepare is not None:
            work.prepare()
        work.call()
    if implementation.graph:
        work = captured(work)
    if work.prepare is not None:
        work.prepare()
    with MemoryEvents(device) as second:
        work.call()
    return work, second.allocated, first.peak


@dataclass
class Run:
    """What all cases of a run share.

    Attributes:
        implementations: who is measured; all can be imported.
        device: where.
        rounds: at most, per case.
        seconds: of rounds, at most, per case.
        progress: tells what is being done.
        failures: what went wrong so far.
        left_out: cases for which there is no memory.
        last: the scenario of the case before this one.
    """

    implementations: list[Implementation]
    device: torch.device
    rounds: int
    seconds: float
    progress: Progress
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    last: Scenario | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note what goes wrong within a part of the run, so that the other parts go on."""
        try:
            yield
        except ValueError as error:
            self.left_out.append(f"{name}: {error}")
        except (ImportError, RuntimeError, subprocess.SubprocessError) as error:
            self.failures.append(f"{name}: {first_line(error)}")

    def case(self, setup: OptimizerSetup, scenario: Scenario) -> dict[str, Any]:
        """Measure all implementations of one optimizer in one scenario; the case for the file."""
        if scenario != self.last:
            make_data.cache_clear()
            self.last = scenario
        gc.collect()
        skipped: dict[str, str] = {}
        able = []
        for implementation in self.implementations:
            if implementation.name in scenario.without:
                continue
            reason = implementation.why_not(setup, scenario, self.device)
            if reason is None:
                able.append(implementation)
            elif reason:
                skipped[implementation.name] = reason
        scenario = fit_to_memory(scenario, setup, len(able), self.device)
        works, allocated, peak = self._build(setup, scenario, able, skipped)
        step_bytes = scenario.elements * setup.bytes_per_parameter
        if self.device.type == "cuda":
            step_bytes = min(step_bytes, MOST_COPIED)
        elements = max(1, step_bytes // 8)
        return {
            "optimizer": setup.name,
            "scenario": scenario.name,
            **({"note": scenario.note} if scenario.note else {}),
            "tensors": len(scenario.tensors),
            "parameters": scenario.elements,
            "bytes_per_parameter": setup.bytes_per_parameter,
            "memory_bytes": 8 * elements,
            "allocated": allocated,
            "peak": peak,
            "skipped": skipped,
            **measure(
                works | memory_works(elements, self.device),
                self.device.type,
                self.rounds,
                self.seconds,
                self.progress,
            ),
        }

    def _build(
        self,
        setup: OptimizerSetup,
        scenario: Scenario,
        implementations: list[Implementation],
        skipped: dict[str, str],
    ) -> tuple[dict[str, Work], dict[str, int], dict[str, int]]:
        """What to time of each implementation, the bytes that a step of it allocates, and its peak.

        One that fails is left out: other projects' with a note, torch's and ours as a failure.
        """
        data = make_data(scenario, self.device)
        initial = first_elements(value.to(setup.dtype) for value, _ in data)
        expected: Tensor | None = None
        works: dict[str, Work] = {}
        allocated: dict[str, int] = {}
        peak: dict[str, int] = {}
        for implementation in implementations:
            name = implementation.name
            self.progress.preparing(name)
            try:
                build = functools.partial(implementation.build, setup, scenario, data)
                gc.collect()  # or garbage freed during the step would change its figures
                work, bytes_allocated, bytes_at_peak = warm_up(implementation, build, self.device)
                got = first_elements(work.params)
                wanted = expected if implementation.exact else None
                check_same_work(name, got, initial, wanted, setup.dtype)
            except Exception as error:
                if implementation.package:
                    skipped[name] = f"it failed with {first_line(error)}"
                else:
                    failure = f"{setup.name} {scenario.name} {name}: {first_line(error)}"
                    self.failures.append(failure)
                continue
            works[name] = work
            if implementation.exact and expected is None:
                expected = got
            if setup.loss_scale is None:  # a GradScaler allocates, too
                allocated[name] = bytes_allocated
            peak[name] = bytes_at_peak
        self.progress.preparing("")
        return works, allocated, peak
