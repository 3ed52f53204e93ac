"""How long an iteration takes that steps within the backward pass, by one optimizer or by many.

python -m benchmarks.studies.release              measures and writes everything
python -m benchmarks.studies.release --tables     only writes the table again
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fusedopt
from benchmarks.measure.progress import Progress
from benchmarks.measure.timing import measure
from benchmarks.measure.work import Work
from benchmarks.models.networks import GPT
from benchmarks.report.case import WALL, Json
from benchmarks.studies.muon import RESULTS as OTHERS
from benchmarks.studies.muon import ROOT, ROUNDS, SECONDS, Study

VOCABULARY, CONTEXT = 65, 32
THEIRS, OURS = "a torch fused step for each parameter", "GradientRelease"


def matrices() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(100)))


def gpt() -> nn.Module:
    return GPT(VOCABULARY, CONTEXT, blocks=24)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "100 of 32x32": (matrices, lambda: torch.randn(32, 32)),
    "GPT of 24 layers": (gpt, lambda: torch.randint(VOCABULARY, (4, CONTEXT))),
}


def stepped_by_many(model: nn.Module) -> None:
    """As torch's tutorial on memory has it: an optimizer for each parameter, in its hook."""
    optimizers = {p: torch.optim.AdamW([p], fused=True) for p in model.parameters()}

    def step(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)


def case(name: str) -> Json:
    """The times of whole iterations, which take turns."""
    make, draw = CASES[name]
    torch.manual_seed(0)
    theirs, ours = make(), make()
    ours.load_state_dict(theirs.state_dict())
    inputs = draw()
    stepped_by_many(theirs)
    optimizer = fusedopt.AdamW(ours.parameters())
    fusedopt.GradientRelease(optimizer)

    def iterate() -> None:
        ours(inputs).square().mean().backward()
        optimizer.step()

    works = {
        THEIRS: Work(lambda: theirs(inputs).square().mean().backward()),
        OURS: Work(iterate),
    }
    for work in works.values():
        work.call()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    samples = measure(works, "cpu", ROUNDS, SECONDS, Progress(ROUNDS))[WALL]
    return {"name": name, "elements": sum(p.numel() for p in ours.parameters()), "seconds": samples}


STUDY = Study(
    "benchmarks.studies.release",
    OTHERS.with_name("release.json"),
    "release",
    "model",
    THEIRS,
    OURS,
    tuple(CASES),
    case,
    ROOT / "docs" / "release.md",
)

if __name__ == "__main__":
    sys.exit(STUDY.main(None, __doc__))
