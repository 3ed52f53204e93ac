"""Which 8-bit codes suit the states of Adam? ``python -m benchmarks.studies.codes``.

A code stores a block of consecutive elements of a parameter's state as one byte each and one
float32, the block's largest magnitude. Candidates are compared by four questions:

- stored once: how far are a training's float32 states from what is decoded?
- the update of the decoded states: how far is ``m_hat / (sqrt(v_hat) + eps)``?
- stored at every step: with the gradients of a float32 training, how far is a step's update from
  the exact one when the states before it were decoded, and are encoded after it, at every step?
- trained with: how far is the final loss from that of float32 states with the same seed?

The results go to a JSON file, and as Markdown to a file beside it; ``--tables`` only writes the
latter again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch

from benchmarks.measure.provenance import provenance
from benchmarks.report.case import Json
from benchmarks.report.files import write_rows
from benchmarks.studies.codes.adamw import SMALLEST
from benchmarks.studies.codes.candidates import SIGNED, UNSIGNED
from benchmarks.studies.codes.errors import averaged, observe
from benchmarks.studies.codes.losses import train_all
from benchmarks.studies.codes.page import markdown
from benchmarks.studies.codes.results import FLOAT32, NUDGED, choose
from benchmarks.studies.trainings import (
    BETAS,
    CONTEXT,
    DECAYS,
    EPS,
    GPT_BLOCKS,
    HEADS,
    IMAGE_BATCH,
    LAST,
    RATES,
    SEEDS,
    STEPS,
    TEXT_BATCH,
    WIDTH,
    model_and_data,
)

RESULTS = Path(__file__).parents[2] / "results" / "codes.json"
SNAPSHOTS = (10, 50, 150, 300)  # the steps after which states are looked at


def elements(task: str) -> int:
    """Of parameters whose states are encoded."""
    sizes = [p.numel() for p in model_and_data(task, 0).model.parameters()]
    return sum(size for size in sizes if size >= SMALLEST)


def known_trainings(results: Json, wanted: Json) -> dict[tuple[Any, ...], Json]:
    """Trainings of an earlier run with the same settings and codes, by what was trained."""
    if results["settings"] != wanted["settings"]:
        return {}
    same = {(c["signed"], c["name"]) for c in results["codes"] if c in wanted["codes"]}
    same |= {(signed, name) for signed in (True, False) for name in (FLOAT32, NUDGED)}
    return {
        (row["task"], row["m"], row["v"], row["block"]): row
        for row in results["training"]
        if {(True, row["m"]), (False, row["v"])} <= same
    }


def study(options: argparse.Namespace) -> Json:
    """Measure everything."""
    snapshots = tuple(step for step in SNAPSHOTS if step <= options.steps)
    steps = {task: min(most, options.steps) for task, most in STEPS.items()}
    results: Json = {
        "provenance": provenance(torch.device("cpu"), []),
        "settings": {
            "betas": list(BETAS),
            "eps": EPS,
            "learning_rates": RATES,
            "weight_decays": DECAYS,
            "smallest_encoded_parameter": SMALLEST,
            "gpt": {"width": WIDTH, "heads": HEADS, "blocks": GPT_BLOCKS, "context": CONTEXT},
            "batches": {"GPT": TEXT_BATCH, "digits": IMAGE_BATCH},
            "elements": {task: elements(task) for task in RATES},
            "snapshots": list(snapshots),
            "steps": steps,
            "seeds": options.seeds,
            "last": LAST,
        },
        "codes": [code.describe() for code in SIGNED + UNSIGNED],
    }
    states: list[Json] = []
    updates: list[Json] = []
    for task in RATES:
        of_states, of_updates = observe(task, snapshots)
        states += of_states
        updates += of_updates
    results["states"] = averaged(states, fmean)
    results["updates"] = averaged(updates, geometric_mean)
    known = {}
    if options.resume and options.output.exists():
        before = json.loads(options.output.read_text())
        known = known_trainings(before, results)
        results["earlier"] = [*before.get("earlier", ()), before["provenance"]] if known else []
    results["training"] = train_all(choose(results), options.seeds, steps, known)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run the study, or only write its page; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.codes",
        description="Compare 8-bit codes of Adam's states.",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--resume", action="store_true", help="keep the trainings of the JSON file")
    parser.add_argument("--steps", type=int, default=max(SNAPSHOTS), help="at most, of trainings")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each kind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if not options.tables:
        torch.set_num_threads(options.threads)
        write_rows(options.output, study(options))
    results = json.loads(options.output.read_text())
    options.output.with_suffix(".md").write_text(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
