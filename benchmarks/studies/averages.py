"""How long a step with ema_decay takes, beside a step and torch's AveragedModel after it.

python -m benchmarks.studies.averages              measures and writes everything
python -m benchmarks.studies.averages --tables     only writes the table again
"""

from __future__ import annotations

import sys
from math import prod

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from benchmarks.measure.progress import Progress
from benchmarks.measure.timing import measure
from benchmarks.measure.work import Work
from benchmarks.report.case import WALL, Json
from benchmarks.studies.muon import RESULTS as OTHERS
from benchmarks.studies.muon import ROUNDS, SECONDS, Study

CASES: dict[str, tuple[tuple[int, ...], ...]] = {
    "1x64Mi": ((2**26,),),
    "200x100K": ((100_000,),) * 200,
    "1000x1Ki": ((1024,),) * 1000,
}
THEIRS, OURS = "AdamW, then AveragedModel", "AdamW with ema_decay"
DECAY = 0.999


def model_of(name: str) -> nn.ParameterList:
    """Parameters with gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(shape, generator=generator)) for shape in CASES[name]]
    )
    for param in model:
        param.grad = torch.randn(param.shape, generator=generator)
    return model


def case(name: str) -> Json:
    """The times of both, which take turns: the fused step is ours in both."""
    first, second = model_of(name), model_of(name)
    plain = fusedopt.AdamW(first.parameters())
    averaging = fusedopt.AdamW(second.parameters(), ema_decay=DECAY)
    averaged = AveragedModel(first, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def step_and_average() -> None:
        plain.step()
        averaged.update_parameters(first)

    for _ in range(3):
        step_and_average()
        averaging.step()
    theirs, ours = averaged.module.parameters(), averaging.ema_params()
    if not all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)):
        raise AssertionError(f"{name}: the averages are not the same")
    works = {THEIRS: Work(step_and_average), OURS: Work(averaging.step)}
    samples = measure(works, "cpu", ROUNDS, SECONDS, Progress(ROUNDS))[WALL]
    return {"name": name, "elements": sum(map(prod, CASES[name])), "seconds": samples}


STUDY = Study(
    "benchmarks.studies.averages",
    OTHERS.with_name("averages.json"),
    "averages",
    "tensors",
    THEIRS,
    OURS,
    tuple(CASES),
    case,
)

if __name__ == "__main__":
    sys.exit(STUDY.main(None, __doc__))
