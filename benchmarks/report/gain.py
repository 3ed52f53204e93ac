"""The picture of README.md: what whole iterations take, and bytes a parameter, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import fusedopt
from benchmarks.report.case import ITERATION, OPTIMIZER, Json
from benchmarks.report.training_figure import draw_workload

WIDTH = 1024  # of the matrix whose bytes are counted
BEFORE = "AdamW in float32"
# Each with the dtype of the weights, the options, and whether gradients are freed.
CHOICES: dict[str, tuple[torch.dtype, dict[str, Any], bool]] = {
    BEFORE: (torch.float32, {}, False),
    "+ int8 states": (torch.float32, {"state_dtype": "int8"}, False),
    "+ bfloat16 with masters": (torch.bfloat16, {"state_dtype": "int8", "master_bits": 32}, False),
    "+ GradientRelease": (torch.bfloat16, {"state_dtype": "int8", "master_bits": 32}, True),
}
PARTS = {
    "parameters": "#57534e",
    "masters": "#a8a29e",
    "gradients": "#fdba74",
    "states": "#c2410c",
}


def bytes_of(dtype: torch.dtype, options: dict[str, Any], freed: bool) -> dict[str, float]:
    """Bytes for each parameter of a matrix after a step, by what they are for."""
    param = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=dtype))
    optimizer = fusedopt.AdamW([param], **options)
    release = fusedopt.GradientRelease(optimizer) if freed else None
    param.sum().backward()
    optimizer.step()
    assert (param.grad is None) == (release is not None)
    total = fusedopt.memory_report(optimizer).total
    return {part: getattr(total, part) / param.numel() for part in PARTS}


def draw_gain(training: list[Json], path: Path) -> None:
    """Write the picture as a PNG file: the first and the last workload, and the bytes."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    shown = [training[0], training[-1]]
    column = left.subplots(len(shown), 1)
    for workload, axes in zip(shown, column, strict=True):
        draw_workload(without_flat(workload), axes)
        axes.set_title(f"{workload['workload']}, {workload['tensors']} tensors")
        axes.set_xlim(right=1.25 * axes.get_xlim()[1])  # room for the numbers
    column[-1].set_xlabel("ms per iteration (medians)")
    handles, labels = column[0].get_legend_handles_labels()
    left.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    draw_bytes(right.subplots())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def without_flat(workload: Json) -> Json:
    keys = (ITERATION, OPTIMIZER)
    kept = {key: {n: t for n, t in workload[key].items() if "flat" not in n} for key in keys}
    return {**workload, **kept}


def draw_bytes(axes: Axes) -> None:
    """A bar for each choice, of what the bytes of a parameter are for."""
    names = list(CHOICES)
    found = [bytes_of(*choice) for choice in CHOICES.values()]
    begin = [0.0] * len(names)
    for part, colour in PARTS.items():
        widths = [each[part] for each in found]
        ends = axes.barh(names, widths, left=begin, color=colour, label=part)
        begin = [a + b for a, b in zip(begin, widths, strict=True)]
    axes.bar_label(ends, [f"{each:.3g} bytes" for each in begin], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(right=1.25 * max(begin))
    axes.set_xlabel("bytes per parameter")
    axes.legend(loc="lower right", frameon=False)
