"""Checkpoints between two processes: broadcast by rank 0, gathered on it, and in one folder."""

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import (
    CLASSES_AND_KINDS,
    OPTIONS,
    Run,
    assert_goes_on,
    assert_left_alone,
    everything,
    got,
    load_folder,
    no_scalars,
    of_kind,
    save_folder,
    two_of,
)
from support.optimizers import Options
from support.storing import RICHEST_IN_CODES
from support.training import RICHEST_IN_TORCH, Case
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

FULL = OPTIONS["full"]
COVERED = [parameter.values for parameter in CLASSES_AND_KINDS]


def put_from_rank_0(rank: int, run: Run, checkpoint: dict[str, Any], options: Options) -> None:
    """Of the other rank torch takes nothing; set_state_dict would take that for no model."""
    given = StateDictOptions(**options, broadcast_from_rank0=True)
    if rank != 0:
        checkpoint = {"model": {}, "optim": {}}
    set_optimizer_state_dict(run.model, run.optimizer, checkpoint["optim"], options=given)
    set_model_state_dict(run.model, checkpoint["model"], options=given)


def broadcast(rank: int, case: Case, kind: str, options: str, folder: Path) -> None:
    """Rank 1 has nothing of the checkpoint, other weights, and has already taken steps."""
    make = of_kind(case, kind)
    run, resumed = make(), make(seed=1 + rank)
    run.train(range(3))
    resumed.train(range(50, 50 + 2 * rank))
    given = OPTIONS[options]
    put_from_rank_0(rank, resumed, got(run, **given), given)
    assert_goes_on(resumed, run, range(3, 5))


def broadcast_torchs(rank: int, case: Case, direction: str, folder: Path) -> None:
    make, make_other = two_of(case, direction)
    run, other = make(), make_other(seed=1 + rank)
    run.train(range(3))
    put_from_rank_0(rank, other, got(run, **FULL), FULL)
    ours, theirs = (other, run) if direction == "from torch" else (run, other)
    assert_goes_on(ours, theirs, range(3, 5), exact=False)


def broadcast_floats_to_codes(rank: int, case: Case, folder: Path) -> None:
    """Refused on both ranks, as the codes were not in it."""
    make, make_other = (of_kind(case, "int8", k, groups=no_scalars) for k in ("default", "int8"))
    run, other = make(), make_other(seed=1)
    run.train(range(3))
    other.train(range(2))
    before = everything(other)
    with pytest.raises(ValueError, match=case.ours.__name__):
        put_from_rank_0(rank, other, got(run, **FULL), FULL)
    assert_left_alone(other, before)


def gathered(rank: int, case: Case, kind: str, folder: Path) -> None:
    """With full_state_dict and cpu_offload only rank 0 has it."""
    run = of_kind(case, kind)()
    run.train(range(3))
    checkpoint = got(run, **OPTIONS["full-offload"])
    assert bool(checkpoint["optim"]) == bool(checkpoint["model"]) == (rank == 0)


def in_one_folder(rank: int, case: Case, kind: str, folder: Path) -> None:
    make = of_kind(case, kind)
    run, resumed = make(), make(seed=1)
    run.train(range(3))
    save_folder(run, folder)
    load_folder(resumed, folder)
    assert_goes_on(resumed, run, range(3, 5))


def all_cases() -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    cases: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}
    for case, kind in COVERED:
        for options in ("full", "full-offload"):
            if kind != "default" and options != "full":
                continue
            cases[f"broadcast {options} {kind} {case}"] = broadcast, (case, kind, options)
        cases[f"gathered {kind} {case}"] = gathered, (case, kind)
        cases[f"folder {kind} {case}"] = in_one_folder, (case, kind)
    for case in RICHEST_IN_TORCH:
        for direction in ("from torch", "to torch"):
            cases[f"broadcast {direction} {case}"] = broadcast_torchs, (case, direction)
    for case in RICHEST_IN_CODES:
        if "step" not in case.row.keys(case.options):
            continue  # rank 1 gets nothing at all then, and cannot tell
        cases[f"broadcast floats to codes {case}"] = broadcast_floats_to_codes, (case,)
    return cases


def rank_of_two(rank: int, folder: Path, queue: Any) -> None:
    """Runs all cases in one of the processes, and tells which failed."""
    torch.set_num_threads(1)
    failed = {}
    for number, (name, (function, arguments)) in enumerate(all_cases().items()):
        # A group for each: where one rank fails, the other does not wait, and both go on.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / f'store{number}'}",
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=20),
        )
        try:
            function(rank, *arguments, folder / str(number))
            dist.barrier()
        except BaseException:
            failed[name] = traceback.format_exc(limit=-4)
        dist.destroy_process_group()
    queue.put((rank, failed))


def test_two_ranks(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=rank_of_two, args=(rank, tmp_path, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    report = [
        f"rank {rank}, {name}:\n{error}"
        for rank, failed in sorted(results.items())
        for name, error in failed.items()
    ]
    assert not report, "\n".join(report)
