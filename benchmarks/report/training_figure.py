"""A plot of whole training iterations: the time of the optimizer, and of the rest."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.case import ITERATION, OPTIMIZER, Json
from benchmarks.report.colours import OUR_COLOUR, TORCH_COLOUR

WIDTH, HEIGHT_OF_TITLE, HEIGHT_OF_BAR = 10, 0.8, 0.32  # in inches


def draw_training(training: list[Json], path: Path) -> None:
    """Write the plot of all workloads, one below the other, as a PNG file."""
    heights = [HEIGHT_OF_TITLE + HEIGHT_OF_BAR * len(one[ITERATION]) for one in training]
    figure = Figure(figsize=(WIDTH, 0.7 + sum(heights)), layout="constrained")
    column = figure.subplots(len(training), 1, squeeze=False, height_ratios=heights)[:, 0]
    for workload, axes in zip(training, column, strict=True):
        draw_workload(workload, axes)
    column[-1].set_xlabel("ms per iteration (medians)")
    handles, labels = column[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_workload(workload: Json, axes: Axes) -> None:
    """A bar for each implementation's median iteration, its end the median optimizer part."""
    names = list(workload[ITERATION])
    wholes = [1e3 * median(workload[ITERATION][name]) for name in names]
    parts = [1e3 * median(workload[OPTIMIZER][name]) for name in names]
    rests = [whole - part for whole, part in zip(wholes, parts, strict=True)]
    axes.barh(names, rests, color=TORCH_COLOUR, label="forward and backward pass")
    ends = axes.barh(names, parts, left=rests, color=OUR_COLOUR, label="step and zero_grad")
    labels = [
        f"{whole:.4g} ms, optimizer {part:.3g} ms"
        for whole, part in zip(wholes, parts, strict=True)
    ]
    axes.bar_label(ends, labels, padding=4)
    axes.invert_yaxis()
    axes.set_xlim(right=1.4 * max(wholes))  # room for the numbers
    axes.set_title(
        f"{workload['workload']}: {workload['parameters']:,} parameters in "
        f"{workload['tensors']} tensors, batch: {workload['batch']}"
    )
