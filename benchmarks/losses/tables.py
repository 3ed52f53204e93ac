"""The tables and the plot of the benchmark of losses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from benchmarks.losses.cases import (
    BEST_CHUNKED,
    CACHED,
    CHUNKED,
    COMPILED,
    FLOORS,
    FRESH,
    IN_PLACE,
    MSE,
    REUSED,
    TORCH,
)
from benchmarks.report.case import OURS, WALL, Json, duration, percent, ratio, times, where
from benchmarks.report.colours import OUR_COLOUR, TORCH_COLOUR
from benchmarks.report.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
# The order of rows and bars; others come behind.
ORDER = (OURS, IN_PLACE, TORCH, COMPILED, CHUNKED, BEST_CHUNKED)
COLOURS = {OURS: OUR_COLOUR, IN_PLACE: OUR_COLOUR, **dict.fromkeys(FLOORS, "#15803d")}
# Of bars, by how the process got its memory.
OPACITY = {FRESH: 1.0, REUSED: 0.5, CACHED: 1.0}


def names_of(case: Json) -> list[str]:
    """Who was measured in any setting, in the order of rows."""
    found = dict.fromkeys(name for one in case["settings"].values() for name in one[WALL])
    others = [name for name in found if name not in (*ORDER, *FLOORS)]
    return [name for name in (*ORDER, *others, *FLOORS) if name in found]


def settings_of(cases: list[Json]) -> list[str]:
    """In which ways processes got their memory."""
    return list(dict.fromkeys(setting for case in cases for setting in case["settings"]))


def figures(case: Json, name: str, settings: list[str]) -> list[str]:
    """Median, middle half and ratio of each setting."""
    cells = []
    for setting in settings:
        one = case["settings"].get(setting, {WALL: {}})
        seconds = one[WALL].get(name)
        if seconds is None:
            cells += ["-", "-", "-"]
        else:
            several = seconds if len(seconds) > 1 else 2 * seconds
            low, _, high = quantiles(several, n=4, method="inclusive")
            half = f"{duration(low)} to {duration(high)}"
            cells += [duration(median(seconds)), half, times(ratio(one, name, OURS))]
    return cells


def head_of(settings: list[str]) -> list[str]:
    """The columns of ``figures``."""
    return [column for setting in settings for column in (setting, "middle half", f"of {OURS}'s")]


def first(case: Json, key: str, name: str) -> int | None:
    """What is the same in all settings, from the first that has it."""
    found = (one[key].get(name) for one in case["settings"].values())
    return next((value for value in found if value is not None), None)


def peak_share(case: Json, name: str) -> str:
    """The peak of memory, as a share of the logits' bytes."""
    value = first(case, "peak", name)
    return "-" if value is None or case["loss"] == MSE else percent(value / case["bytes"])


def case_rows(results: Json) -> list[list[str]]:
    """A row for each implementation of each case."""
    settings = settings_of(results["cases"])
    return [
        [
            case["loss"],
            case["size"] if case["dtype"] == "float32" else f"{case['size']} {case['dtype']}",
            name,
            *figures(case, name, settings),
            peak_share(case, name),
        ]
        for case in results["cases"]
        for name in names_of(case)
    ]


def training_rows(results: Json) -> list[list[str]]:
    """A row for each way to train each model."""
    settings = settings_of(results["training"])
    return [
        [
            f"{case['name']}, {case['batch']}",
            name,
            *figures(case, name, settings),
            f"{(first(case, 'peak', name) or 0) / 2**20:,.0f} MiB",
        ]
        for case in results["training"]
        for name in names_of(case)
    ]


def notes(results: Json) -> str:
    """How implementations were set up, and which were left out, each once."""
    lines = []
    for case in results["cases"]:
        for setting, one in case["settings"].items():
            for name, note in one["notes"].items():
                lines.append(f"- {case['name']}, {setting}, {name}: {note}.\n")
            for name, reason in one["skipped"].items():
                lines.append(f"- {case['name']}, {setting}, {name}: not measured, {reason}.\n")
    lines += measured_again((*results["cases"], *results["training"]))
    text = "".join(dict.fromkeys(lines))
    return f"{text}\n" if text else ""


def measured_again(cases: Iterable[Json]) -> list[str]:
    """A line for each that was measured at another commit than the others."""
    return [
        f"- {case['name']}: measured at commit {again['commit'][:10]}, {again['date'][:10]}.\n"
        for case in cases
        if (again := case.get("again"))
    ]


def tables(results: Json) -> str:
    """Times and memory of losses and of whole iterations, as Markdown."""
    text = ""
    if results["cases"]:
        columns = head_of(settings_of(results["cases"]))
        head = ["loss", "size", "implementation", *columns, "peak, of the logits"]
        text += f"{table(head, case_rows(results), left=3)}\n"
    if results["training"]:
        columns = head_of(settings_of(results["training"]))
        head = ["iteration of", "loss and AdamW of", *columns, "peak"]
        text += f"{table(head, training_rows(results), left=2)}\n"
    return f"{text}{notes(results)}{where({**results, 'cases': []})}.\n"


def short_table(results: Json) -> str:
    """Each case in a row, as Markdown: ours and torch's, for the README."""
    settings = settings_of(results["cases"])
    head = ["loss", "size", OURS, *(f"{TORCH}, {one}" for one in settings)]
    head += [f"in place: {TORCH}, {one}" for one in settings]
    head += ["peak", "in place", f"of {TORCH}"]
    rows = []
    for case in results["cases"]:
        of_settings = [case["settings"].get(one, {WALL: {}}) for one in settings]
        seconds = of_settings[0][WALL].get(OURS)
        rows.append(
            [
                case["loss"],
                case["size"] if case["dtype"] == "float32" else f"{case['size']} {case['dtype']}",
                "-" if seconds is None else duration(median(seconds)),
                *(times(ratio(one, TORCH, OURS)) for one in of_settings),
                *(times(ratio(one, TORCH, IN_PLACE)) for one in of_settings),
                *(peak_share(case, name) for name in (OURS, IN_PLACE, TORCH)),
            ]
        )
    again = "".join(measured_again(results["cases"]))
    again = f"{again}\n" if again else ""
    return f"{table(head, rows, left=2)}\n{again}{where({**results, 'cases': []})}.\n"


# -- plot ---------------------------------------------------------------------------------------


def draw(results: Json, path: Path) -> None:
    """Write the plot of times relative to ours, a panel for each case, as a PNG file."""
    from matplotlib.figure import Figure  # the only part that needs it
    from matplotlib.patches import Patch

    cases = results["cases"]
    settings = settings_of(cases)
    rows = max(1, -(-len(cases) // COLUMNS))
    figure = Figure(figsize=(5 * COLUMNS, 0.6 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for case, axes in zip(cases, panels, strict=False):
        draw_case(case, settings, axes)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    figure.suptitle("Forward and backward pass: time relative to fusedopt's (medians)")
    patches = [
        Patch(color="#505050", alpha=OPACITY[one], label=f"{one} memory") for one in settings
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_case(case: Json, settings: list[str], axes: Axes) -> None:
    """A bar for each implementation and setting, on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = names_of(case)
    height = 0.8 / len(settings)
    drawn: list[float] = [1.0]
    for place, setting in enumerate(settings):
        one = case["settings"].get(setting, {WALL: {}})
        for row, name in enumerate(names):
            value = ratio(one, name, OURS)
            if value is None:
                continue
            drawn.append(value)
            y = row + (place - (len(settings) - 1) / 2) * height
            colour = COLOURS.get(name, TORCH_COLOUR if name != TORCH else "#808080")
            axes.barh(y, value - 1, height, left=1, color=colour, alpha=OPACITY[setting])
            text = duration(median(one[WALL][name])) if name == OURS else times(value)
            at = (max(value, 1.0), y)
            axes.annotate(text, at, (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_xscale("log")
    low, high = min(drawn), max(drawn)
    wide = high > 50 * low
    axes.set_xlim(0.8 * low, 1.5 * high * (high / low) ** 0.2)  # room for the labels
    axes.axvline(1, color=OUR_COLOUR, linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(case["name"], fontsize=10)
