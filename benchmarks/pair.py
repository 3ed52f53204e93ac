"""Is a step slower than in another checkout? ``python -m benchmarks.pair ../before``.

Each checkout, built in place, runs in a process of its own. The two take turns within one run, so
that both see the same drift of the machine, and what counts is the ratio of neighbouring turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]

# Of each case: how many parameters, elements of each, and options of AdamW.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "AdamW 1x64Mi": (1, 64 * 2**20, {}),
    "AdamW 200x100K": (200, 100_000, {}),
    "AdamW 1000x1Ki": (1000, 1024, {}),
    "AdamW 1x1": (1, 1, {}),
    "AdamW 1x64Mi int8": (1, 64 * 2**20, {"state_dtype": "int8"}),
}
TURN_SECONDS = 0.2  # a turn takes at least so long
PAUSE_SECONDS = 0.02  # before a turn, in which the other's threads stop waiting for more


# -- in the process of a checkout ---------------------------------------------------------------


def make_step(case: str, divisor: int) -> Callable[[], object]:
    """The step of a case whose parameters have so much fewer elements."""
    import torch

    import fusedopt

    count, numel, options = CASES[case]
    params = [torch.nn.Parameter(torch.randn(max(1, numel // divisor))) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    step: Callable[[], object] = fusedopt.AdamW(params, lr=1e-6, **options).step
    return step


def work(divisor: int) -> None:
    """Answer each line of input: a case to set up, or a number of steps to time."""
    import fusedopt

    print(Path(fusedopt.__file__).parent, flush=True)
    step: Callable[[], object] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, str):
            step = None  # gives its memory back first
            step = make_step(request, divisor)
            step()
            print("0", flush=True)
            continue
        assert step is not None
        begin = time.perf_counter()
        for _ in range(request):
            step()
        print((time.perf_counter() - begin) / request, flush=True)


# -- in the process that asks them --------------------------------------------------------------


class Checkout:
    """The process of a checkout."""

    def __init__(self, path: Path, threads: int, divisor: int) -> None:
        command = [sys.executable, __file__, "--worker", "--divisor", str(divisor), str(path)]
        env = os.environ | {"PYTHONPATH": str(path.resolve()), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, env=env, cwd=path, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        package = self._process.stdout.readline().strip()
        if package != str(path.resolve() / "fusedopt"):
            sys.exit(f"benchmarks.pair: {path} has no fusedopt that is built (found {package!r})")

    def ask(self, request: str | int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        time.sleep(PAUSE_SECONDS)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def ratios(ours: Checkout, theirs: Checkout, case: str, rounds: int) -> list[float]:
    """Our time by theirs, of neighbouring turns, of which either comes first in turn."""
    for checkout in (ours, theirs):
        checkout.ask(case)
    steps = max(1, round(TURN_SECONDS / max(ours.ask(2), theirs.ask(2), 1e-9)))
    for checkout in (ours, theirs):
        checkout.ask(steps)
    found = []
    for number in range(rounds):
        if number % 2 == 0:
            mine = ours.ask(steps)
            found.append(mine / theirs.ask(steps))
        else:
            other = theirs.ask(steps)
            found.append(ours.ask(steps) / other)
    return found


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair", description=__doc__)
    parser.add_argument("before", type=Path, help="the other checkout, built in place")
    parser.add_argument("--rounds", type=int, default=31, help="pairs of turns for each case")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--divisor", type=int, default=1, help="make parameters so much smaller")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    if args.worker:
        work(args.divisor)
        return 0
    ours, theirs = (Checkout(p, args.threads, args.divisor) for p in (HERE, args.before))
    print(f"time by that of {args.before}, {args.threads} threads, {args.rounds} pairs of turns")
    for case in args.case or CASES:
        found = ratios(ours, theirs, case, args.rounds)
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{case:20} {middle:.3f} (quartiles {low:.3f} to {high:.3f})", flush=True)
    for checkout in (ours, theirs):
        checkout.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
