"""How long steps take that measure whole parameters first, beside AdamW's and other packages'.

python -m benchmarks.studies.measured              measures and writes everything
python -m benchmarks.studies.measured --tables     only writes the table again

Other packages are taken where they are installed: torch-optimi, timm and pytorch-optimizer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder
from math import prod
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import fusedopt
from benchmarks.measure.progress import Progress
from benchmarks.measure.provenance import provenance
from benchmarks.measure.timing import measure
from benchmarks.measure.work import Work
from benchmarks.report.case import WALL, Json, where
from benchmarks.report.files import write_json
from benchmarks.report.pages import show
from benchmarks.report.tables import table
from benchmarks.studies.muon import PAGE, ROUNDS, SECONDS
from benchmarks.studies.muon import RESULTS as OTHERS

RESULTS = OTHERS.with_name("measured.json")
CASES: dict[str, tuple[tuple[int, ...], ...]] = {
    "200x100K": ((100_000,),) * 200,
    "1000x1Ki": ((1024,),) * 1000,
    "1x64Mi": ((2**26,),),
}

Make = Callable[[list[nn.Parameter]], Optimizer]
OURS: dict[str, Make] = {
    "AdamW": fusedopt.AdamW,
    "StableAdamW": fusedopt.StableAdamW,
    "LAMB": fusedopt.LAMB,
    "LARS": lambda params: fusedopt.LARS(params, weight_decay=1e-4),
    "AdamW, cautious": lambda params: fusedopt.AdamW(params, cautious=True),
    "Lion": lambda params: fusedopt.Lion(params, weight_decay=0.1),
    "Lion, cautious": lambda params: fusedopt.Lion(params, weight_decay=0.1, cautious=True),
}
# Their package, class, and what makes them do the same work, each in its fastest way.
THEIRS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "StableAdamW": [
        ("optimi", "StableAdamW", {"lr": 1e-3, "foreach": True}),
        ("pytorch_optimizer", "StableAdamW", {"kahan_sum": False}),
    ],
    "LAMB": [
        ("timm.optim.lamb", "Lamb", {"max_grad_norm": None, "foreach": True}),
        ("pytorch_optimizer", "Lamb", {"weight_decay": 0.01, "max_grad_norm": 0.0}),
    ],
    "LARS": [
        ("timm.optim.lars", "Lars", {"momentum": 0.9, "weight_decay": 1e-4, "foreach": True}),
        ("pytorch_optimizer", "LARS", {"weight_decay": 1e-4}),
    ],
    "AdamW, cautious": [("timm.optim.adamw", "AdamWLegacy", {"caution": True, "foreach": True})],
    "Lion, cautious": [("timm.optim.lion", "Lion", {"caution": True, "foreach": True})],
}


def params_of(name: str) -> list[nn.Parameter]:
    """Parameters with gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in CASES[name]]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def is_installed(module: str) -> bool:
    """Whether it can be imported; what its parents import is left out, as that may need more, such
    as torchvision."""
    parents = module.split(".")[:-1] or [module]
    spec = PathFinder.find_spec(parents[0])
    if spec is None or not spec.submodule_search_locations:
        return False
    for count in range(1, len(parents) + (module != parents[0])):
        name = ".".join(parents[:count])
        if name not in sys.modules:
            sys.modules[name] = stub = ModuleType(name)
            stub.__path__ = [str(Path(spec.submodule_search_locations[0], *parents[1:count]))]
    return True


def peers(name: str) -> dict[str, Make]:
    """Other packages' ways to do one of ours."""
    found: dict[str, Make] = {}
    for module, class_name, options in THEIRS.get(name, []):
        if is_installed(module):
            made = getattr(importlib.import_module(module), class_name)
            found[module.split(".")[0]] = partial(made, **options)
    return found


def case(name: str) -> Json:
    """The times of all, which take turns."""
    made = dict(OURS)
    # A large tensor is there many times over otherwise.
    if name != "1x64Mi":
        for one in OURS:
            made |= {f"{one} of {package}": make for package, make in peers(one).items()}
    optimizers = {label: make(params_of(name)) for label, make in made.items()}
    for optimizer in optimizers.values():
        for _ in range(2):
            optimizer.step()
    works = {label: Work(optimizer.step) for label, optimizer in optimizers.items()}
    samples = measure(works, "cpu", ROUNDS, SECONDS, Progress(ROUNDS))[WALL]
    return {"name": name, "elements": sum(map(prod, CASES[name])), "seconds": samples}


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of those of each round."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def rows(results: Json) -> list[list[str]]:
    made = []
    for one in results["cases"]:
        seconds = one["seconds"]
        for name in OURS:
            base = "Lion" if name.startswith("Lion") else "AdamW"
            others = {
                label.removeprefix(f"{name} of "): ratio(times, seconds[name])
                for label, times in seconds.items()
                if label.startswith(f"{name} of ")
            }
            best = min(others, key=lambda package: others[package], default=None)
            made.append(
                [
                    name,
                    one["name"],
                    f"{1e3 * median(seconds[name]):.2f}",
                    "-" if name == base else f"{ratio(seconds[name], seconds[base]):.2f}",
                    "-" if best is None else f"{others[best]:.1f}x {best}",
                ]
            )
    return made


def text(results: Json) -> str:
    head = ["optimizer", "tensors", "ms", "of AdamW's, or Lion's, time", "times as fast as"]
    return f"{table(head, rows(results), left=2)}\n{where(results)}.\n"


def main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.measured",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write the table again")
    parser.add_argument("--check", action="store_true", help="exit status 1 if it is old")
    options = parser.parse_args(arguments)
    if not (options.tables or options.check):
        found = provenance(torch.device("cpu"), [])
        cases = [case(name) for name in CASES]
        write_json(options.output, {"provenance": found, "cases": cases})
    results = json.loads(options.output.read_text())
    if options.output != RESULTS:
        print(text(results))
        return 0
    shown = show(PAGE, "measured", text(results), check=options.check)
    return int(options.check and not shown)


if __name__ == "__main__":
    sys.exit(main(None))
