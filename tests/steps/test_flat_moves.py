"""Flat parameters and gradients that somebody moves or copies: trained where they are then."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.flat import Model, fit, values
from support.training import (
    RICHEST,
    Case,
    assert_close,
    assert_equal,
    assert_same_bits,
    clone_params,
    make_params,
    params_of,
    train,
)
from torch import nn

import fusedopt
from fusedopt import FlatParameters

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
both_gradients = pytest.mark.parametrize("gradients", [False, True], ids=["params", "gradients"])


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    yield
    assert not torch.__future__.get_swap_module_params_on_conversion()


# -- what undoes it ---------------------------------------------------------------------------


def test_load_state_dict_keeps_it() -> None:
    model, other = Model(), Model()
    optimizer = fusedopt.AdamW(model.parameters(), flat=True)
    fit(model, optimizer, range(2))
    model.load_state_dict(other.state_dict())
    [flat] = optimizer._flats
    assert flat.is_intact()
    assert_same_bits(values(model), values(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, optimizer, range(2, 4))


def rebind(model: Model) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def rebind_one(model: Model) -> None:
    model.norm.weight.data = model.norm.weight.data.clone()


def rebind_contiguous(model: Model) -> None:
    """The idiom that silently detaches a view, as the convolution is channels_last."""
    for p in model.parameters():
        p.data = p.data.contiguous()
    model.conv.weight.data = model.conv.weight.data.clone(memory_format=torch.contiguous_format)


def swap(model: Model) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "there and back": lambda model: model.double().float(),
    "rebind": rebind,
    "rebind one": rebind_one,
    "rebind contiguous": rebind_contiguous,
    "shared memory": lambda model: model.share_memory(),
    "swap": swap,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before the first step", "in training"])
@pytest.mark.parametrize("zero_first", [True, False], ids=["zero_grad", "step"])
@both_gradients
def test_moved_parameters(change: str, when: str, zero_first: bool, gradients: bool) -> None:
    """Trained where they are now, with one warning, as if they had never been flat."""
    model, plain = Model(), Model()
    # Unused and frozen parameters have zero gradients in the one and none in the other.
    for m in (model, plain):
        for p in [*m.unused.parameters(), *m.frozen.parameters()]:
            p.requires_grad_(False)
    flat = FlatParameters(model, gradients=gradients)
    optimizer = fusedopt.AdamW(model.parameters())
    reference = fusedopt.AdamW(plain.parameters())
    if when == "in training":
        fit(model, optimizer, range(3))
        fit(plain, reference, range(3))
    else:
        model.loss(50).backward()
        plain.loss(50).backward()
    for m in (model, plain):
        CHANGES[change](m)
    assert not flat.is_intact()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3, 6):
            for m, o in ((model, optimizer), (plain, reference)):
                if zero_first or step > 3:
                    o.zero_grad()
                m.loss(step).backward()
                o.step()
    ours = [w for w in caught if "flat" in str(w.message)]
    assert len(ours) == 1 and "AdamW" in str(ours[0].message) and "0" in str(ours[0].message)
    assert_same_bits(values(model), values(plain))
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in plain.parameters()]


def test_zero_grad_after_a_move() -> None:
    """The gradients were moved, too: they are zero afterwards, wherever they are."""
    for change in CHANGES.values():
        model = Model()
        optimizer = fusedopt.AdamW(model.parameters(), flat=True)
        fit(model, optimizer, range(2))
        change(model)
        optimizer.zero_grad()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_moved_gradients() -> None:
    """grad.data may be re-bound as anything else: the gradient is where it is then."""
    params, plain = make_params(), make_params()
    flat = FlatParameters(params, gradients=True)
    optimizer, reference = fusedopt.AdamW(params), fusedopt.AdamW(plain)
    for p, q in zip(params, plain, strict=True):
        p.grad.data = torch.full_like(p, 0.5)
        q.grad = torch.full_like(q, 0.5)
    optimizer.step()
    reference.step()
    assert_equal(optimizer, reference)
    optimizer.zero_grad()
    assert flat.is_intact()
    assert all(p.grad is None or not p.grad.any() for p in params)


def test_made_flat_anew() -> None:
    """As the warning advises; the old objects may still be there."""
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [FlatParameters(trained, gradients=True) for _ in range(5)]
    optimizer = fusedopt.AdamW(trained)
    fit(model, optimizer, range(2))
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        kept.append(FlatParameters(trained, gradients=True))
        assert [flat.is_intact() for flat in kept] == [False] * (len(kept) - 1) + [True]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(model, optimizer, range(2, 4))
        assert optimizer._plan.span_count == 1
        assert kept[-1].is_intact()
        optimizer.zero_grad()
        assert not kept[-1].grads[0].any()


def test_flat_optimizer_of_flat_parameters() -> None:
    """flat=True for what is flat already leaves the user's object in order."""
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    optimizer = fusedopt.AdamW(params, flat=True)
    assert flat.is_intact()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer._plan.span_count == 1


def test_forgotten_object() -> None:
    """Without the FlatParameters object the parameters are ordinary ones."""
    params, plain = make_params(), make_params()
    FlatParameters(params)
    gc.collect()
    optimizer, reference = fusedopt.AdamW(params), fusedopt.AdamW(plain)
    for each in (optimizer, reference):
        train(each, range(3))
    assert_equal(optimizer, reference)


def test_replaced_parameters() -> None:
    for replace in (
        lambda model: model.load_state_dict(Model().state_dict(), assign=True),
        lambda model: setattr(model.norm, "weight", nn.Parameter(torch.ones(8))),
        lambda model: model.add_module("more", nn.Linear(2, 2)),
    ):
        model = Model()
        flat = FlatParameters(model)
        assert flat.is_intact()
        replace(model)
        assert not flat.is_intact()


# -- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("flat", [False, True], ids=["FlatParameters", "flat=True"])
def test_copies(how: str, flat: bool) -> None:
    """Model and optimizer together: both train on as one that was never flat."""
    model = Model()
    kept = None if flat else FlatParameters(model, gradients=True)
    optimizer = fusedopt.AdamW(model.parameters(), flat=flat)
    fit(model, optimizer, range(2))
    copied = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}[how]
    before = values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin_model, twin = copied((model, optimizer))
        fit(twin_model, twin, range(2, 5))
        assert_same_bits(values(model), before)
        assert twin_model.head.weight is twin_model.embed.weight
        fit(model, optimizer, range(2, 5))
    for name, p in model.named_parameters():
        q = twin_model.get_parameter(name)
        if p.requires_grad and "unused" not in name:
            assert_same_bits(p.detach(), q.detach())
    assert kept is None or kept.is_intact()


def test_copy_of_a_model_alone() -> None:
    """As for an average of it: not flat, and no part of the buffer."""
    model = Model()
    flat = FlatParameters(model, gradients=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(p.any() for p in [model.norm.weight, model.embed.weight])
    assert flat.is_intact()
    assert len(pickle.dumps(twin)) < 1.2 * len(pickle.dumps(Model())) + 20_000


def test_saved_model_is_no_larger() -> None:
    params = nn.ParameterList(nn.Parameter(torch.zeros(1000)) for _ in range(50))
    size = len(pickle.dumps(params))
    FlatParameters(params)
    assert len(pickle.dumps(params)) < 1.05 * size


@every_class
def test_checkpoint_between_flat_and_not(case: Case) -> None:
    plain = case.ours(make_params(), **case.options)
    train(plain, range(2))
    flat = case.ours(clone_params(params_of(plain)), **case.options, flat=True)
    flat.load_state_dict(plain.state_dict())
    for each in (flat, plain):
        train(each, range(2, 4))
    assert_equal(flat, plain)
    back = case.counterpart(clone_params(params_of(flat)), **case.options)
    back.load_state_dict(copy.deepcopy(flat.state_dict()))
    for each in (back, flat):
        train(each, [4])
    assert_close(flat, back)
