"""The demo's plot: loss curves and step times of each task."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.demo.training import ALL_OURS, OURS, OURS_LOSS, Result
from benchmarks.report.colours import OUR_COLOUR, TORCH_COLOUR


def draw(results: list[Result], path: Path) -> None:
    """Write the plot of all results, a row for each, as a PNG file."""
    figure = Figure(figsize=(12, 4 * len(results)), layout="constrained")
    for result, (left, right) in zip(
        results, figure.subplots(len(results), 2, squeeze=False), strict=True
    ):
        draw_losses(result, left)
        draw_step_times(result, right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_losses(result: Result, axes: Axes) -> None:
    """The loss curves of torch and of fusedopt, one over the other."""
    reference, ours = result.trainings[result.reference].losses, result.trainings[OURS].losses
    steps = range(1, len(ours) + 1)
    axes.plot(steps, reference, color=TORCH_COLOUR, linewidth=5, label=result.reference)
    axes.plot(steps, ours, color=OUR_COLOUR, linewidth=1, label=OURS)
    if OURS_LOSS in result.trainings:
        with_loss = result.trainings[OURS_LOSS].losses
        axes.plot(steps, with_loss, ":", color="black", linewidth=1, label=OURS_LOSS)
    difference = max(result.difference(name) for name in result.ours)
    axes.set_title(f"{result.task.name}: losses differ by at most {difference:.1e}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_step_times(result: Result, axes: Axes) -> None:
    """A bar for each implementation's median step, a line for half of all steps."""
    names = list(result.trainings)
    medians = [1e3 * training.step_median for training in result.trainings.values()]
    quartiles = [training.step_quartiles for training in result.trainings.values()]
    errors = [
        [median - 1e3 * low for median, (low, _) in zip(medians, quartiles, strict=True)],
        [1e3 * high - median for median, (_, high) in zip(medians, quartiles, strict=True)],
    ]
    colours = [OUR_COLOUR if name in ALL_OURS else TORCH_COLOUR for name in names]
    bars = axes.barh(names, medians, xerr=errors, color=colours, ecolor="#404040")
    axes.bar_label(bars, fmt="%.3f ms", padding=4)
    axes.invert_yaxis()
    axes.set_xlim(right=1.25e3 * max(high for _, high in quartiles))  # room for the numbers
    axes.set_title(f"{result.task.name}: {result.task.optimizer} step, median")
    axes.set_xlabel("ms (the line spans the middle half of all steps)")
