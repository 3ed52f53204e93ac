"""Plots of a run: ``python -m benchmarks.report results.json --plots docs/images``."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.report.case import COPY, FLOOR, OURS, WALL, Json, duration, of_what, ratio, where
from benchmarks.report.colours import OUR_COLOUR, TORCH_COLOUR
from benchmarks.report.gain import draw_gain
from benchmarks.report.pages import measured_cases
from benchmarks.report.training_figure import draw_training

COLOURS = {
    OURS: OUR_COLOUR,
    "fusedopt-flat": "#ea8a4c",
    "torch-fused": "#404040",
    "torch-compiled": "#707070",
    "torch-foreach": "#989898",
    "torch-forloop": TORCH_COLOUR,
    "deepspeed-cpu": "#2563eb",
    "torch-optimi": "#0891b2",
    "bitsandbytes": "#7c3aed",
    "bitsandbytes-8bit": "#a78bfa",
    "torchao-8bit": "#16a34a",
}
AXES = {
    "tensors": ("tensors of 256 elements, AdamW", "tensors"),
    "groups": ("groups of one tensor of 1,024 elements, AdamW", "groups"),
    "elements": ("elements in one tensor, AdamW", "elements"),
}
COLUMNS = 3


def measured_on(results: Json) -> str:
    """Where and when, without what was measured again: a title has one line."""
    return where(results).partition(";")[0]


def draw_all(results: Json, folder: Path) -> None:
    """Write all plots for which the results have figures."""
    folder.mkdir(parents=True, exist_ok=True)
    cases, _ = measured_cases(results, rules=False)
    if cases:
        draw_steps(cases, measured_on(results), folder / "steps.png")
    if results.get("scaling"):
        draw_scaling(results, folder / "scaling.png")
    if results.get("training"):
        draw_training(results["training"], folder / "training.png")
        draw_gain(results["training"], folder / "gain.png")


def draw_steps(cases: list[Json], measured: str, path: Path) -> None:
    """A panel for each case: a bar for each implementation, and a line at the floor."""
    rows = -(-len(cases) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for case, axes in zip(cases, panels, strict=False):
        draw_case(case, axes)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    figure.suptitle(f"One optimizer step, median; the line is the floor\n{measured}")
    figure.savefig(path, dpi=100)


def draw_case(case: Json, axes: Axes) -> None:
    """One panel, on a logarithmic axis."""
    names = sorted(
        (name for name in case[WALL] if name not in (COPY, FLOOR)),
        key=lambda name: median(case[WALL][name]),
    )
    seconds = [median(case[WALL][name]) for name in names]
    floor = median(case[WALL][FLOOR])
    bars = axes.barh(names, seconds, color=[COLOURS.get(name, TORCH_COLOUR) for name in names])
    labels = [
        f"{duration(value)}" + ("" if name == OURS else f" ({ratio(case, name, OURS):.2f}x)")
        for name, value in zip(names, seconds, strict=True)
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.axvline(floor, color="#15803d", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(*seconds, floor), 40 * max(seconds))  # room for the labels
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds", fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_title(f"{case['optimizer']} {of_what(case)}", fontsize=10)


def draw_scaling(results: Json, path: Path) -> None:
    """A panel for each axis: the time of a step over its size, and the floor."""
    measured = {case["axis"] for case in results["scaling"]}
    drawn = [(axis, *of_axis) for axis, of_axis in AXES.items() if axis in measured]
    figure = Figure(figsize=(5 * len(drawn), 4.6), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for (axis, title, unit), axes in zip(drawn, panels, strict=True):
        cases = [case for case in results["scaling"] if case["axis"] == axis]
        size = "parameters" if axis == "elements" else "tensors"
        for name in dict.fromkeys(n for case in cases for n in case[WALL] if n != COPY):
            points = [
                (case[size], 1e3 * median(case[WALL][name])) for case in cases if name in case[WALL]
            ]
            style = "--" if name == FLOOR else "o-"
            colour = COLOURS.get(name, "#15803d")
            label = "floor" if name == FLOOR else name
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.set_ylabel("ms per step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(measured_on(results))
    figure.savefig(path, dpi=100)
