"""Trials on several ranks over gloo, or one over NCCL, all in turn in the same processes."""

import datetime
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .forks import output_of_program

Trial = Callable[[], None]
DEVICE = os.environ.get("RANKS_ON", "cpu")
"""What trials are on."""
# A trial takes far less; a rank that waits for ever says where.
SECONDS = 120


def _be_rank(rank: int, world: int, ports: int, folder: Path, trials: Mapping[str, Trial]) -> None:
    """Never returns. What goes wrong lands in a file of the rank's, the trial's name in another."""
    status = 1
    with (folder / f"{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.enable()
        # Of threads without Python, such as those of a process group, that one says nothing.
        torch._C._set_print_stack_traces_on_fatal_signal(True)
        try:
            torch.set_num_threads(1)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            port = int.from_bytes(os.read(ports, 2), "little")
            dist.init_process_group(
                "gloo" if DEVICE == "cpu" else "nccl",
                store=dist.TCPStore("127.0.0.1", port, world, is_master=False),
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=SECONDS),
            )
            for name, trial in trials.items():
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                (folder / f"{rank}.trial").write_text(name)
                log.seek(0)
                log.truncate()
                trial()
                dist.barrier()
            status = 0
        except BaseException:
            log.flush()
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)


def _on_ranks(world: int, trials: Mapping[str, Trial]) -> tuple[str, str] | None:
    """The first trial that goes wrong, and what does, in words; None: none."""
    ports, to_ranks = os.pipe()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ranks: dict[int, int] = {}
        for rank in range(world):
            child = os.fork()
            if child == 0:
                _be_rank(rank, world, ports, folder, trials)
            ranks[child] = rank
        # On a free port. Its thread may hold locks, which a fork would then hold for ever.
        store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        os.write(to_ranks, store.port.to_bytes(2, "little") * world)
        said: list[str] = []
        trial = ""
        while ranks:
            child, status = os.wait()
            rank = ranks.pop(child)
            if status == 0:
                continue
            text = (folder / f"{rank}.txt").read_text(errors="replace")
            begun = folder / f"{rank}.trial"
            trial = trial or (begun.read_text() if begun.exists() else next(iter(trials)))
            said.append(f"rank {rank} of {world}: status {status}\n{text[-20000:]}")
            # Others may wait for it.
            time.sleep(1)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        os.close(ports)
        os.close(to_ranks)
        return (trial, "\n".join(said)) if said else None


def run_trials(world: int, trials: Mapping[str, Trial]) -> None:
    """Print the trials that went wrong, and what did, as JSON."""
    # What is imported with the first optimizer of a process.
    torch.optim.SGD([torch.zeros(3, requires_grad=True)]).step()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    wrong: dict[str, str] = {}
    left = dict(trials)
    while left and (found := _on_ranks(world, left)) is not None:
        name, wrong[name] = found
        names = [*left]
        left = {name: left[name] for name in names[names.index(name) + 1 :]}
    print(json.dumps(wrong))


def check(file: str, world: int, among: str = "", env: Mapping[str, str] | None = None) -> None:
    """Run a test module's trials(world) on so many ranks, those with this in their names."""
    path = Path(file)
    program = (
        f"import {path.stem} as module; from support.ranks import run_trials; "
        f"trials = module.trials({world}); "
        f"run_trials({world}, {{k: trials[k] for k in trials if {among!r} in k}})"
    )
    # Libraries print when they are imported.
    wrong = json.loads(output_of_program(program, path.parent, env).splitlines()[-1])
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def check_on_a_gpu(file: str) -> None:
    """Run those of one rank, of which a GPU is, on it."""
    check(file, 1, env={"RANKS_ON": "cuda"})


def worlds(few: Mapping[int, str], every: Iterable[int]) -> pytest.MarkDecorator:
    """Trials of few worlds with a part of their names, and all of every world where it is slow."""
    given = [pytest.param(world, among, id=f"{world}-{among}") for world, among in few.items()]
    given += [pytest.param(world, "", id=str(world), marks=pytest.mark.slow) for world in every]
    return pytest.mark.parametrize(("world", "among"), given)
