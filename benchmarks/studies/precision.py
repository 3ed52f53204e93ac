"""What storage choices cost in quality and save in memory.

    python -m benchmarks.studies.precision            trains, measures memory, writes everything
    python -m benchmarks.studies.precision --tables   only writes tables and plot again

Trains the demo's models, a small GPT on text and a classifier of digits, with AdamW and each choice
of storage, several seeds each, and compares the final losses. Memory is what a process grows by
when it makes parameters, gradients and an optimizer, and takes two steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import fusedopt
from benchmarks.measure.provenance import provenance
from benchmarks.models.parameters import parameter_groups
from benchmarks.report.case import Json
from benchmarks.report.colours import OUR_COLOUR, TORCH_COLOUR
from benchmarks.report.files import write_json
from benchmarks.report.pages import show
from benchmarks.studies.trainings import (
    BETAS,
    DECAYS,
    EPS,
    LAST,
    RATES,
    SEEDS,
    STEPS,
    model_and_data,
)

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "precision.json"
PAGE, PLOT = ROOT / "docs" / "precision.md", ROOT / "docs" / "images" / "precision.png"
FLOAT32 = "float32"
# By name: the dtype of the model, and the optimizer's options.
CHOICES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    FLOAT32: (torch.float32, {}),
    "float32, int8 states": (torch.float32, {"state_dtype": "int8"}),
    "float32, bfloat16 states": (torch.float32, {"state_dtype": torch.bfloat16}),
    "bfloat16 + 32": (torch.bfloat16, {"master_bits": 32}),
    "bfloat16 + 24": (torch.bfloat16, {"master_bits": 24}),
    "bfloat16 + 32, int8 states": (torch.bfloat16, {"master_bits": 32, "state_dtype": "int8"}),
    "bfloat16 stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bfloat16 stochastic, int8 states": (
        torch.bfloat16,
        {"rounding": "stochastic", "state_dtype": "int8"},
    ),
    "bfloat16, float32 states": (torch.bfloat16, {}),
    "bfloat16, bfloat16 states": (torch.bfloat16, {"state_dtype": torch.bfloat16}),
}
ELEMENTS = 2**25  # of the parameters whose memory is measured


# -- training -----------------------------------------------------------------------------------


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in float32, in nats, of a model of any dtype."""
    inputs, targets = batch
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    return F.cross_entropy(model(inputs).float().flatten(0, -2), targets.flatten())


def train(task: str, seed: int, choice: str, steps: int) -> dict[str, float]:
    """The losses of one training: mean of the last ones, and that of data not trained on."""
    dtype, options = CHOICES[choice]
    one = model_and_data(task, seed)
    model = one.model.to(dtype)
    optimizer = fusedopt.AdamW(
        parameter_groups(model, DECAYS[task]), lr=RATES[task], betas=BETAS, eps=EPS, **options
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=steps)
    losses = []
    for batch in islice(one.batches, steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    with torch.no_grad():
        unseen = loss_of(model, one.unseen).item()
    return {"train": fmean(losses[-LAST:]), "unseen": unseen}


def train_all(seeds: int, steps: dict[str, int]) -> list[Json]:
    """A row of losses for each task and choice."""
    rows = []
    for task in tqdm(RATES, "task"):
        for choice in tqdm(CHOICES, task, leave=False):
            done = [train(task, seed, choice, steps[task]) for seed in range(seeds)]
            losses = {key: [one[key] for one in done] for key in done[0]}
            rows.append({"task": task, "choice": choice, "losses": losses})
    return rows


# -- memory -------------------------------------------------------------------------------------


def resident() -> int:
    """The bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def bytes_per_parameter(choice: str) -> float:
    """The bytes that a process grows by for each element when it trains large parameters."""
    dtype, options = CHOICES[choice]
    torch.zeros(1000).add_(1)  # so that threads and allocators have started before
    fusedopt.AdamW([nn.Parameter(torch.zeros(2**16, dtype=dtype))], **options).step()
    before = resident()
    params = [nn.Parameter(torch.full((ELEMENTS // 8,), 0.5, dtype=dtype)) for _ in range(8)]
    optimizer = fusedopt.AdamW(params, **options)
    for param in params:
        param.grad = torch.full_like(param, 0.25)
    optimizer.step()
    optimizer.step()
    return (resident() - before) / ELEMENTS


def memory_of_all() -> dict[str, float]:
    """Bytes per parameter of each choice, each measured in a process of its own."""
    measured = {}
    for choice in tqdm(CHOICES, "memory"):
        command = [sys.executable, "-m", "benchmarks.studies.precision", "--memory-of", choice]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        measured[choice] = float(result.stdout)
    return measured


# -- tables and plot ----------------------------------------------------------------------------


def differences(results: Json, row: Json, key: str) -> list[float]:
    """Losses minus those of float32 with the same seeds."""
    base = next(
        r for r in results["training"] if (r["task"], r["choice"]) == (row["task"], FLOAT32)
    )
    return [a - b for a, b in zip(row["losses"][key], base["losses"][key], strict=True)]


def table(results: Json) -> str:
    """A row for each choice: bytes, and for each task the loss and its distance from float32's."""
    tasks = list(results["settings"]["steps"])
    head = ["parameters and states", "bytes per parameter"]
    for task in tasks:
        head += [f"{task}: loss", f"{task}: difference"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for choice in CHOICES:
        cells = [choice, f"{results['memory'][choice]:.2f}"]
        for task in tasks:
            row = next(r for r in results["training"] if (r["task"], r["choice"]) == (task, choice))
            unseen = row["losses"]["unseen"]
            cells.append(f"{fmean(unseen):.4f} ± {stdev(unseen):.4f}")
            apart = differences(results, row, "unseen")
            error = stdev(apart) / len(apart) ** 0.5
            cells.append("" if choice == FLOAT32 else f"{fmean(apart):+.5f} ± {error:.5f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: Json, path: Path) -> None:
    """Bytes against the difference from float32, one panel a task."""
    from matplotlib.figure import Figure

    tasks = list(results["settings"]["steps"])
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True)
    names = list(CHOICES)
    for task, panel in zip(tasks, axes, strict=True):
        rows = {r["choice"]: r for r in results["training"] if r["task"] == task}
        spread = stdev(rows[FLOAT32]["losses"]["unseen"])
        panel.axvline(0, color=TORCH_COLOUR, linewidth=6)
        for height, name in enumerate(names):
            apart = differences(results, rows[name], "unseen")
            panel.plot(apart, [height] * len(apart), "o", color=OUR_COLOUR, alpha=0.45, ms=5)
            panel.plot([fmean(apart)], [height], "|", color="#000000", ms=16, mew=2)
        panel.set_title(f"{task}: loss on unseen data, less that of float32")
        panel.set_xlabel(
            "nats; points are seeds, bars their means\n"
            f"(seeds by themselves: standard deviation {spread:.4f})"
        )
        panel.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(
        range(len(names)),
        [f"{name}\n{results['memory'][name]:.2f} bytes a parameter" for name in names],
        fontsize=8,
    )
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def study(options: argparse.Namespace) -> Json:
    """Measure everything."""
    steps = {task: min(most, options.steps) for task, most in STEPS.items()}
    return {
        "provenance": provenance(torch.device("cpu"), []),
        "settings": {
            "betas": list(BETAS),
            "eps": EPS,
            "learning_rates": RATES,
            "weight_decays": DECAYS,
            "steps": steps,
            "seeds": options.seeds,
            "elements": ELEMENTS,
        },
        "memory": memory_of_all(),
        "training": train_all(options.seeds, steps),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the study, or only write or check its table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write table and plot again")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the table is old")
    parser.add_argument("--steps", type=int, default=max(STEPS.values()), help="at most")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each kind")
    parser.add_argument("--memory-of", choices=list(CHOICES), help="print it for one choice")
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(bytes_per_parameter(options.memory_of))
        return 0
    if not (options.tables or options.check):
        torch.set_num_threads(1)  # such small models gain nothing from more
        write_json(options.output, study(options))
    results = json.loads(options.output.read_text())
    if options.output != RESULTS:
        print(table(results))
        return 0
    shown = show(PAGE, "precision", table(results), check=options.check)
    if options.check:
        return int(not shown)
    draw(results, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
