"""Does every optimizer train? Each on the demo's GPT, with the best of three learning rates.

    python -m benchmarks.studies.convergence                  trains and writes everything
    python -m benchmarks.studies.convergence --tables         only writes table and plot again
    python -m benchmarks.studies.convergence --only AdamW     trains this one again

The learning rate falls to zero along a cosine; the one that left the smallest loss on data that was
not trained on is shown.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import fusedopt
from benchmarks.measure.provenance import provenance
from benchmarks.models.parameters import parameter_groups
from benchmarks.report.case import Json, where
from benchmarks.report.files import write_json
from benchmarks.report.pages import show
from benchmarks.report.tables import table
from benchmarks.studies.trainings import DECAYS, LAST, STEPS, model_and_data
from fusedopt.optimizers.schedule_free import ScheduleFree

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "convergence.json"
PAGE, PLOT = ROOT / "docs" / "optimizers.md", ROOT / "docs" / "images" / "convergence.png"
MARKER = "convergence"
TASK, SEED = "GPT", 0
COLUMNS = 4
WINDOW = 10  # losses of training that a point of a curve is the mean of


@dataclass(frozen=True)
class Setup:
    """An optimizer, and the learning rates that are tried."""

    rates: tuple[float, float, float]
    options: dict[str, Any] = field(default_factory=dict)
    decays: bool = True  # by the same weights as AdamW
    scheduled: bool = True  # by half a cosine


SETUPS = {
    "AdamW": Setup((1e-3, 3e-3, 1e-2)),
    "Adam": Setup((1e-3, 3e-3, 1e-2), decays=False),
    "SGD": Setup((0.1, 0.3, 1.0), {"momentum": 0.9, "nesterov": True}, decays=False),
    "RMSprop": Setup((3e-4, 1e-3, 3e-3), decays=False),
    "Lion": Setup((3e-4, 1e-3, 3e-3)),
    # Betas and alpha of the paper are for trainings a thousand times as long.
    "AdEMAMix": Setup((1e-3, 3e-3, 1e-2), {"betas": (0.9, 0.999, 0.99), "alpha": 2.0}),
    "ADOPT": Setup((1e-3, 3e-3, 1e-2), {"betas": (0.9, 0.99), "decouple": True}),
    "Adan": Setup((1e-3, 3e-3, 1e-2)),
    "RAdam": Setup((1e-3, 3e-3, 1e-2), {"decoupled_weight_decay": True}),
    "Adamax": Setup((1e-3, 3e-3, 1e-2), decays=False),
    "Adagrad": Setup((1e-2, 3e-2, 1e-1), decays=False),
    "Adadelta": Setup((1.0, 3.0, 10.0), decays=False),
    "NAdam": Setup((1e-3, 3e-3, 1e-2), {"decoupled_weight_decay": True}),
    "ASGD": Setup((0.1, 0.3, 1.0), decays=False),
    "ScheduleFreeAdamW": Setup((3e-3, 1e-2, 3e-2), {"warmup_steps": 20}, scheduled=False),
    "ScheduleFreeSGD": Setup((0.3, 1.0, 3.0), {"warmup_steps": 20}, False, scheduled=False),
    "AdamW, cautious": Setup((1e-3, 3e-3, 1e-2), {"cautious": True}),
    "StableAdamW": Setup((1e-3, 3e-3, 1e-2)),
    "LAMB": Setup((3e-3, 1e-2, 3e-2)),
    # Weights without decay, which have no norm to go by, are for SGD with the same rate.
    "LARS": Setup((0.01, 0.03, 0.1), {"trust_coefficient": 0.1}),
    # Of the matrices in blocks; AdamW steps all else with the rate that is best for it alone.
    "Muon": Setup((1e-2, 3e-2, 1e-1), {"adamw": {"lr": 3e-3}}),
    # For full batches: with small ones, of which gradients change their signs, only short steps do.
    "Rprop": Setup((1e-4, 3e-4, 1e-3), {"step_sizes": (1e-6, 1e-3)}, decays=False),
}


def muon_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The matrices in blocks, and for AdamW matrices and vectors apart from them."""
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and "blocks" in name]
    known = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in known]
    apart = parameter_groups(nn.ParameterList(others), decay)
    return [
        {"params": inside, "weight_decay": decay},
        *({**group, "use_muon": False} for group in apart),
    ]


def train(name: str, rate: float, steps: int) -> Json:
    """The losses of one training, and that of data not trained on."""
    setup = SETUPS[name]
    one = model_and_data(TASK, SEED)
    decay = DECAYS[TASK] if setup.decays else 0.0
    groups: Any = parameter_groups(one.model, decay)
    if name == "Rprop":  # has no weight decay
        groups = one.model.parameters()
    if name == "Muon":
        groups = muon_groups(one.model, decay)
    class_name = name.split(",")[0]  # behind it, what is special
    optimizer = getattr(fusedopt, class_name)(groups, lr=rate, **setup.options)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps) if setup.scheduled else None
    if isinstance(optimizer, ScheduleFree):
        optimizer.train()
    losses = []
    for inputs, targets in islice(one.batches, steps):
        optimizer.zero_grad()
        logits = one.model(inputs).flatten(0, -2)
        loss = fusedopt.nn.functional.cross_entropy(logits, targets.flatten())
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    if isinstance(optimizer, ScheduleFree):
        optimizer.eval()
    inputs, targets = one.unseen
    with torch.no_grad():
        logits = one.model(inputs).flatten(0, -2)
        unseen = fusedopt.nn.functional.cross_entropy(logits, targets.flatten()).item()
    return {"rate": rate, "losses": losses, "unseen": unseen}


def study(names: list[str], steps: int) -> Json:
    """Train each with each of its learning rates."""
    torch.set_num_threads(1)  # such a small model gains nothing from more
    trainings = [
        {"optimizer": name, **train(name, rate, steps)}
        for name in tqdm(names)
        for rate in SETUPS[name].rates
    ]
    device = torch.device("cpu")
    return {"provenance": provenance(device, []), "steps": steps, "trainings": trainings}


def updated(old: Json, new: Json) -> Json:
    """Old results with those in place of them that were trained again."""
    again = {one["optimizer"] for one in new["trainings"]}
    kept = [one for one in old["trainings"] if one["optimizer"] not in again]
    order = list(SETUPS)
    trainings = sorted(
        [*kept, *new["trainings"]], key=lambda one: (order.index(one["optimizer"]), one["rate"])
    )
    return {**new, "trainings": trainings}


# -- table and plot -----------------------------------------------------------------------------


def best_of(results: Json, name: str) -> Json:
    """The training that left the smallest loss."""
    found = [one for one in results["trainings"] if one["optimizer"] == name]
    return min(found, key=lambda one: one["unseen"] if math.isfinite(one["unseen"]) else math.inf)


def names_of(results: Json) -> list[str]:
    """The optimizers that were trained, in their order."""
    return list(dict.fromkeys(one["optimizer"] for one in results["trainings"]))


def rows(results: Json) -> list[list[str]]:
    """The best learning rate of each, and the losses at its end."""
    made = []
    for name in names_of(results):
        best = best_of(results, name)
        tried = [f"{o['rate']:g}" for o in results["trainings"] if o["optimizer"] == name]
        last = fmean(best["losses"][-LAST:])
        made.append(
            [name, ", ".join(tried), f"{best['rate']:g}", f"{last:.3f}", f"{best['unseen']:.3f}"]
        )
    return made


def text(results: Json) -> str:
    """The table, and where it comes from."""
    head = ["optimizer", "learning rates", "best", "loss", "on unseen data"]
    return f"{table(head, rows(results), left=2)}\n{where({**results, 'cases': []})}.\n"


def curve(losses: list[float]) -> list[float]:
    """Means of the losses of some steps up to each."""
    return [fmean(losses[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(losses))]


def draw(results: Json, path: Path) -> None:
    """A panel for each optimizer: its training with the best rate, those with others, AdamW's."""
    from matplotlib.figure import Figure  # the only part that needs it

    from benchmarks.report.colours import OUR_COLOUR, TORCH_COLOUR

    names = names_of(results)
    height = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 0.4 + 2.5 * height), layout="constrained")
    panels = figure.subplots(height, COLUMNS, squeeze=False, sharex=True, sharey=True).flatten()
    base = best_of(results, names[0])
    for name, panel in zip(names, panels, strict=False):
        best = best_of(results, name)
        for one in results["trainings"]:
            if one["optimizer"] == name and one is not best:
                panel.plot(curve(one["losses"]), color=OUR_COLOUR, alpha=0.3, linewidth=0.8)
        panel.plot(curve(base["losses"]), color=TORCH_COLOUR, linewidth=2)
        panel.plot(curve(best["losses"]), color=OUR_COLOUR, linewidth=1.4)
        panel.set_title(f"{name}, {best['rate']:g}: {best['unseen']:.2f}", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    panels[0].set_ylim(2.0, 4.5)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    figure.suptitle(
        f"A small GPT: loss with the best of three learning rates, the others pale, {names[0]} grey"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """Run the study, or only write or check its table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write table and plot again")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the table is old")
    parser.add_argument("--steps", type=int, default=STEPS[TASK])
    parser.add_argument("--only", nargs="+", choices=list(SETUPS), metavar="OPTIMIZER")
    options = parser.parse_args(arguments)
    if not (options.tables or options.check):
        made = study(options.only or list(SETUPS), options.steps)
        if options.only and options.output.exists():
            made = updated(json.loads(options.output.read_text()), made)
        write_json(options.output, made)
    results = json.loads(options.output.read_text())
    if options.output != RESULTS:
        print(text(results))
        return 0
    shown = show(PAGE, MARKER, text(results), check=options.check)
    if options.check:
        return int(not shown)
    draw(results, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
