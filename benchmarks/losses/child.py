"""One case, or one training, measured in this process: ``python -m benchmarks.losses.child``.

benchmarks.losses starts it, once for each way in which a process gets its memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.losses.cases import CASES, LINEAR, MAY_FAIL, Case
from benchmarks.losses.implementations import Inputs, Subject, floors, makers
from benchmarks.losses.training import MODELS, have_once, measure_model
from benchmarks.measure.implementation import first_line
from benchmarks.measure.memory import MemoryEvents
from benchmarks.measure.progress import Progress
from benchmarks.measure.timing import measure
from benchmarks.measure.work import Work
from benchmarks.report.case import WALL, Json
from benchmarks.report.files import write_json

WARM_UP = 3
# Of losses and gradients, relative to the largest of them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
KEPT = 8  # times the logits' bytes that a process has once had, for peers to find again


def check(name: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise RuntimeError unless loss and gradients are as expected, but for rounding."""
    tolerance = TOLERANCE[got[-1].dtype]
    for mine, theirs in zip(got, expected, strict=True):
        far = (mine - theirs).abs().max().item()
        if not far <= tolerance * theirs.abs().max().item():
            raise RuntimeError(f"{name}: a loss or gradient is {far:.3g} off torch's")


def make_all(
    case: Case, inputs: Inputs, compiled: bool, progress: Progress
) -> tuple[dict[str, Subject], dict[str, str]]:
    """All implementations that work, checked; and why others do not."""
    subjects: dict[str, Subject] = {}
    skipped: dict[str, str] = {}
    expected: tuple[Tensor, ...] | None = None
    for name, make in makers(case, inputs, compiled).items():
        progress.preparing(name)
        try:
            subject = make()
            loss, gradients = subject.call()
            # The compiler's loss of bfloat16 is a float32.
            got = (loss.to(case.dtype), *gradients)
            if expected is None:
                expected = got
            check(name, got, expected)
        except Exception as error:
            if name not in MAY_FAIL and not inputs.target.is_cuda:
                raise
            skipped[name] = first_line(error)
            continue
        subjects[name] = subject
    progress.preparing("")
    return subjects, skipped


def peak(case: Case, subject: Subject, device: torch.device) -> int:
    """The most bytes in use at once, above what was there before.

    The gradients of a linear layer stay, whoever makes them: they do not count. That of logits
    goes on to the layer before, and counts.
    """
    with MemoryEvents(device) as events:
        subject.call()
    stays = sum(leaf.nbytes for leaf in subject.leaves) if case.loss == LINEAR else 0
    return max(0, events.peak - stays)


def page_faults(call: Callable[[], object]) -> int:
    """The page faults of a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure_case(
    case: Case, device: torch.device, rounds: int, seconds: float, compiled: bool
) -> Json:
    """Times, memory and page faults of all that is measured of a case."""
    rounds = min(rounds, case.rounds or rounds)
    inputs = Inputs.of(case, device)
    with Progress(rounds) as progress:
        progress.case(case.name)
        subjects, skipped = make_all(case, inputs, compiled, progress)
        calls: dict[str, Callable[[], object]] = {
            **{name: subject.call for name, subject in subjects.items()},
            **floors(case, inputs),
        }
        gc.collect()
        have_once(KEPT * case.bytes)
        for _ in range(1 if case.rounds else WARM_UP):
            faults = {name: page_faults(call) for name, call in calls.items()}
        peaks = {name: peak(case, subject, device) for name, subject in subjects.items()}
        works = {name: Work(call) for name, call in calls.items()}
        timed = measure(works, device.type, rounds, seconds, progress)
    return {
        WALL: timed[WALL],
        "peak": peaks,
        "faults": faults,
        "notes": {name: subject.note for name, subject in subjects.items() if subject.note},
        "skipped": skipped,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses.child", description=__doc__)
    parser.add_argument("name", choices=(*CASES, *MODELS), help="a case or a model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, required=True, help="at most")
    parser.add_argument("--seconds", type=float, required=True, help="of rounds, at most")
    parser.add_argument("--quick", action="store_true", help="without compiling")
    options = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.manual_seed(0)
    if options.name in MODELS:
        found = measure_model(MODELS[options.name], options.rounds)
    else:
        found = measure_case(
            CASES[options.name],
            options.device,
            options.rounds,
            options.seconds,
            not options.quick,
        )
    write_json(options.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
