"""What all tables and plots share: the keys of results, figures made of them, and their text."""

from __future__ import annotations

from statistics import median
from typing import Any

COPY = "copy"
FLOOR = "read-modify-write"
OURS = "fusedopt"
FLAT = "fusedopt-flat"
GRAPH = "fusedopt-graph"
DEFAULT, FUSED = "torch-default", "torch-fused"

# The keys of a case's samples by what was timed; the last two on GPUs only.
WALL = "seconds"
HOST = "host_seconds"
DEVICE = "device_seconds"
# The keys of the samples of whole training iterations.
ITERATION = "iteration_seconds"
OPTIMIZER = "optimizer_seconds"

Json = dict[str, Any]


def samples(case: Json, name: str, timed: str = WALL) -> list[float] | None:
    """The seconds per call in each round; None where they were not measured."""
    found: list[float] | None = case.get(timed, {}).get(name)
    return found


def ratios(case: Json, name: str, to: str, timed: str = WALL) -> list[float] | None:
    """In each round one time divided by another; None where one was not measured."""
    above, below = samples(case, name, timed), samples(case, to, timed)
    if above is None or below is None:
        return None
    return [a / b for a, b in zip(above, below, strict=True)]


def ratio(case: Json, name: str, to: str, timed: str = WALL) -> float | None:
    """Their median."""
    found = ratios(case, name, to, timed)
    return None if found is None else median(found)


def shares_of_copy(case: Json, name: str) -> list[float] | None:
    """In each round a step's bytes per second on the device, as a share of a copy's."""
    times_copy = ratios(case, COPY, name, DEVICE)
    if times_copy is None:
        return None
    step_bytes: int = case["parameters"] * case["bytes_per_parameter"]
    copied: int = case["memory_bytes"]
    return [each * step_bytes / copied for each in times_copy]


def share_of_copy(case: Json, name: str) -> float | None:
    """Their median."""
    found = shares_of_copy(case, name)
    return None if found is None else median(found)


# What benchmarks/gpu/model.py calls the kernels of these optimizers.
KERNELS = {
    "AdamW": "AdamW float32",
    "SGD": "SGD with momentum float32",
    "RMSprop": "RMSprop float32",
    "AdamW-bf16": "AdamW bfloat16",
    "AdamW-master": "AdamW bfloat16 + master, float32 states",
}
# And these GPUs: others of the same name have another clock or memory.
PREDICTED_DEVICES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
}
LARGE = 1 << 20  # elements of a tensor, with which only the kernel counts


def predicted_share(case: Json, device: str, predictions: list[Json]) -> float | None:
    """The share of a copy's bandwidth that was predicted of large tensors on this GPU."""
    kernel, name = KERNELS.get(case["optimizer"]), PREDICTED_DEVICES.get(device)
    if case["parameters"] < LARGE * case["tensors"]:
        return None
    shares = (one["shares"] for one in predictions if one["kernel"] == kernel)
    return next((each[name] for each in shares if name in each), None)


def of_what(case: Json) -> str:
    """The scenario's name, and its note if it has one."""
    note = case.get("note")
    return f"{case['scenario']} ({note})" if note else str(case["scenario"])


def on_gpu(results: Json) -> bool:
    """Whether a run was on a GPU."""
    return bool(results["provenance"]["device"] != "CPU")


def times(value: float | None) -> str:
    """A ratio as text."""
    if value is None:
        return "-"
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def percent(value: float | None) -> str:
    """A share as text."""
    return "-" if value is None else f"{100 * value:.0f}%"


def duration(seconds: float | None) -> str:
    """A time as text."""
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


# What a run may measure besides cases, and how it is called.
PARTS = {"scaling": "the curves", "training": "training", "import_seconds": "the import"}


def where(results: Json) -> str:
    """One line: on which machine, when, and at which commit the figures were measured."""
    source = results["provenance"]
    commit = f"commit {source['commit'][:10]}" if source["commit"] else "no commit"
    dirty = " with changes" if source["commit"] and source["dirty"] else ""
    when = f"Python {source['python']}, {source['date'][:10]}, {commit}{dirty}"
    if on_gpu(results):
        return (
            f"{source['device']}, a copy: {source['copy_bandwidth'] / 1e12:.2f} TB/s, "
            f"driver {source['driver']}, CUDA {source['cuda']}, torch {source['torch']}, {when}"
        )
    isa = f" ({source['isa']})" if source.get("isa") else ""
    later: dict[str, list[str]] = {}
    for case in results["cases"]:
        if case.get("provenance"):
            name = f"{case['optimizer']} {of_what(case)}"
            later.setdefault(str(case["provenance"]["commit"])[:10], []).append(name)
    for part, provenance in results.get("again", {}).items():
        later.setdefault(str(provenance["commit"])[:10], []).append(PARTS[part])
    again = "".join(
        f"; measured again at commit {commit_of}: {', '.join(names)}"
        for commit_of, names in later.items()
    )
    return (
        f"{source['processor']}{isa}, threads: {source['threads']} of {source['cores']}, "
        f"torch {source['torch']}, {when}{again}"
    )
