"""State dicts by torch.distributed: every option of its helpers, and to and from torch.optim."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import (
    CLASSES_AND_KINDS,
    MAIN_OPTIONS,
    OPTIONS,
    Run,
    assert_goes_on,
    got,
    groups_of,
    make_states,
    of_kind,
    put,
    start,
    two_of,
    world_of_one,
)
from support.optimizers import Options
from support.storing import BF16, F32, F64, RICHEST_IN_CODES, Choice, richest_with
from support.training import (
    RICHEST,
    RICHEST_IN_TORCH,
    Case,
    assert_same_bits,
    params_of,
    states_of,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import fusedopt

pytestmark = pytest.mark.usefixtures("one_thread")

classes_and_kinds = pytest.mark.parametrize(("case", "kind"), CLASSES_AND_KINDS)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_class_in_codes = pytest.mark.parametrize("case", RICHEST_IN_CODES, ids=str)
every_class_in_torch = pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
both_ways = pytest.mark.parametrize("direction", ["from torch", "to torch"])
FULL, FLATTEN = OPTIONS["full"], OPTIONS["flatten"]
three_options = pytest.mark.parametrize(
    "options", [{}, FULL, FLATTEN], ids=["nothing", "full", "flatten"]
)


def from_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as it comes back from a file that may hold nothing but tensors and numbers."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- what a checkpoint is made of -------------------------------------------------------------


@every_class_in_torch
def test_groups_have_torchs_keys(case: Case) -> None:
    """torch's helpers and planners want the same keys in a checkpoint and in an optimizer."""
    ours, theirs = (start(cls, case.options).optimizer for cls in (case.ours, case.counterpart))
    assert ours.defaults.keys() == theirs.defaults.keys()
    for mine, given in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert mine.keys() == given.keys()


@every_class
def test_groups_hold_what_was_given(case: Case) -> None:
    """Only that, beyond torch's keys, and nothing that a JSON file cannot hold."""
    groups = start(case.ours, case.options).optimizer.param_groups
    plain = set().union(*(group.keys() for group in groups))
    for dtype, storage in (
        (F32, {"state_dtype": F32}),
        (F32, {"state_dtype": BF16}),
        (BF16, {"state_dtype": "int8", "min_8bit_size": 7, "master_bits": 24}),
        (BF16, {"rounding": "stochastic", "seed": 3}),
    ):
        richest = richest_with(case, Choice(dtype, storage))
        if richest is None:  # not with any options of this class
            continue
        options = richest.options
        optimizer = start(case.ours, {**options, **storage}, dtype).optimizer
        dtypes = {F32: "float32", BF16: "bfloat16"}
        expected = {key: dtypes.get(value, value) for key, value in storage.items()}
        for group in (optimizer.defaults, *optimizer.param_groups):
            assert {key: group[key] for key in group.keys() - plain} == expected
        groups = optimizer.state_dict()["param_groups"]
        for group, read in zip(groups, json.loads(json.dumps(groups)), strict=True):
            assert read == {k: [*v] if isinstance(v, tuple) else v for k, v in group.items()}


@classes_and_kinds
def test_making_the_states_changes_nothing_else(case: Case, kind: str) -> None:
    """torch takes a step with lr=0 and gradients of zero, if there are neither states nor
    gradients. Flat gradients are always there, so flat states have to be, too."""
    run, twin = (of_kind(case, kind)() for _ in range(2))
    make_states(run)
    assert_same_bits(dict(run.model.state_dict()), dict(twin.model.state_dict()))
    for mine, theirs in zip(run.optimizer.param_groups, twin.optimizer.param_groups, strict=True):
        assert {**mine, "params": 0} == {**theirs, "params": 0}
    for p, state in zip(
        params_of(run.optimizer), states_of(run.optimizer, frozen=False), strict=True
    ):
        assert bool(state) == p.requires_grad
        if "flat" not in kind:
            assert p.grad is None


# -- from ours to ours ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "kind", "name"),
    [
        pytest.param(*parameter.values, name, id=f"{parameter.id}-{name}")
        for parameter in CLASSES_AND_KINDS
        for name in OPTIONS
        if "default-adamw" in parameter.id or name in MAIN_OPTIONS
    ],
)
def test_resumes_to_the_last_bit(case: Case, kind: str, name: str) -> None:
    make, options = of_kind(case, kind), OPTIONS[name]
    run, resumed = make(), make(seed=1)
    run.train(range(3))
    put(resumed, from_file(got(run, **options)), **options)
    assert_goes_on(resumed, run, range(3, 5))


@every_class
@three_options
def test_resumes_where_it_has_already_stepped(case: Case, options: Options) -> None:
    for kind in ("default", "flat", "32"):
        make = of_kind(case, kind)
        run, resumed = make(), make(seed=1)
        run.train(range(3))
        resumed.train(range(50, 57))
        put(resumed, got(run, **options), **options)
        assert_goes_on(resumed, run, range(3, 5))


@every_class
def test_before_the_first_step(case: Case) -> None:
    """The checkpoint is of what torch made, a step of zeros; ours goes on as if it were one."""
    make = of_kind(case, "default")
    run, resumed = make(), make(seed=1)
    put(resumed, got(run))
    assert_goes_on(resumed, run, range(2))


@every_class
@pytest.mark.parametrize("kind", ["default", "int8", "32", "bfloat16"])
def test_from_rank_0(case: Case, kind: str, tmp_path: Path) -> None:
    make = of_kind(case, kind)
    with world_of_one(tmp_path):
        for options in (FULL, OPTIONS["full-offload"], OPTIONS["full-not-strict"]):
            run, resumed = make(), make(seed=1)
            run.train(range(3))
            put(resumed, got(run, **options), **options, broadcast_from_rank0=True)
            assert_goes_on(resumed, run, range(3, 5))


# -- to and from torch ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in RICHEST_IN_TORCH
        for name in OPTIONS
        if case.row.name == "adamw" or name in MAIN_OPTIONS
    ],
)
@both_ways
def test_exchange_with_torch(case: Case, direction: str, name: str) -> None:
    options = OPTIONS[name]
    make, make_other = two_of(case, direction)
    run, other = make(), make_other(seed=1)
    control = run if direction == "from torch" else two_of(case, "from torch")[0]()
    run.train(range(3))
    if control is not run:
        control.train(range(3))
    # Options come from the checkpoint.
    for each in (run, control):
        each.optimizer.param_groups[0]["lr"] = 0.002
    put(other, from_file(got(run, **options)), **options)
    assert_goes_on(other, control, range(3, 5), exact=False)


@every_class_in_torch
@both_ways
@three_options
def test_exchange_with_flat(case: Case, direction: str, options: Options) -> None:
    ours = start(case.ours, {**case.options, "flat": True}, F64)
    theirs = start(case.counterpart, case.options, F64)
    for run in (ours, theirs):
        run.train(range(3))
    if direction == "from torch":
        resumed = start(case.ours, {**case.options, "flat": True}, F64, seed=1)
        put(resumed, got(theirs, **options), **options)
        assert_goes_on(resumed, theirs, range(3, 5), exact=False)
    else:
        resumed = start(case.counterpart, case.options, F64, seed=1)
        put(resumed, got(ours, **options), **options)
        assert_goes_on(ours, resumed, range(3, 5), exact=False)


LAYOUTS: dict[str, Callable[[nn.Module], Any]] = {
    "one group": lambda model: model.parameters(),
    "names": lambda model: model.named_parameters(),
    "only what is trained": lambda model: [p for p in model.parameters() if p.requires_grad],
    "in another order": lambda model: [*model.parameters()][::-1],
}


@pytest.mark.parametrize("case", RICHEST_IN_TORCH[-1:], ids=str)
@both_ways
@three_options
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups(case: Case, direction: str, options: Options, layout: str) -> None:
    make, make_other = two_of(case, direction)
    run = make(groups=LAYOUTS[layout])
    other = make_other(seed=1, groups=LAYOUTS[layout])
    control = two_of(case, "from torch")[0](groups=LAYOUTS[layout])
    for each in (run, control):
        each.train(range(3))
    put(other, got(run, **options), **options)
    assert_goes_on(other, control, range(3, 5), exact=False)


@every_class_in_torch
@both_ways
@three_options
def test_lr_in_a_tensor(case: Case, direction: str, options: Options) -> None:
    make, make_other = two_of(case, direction)
    control = two_of(case, "from torch")[0](also={"lr": torch.tensor(0.002, dtype=F64)})
    run = make(also={"lr": torch.tensor(0.002, dtype=F64)})
    other = make_other(seed=1, also={"lr": torch.tensor(0.5, dtype=F64)})
    for each in (run, control):
        each.train(range(3))
    put(other, got(run, **options), **options)
    assert_goes_on(other, control, range(3, 5), exact=False)


@every_class_in_torch
@three_options
def test_two_optimizers_of_one_model(case: Case, options: Options) -> None:
    """Each takes its own part of one checkpoint, here torch's, whatever the other is."""

    def make(seed: int, first: Any, second: Any) -> tuple[Run, Run]:
        run = start(first, case.options, F64, seed, lambda model: groups_of(model)[:1])
        return run, Run(run.model, second(groups_of(run.model)[1:], **case.options))

    pairs = [
        make(0, case.counterpart, case.counterpart),
        make(1, case.ours, case.counterpart),
        make(2, case.ours, case.ours),
    ]
    for run in pairs[0]:
        run.train(range(3))
    given = StateDictOptions(**options)
    for pair in pairs[1:]:
        model = pair[0].model
        checkpoint = get_optimizer_state_dict(
            pairs[0][0].model, [run.optimizer for run in pairs[0]], options=given
        )
        model.load_state_dict(pairs[0][0].model.state_dict())
        set_optimizer_state_dict(
            model, [run.optimizer for run in pair], copy.deepcopy(checkpoint), options=given
        )
    for pair in pairs:
        for run in pair:
            run.train(range(3, 5))
    for pair in pairs[1:]:
        for run, control in zip(pair, pairs[0], strict=True):
            assert_goes_on(run, control, (), exact=False)


def test_weights_alone() -> None:
    """Masters follow weights that torch's helpers load, as those that a model loads itself."""
    for bits in (32, 24):
        run, control = (
            start(fusedopt.AdamW, {"lr": 0.01, "master_bits": bits}, BF16) for _ in range(2)
        )
        weights = start(fusedopt.AdamW, {}, BF16, seed=4).model
        for each in (run, control):
            each.train(range(3))
        for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
            checkpoint = get_model_state_dict(weights, options=options)
            set_model_state_dict(run.model, copy.deepcopy(checkpoint), options=options)
            control.model.load_state_dict(weights.state_dict())
            assert_goes_on(run, control, range(3, 5))
