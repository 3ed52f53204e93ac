"""Masters set before the first step, and copies that know whether weights were written since."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.storing import CHOICES, SHAPES, Choice, masters_of, step
from support.training import (
    assert_equal,
    assert_same_bits,
    clone_params,
    make_params,
    params_of,
    saved,
    states_of,
)
from torch.optim import Optimizer

import fusedopt

pytestmark = pytest.mark.usefixtures("one_thread")
MASTERS = {name: choice for name, choice in CHOICES.items() if choice.masters}
with_masters = pytest.mark.parametrize("choice", MASTERS.values(), ids=MASTERS)

Copying = Callable[[Optimizer], Optimizer]


def loaded(optimizer: Optimizer) -> Optimizer:
    group = optimizer.param_groups[0]
    own = ("state_dtype", "min_8bit_size", "master_bits", "rounding", "seed")
    options = {key: group[key] for key in own if key in group}
    twin = type(optimizer)(clone_params(params_of(optimizer)), **options)
    twin.load_state_dict(saved(optimizer))
    return twin


COPIES: dict[str, Copying] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "copy": copy.copy,
    "state_dict": loaded,
    "of a copy": lambda o: copy.deepcopy(copy.copy(o)),
    "none": lambda o: o,
}
every_copy = pytest.mark.parametrize("how", COPIES)


def exact(choice: Choice) -> list[torch.Tensor]:
    """Masters that the parameters' dtype cannot hold, but as many bits as there are can."""
    values = [p.detach() / 3 for p in make_params(shapes=SHAPES, seed=6)]
    if choice.options["master_bits"] == 24:
        values = [(v.view(torch.int32) & -256).view(torch.float32) for v in values]
    return values


@with_masters
@every_copy
def test_masters_before_the_first_step(choice: Choice, how: str) -> None:
    """They are there in whatever is made of the optimizer, and in its first step."""
    optimizer = fusedopt.AdamW(choice.params(SHAPES), **choice.options)
    wanted = exact(choice)
    optimizer.load_master_params(wanted)
    twin = COPIES[how](optimizer)
    assert_same_bits(masters_of(twin), wanted)
    assert_same_bits(masters_of(optimizer), wanted)
    control = fusedopt.AdamW(choice.params(SHAPES), **choice.options)
    step(control, range(1))
    control.state.clear()
    control.load_master_params(wanted)
    for each in {id(o): o for o in (twin, optimizer, control)}.values():
        if how == "copy" and each is optimizer:
            continue  # it has the parameters of the twin
        step(each, range(3))
    assert_same_bits(params_of(twin), params_of(control))
    assert_same_bits(masters_of(twin), masters_of(control))
    assert_same_bits(states_of(twin), states_of(control))


@with_masters
@every_copy
@pytest.mark.parametrize("when", ["before", "after", "both", "before any step"])
def test_written_weights_are_masters_in_a_copy(choice: Choice, how: str, when: str) -> None:
    """Weights written before the copy was made, or to the copy before its first step."""

    if how == "state_dict" and when in ("after", "before any step"):
        # What is written after a load may be the weights of the checkpoint, which have its masters.
        pytest.skip("weights may be loaded after the optimizer")

    def write(target: Optimizer, value: float) -> None:
        with torch.no_grad():
            for p in params_of(target)[::2]:
                p.fill_(value).add_(torch.arange(p.numel()).view(p.shape) % 7)

    results = []
    for copying in (COPIES[how], COPIES["none"]):
        optimizer = fusedopt.AdamW(choice.params(SHAPES), **choice.options)
        if when != "before any step":
            step(optimizer, range(3))
        else:
            optimizer.load_master_params(exact(choice))
        untouched = masters_of(optimizer)[1]
        if when in ("before", "both"):
            write(optimizer, 0.5)
        twin = copying(optimizer)
        if when != "before":
            write(twin, -0.25)
        expected = [p.detach().float() for p in params_of(twin)]
        masters = masters_of(twin)
        assert_same_bits(masters[::2], expected[::2])
        assert_same_bits(masters[1], untouched)
        step(twin, range(3, 5))
        results.append(twin)
    assert_equal(*results)
    assert_same_bits(masters_of(results[0]), masters_of(results[1]))


@with_masters
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_written_without_a_look_at_its_masters(choice: Choice, how: str) -> None:
    """The first that happens after it was written is its step."""
    results = []
    for copying in (COPIES[how], COPIES["none"]):
        optimizer: Any = fusedopt.SGD(choice.params(SHAPES), lr=0.0, **choice.options)
        step(optimizer, range(2))
        optimizer.load_master_params(exact(choice))
        twin = copying(optimizer)
        new = [torch.full_like(p, 0.75) for p in params_of(twin)]
        with torch.no_grad():
            for p, value in zip(params_of(twin), new, strict=True):
                p.copy_(value)
        step(twin, [2])
        # A step by nothing: what it worked on is what there is.
        assert_same_bits(params_of(twin), new)
        assert_same_bits(masters_of(twin), [value.float() for value in new])
        results.append(twin)
    assert_equal(*results)
