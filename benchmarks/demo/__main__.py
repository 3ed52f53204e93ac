"""Train two real models with torch.optim and with fusedopt: ``python -m benchmarks.demo``.

A small GPT on English text (AdamW) and a classifier of handwritten digits (RMSprop) are trained by
every implementation of torch.optim and by fusedopt, from the same seed on the same data; the GPT by
fusedopt's optimizer and loss together, too. Losses and times are printed side by side and drawn in
a plot. The exit code is 1 if the losses differ by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

import fusedopt
from fusedopt._extension import _C

try:
    from benchmarks.demo.figure import draw
    from benchmarks.demo.tasks import digits_task, gpt_task
    from benchmarks.demo.training import OURS, OURS_FLAT, OURS_LOSS, UNFUSED, Result, train
except ModuleNotFoundError as error:
    sys.exit(f"{error}; the demo needs: pip install matplotlib scikit-learn tqdm")

RESULTS = Path(__file__).parents[1] / "results" / "demo"
STEPS, QUICK_STEPS, FEWEST_STEPS = 220, 40, 20
LOSS_ROWS = 6


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit code says whether the losses agree."""
    options = parse(arguments)
    start = time.perf_counter()
    print(f"fusedopt and torch {torch.__version__} on {describe(options.device)}")
    results = []
    for make_task in (gpt_task, digits_task):
        task = make_task(options.seed, options.device)
        parameters = list(task.model.parameters())
        size = f"{sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors"
        print(f"\n{task.title}\n{size}, {task.optimizer}, {options.steps} steps\n", flush=True)
        results.append(train(task, options.steps))
        print(f"{losses_table(results[-1])}\n\n{times_table(results[-1])}")

    plot = options.output / "demo.png"
    draw(results, plot)
    agree = conclude(results)
    print(f"Plot: {os.path.relpath(plot)}\nTotal: {time.perf_counter() - start:.0f} s")
    return 0 if agree else 1


def conclude(results: list[Result]) -> bool:
    """Print what the trainings show; returns whether the losses agree."""
    disagreements = [text for result in results for text in disagreements_in(result)]
    if disagreements:
        print("", *disagreements, sep="\nDIFFERENT LOSSES: ", file=sys.stderr)
    else:
        print(f"\nSame losses: {'; '.join(agreement(result) for result in results)}.")
    for result in results:
        print(f"{speed(result, OURS)}\n{speed(result, OURS_FLAT)}")
        if OURS_LOSS in result.trainings:
            print(share_of_training(result, OURS_LOSS))
    return not disagreements


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked, with the device chosen."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train two real models with torch.optim and with fusedopt, side by side. "
        "Nothing is downloaded: the text comes with Python, the digits with scikit-learn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train; auto takes a GPU if there is one",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the plot")
    parser.add_argument("--quick", action="store_true", help=f"train for {QUICK_STEPS} steps only")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps = QUICK_STEPS
    if options.steps < FEWEST_STEPS:
        parser.error(f"--steps {options.steps}: at least {FEWEST_STEPS} are needed")
    no_gpu = why_no_gpu()
    if options.device == "cuda" and no_gpu:
        parser.error(f"--device cuda: {no_gpu}")
    if options.device == "auto":
        options.device = "cpu" if no_gpu else "cuda"
    options.device = torch.device(options.device)
    return options


def why_no_gpu() -> str | None:
    """Why a GPU cannot be used, or None."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None if _C.has_cuda else "there is a GPU, but fusedopt was built without CUDA"


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    reason = why_no_gpu() or "by choice"
    return f"the CPU ({reason}), {fusedopt.isa()}, threads: {torch.get_num_threads()}"


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first of each aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            ["  " + row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def losses_table(result: Result) -> str:
    """Training losses at a few steps, and the largest difference over all of them."""
    names = [result.reference, *result.ours]
    curves = [result.trainings[name].losses for name in names]
    last = len(curves[0]) - 1
    shown = sorted({round(last * row / (LOSS_ROWS - 1)) for row in range(LOSS_ROWS)})
    rows = [["training loss", *names]]
    for step in shown:
        rows.append([f"step {step + 1}", *(f"{losses[step]:.7f}" for losses in curves)])
    differences = (f"{result.difference(name):.1e}" for name in result.ours)
    rows.append([f"largest difference, {last + 1} steps", "", *differences])
    return table(rows)


def times_table(result: Result) -> str:
    """Step times, training times and scores of every implementation."""
    rows = [["", "optimizer step", "middle half of steps", "all training", result.task.score_name]]
    for name, training in result.trainings.items():
        low, high = training.step_quartiles
        rows.append(
            [
                name,
                f"{1e3 * training.step_median:.3f} ms",
                f"{1e3 * low:.3f} - {1e3 * high:.3f} ms",
                f"{training.training_seconds:.2f} s",
                f"{result.scores[name]:.4f}",
            ]
        )
    return table(rows)


def agreement(result: Result) -> str:
    """How well the losses agree."""
    difference = max(result.difference(name) for name in result.ours)
    return (
        f"{result.task.name} within {difference:.1e} of {result.reference} "
        f"(rounding allows {result.allowed:.1e})"
    )


def disagreements_in(result: Result) -> list[str]:
    """What to say of each implementation whose losses differ by more than rounding."""
    return [
        f"{result.task.name}: {name} is {result.difference(name):.1e} off {result.reference}, "
        f"but rounding allows only {result.allowed:.1e}"
        for name in result.ours
        if not result.agrees(name)
    ]


def speed(result: Result, name: str) -> str:
    """How fast an implementation's steps are next to torch's fastest and torch's unfused ones."""
    medians = {one: training.step_median for one, training in result.trainings.items()}
    compared = " and ".join(
        f"{faster(medians[other] / medians[name])} {other}"
        for other in dict.fromkeys((result.fastest_torch, UNFUSED))
    )
    return f"{result.task.name}: {name} does an {result.task.optimizer} step {compared}."


def share_of_training(result: Result, name: str) -> str:
    """The time of a whole training next to that with torch's fastest step."""
    other = result.fastest_torch
    share = result.trainings[name].training_seconds / result.trainings[other].training_seconds
    return f"{result.task.name}: {name} trains in {share:.2f} of the time of {other}."


def faster(ratio: float) -> str:
    """A ratio of times in words."""
    return f"{ratio:.1f} times faster than" if ratio >= 1 else f"{1 / ratio:.1f} times slower than"


if __name__ == "__main__":
    sys.exit(main())
