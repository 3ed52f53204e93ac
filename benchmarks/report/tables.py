"""Tables of everything that one run measured: its figures, memory, targets and training."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median, quantiles

from benchmarks.report.case import (
    COPY,
    DEFAULT,
    DEVICE,
    FLAT,
    FLOOR,
    FUSED,
    HOST,
    ITERATION,
    OPTIMIZER,
    OURS,
    WALL,
    Json,
    of_what,
    on_gpu,
    percent,
    ratio,
    samples,
    share_of_copy,
    times,
    where,
)
from benchmarks.report.targets import target_rows

TRAINED = (DEFAULT, FUSED, OURS, FLAT)  # the columns of the table of training iterations
GPU_TIMES = """\
Three times of a step. On the device: between CUDA events, with the device kept waiting until the
host has enqueued what is timed. Wall: in a row of steps, until the device is done. Host: until the
call returns. `of the copy` is the bytes that a step must move over its time on the device, as a
share of what a copy of as many bytes reaches (of 8 GiB where they are more), timed in the same
rounds. `-graph` is a replay of a CUDA graph. `AdamW-pipeline` is all that follows a backward pass
of a scaled loss, one call at a time: a GradScaler's unscaling, clipping by the norm, the step, the
scaler's update, and `zero_grad()`.
"""
CPU_HEAD = ("median ms", "quartiles ms", "time/fusedopt", "of the floor", "GB/s")
GPU_HEAD = (
    *("device ms", "quartiles ms", "wall ms", "quartiles ms", "host ms"),
    *("device/fusedopt", "wall/fusedopt", "of the copy", "GB/s"),
)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> str:
    """A Markdown table whose first columns are aligned to the left and the others to the right."""
    head = list(head)
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])


def quartiles(seconds: list[float]) -> str:
    """The middle half, in milliseconds."""
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return f"{1e3 * low:.4g} to {1e3 * high:.4g}"


def milliseconds(seconds: list[float] | None) -> str:
    """The median, in milliseconds."""
    return "-" if seconds is None else f"{1e3 * median(seconds):.4g}"


def cpu_row(case: Json, name: str) -> list[str]:
    """The figures of an implementation."""
    seconds = case[WALL][name]
    step_bytes = case["parameters"] * case["bytes_per_parameter"]
    return [
        milliseconds(seconds),
        quartiles(seconds),
        times(ratio(case, name, OURS)),
        percent(ratio(case, FLOOR, name)),
        f"{step_bytes / median(seconds) / 1e9:.1f}",
    ]


def gpu_row(case: Json, name: str) -> list[str]:
    """The figures of an implementation; those of the copies are of the bytes that they move."""
    step_bytes = case["parameters"] * case["bytes_per_parameter"]
    moved = case["memory_bytes"] if name in (COPY, FLOOR) else step_bytes
    return [
        milliseconds(case[DEVICE][name]),
        quartiles(case[DEVICE][name]),
        milliseconds(case[WALL][name]),
        quartiles(case[WALL][name]),
        milliseconds(case[HOST][name]),
        times(ratio(case, name, OURS, DEVICE)),
        times(ratio(case, name, OURS)),
        "-" if name in (COPY, FLOOR) else percent(share_of_copy(case, name)),
        f"{moved / median(case[DEVICE][name]) / 1e9:.1f}",
    ]


def markdown(results: Json) -> str:
    """Every measured figure of a run."""
    gpu = on_gpu(results)
    rows = []
    notes = [f"- {name}: not measured, {reason}.\n" for name, reason in absent(results).items()]
    for case in results["cases"]:
        for name in case[WALL]:
            figures = gpu_row(case, name) if gpu else cpu_row(case, name)
            memory = memory_cells(case, name)
            rows.append([case["optimizer"], of_what(case), name, *figures, *memory])
        for name, reason in case["skipped"].items():
            notes.append(f"- {name}, {case['optimizer']}: not measured, {reason}.\n")
    notes += [f"- Left out: {reason}.\n" for reason in results.get("left_out", ())]
    notes += [f"- FAILED: {failure}.\n" for failure in results.get("failures", ())]
    head = ["optimizer", "tensors", "implementation", *(GPU_HEAD if gpu else CPU_HEAD)]
    rounds = [len(taken) for case in results["cases"] for taken in case[WALL].values()] or [0]
    meaning = (
        GPU_TIMES
        if gpu
        else f"`{COPY}` and `{FLOOR}` move the bytes that\na step must move. `time/fusedopt` is "
        "the median of the rounds' ratios, `of the floor` that of\nthe read-modify-write's time to "
        "the step's. "
    )
    return (
        f"# One optimizer step\n\n{where(results)}.\n\n"
        + table([*head, "allocated bytes", "peak bytes/parameter"], rows, left=3)
        + f"\nMedians of {min(rounds)} to {max(rounds)} interleaved rounds. {meaning}"
        + "`allocated bytes`: by torch's allocators during one\nstep after the first; "
        + "`peak bytes/parameter`: the most of them in use at once until the first\nstep was done, "
        + "from nothing on: parameters, gradients, states and whatever else.\n\n"
        + "".join(dict.fromkeys(notes))
    )


def memory_cells(case: Json, name: str) -> list[str]:
    """What an implementation's step allocates, and its peak per parameter."""
    allocated = case["allocated"].get(name)
    peak = case.get("peak", {}).get(name)
    return [
        "-" if allocated is None else f"{allocated:,}",
        "-" if peak is None else f"{peak / case['parameters']:.1f}",
    ]


def absent(results: Json) -> dict[str, str]:
    """Why implementations could not be imported, by name."""
    found: dict[str, str] = results.get("absent", {})
    return found


def memory_table(results: Json) -> str:
    """The peaks of memory of all cases and implementations."""
    rows = [
        [case["optimizer"], of_what(case), name, f"{peak:,}", f"{peak / case['parameters']:.2f}"]
        for case in results["cases"]
        for name, peak in case["peak"].items()
    ]
    return table(["optimizer", "tensors", "implementation", "peak", "per parameter"], rows, left=3)


def target_table(results: Json) -> tuple[str, bool]:
    """The table of targets, and whether all are met."""
    rows = target_rows(results)
    shown = [[*cells, "yes" if met else "NO"] for cells, met in rows]
    head = ["target", "measured", "required", "met"]
    return table(head, shown, left=1), all(met for _, met in rows)


def share_of_iteration(workload: Json, name: str) -> float | None:
    """Median over the rounds of the optimizer's part; None where it was not measured."""
    parts, wholes = samples(workload, name, OPTIMIZER), samples(workload, name, ITERATION)
    if parts is None or wholes is None:
        return None
    return median(part / whole for part, whole in zip(parts, wholes, strict=True))


def training_rows(training: list[Json]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: iterations' times, the optimizer's shares, fusedopt's speed-ups."""
    shared, compared = (DEFAULT, FUSED, OURS), (DEFAULT, FUSED)
    head = [
        *("workload", "parameters", "tensors"),
        *(f"{name} ms" for name in TRAINED),
        *(f"optimizer, {name}" for name in shared),
        *(f"{OURS} vs {name}" for name in compared),
    ]
    rows = [
        [
            workload["workload"],
            f"{workload['parameters']:,}",
            str(workload["tensors"]),
            *(milliseconds(samples(workload, name, ITERATION)) for name in TRAINED),
            *(percent(share_of_iteration(workload, name)) for name in shared),
            *(times(ratio(workload, name, OURS, ITERATION)) for name in compared),
        ]
        for workload in training
    ]
    return head, rows
