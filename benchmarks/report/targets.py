"""What the figures of a run have to be: ``python -m benchmarks.report results.json --targets``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.report.case import (
    FLAT,
    FLOOR,
    GRAPH,
    OURS,
    Json,
    duration,
    of_what,
    on_gpu,
    percent,
    ratios,
    samples,
    shares_of_copy,
    times,
)


@dataclass(frozen=True)
class Target:
    """A figure of one optimizer in one scenario, and what it has to be."""

    optimizer: str
    scenario: str

    def title(self, case: Json) -> str:
        """What is measured; the case is empty where it was not."""
        return f"{self.optimizer} {of_what({'scenario': self.scenario, **case})}"

    def figures(self, case: Json) -> list[float] | None:
        """The figure in each round; None where it was not measured."""
        raise NotImplementedError

    def meets(self, figure: float) -> bool:
        raise NotImplementedError

    def shown(self, figure: float) -> str:
        return times(figure)

    def required(self) -> str:
        raise NotImplementedError

    def row(self, case: Json) -> tuple[list[str], bool]:
        """The cells title, measured and required, and whether it is met."""
        figures = self.figures(case)
        measured = "-" if figures is None else self.shown(median(figures))
        met = figures is not None and self.meets(median(figures))
        return [self.title(case), measured, self.required()], met


@dataclass(frozen=True)
class Faster(Target):
    """How many times as fast fusedopt has to be as the fastest of some implementations."""

    against: tuple[str, ...]
    at_least: float
    implementation: str = OURS

    def title(self, case: Json) -> str:
        ours = "" if self.implementation == OURS else f", {self.implementation}"
        return f"{super().title(case)}{ours} vs {' / '.join(self.against)}"

    def figures(self, case: Json) -> list[float] | None:
        """Those of the implementation that comes closest."""
        every = [ratios(case, name, self.implementation) for name in self.against]
        return min(filter(None, every), key=median, default=None)

    def meets(self, figure: float) -> bool:
        return figure >= self.at_least

    def required(self) -> str:
        return f"at least {self.at_least:g}x"


@dataclass(frozen=True)
class Share(Target):
    """The share of a copy's bandwidth that a step has to reach on the device."""

    at_least: float

    def title(self, case: Json) -> str:
        return f"{super().title(case)}, of the copy's bandwidth"

    def figures(self, case: Json) -> list[float] | None:
        return shares_of_copy(case, OURS)

    def meets(self, figure: float) -> bool:
        return figure >= self.at_least

    def shown(self, figure: float) -> str:
        return f"{100 * figure:.1f}%"

    def required(self) -> str:
        return f"at least {percent(self.at_least)}"


@dataclass(frozen=True)
class Within(Target):
    """How long a step may take, until the device is done."""

    implementation: str
    at_most: float

    def title(self, case: Json) -> str:
        return f"{super().title(case)}, {self.implementation}, wall time"

    def figures(self, case: Json) -> list[float] | None:
        return samples(case, self.implementation)

    def meets(self, figure: float) -> bool:
        return figure <= self.at_most

    def shown(self, figure: float) -> str:
        return duration(figure)

    def required(self) -> str:
        return f"at most {duration(self.at_most)}"


@dataclass(frozen=True)
class OfFloor(Target):
    """How many times as long as the floor a step may take."""

    at_most: float
    implementation: str = OURS

    def title(self, case: Json) -> str:
        return f"{super().title(case)}, {self.implementation}, of the floor's time"

    def figures(self, case: Json) -> list[float] | None:
        return ratios(case, self.implementation, FLOOR)

    def meets(self, figure: float) -> bool:
        return figure <= self.at_most

    def required(self) -> str:
        return f"at most {times(self.at_most)}"


INT8 = "fusedopt-int8"
NOT_FUSED = ("torch-foreach", "torch-forloop")
CPU_TARGETS: tuple[Target, ...] = (
    Faster("AdamW", "1000x1Ki", ("torch-fused",), 18),
    Faster("AdamW", "1000x1Ki", ("deepspeed-cpu",), 17),
    OfFloor("AdamW", "1000x1Ki", 2),
    Faster("AdamW", "1000x1Ki", ("torch-fused",), 30, FLAT),
    OfFloor("AdamW", "1000x1Ki", 1.2, FLAT),
    Faster("AdamW", "500-groups", ("torch-fused",), 14),
    OfFloor("AdamW", "500-groups", 1.6),
    OfFloor("AdamW", "1x64Mi", 1 / 0.95),
    Faster("AdamW", "1x64Mi", ("torch-fused",), 0.97),
    Faster("AdamW", "1x64Mi", ("torch-foreach",), 4),
    Faster("AdamW", "1x64Mi", ("torch-forloop",), 6),
    Faster("SGD", "1x64Mi", ("torch-fused",), 0.97),
    Faster("RMSprop", "1x64Mi", NOT_FUSED, 6),
    Faster("RMSprop", "200x100K", NOT_FUSED, 1.8),
    Faster("AdamW", "ResNet-50", ("torch-fused",), 1),
    Faster("AdamW", "GPT-2-small", ("torch-fused",), 1),
    Faster("AdamW-bf16", "1x64Mi", ("torch-fused",), 1.8),
    Faster("AdamW-clip", "200x100K", ("torch-fused",), 1.5),
    Faster("AdamW", "1x64Mi", ("torch-fused",), 1.4, INT8),
    Faster("AdamW", "1x64Mi", ("bitsandbytes-8bit",), 40, INT8),
    Faster("AdamW", "1x64Mi", ("torchao-8bit",), 35, INT8),
    Faster("AdamW-master", "1x64Mi", ("torch-fused-copies",), 1.7, "fusedopt-32"),
    Faster("SGD", "1x1", ("torch-fused", *NOT_FUSED), 1),
)
GPU_TARGETS: tuple[Target, ...] = (
    Share("AdamW", "1x1Gi", 0.97),
    Share("SGD", "1x1Gi", 0.97),
    Share("RMSprop", "1x1Gi", 0.97),
    Faster("AdamW", "1x1Gi", ("torch-fused",), 1.05),
    Faster("SGD", "1x1Gi", ("torch-fused",), 1.05),
    Faster("RMSprop", "1x1Gi", ("torch-foreach",), 2.5),
    Faster("AdamW-bf16", "Llama-3-8B", ("torch-fused",), 1.2),
    Within("AdamW", "1000x1Ki", OURS, 100e-6),
    Within("AdamW", "1000x1Ki", FLAT, 20e-6),
    Within("AdamW", "1000x1Ki", GRAPH, 20e-6),
    Faster("AdamW", "ResNet-50", ("torch-fused",), 1.8),
    Faster("SGD", "ResNet-50", ("torch-fused",), 2.5),
    Faster("AdamW-pipeline", "ResNet-50", ("torch-fused",), 1.5),
    Faster("AdamW-pipeline", "Llama-3-8B", ("torch-fused",), 1.5),
)
ALLOCATED_AT_MOST = 0  # bytes, in a step after the first, in every case
IMPORT_AT_MOST = 0.05  # seconds, beyond torch


def allocated_row(results: Json) -> tuple[list[str], bool]:
    """The same for the memory that steps allocate, in all cases."""
    allocated = [
        count
        for case in results["cases"]
        for name, count in case["allocated"].items()
        if name in (OURS, FLAT)
    ]
    title = f"allocated during a step after the first, {OURS} and {FLAT}, all cases"
    measured = f"{max(allocated):,} bytes" if allocated else "-"
    met = bool(allocated) and max(allocated) <= ALLOCATED_AT_MOST
    return [title, measured, f"at most {ALLOCATED_AT_MOST} bytes"], met


def import_row(results: Json) -> tuple[list[str], bool]:
    """The same for the time to import fusedopt."""
    taken = results.get("import_seconds")
    measured = median(taken) if taken else None
    met = measured is not None and measured <= IMPORT_AT_MOST
    return ["import beyond torch", duration(measured), f"at most {duration(IMPORT_AT_MOST)}"], met


def targets_of(results: Json) -> Iterator[tuple[Target, Json]]:
    """Each target for such a device, and its case, which is empty where none was measured."""
    cases = {(case["optimizer"], case["scenario"]): case for case in results["cases"]}
    for target in GPU_TARGETS if on_gpu(results) else CPU_TARGETS:
        yield target, cases.get((target.optimizer, target.scenario), {})


def target_rows(results: Json) -> list[tuple[list[str], bool]]:
    """For each target the cells title, measured and required, and whether it is met."""
    rows = [target.row(case) for target, case in targets_of(results)]
    rows.append(allocated_row(results))
    return rows if on_gpu(results) else [*rows, import_row(results)]
