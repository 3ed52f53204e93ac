"""What the figures of a run have to be: ``python -m benchmarks.report results.json --targets``."""

from __future__ import annotations

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
    ratio,
    samples,
    share_of_copy,
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

    def row(self, case: Json) -> tuple[list[str], bool]:
        """The cells title, measured and required, and whether it is met."""
        raise NotImplementedError


@dataclass(frozen=True)
class Faster(Target):
    """How many times as fast fusedopt has to be as the fastest of some implementations."""

    against: tuple[str, ...]
    at_least: float
    implementation: str = OURS

    def row(self, case: Json) -> tuple[list[str], bool]:
        ratios = [ratio(case, name, self.implementation) for name in self.against]
        measured = min((value for value in ratios if value is not None), default=None)
        ours = "" if self.implementation == OURS else f", {self.implementation}"
        title = f"{self.title(case)}{ours} vs {' / '.join(self.against)}"
        met = measured is not None and measured >= self.at_least
        return [title, times(measured), f"at least {self.at_least:g}x"], met


@dataclass(frozen=True)
class Share(Target):
    """The share of a copy's bandwidth that a step has to reach on the device."""

    at_least: float

    def row(self, case: Json) -> tuple[list[str], bool]:
        measured = share_of_copy(case, OURS)
        met = measured is not None and measured >= self.at_least
        title = f"{self.title(case)}, of the copy's bandwidth"
        shown = "-" if measured is None else f"{100 * measured:.1f}%"
        return [title, shown, f"at least {percent(self.at_least)}"], met


@dataclass(frozen=True)
class Within(Target):
    """How long a step may take, until the device is done."""

    implementation: str
    at_most: float

    def row(self, case: Json) -> tuple[list[str], bool]:
        found = samples(case, self.implementation)
        measured = median(found) if found else None
        met = measured is not None and measured <= self.at_most
        title = f"{self.title(case)}, {self.implementation}, wall time"
        return [title, duration(measured), f"at most {duration(self.at_most)}"], met


@dataclass(frozen=True)
class OfFloor(Target):
    """How many times as long as the floor a step may take."""

    at_most: float
    implementation: str = OURS

    def row(self, case: Json) -> tuple[list[str], bool]:
        measured = ratio(case, self.implementation, FLOOR)
        met = measured is not None and measured <= self.at_most
        title = f"{self.title(case)}, {self.implementation}, of the floor's time"
        return [title, times(measured), f"at most {times(self.at_most)}"], met


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


def target_rows(results: Json) -> list[tuple[list[str], bool]]:
    """For each target the cells title, measured and required, and whether it is met."""
    cases = {(case["optimizer"], case["scenario"]): case for case in results["cases"]}
    targets = GPU_TARGETS if on_gpu(results) else CPU_TARGETS
    rows = [target.row(cases.get((target.optimizer, target.scenario), {})) for target in targets]
    rows.append(allocated_row(results))
    return rows if on_gpu(results) else [*rows, import_row(results)]
