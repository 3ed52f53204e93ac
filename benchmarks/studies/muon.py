"""How long a step of Muon takes, beside torch.optim.Muon: what takes the time are products.

python -m benchmarks.studies.muon              measures and writes everything
python -m benchmarks.studies.muon --tables     only writes the table again
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

import fusedopt
from benchmarks.measure.progress import Progress
from benchmarks.measure.provenance import provenance
from benchmarks.measure.timing import measure
from benchmarks.measure.work import Work
from benchmarks.report.case import WALL, Json, where
from benchmarks.report.files import write_json
from benchmarks.report.pages import show
from benchmarks.report.tables import table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "muon.json"
PAGE, MARKER = ROOT / "docs" / "optimizers.md", "muon"
ROUNDS, SECONDS = 21, 60.0  # at most, per case

Shapes = tuple[tuple[int, int], ...]
CASES: dict[str, Shapes] = {
    "126 of 128x128": ((128, 128),) * 126,
    "12 of 768x768": ((768, 768),) * 12,
    "4 of 768x3072": ((768, 3072),) * 4,
    "24 layers of 96": ((96, 288), (96, 96), (96, 384), (384, 96)) * 24,
    "2 layers of GPT-2 small": ((768, 2304), (768, 768), (768, 3072), (3072, 768)) * 2,
}
THEIRS, OURS = "torch.optim.Muon", "fusedopt.Muon"
MOST_APART = 0.03  # of the way of the first step: the same up to rounding


def params_of(shapes: Shapes, seed: int) -> list[nn.Parameter]:
    """Matrices with gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def far_apart(params: Sequence[Tensor], others: Sequence[Tensor], begun: Sequence[Tensor]) -> float:
    """How far, of the way that they have gone."""
    way = sum(float((p - b).detach().norm()) for p, b in zip(params, begun, strict=True))
    apart = sum(float((p - q).detach().norm()) for p, q in zip(params, others, strict=True))
    return apart / way


def case(name: str) -> Json:
    """The times of both, which take turns."""
    made = {label: params_of(CASES[name], 0) for label in (THEIRS, OURS)}
    optimizers = {
        THEIRS: torch.optim.Muon(made[THEIRS], lr=0.02),
        OURS: fusedopt.Muon(made[OURS], lr=0.02),
    }
    for optimizer in optimizers.values():
        optimizer.step()
    apart = far_apart(made[THEIRS], made[OURS], params_of(CASES[name], 0))
    if not apart < MOST_APART:
        raise AssertionError(f"{name}: they are {apart:.3f} of their way apart")
    works = {label: Work(optimizer.step) for label, optimizer in optimizers.items()}
    samples = measure(works, "cpu", ROUNDS, SECONDS, Progress(ROUNDS))[WALL]
    return {
        "name": name,
        "elements": sum(map(prod, CASES[name])),
        "apart": apart,
        "seconds": {label: samples[label] for label in works},
    }


def rows(results: Json) -> list[list[str]]:
    """The medians of both, and of the ratios of each round, with quartiles."""
    made = []
    for one in results["cases"]:
        theirs, ours = one["seconds"][THEIRS], one["seconds"][OURS]
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        made.append(
            [
                one["name"],
                f"{1e3 * median(theirs):.1f}",
                f"{1e3 * median(ours):.1f}",
                f"{middle:.2f}x",
                f"{low:.2f}-{high:.2f}",
            ]
        )
    return made


def text(results: Json) -> str:
    """The table, and where it comes from."""
    head = ["matrices", f"{THEIRS}, ms", f"{OURS}, ms", "times as fast", "quartiles"]
    return f"{table(head, rows(results), left=1)}\n{where(results)}.\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, or only write or check the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.muon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write the table again")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the table is old")
    options = parser.parse_args(arguments)
    if not (options.tables or options.check):
        found = provenance(torch.device("cpu"), [])
        write_json(options.output, {"provenance": found, "cases": [case(name) for name in CASES]})
    results = json.loads(options.output.read_text())
    if options.output != RESULTS:
        print(text(results))
        return 0
    shown = show(PAGE, MARKER, text(results), check=options.check)
    return int(options.check and not shown)


if __name__ == "__main__":
    sys.exit(main())
