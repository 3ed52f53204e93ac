"""Bad input: an exception that names what is wrong, before anything was changed."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_same_bits,
    assert_unchanged,
    make_params,
    params_of,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt
from fusedopt._formats import NUMBERS

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
NAN = float("nan")
NAMES = [f"block{i}.weight" for i in range(6)]
# How the third parameter is called in messages, without names and with them.
THIRD = {False: "parameter 1 of group 1", True: "block2.weight"}


def build(case: Case, named: bool = False, steps: int = 2, **options: Any) -> Optimizer:
    """An optimizer in training: a group of one parameter, a group of two, one of the rest."""
    params: Any = make_params()
    if named:
        params = list(zip(NAMES, params, strict=True))
    groups = [{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}]
    optimizer = case.ours(groups, **case.options, **options)
    train(optimizer, range(steps))
    return optimizer


def refuse(
    optimizer: Optimizer,
    action: Callable[[], Any],
    *parts: str,
    error: Any = (TypeError, ValueError),
) -> None:
    """The action raises, says all of these, and changes nothing."""
    before = snapshot(optimizer)
    with pytest.raises(error) as caught:
        action()
    for part in (type(optimizer).__name__, *parts):
        assert part in str(caught.value)
    assert_unchanged(optimizer, before)


# -- gradients --------------------------------------------------------------------------------

BAD_GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "wrong shape": (lambda p: torch.zeros(9), ("[9]", "[]")),
    "float64": (lambda p: torch.zeros_like(p, dtype=torch.float64), ("Double", "Float", "float32")),
    "float16": (lambda p: torch.zeros_like(p, dtype=torch.float16), ("Half", "Float")),
    "integer": (lambda p: torch.zeros_like(p, dtype=torch.int32), ("Int", "Float")),
    "complex": (lambda p: torch.zeros_like(p, dtype=torch.complex64), ("Complex", "Float")),
}


@every_class
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("steps", [0, 2])
def test_gradient(case: Case, kind: str, named: bool, steps: int) -> None:
    """Of the third parameter: those before it are not stepped, either."""
    optimizer = build(case, named, steps)
    make, parts = BAD_GRADIENTS[kind]
    set_grads(params_of(optimizer), 5)
    bad = params_of(optimizer)[2]
    if kind != "integer":
        # torch checks what is assigned to grad, but not what it is made to be later.
        bad.grad.data = make(bad)
    else:
        bad.grad_dtype = None
        bad.grad = make(bad)
    refuse(optimizer, optimizer.step, THIRD[named], *parts)
    # With the gradient put right, it goes on as if nothing had happened.
    bad.grad = None
    bad.grad_dtype = torch.float32
    twin = build(case, named, steps)
    train(optimizer, range(steps, 4))
    train(twin, range(steps, 4))
    assert_unchanged(optimizer, [*snapshot(twin)[:3], *snapshot(optimizer)[3:]])


@every_class
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("steps", [0, 2])
def test_sparse_gradient(case: Case, named: bool, steps: int) -> None:
    table = nn.Embedding(7, 3, sparse=True)
    params: Any = [*make_params()[:2], table.weight]
    if named:
        params = list(zip(NAMES, params, strict=False))
    optimizer = case.ours([{"params": params[:1]}, {"params": params[1:]}], **case.options)

    def give_gradients() -> None:
        optimizer.zero_grad()
        set_grads(params_of(optimizer)[:2], 0)
        table(torch.tensor([1, 2])).sum().backward()

    give_gradients()
    for p in params_of(optimizer)[2:]:
        p.grad = p.grad.to_dense()
    for _ in range(steps):
        optimizer.step()
    give_gradients()
    refuse(optimizer, optimizer.step, THIRD[named], "parse", error=RuntimeError)


@every_class
def test_gradient_that_is_not_dense(case: Case) -> None:
    """Other layouts than sparse COO are no better."""
    optimizer = build(case)
    bad = params_of(optimizer)[0]
    bad.grad.data = torch.zeros_like(bad)
    bad.grad = None
    bad.grad = torch.eye(33, 7).to_sparse()
    refuse(optimizer, optimizer.step, "parameter 0 of group 0", error=RuntimeError)


# -- parameters -------------------------------------------------------------------------------

BAD_PARAMS: dict[str, tuple[Callable[[], Tensor], tuple[str, ...]]] = {
    "int64": (lambda: torch.zeros(3, dtype=torch.int64), ("int64", "float32", "bfloat16")),
    "bool": (lambda: torch.zeros(3, dtype=torch.bool), ("bool", "float32")),
    "float8": (lambda: torch.zeros(3).to(torch.float8_e4m3fn), ("float8_e4m3fn", "float32")),
    "meta": (lambda: torch.zeros(3, device="meta"), ("meta",)),
    "empty meta": (lambda: torch.zeros(0, device="meta"), ("meta",)),
    "sparse": (lambda: torch.eye(3).to_sparse(), ("sparse", "dense")),
    "expanded": (lambda: torch.zeros(1).expand(5), ("(5,)", "(0,)", "share memory")),
    "windows": (lambda: torch.zeros(9).as_strided((4, 3), (2, 1)), ("(4, 3)", "(2, 1)")),
}


@every_class
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("kind", BAD_PARAMS)
def test_parameter(case: Case, kind: str, named: bool) -> None:
    make, parts = BAD_PARAMS[kind]

    def groups() -> Any:
        params: Any = [*make_params()[:2], make()]
        if named:
            params = list(zip(NAMES, params, strict=False))
        return [{"params": params[:1]}, {"params": params[1:]}]

    def refuse_step(optimizer: Optimizer, where: str) -> None:
        *good, bad = params_of(optimizer)
        for step in range(2):  # it may be one that never has a gradient
            set_grads(good, step)
            optimizer.step()
        bad.grad = bad.detach()
        before = copy.deepcopy(([*good], [optimizer.state[p] for p in good]))
        with pytest.raises((TypeError, ValueError)) as caught:
            optimizer.step()
        for part in (case.ours.__name__, where, *parts):
            assert part in str(caught.value)
        assert_same_bits(([*good], [optimizer.state[p] for p in good]), before)
        bad.grad = None
        optimizer.step()

    refuse_step(case.ours(groups(), **case.options), THIRD[named])
    optimizer = build(case, named)
    optimizer.add_param_group({"params": [(NAMES[0], make())] if named else [make()]})
    refuse_step(optimizer, NAMES[0] if named else "parameter 0 of group 3")


@every_class
@pytest.mark.parametrize("overlap", ["part", "whole", "interleaved"])
def test_overlapping_parameters(case: Case, overlap: str) -> None:
    memory = torch.zeros(40)
    first, second = {
        "part": (memory[:20], memory[19:]),
        "whole": (memory[:], memory[5:9]),
        "interleaved": (memory[::2], memory[::3]),
    }[overlap]
    p, q = nn.Parameter(first), nn.Parameter(second)
    assert p.data_ptr() == memory.data_ptr()
    # Within a group the constructor refuses, between groups the first step at the latest.
    with pytest.raises(ValueError) as caught:
        case.ours([p, q], **case.options)
    for part in (case.ours.__name__, "parameter 0 of group 0", "parameter 1 of group 0", "overlap"):
        assert part in str(caught.value)
    with pytest.raises(ValueError) as caught:
        optimizer = case.ours([{"params": [p]}, {"params": [q]}], **case.options)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
    for part in (case.ours.__name__, "parameter 0 of group 0", "parameter 0 of group 1", "overlap"):
        assert part in str(caught.value)
    assert not memory.any()


@every_class
def test_neighbours_do_not_overlap(case: Case) -> None:
    memory = torch.zeros(40)
    views = [memory[:20], memory[20:30], memory[30::2], memory[31::2]]
    optimizer = case.ours([nn.Parameter(view) for view in views], **case.options)
    train(optimizer, range(2))


@every_class
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_parameters_made_to_overlap_later(case: Case, named: bool) -> None:
    optimizer = build(case, named)
    params = params_of(optimizer)
    set_grads(params, 3)
    params[2].data = params[1].data[3]
    refuse(optimizer, optimizer.step, THIRD[named], "overlap")


@every_class
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_parameter_changed_later(case: Case, named: bool) -> None:
    optimizer = build(case, named)
    bad = params_of(optimizer)[2]
    bad.grad = None
    bad.data = torch.zeros((), dtype=torch.bfloat16)
    bad.grad = torch.zeros((), dtype=torch.bfloat16)
    bad.data = bad.data.to(torch.float8_e5m2)
    for p in params_of(optimizer)[:2]:
        p.grad = torch.ones_like(p)
    refuse(optimizer, optimizer.step, THIRD[named], "float8_e5m2")


def test_one_tensor_is_no_list() -> None:
    with pytest.raises(TypeError, match="iterable"):
        fusedopt.AdamW(nn.Parameter(torch.zeros(3)))


# -- state ------------------------------------------------------------------------------------

BAD_STATES: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "shape": (lambda s: torch.zeros(4, 2), ("(4, 2)", "()")),
    "integer": (lambda s: torch.zeros((), dtype=torch.int64), ("int64", "floating")),
    "complex": (lambda s: torch.zeros((), dtype=torch.complex64), ("complex64", "floating")),
    "meta": (lambda s: s.to("meta"), ("meta", "cpu")),
    "sparse": (lambda s: torch.zeros(()).to_sparse(), ("sparse",)),
    "number": (lambda s: 1.0, ("float", "tensor")),
}


@every_class
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("kind", BAD_STATES)
def test_state_put_there(case: Case, kind: str, named: bool) -> None:
    make, parts = BAD_STATES[kind]
    for key in case.state_keys:
        if key in NUMBERS:
            continue
        optimizer = build(case, named)
        bad = params_of(optimizer)[2]
        before = optimizer.state[bad][key]
        optimizer.state[bad][key] = make(before)
        set_grads(params_of(optimizer), 5)
        with pytest.raises((TypeError, ValueError)) as caught:
            optimizer.step()
        for part in (case.ours.__name__, THIRD[named], key, *parts):
            assert part in str(caught.value)
        # Nothing was stepped: with the state put right, it goes on as if nothing had happened.
        optimizer.state[bad][key] = before
        twin = build(case, named)
        assert_unchanged(optimizer, [*snapshot(twin)[:3], *snapshot(optimizer)[3:]])


@every_class
@pytest.mark.parametrize("kind", ["shape", "meta"])
def test_state_tensor_rebound(case: Case, kind: str) -> None:
    """Not exchanged in the dictionary, but made to be another tensor itself."""
    make, parts = BAD_STATES[kind]
    optimizer = build(case)
    bad = params_of(optimizer)[2]
    key = next(key for key in case.state_keys if key not in NUMBERS)
    if kind == "meta":
        torch.utils.swap_tensors(optimizer.state[bad][key], make(optimizer.state[bad][key]))
    else:
        optimizer.state[bad][key].data = make(bad)
    set_grads(params_of(optimizer), 5)
    before = [p.detach().clone() for p in params_of(optimizer)]
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer.step()
    for part in (case.ours.__name__, THIRD[False], key, *parts):
        assert part in str(caught.value)
    for p, value in zip(params_of(optimizer), before, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("case", [c for c in RICHEST if "step" in c.state_keys], ids=str)
@pytest.mark.parametrize("value", [torch.zeros(2), "3", None, torch.tensor(NAN)], ids=str)
def test_step_count(case: Case, value: Any) -> None:
    optimizer = build(case)
    bad = params_of(optimizer)[2]
    optimizer.state[bad]["step"] = value
    set_grads(params_of(optimizer), 5)
    refuse(optimizer, optimizer.step, THIRD[False], "step")


# -- hyper-parameters -------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[str, Any]] = {
    "lr": ("lr", NAN),
    "tensor lr": ("lr", torch.tensor(NAN)),
    "weight_decay": ("weight_decay", NAN),
    "eps": ("eps", NAN),
    "betas[0]": ("betas", (NAN, 0.9)),
    "betas[1]": ("betas", (0.9, NAN)),
    "momentum": ("momentum", NAN),
    "dampening": ("dampening", NAN),
    "alpha": ("alpha", NAN),
    "rho": ("rho", NAN),
    "lr_decay": ("lr_decay", NAN),
    "initial_accumulator_value": ("initial_accumulator_value", NAN),
    "etas[0]": ("etas", (NAN, 1.2)),
    "etas[1]": ("etas", (0.5, NAN)),
    "step_sizes[0]": ("step_sizes", (NAN, 50)),
    "step_sizes[1]": ("step_sizes", (1e-6, NAN)),
}


def has(case: Case, key: str) -> bool:
    return key in case.ours(make_params()).defaults


OPTION_CASES = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in RICHEST
    for name, (key, _) in BAD_OPTIONS.items()
    if has(case, key)
]


@pytest.mark.parametrize(("case", "name"), OPTION_CASES)
def test_nan_in_the_constructor(case: Case, name: str) -> None:
    """torch's own checks find most of these, in its own words; the rest is found all the same."""
    key, value = BAD_OPTIONS[name]
    words = {"lr": "learning rate", "eps": "epsilon", "betas": "beta", "etas": "eta values"}
    with pytest.raises(ValueError, match=f"{key}|{words.get(key, key)}"):
        case.ours(make_params(), **{**case.options, key: value})


@pytest.mark.parametrize(("case", "name"), OPTION_CASES)
def test_nan_in_a_group(case: Case, name: str) -> None:
    key, value = BAD_OPTIONS[name]
    groups = [{"params": make_params()[:3]}, {"params": make_params()[3:], key: value}]
    with pytest.raises(ValueError, match=f"{case.ours.__name__}.*group 1.*{key}.*NaN"):
        case.ours(groups, **case.options)
    optimizer = build(case)
    refuse(optimizer, lambda: optimizer.add_param_group(groups[1]), "group 3", key, "NaN")


@pytest.mark.parametrize(("case", "name"), OPTION_CASES)
def test_nan_set_by_hand(case: Case, name: str) -> None:
    key, value = BAD_OPTIONS[name]
    optimizer = build(case)
    good = optimizer.param_groups[1][key]
    optimizer.param_groups[1][key] = value
    set_grads(params_of(optimizer), 5)
    refuse(optimizer, optimizer.step, "group 1", name.split()[-1], "NaN", error=ValueError)
    optimizer.param_groups[1][key] = good
    twin = build(case)
    for each in (optimizer, twin):
        train(each, range(2, 4))
    assert_unchanged(optimizer, [*snapshot(twin)[:3], *snapshot(optimizer)[3:]])


@every_class
def test_lr_of_two_elements(case: Case) -> None:
    with pytest.raises(ValueError, match="1-element" if case.row.theirs else "one element"):
        case.ours(make_params(), lr=torch.ones(2))
    with pytest.raises(ValueError, match=f"{case.ours.__name__}.*group 0.*lr.*2 elements"):
        case.ours([{"params": make_params(), "lr": torch.ones(2)}])
    optimizer = build(case)
    refuse(
        optimizer,
        lambda: optimizer.add_param_group({"params": make_params(), "lr": torch.ones(2)}),
        "group 3",
        "lr",
        "2 elements",
    )
    optimizer.param_groups[1]["lr"] = torch.ones(2)
    refuse(optimizer, optimizer.step, "group 1", "lr", "2 elements", "one")


@every_class
@pytest.mark.parametrize("value", ["0.1", [0.1], {"max": 1}], ids=["text", "list", "dict"])
def test_options_that_are_no_numbers(case: Case, value: Any) -> None:
    optimizer = build(case)
    optimizer.param_groups[1]["lr"] = value
    refuse(optimizer, optimizer.step, "group 1", "lr", error=TypeError)


@every_class
def test_missing_option(case: Case) -> None:
    optimizer = build(case)
    del optimizer.param_groups[1]["maximize"]
    refuse(optimizer, optimizer.step, "group 1", "maximize", error=KeyError)


@every_class
def test_empty_groups(case: Case) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        case.ours([], **case.options)
    optimizer, twin = build(case), build(case)
    optimizer.add_param_group({"params": []})
    for each in (optimizer, twin):
        train(each, [2])
    assert_same_bits(params_of(optimizer), params_of(twin))


@every_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, "float31"], ids=str)
def test_state_dtype(case: Case, dtype: Any) -> None:
    """One that the parameter cannot have."""
    with pytest.raises(TypeError) as caught:
        case.ours(make_params(torch.bfloat16), **case.options, state_dtype=dtype)
    for part in (
        case.ours.__name__,
        "parameter 0 of group 0",
        "bfloat16",
        str(dtype).removeprefix("torch."),
        "float32",
    ):
        assert part in str(caught.value)


# -- the environment --------------------------------------------------------------------------


def test_unknown_isa() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fusedopt"],
        env={**os.environ, "FUSEDOPT_ISA": "unknown"},
        capture_output=True,
        text=True,
        cwd=Path(fusedopt.__file__).parents[1],
    )
    assert done.returncode != 0
    for part in ("Error", "FUSEDOPT_ISA=unknown", "baseline", "avx2", "avx512"):
        assert part in done.stderr
