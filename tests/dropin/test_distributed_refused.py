"""Checkpoints by torch.distributed of other keys, storage, models, or damaged: what is refused
changes nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from support.distributed import (
    CLASSES_AND_KINDS,
    OPTIONS,
    Run,
    assert_goes_on,
    assert_left_alone,
    everything,
    got,
    make_states,
    no_scalars,
    of_kind,
    put,
    start,
    two_of,
)
from support.optimizers import Options
from support.storing import BF16, F64, RICHEST_IN_CODES
from support.training import (
    RICHEST,
    RICHEST_IN_TORCH,
    Case,
    assert_same_bits,
    states_of,
)

from fusedopt._formats import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_class_in_codes = pytest.mark.parametrize("case", RICHEST_IN_CODES, ids=str)
every_class_in_torch = pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
FULL, FLATTEN = OPTIONS["full"], OPTIONS["flatten"]
three_options = pytest.mark.parametrize(
    "options", [{}, FULL, FLATTEN], ids=["nothing", "full", "flatten"]
)


# -- other storage than the checkpoint's ------------------------------------------------------


GIVEN: dict[str, Options] = {
    "state_dtype": {"state_dtype": F64},
    "min_8bit_size": {"min_8bit_size": 7},
    "seed": {"seed": 3},
}


@every_class_in_torch
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_keys_that_only_one_side_has(case: Case, given: Options) -> None:
    """Where torch wants the same keys on both sides, it says so, and nothing has been changed."""
    ours, theirs = (two_of(case, "to torch")[i] for i in range(2))
    run, other = theirs(), ours(seed=1, also=given)
    run.train(range(3))
    other.train(range(2))
    before = everything(other)
    with pytest.raises(KeyError, match=next(iter(given))):
        put(other, got(run, **FLATTEN), **FLATTEN)
    assert_left_alone(other, before)
    for options in ({}, FULL):  # here an optimizer's own choices stay
        other = ours(seed=1, also=given)
        groups = [dict(group) for group in other.optimizer.param_groups]
        put(other, got(run, **options), **options)
        for group, old in zip(other.optimizer.param_groups, groups, strict=True):
            assert {key: group[key] for key in given} == {key: old[key] for key in given}
        run_on, control = copy.deepcopy(other), copy.deepcopy(run)
        assert_goes_on_but_for(run_on, control, given)
    run, other = ours(also=given), theirs(seed=1)
    run.train(range(3))
    other.train(range(2))
    before = everything(other)
    with pytest.raises(KeyError, match=next(iter(given))):
        put(other, got(run, **FULL), **FULL)
    assert_left_alone(other, before)
    for options in ({}, FLATTEN):
        put(other, got(run, **options), **options)


def assert_goes_on_but_for(resumed: Run, control: Run, keys: Options) -> None:
    for group in resumed.optimizer.param_groups:
        assert keys.keys() <= group.keys()
    assert_goes_on(resumed, control, range(3, 5), exact=False)


FOR_CODES = {name: OPTIONS[name] for name in ("offload", "full", "full-not-strict", "flatten")}


@every_class_in_codes
@pytest.mark.parametrize("to", ["int8", "default"])
@pytest.mark.parametrize("options", FOR_CODES.values(), ids=FOR_CODES)
def test_codes_and_floats(case: Case, to: str, options: Options) -> None:
    """Converted where the checkpoint is loaded as it is. Where torch puts it into the states that
    there are, those of the other kind would stay what they were: that is refused."""
    kinds = ["default", "int8"][:: 1 if to == "int8" else -1]
    make, make_other = (of_kind(case, "int8", kind, groups=no_scalars) for kind in kinds)
    run = make()
    run.train(range(3))
    for steps in (0, 2):
        other = make_other(seed=1)
        other.train(range(steps))
        make_states(other)
        before = everything(other)
        if options.keys() & {"full_state_dict", "flatten_optimizer_state_dict"}:
            # By torch, where a group or a state has other keys, and by ours.
            expected = ValueError if to == "int8" and "full_state_dict" in options else Exception
            with pytest.raises(expected) as caught:
                put(other, got(run, **options), **options)
            assert type(caught.value) in (KeyError, TypeError, ValueError)
            assert_left_alone(other, before)
        else:
            put(other, got(run, **options), **options)
            control = make_other(seed=1)
            control.optimizer.load_state_dict(run.optimizer.state_dict())
            control.model.load_state_dict(run.model.state_dict())
            assert_goes_on(other, control, range(3, 5))


@every_class
@pytest.mark.parametrize("options", [{}, OPTIONS["offload"]], ids=["nothing", "offload"])
def test_another_width_of_states(case: Case, options: Options) -> None:
    run = start(case.ours, case.options)
    other = start(case.ours, {**case.options, "state_dtype": BF16}, seed=1)
    run.train(range(3))
    put(other, got(run, **options), **options)
    for a, b in zip(
        states_of(other.optimizer, frozen=False),
        states_of(run.optimizer, frozen=False),
        strict=True,
    ):
        for key in b.keys() - NUMBERS:
            assert_same_bits(a[key], b[key].to(BF16))
    other.train(range(3, 5))


# -- damaged checkpoints ----------------------------------------------------------------------


def without_a_state(checkpoint: dict[str, Any], name: str, key: str) -> None:
    del checkpoint["state"][name][key]


def of_another_shape(checkpoint: dict[str, Any], name: str, key: str) -> None:
    values = checkpoint["state"][name]
    values[key] = values[key].flatten()[:1].clone()


def no_tensor(checkpoint: dict[str, Any], name: str, key: str) -> None:
    checkpoint["state"][name][key] = "tensor"


DAMAGES = (without_a_state, of_another_shape, no_tensor)


@pytest.mark.parametrize(
    ("case", "kind"),
    [p for p in CLASSES_AND_KINDS if p.id.startswith(("default", "flat-32-int8", "32"))],
)
@three_options
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged(case: Case, options: Options, damage: Callable[..., None], kind: str) -> None:
    """Refused, and the optimizer, its groups and the weights are what they were."""
    make = of_kind(case, kind)
    run, other = make(), make(seed=1)
    run.train(range(3))
    other.train(range(2))
    name = "trunk.0.weight"
    keys = [
        k
        for k in got(run)["optim"]["state"][name]
        if k not in NUMBERS | {"master_remainder", "code_stride"}
    ]
    if damage is without_a_state and "step" not in of_names(case):
        return  # a momentum buffer that is missing is made in the next step
    before = everything(other)
    for key in keys:
        checkpoint = got(run, **options)
        if options is FLATTEN:
            optim = checkpoint["optim"]
            nested = {"state": {name: {key: optim.pop(f"state.{name}.{key}")}}}
            damage(nested, name, key)
            optim.update({f"state.{name}.{k}": v for k, v in nested["state"][name].items()})
        else:
            damage(checkpoint["optim"], name, key)
        with pytest.raises((TypeError, ValueError), match=case.ours.__name__):
            put(other, checkpoint, **options)
        assert_left_alone(other, before)
    other.train([3])


def of_names(case: Case) -> set[str]:
    return case.row.keys(case.options)


@every_class
def test_of_another_model(case: Case) -> None:
    """By torch's own checks, or ours, whichever come first."""
    run, other = start(case.ours, case.options, width=31), start(case.ours, case.options)
    run.train(range(3))
    other.train(range(2))
    before = everything(other)
    for options in OPTIONS.values():
        with pytest.raises(ValueError, match=f"{case.ours.__name__}.*shape"):
            put(other, got(run, **options), **options)
        assert_left_alone(other, before)
    checkpoint = got(run)
    del checkpoint["optim"]["state"]["head.out.weight"]
    with pytest.raises(RuntimeError, match="Missing optimizer state"):
        put(other, checkpoint)
    assert_left_alone(other, before)
