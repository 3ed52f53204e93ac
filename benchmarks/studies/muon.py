"""How long a step of Muon takes, beside torch.optim.Muon: what takes the time are products.

python -m benchmarks.studies.muon              measures and writes everything
python -m benchmarks.studies.muon --tables     only writes the table again
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
PAGE = ROOT / "docs" / "optimizers.md"
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


def rows(results: Json, first: str, second: str) -> list[list[str]]:
    """The medians of both, and of the ratios of each round, with quartiles."""
    made = []
    for one in results["cases"]:
        theirs, ours = one["seconds"][first], one["seconds"][second]
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


def text(results: Json, what: str, theirs: str, ours: str) -> str:
    """The table, and where it comes from."""
    head = [what, f"{theirs}, ms", f"{ours}, ms", "times as fast", "quartiles"]
    return f"{table(head, rows(results, theirs, ours), left=1)}\n{where(results)}.\n"


@dataclass(frozen=True)
class Study:
    """Two ways to do the same, in some cases.

    Attributes:
        module: how the command line calls it.
        results: the JSON file.
        marker: of the table.
        what: the cases are.
        case: measures one.
        page: where the table is.
    """

    module: str
    results: Path
    marker: str
    what: str
    theirs: str
    ours: str
    cases: Sequence[str]
    case: Callable[[str], Json]
    page: Path = PAGE

    def main(self, arguments: list[str] | None, about: str | None) -> int:
        """Measure, or only write or check the table; the exit status."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--output", type=Path, default=self.results, help="the JSON file")
        parser.add_argument("--tables", action="store_true", help="only write the table again")
        parser.add_argument("--check", action="store_true", help="exit status 1 if it is old")
        options = parser.parse_args(arguments)
        if not (options.tables or options.check):
            found = provenance(torch.device("cpu"), [])
            cases = [self.case(name) for name in self.cases]
            write_json(options.output, {"provenance": found, "cases": cases})
        results = json.loads(options.output.read_text())
        shown_text = text(results, self.what, self.theirs, self.ours)
        if options.output != self.results:
            print(shown_text)
            return 0
        shown = show(self.page, self.marker, shown_text, check=options.check)
        return int(options.check and not shown)


STUDY = Study(
    "benchmarks.studies.muon", RESULTS, "muon", "matrices", THEIRS, OURS, tuple(CASES), case
)

if __name__ == "__main__":
    sys.exit(STUDY.main(None, __doc__))
