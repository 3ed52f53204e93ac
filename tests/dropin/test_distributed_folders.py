"""Checkpoints that torch.distributed.checkpoint writes into a folder and reads in place: of ours,
to and from torch.optim, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.distributed import (
    CLASSES_AND_KINDS,
    OPTIONS,
    Run,
    assert_goes_on,
    assert_left_alone,
    everything,
    load_folder,
    make_states,
    of_kind,
    put,
    save_folder,
    start,
    two_of,
    world_of_one,
)
from support.optimizers import Options
from support.storing import INT8, LAID, RICHEST_IN_CODES
from support.training import RICHEST, RICHEST_IN_TORCH, Case, assert_same_bits, params_of
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Without a process group it says each time that there is none.
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
]

classes_and_kinds = pytest.mark.parametrize(("case", "kind"), CLASSES_AND_KINDS)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_class_in_torch = pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
both_ways = pytest.mark.parametrize("direction", ["from torch", "to torch"])
in_codes = pytest.mark.parametrize("case", RICHEST_IN_CODES, ids=str)
USED = ["nothing", "full", "flatten-offload"]


@classes_and_kinds
@pytest.mark.parametrize("name", USED)
def test_resumes_to_the_last_bit(case: Case, kind: str, name: str, tmp_path: Path) -> None:
    make, options = of_kind(case, kind), OPTIONS[name]
    run, resumed = make(), make(seed=1)
    run.train(range(3))
    save_folder(run, tmp_path, **options)
    load_folder(resumed, tmp_path, **options)
    assert_goes_on(resumed, run, range(3, 5))


@every_class_in_torch
@both_ways
@pytest.mark.parametrize("name", USED)
def test_exchange_with_torch(case: Case, direction: str, name: str, tmp_path: Path) -> None:
    (make, make_other), options = two_of(case, direction), OPTIONS[name]
    run, other = make(), make_other(seed=1)
    run.train(range(3))
    save_folder(run, tmp_path, **options)
    load_folder(other, tmp_path, **options)
    ours, theirs = (other, run) if direction == "from torch" else (run, other)
    assert_goes_on(ours, theirs, range(3, 5), exact=False)


@pytest.mark.parametrize(
    ("case", "kind", "no_dist"),
    [
        pytest.param(*parameter.values, no_dist, id=f"{parameter.id}-{no_dist}")
        for parameter in CLASSES_AND_KINDS
        for no_dist in (False, True)
        if "adamw" in parameter.id and (not no_dist or "default" in parameter.id)
    ],
)
def test_in_a_process_group(case: Case, kind: str, no_dist: bool, tmp_path: Path) -> None:
    """In the background, too: what is saved is what there was when it was asked for."""
    make = of_kind(case, kind)
    run, control, resumed = make(), make(), make(seed=1)
    for each in (run, control):
        each.train(range(3))
    first, second = tmp_path / "first", tmp_path / "second"
    with world_of_one(tmp_path):
        model, optim = get_state_dict(run.model, run.optimizer)
        checkpoint = {"model": model, "optim": optim}
        future = dcp.async_save(checkpoint, checkpoint_id=first, no_dist=no_dist)
        run.train(range(50, 53))
        future.result()
        load_folder(resumed, first, no_dist)
        assert_goes_on(resumed, control, range(3, 5))
        save_folder(resumed, second, no_dist)
        load_folder(run, second, no_dist)
        assert_goes_on(run, resumed, range(5, 7))


@classes_and_kinds
def test_optimizers_themselves(case: Case, kind: str, tmp_path: Path) -> None:
    """torch reads into the states that there are, so they have to be made before."""
    make = of_kind(case, kind)
    run, resumed = make(), make(seed=1)
    run.train(range(3))
    make_states(resumed)
    for each, do in ((run, dcp.save), (resumed, dcp.load)):
        do({"model": each.model, "optim": each.optimizer}, checkpoint_id=tmp_path)
    assert_goes_on(resumed, run, range(3, 5))


@classes_and_kinds
def test_made_one_file(case: Case, kind: str, tmp_path: Path) -> None:
    make = of_kind(case, kind)
    run, resumed = make(), make(seed=1)
    run.train(range(3))
    save_folder(run, tmp_path)
    dcp_to_torch_save(tmp_path, tmp_path / "file")
    put(resumed, torch.load(tmp_path / "file", weights_only=True))
    assert_goes_on(resumed, run, range(3, 5))


@every_class
@pytest.mark.parametrize("given", [{"seed": 3}, {"min_8bit_size": 7}], ids=lambda g: next(iter(g)))
def test_keys_that_a_checkpoint_lacks(case: Case, given: Options, tmp_path: Path) -> None:
    """torch refuses them, but with allow_partial_load they stay what they are."""
    run = start(case.counterpart, case.options)
    run.train(range(3))
    save_folder(run, tmp_path)
    other = start(case.ours, {**case.options, **given}, seed=1)
    other.train(range(2))
    before = everything(other)
    with pytest.raises(CheckpointException, match="Missing key"):
        load_folder(other, tmp_path)
    assert_left_alone(other, before)
    load_folder(other, tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    for group in other.optimizer.param_groups:
        assert given.items() <= group.items()
    assert_goes_on_with(other, run, given)


def test_a_part_that_a_checkpoint_fills_in_place(tmp_path: Path) -> None:
    """allow_partial_load leaves what it lacks: zeros beside a count of steps, as it were."""
    (case,) = (case for case in RICHEST_IN_CODES if case.row.name == "adamw")
    run, other = (of_kind(case, "int8", kind)() for kind in ("default", "int8"))
    run.train(range(3))
    save_folder(run, tmp_path)
    with pytest.raises(ValueError, match="the checkpoint has filled a part only"):
        load_folder(other, tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))


def assert_goes_on_with(resumed: Run, control: Run, given: Options) -> None:
    assert all(given.keys() <= group.keys() for group in resumed.optimizer.param_groups)
    assert_goes_on(resumed, control, range(3, 5), exact=False)


@in_codes
@pytest.mark.parametrize("to", ["int8", "default"])
@pytest.mark.parametrize("name", USED)
def test_codes_and_floats(case: Case, to: str, name: str, tmp_path: Path) -> None:
    kinds = ["default", "int8"][:: 1 if to == "int8" else -1]
    run, other = (of_kind(case, "int8", kind)(seed=i) for i, kind in enumerate(kinds))
    run.train(range(3))
    other.train(range(2))
    save_folder(run, tmp_path, **OPTIONS[name])
    before = everything(other)
    with pytest.raises(CheckpointException, match="Missing key"):
        load_folder(other, tmp_path, **OPTIONS[name])
    assert_left_alone(other, before)


@every_class
@pytest.mark.parametrize("name", USED)
def test_of_another_model(case: Case, name: str, tmp_path: Path) -> None:
    run, other = start(case.ours, case.options, width=31), start(case.ours, case.options)
    run.train(range(3))
    other.train(range(2))
    save_folder(run, tmp_path, **OPTIONS[name])
    before = everything(other)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load_folder(other, tmp_path, **OPTIONS[name])
    assert_left_alone(other, before)


ORDERS = [("channels_last", "contiguous"), ("contiguous", "channels_last")]


@in_codes
@pytest.mark.parametrize(("of", "to"), ORDERS)
@pytest.mark.parametrize("name", USED)
def test_another_order_in_memory(case: Case, of: str, to: str, name: str, tmp_path: Path) -> None:
    """Codes lie in the order of their parameter. torch reads no more than there is a place for, so
    where their order is not told, what it reads would be that of other elements."""
    options = {k: v for k, v in case.options.items() if k != "centered"}

    def make(layout: Callable[[Any], Any], seed: int) -> Run:
        torch.manual_seed(seed)
        model = nn.Conv2d(5, 7, 3)
        model.weight = nn.Parameter(layout(model.weight.detach()))
        return Run(model, case.ours(model.parameters(), **options, **INT8))

    run, other, control = (make(LAID[layout], i) for i, layout in enumerate((of, to, to)))
    run.train(range(3))
    save_folder(run, tmp_path, **OPTIONS[name])
    control.model.load_state_dict(run.model.state_dict())
    control.optimizer.load_state_dict(run.optimizer.state_dict())
    before = everything(other)
    try:
        load_folder(other, tmp_path, **OPTIONS[name])
    except CheckpointException:
        assert_same_bits(params_of(other.optimizer), before[0][0])
    else:
        assert_goes_on(other, control, range(3, 5))
