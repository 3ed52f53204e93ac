"""torch's default dtype and device: whatever they are, everything has the same bits."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.storing import BF16, CHOICES, F32
from support.training import (
    RICHEST,
    Case,
    assert_same_bits,
    clone_params,
    make_params,
    params_of,
    states_of,
    train,
)
from torch.optim import Optimizer

import fusedopt

pytestmark = pytest.mark.usefixtures("one_thread")
DEFAULTS = ["float64", "bfloat16", "float16", "meta"]
every_default = pytest.mark.parametrize("default", DEFAULTS)


@contextmanager
def as_default(name: str | None) -> Iterator[None]:
    try:
        if name == "meta":
            torch.set_default_device("meta")
        elif name is not None:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def grads_of(params: list[Any]) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params] for _ in range(8)
    ]


def step(optimizer: Optimizer, grads: list[list[torch.Tensor]]) -> None:
    for each in grads:
        for p, grad in zip(params_of(optimizer), each, strict=True):
            if p.grad is None:
                p.grad = grad.clone()
            else:
                p.grad.copy_(grad)
        optimizer.step()


def life(cls: Any, default: str | None, dtype: torch.dtype, options: Any, start: Any) -> Any:
    """All that an optimizer does, and what comes of each; start: a checkpoint to begin with."""
    params, twins = make_params(dtype), make_params(dtype, seed=1)
    extra = make_params(dtype, ((300,),), seed=2)
    grads, more = grads_of(params), grads_of([*params, *extra])
    seen: list[Any] = []

    def note(optimizer: Optimizer) -> None:
        seen.append([p.detach().clone() for p in params_of(optimizer)])
        seen.append(copy.deepcopy(states_of(optimizer)))

    with as_default(default):
        optimizer = cls(params, **options)
        step(optimizer, grads[:2])
        note(optimizer)
        if start is not None:
            optimizer.load_state_dict(start)
            step(optimizer, grads[2:3])
            note(optimizer)
        loaded = copy.deepcopy(optimizer.state_dict())
        other = cls(twins, **options)
        other.load_state_dict(loaded)
        twin = copy.deepcopy(optimizer)
        shallow = copy.copy(twin)
        for each in (other, twin, shallow, optimizer):
            step(each, grads[3:5])
            note(each)
        if hasattr(optimizer, "master_params"):
            seen.append(list(optimizer.master_params()))
            other.load_master_params(optimizer.master_params())
        optimizer.add_param_group({"params": extra})
        step(optimizer, more[5:7])
        optimizer.state.clear()
        step(optimizer, more[7:])
        note(optimizer)
    return seen


@every_default
@pytest.mark.parametrize("case", RICHEST, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_plain(case: Case, default: str, flat: bool) -> None:
    options = {**case.options, "flat": flat}
    results = [life(case.ours, name, F32, options, None) for name in (None, default)]
    assert_same_bits(results[1], results[0])


@every_default
@pytest.mark.parametrize("choice", CHOICES)
def test_storage(default: str, choice: str) -> None:
    """And a checkpoint of torch's, in float32, loaded into these."""
    dtype, options = CHOICES[choice].param, CHOICES[choice].options
    start = torch.optim.AdamW(make_params())
    train(start, range(3))
    loaded = start.state_dict()
    results = [
        life(fusedopt.AdamW, name, dtype, options, copy.deepcopy(loaded))
        for name in (None, default)
    ]
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("case", RICHEST, ids=str)
def test_the_default_device_as_a_context(case: Case) -> None:
    """Entered between steps only, as code that builds another model does."""
    pair = []
    for device in (None, "meta"):
        optimizer = case.ours(make_params(), **case.options)
        grads = grads_of(params_of(optimizer))
        if device is None:
            step(optimizer, grads)
        else:
            for number, each in enumerate(grads):
                with torch.device("meta" if number % 2 == 0 else "cpu"):
                    step(optimizer, [each])
        pair.append(optimizer)
    assert_same_bits(params_of(pair[0]), params_of(pair[1]))
    assert_same_bits(states_of(pair[0]), states_of(pair[1]))


@every_default
def test_scaled_and_clipped(default: str) -> None:
    results = []
    for name in (None, default):
        params = make_params(BF16)
        grads = grads_of(params)
        inf, scale = torch.tensor(0.0), torch.tensor(4.0)
        with as_default(name):
            optimizer = fusedopt.SGD(params, momentum=0.9, max_grad_norm=0.5, fused=True)
            optimizer.grad_scale, optimizer.found_inf = scale, inf
            step(optimizer, grads[:3])
            results.append((params, optimizer.grad_norm, states_of(optimizer)))
    assert_same_bits(results[1], results[0])


def test_copies_are_made_on_the_parameters_device() -> None:
    """Of parameters, too: nothing lands on the default device."""
    optimizer = fusedopt.AdamW(make_params())
    train(optimizer, range(2))
    with as_default("meta"):
        twin = fusedopt.AdamW(clone_params(params_of(optimizer)))
        twin.load_state_dict(optimizer.state_dict())
        assert fusedopt.memory_report(twin) is not None
    devices = {v.device.type for values in states_of(twin) for v in values.values()}
    assert devices == {"cpu"}
