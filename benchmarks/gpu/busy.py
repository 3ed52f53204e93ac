"""A step beside kernels that take some of the device: ``python -m benchmarks.gpu.busy``.

As NCCL's do in sharded training. Each is one block, which does nothing but wait, and takes a place
of a multiprocessor on which blocks of the step could be. Prints how much longer a step takes beside
them than alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from torch.nn import Parameter

import fusedopt

ELEMENTS = 64 * 2**20
HELD_CYCLES = 40_000_000  # of a multiprocessor's clock: longer than a step takes
STORAGE: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8 states": {"state_dtype": "int8"},
}


class Held:
    """So many places for blocks, each on a multiprocessor of its own if these are shared out."""

    def __init__(self, count: int) -> None:
        self._streams = [torch.cuda.Stream() for _ in range(count)]

    def hold(self) -> None:
        for stream in self._streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(HELD_CYCLES)


def milliseconds(optimizer: torch.optim.Optimizer, held: Held | None) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if held is not None:
        held.hold()
    begin.record()
    optimizer.step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def main(argv: list[str] | None = None) -> int:
    """Time the steps; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.busy", description=__doc__)
    parser.add_argument("--held", type=int, default=16, help="blocks that wait")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU")
    count = torch.cuda.get_device_properties().multi_processor_count
    print(f"{arguments.held} blocks wait on {count} multiprocessors")
    for name, options in STORAGE.items():
        p = Parameter(torch.zeros(ELEMENTS, device="cuda"))
        p.grad = torch.ones_like(p)
        optimizer = fusedopt.AdamW([p], **options)
        optimizer.step()
        held = Held(arguments.held)
        ratios = []
        for _ in range(arguments.rounds):
            alone = milliseconds(optimizer, None)
            ratios.append(milliseconds(optimizer, held) / alone)
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"AdamW, {name}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
