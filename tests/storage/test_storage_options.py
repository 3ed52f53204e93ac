"""Choices of storage: which parameters they are for, what is refused, and changes by hand."""

import pytest
import torch
from support.optimizers import Options
from support.storing import (
    BF16,
    CHOICES,
    F16,
    F32,
    INT8,
    PAIRS,
    RICHEST_IN_CODES,
    SHAPES,
    Choice,
    every_pair,
    step,
)
from support.training import (
    RICHEST,
    Case,
    assert_same_bits,
    assert_unchanged,
    clone_params,
    make_params,
    params_of,
    set_grads,
    snapshot,
    states_of,
    train,
)

import fusedopt
from fusedopt._formats import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_class_in_codes = pytest.mark.parametrize("case", RICHEST_IN_CODES, ids=str)


@every_class_in_codes
def test_small_parameters_have_float32_states(case: Case) -> None:
    case = next(p.values[0] for p in PAIRS if p.values[0].ours is case.ours and p.values[1].codes)
    shapes = ((4095,), (4096,), (64, 64), ())
    optimizer = case.ours(make_params(shapes=shapes), **case.options, state_dtype="int8")
    step(optimizer, range(2))
    coded_ones = (False, True, True, False)
    for p, state, coded in zip(params_of(optimizer), states_of(optimizer), coded_ones, strict=True):
        for key, value in state.items():
            assert not coded or key in NUMBERS or key.endswith(("_code", "_scale", "_stride"))
            assert coded or value.dtype == F32
            assert not key.endswith("_code") or value.dtype == torch.uint8
            assert not key.endswith("_code") or value.shape == p.shape
            scales = (16,) if p.dim() == 1 else (64, 1)
            assert not key.endswith("_scale") or tuple(value.shape) == scales


@every_class_in_codes
def test_a_group_has_its_own_storage(case: Case) -> None:
    case = next(p.values[0] for p in PAIRS if p.values[0].ours is case.ours and p.values[1].codes)
    names = ["bfloat16-24", "bfloat16-int8", "bfloat16-random", "float16-32", "float32-bfloat16"]
    choices = [CHOICES[name] for name in names]
    together = case.ours(
        [
            {"params": choice.params(SHAPES), "master_bits": None, **choice.options}
            for choice in choices
        ],
        **case.options,
        master_bits=32,
    )
    apart = [case.ours(c.params(SHAPES), **case.options, **c.options) for c in choices]
    for number in range(4):
        for optimizer in apart:
            step(optimizer, [number])
        for p, q in zip(params_of(together), sum(map(params_of, apart), []), strict=True):
            p.grad = q.grad
        together.step()
    plain = [i for i, name in enumerate(names) if "random" not in name]  # noise is by position
    for group in plain:
        params = together.param_groups[group]["params"]
        assert_same_bits(params, params_of(apart[group]))
        assert_same_bits([together.state[p] for p in params], states_of(apart[group]))


C64 = torch.complex64
SENSELESS: dict[str, tuple[torch.dtype, Options, list[str]]] = {
    "master of float32": (F32, {"master_bits": 32}, ["master_bits=32", "float32", "None"]),
    "master of float64": (torch.float64, {"master_bits": 24}, ["master_bits=24", "None"]),
    "master of complex": (C64, {"master_bits": 32}, ["master_bits=32", "complex64", "None"]),
    "24 bits of float16": (F16, {"master_bits": 24}, ["master_bits=24", "float16", "32"]),
    "16 bits": (BF16, {"master_bits": 16}, ["master_bits=16", "None", "32", "24"]),
    "true bits": (BF16, {"master_bits": True}, ["master_bits=True", "None", "32", "24"]),
    "text for bits": (BF16, {"master_bits": "32"}, ["master_bits='32'", "None", "32", "24"]),
    "master, float16 states": (
        F16,
        {"master_bits": 32, "state_dtype": F16},
        ["float16", "float32"],
    ),
    "codes for float64": (torch.float64, INT8, ['"int8"', "float64", "None"]),
    "codes for complex": (C64, INT8, ['"int8"', "complex64", "None"]),
    "unknown text": (F32, {"state_dtype": "int4"}, ["'int4'", '"int8"', "float32"]),
    "int8 as a dtype": (F32, {"state_dtype": torch.int8}, ["torch.int8", '"int8"', "float32"]),
    "no dtype": (F32, {"state_dtype": 8}, ["state_dtype=8", '"int8"', "float32"]),
    "a list": (F32, {"state_dtype": []}, ["state_dtype=[]", '"int8"', "float32"]),
    "bfloat16 for complex": (C64, {"state_dtype": BF16}, ["bfloat16", "complex64", "float32"]),
    "float16 for bfloat16": (BF16, {"state_dtype": F16}, ["float16", "bfloat16", "float32"]),
    "random and a master": (
        BF16,
        {"rounding": "stochastic", "master_bits": 32},
        ['"stochastic"', "master_bits=32", "one of"],
    ),
    "random float32": (F32, {"rounding": "stochastic"}, ["float32", '"nearest"']),
    "random float16": (F16, {"rounding": "stochastic"}, ["float16", '"nearest"']),
    "unknown rounding": (BF16, {"rounding": "up"}, ["rounding='up'", '"nearest"', '"stochastic"']),
    "no rounding": (BF16, {"rounding": None}, ["rounding=None", '"nearest"', '"stochastic"']),
    "negative size": (F32, {**INT8, "min_8bit_size": -1}, ["min_8bit_size=-1", "number"]),
    "half a size": (F32, {**INT8, "min_8bit_size": 0.5}, ["min_8bit_size=0.5", "number"]),
    "negative seed": (BF16, {"seed": -1}, ["seed=-1", "2**64"]),
    "large seed": (BF16, {"seed": 2**64}, [f"seed={2**64}", "2**64"]),
    "half a seed": (BF16, {"seed": 0.5}, ["seed=0.5", "integer"]),
    "true seed": (BF16, {"seed": True}, ["seed=True", "integer"]),
}


senseless = pytest.mark.parametrize(
    ("dtype", "options", "parts"), SENSELESS.values(), ids=SENSELESS
)


@every_class
@senseless
def test_senseless_choices(
    case: Case, dtype: torch.dtype, options: Options, parts: list[str]
) -> None:
    """They are refused before anything was made, and the message says what to use instead."""
    params = make_params(dtype)
    common = {**case.options, "centered": False} if "centered" in case.options else case.options
    with pytest.raises((TypeError, ValueError)) as caught:
        case.ours([{"params": params[:1]}, {"params": params[1:], **options}], **common)
    for part in (case.ours.__name__, "parameter 0 of group 1", *parts):
        assert part in str(caught.value)
    with pytest.raises((TypeError, ValueError)) as caught:
        case.ours([("weight", params[0])], **common, **options)
    for part in (case.ours.__name__, "parameter 'weight'", *parts):
        assert part in str(caught.value)
    optimizer = case.ours(make_params(), **common)
    train(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer.add_param_group({"params": params, **options})
    for part in (case.ours.__name__, "parameter 0 of group 1", *parts):
        assert part in str(caught.value)
    assert_unchanged(optimizer, before)
    train(optimizer, [2])


def test_codes_for_centered_rmsprop() -> None:
    params = make_params()
    match = r'RMSprop: parameter 0 of group 0.*"int8" with centered=True.*torch\.float32'
    with pytest.raises(ValueError, match=match):
        fusedopt.RMSprop(params, centered=True, state_dtype="int8")
    optimizer = fusedopt.RMSprop(params[:1], state_dtype="int8")
    with pytest.raises(ValueError, match=r"RMSprop: parameter 0 of group 1.*centered=True"):
        optimizer.add_param_group({"params": params[1:], "centered": True})
    optimizer.add_param_group({"params": params[1:], "centered": True, "state_dtype": None})
    step(optimizer, range(2))


@every_class
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_first_of_several_that_fits_not_is_named(case: Case, dtype: torch.dtype) -> None:
    params = [*make_params(dtype)[:2], *make_params()]
    with pytest.raises(ValueError, match=f"{case.ours.__name__}: parameter 2 of group 0"):
        case.ours(params, **case.options, master_bits=32)


@every_class
def test_options_set_by_hand(case: Case) -> None:
    """A senseless one is refused, when the next plan is made, and nothing is changed."""
    optimizer = case.ours(make_params(BF16), **case.options)
    step(optimizer, range(2))
    optimizer.param_groups[0]["master_bits"] = 16
    optimizer._plan = None
    set_grads(params_of(optimizer), 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="master_bits=16"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_pair
def test_another_storage_set_by_hand(case: Case, choice: Choice) -> None:
    """From the next plan on: as if it had been loaded into such an optimizer."""
    optimizer = case.ours(choice.params(SHAPES), **case.options)
    step(optimizer, range(3))
    other = case.ours(clone_params(params_of(optimizer)), **case.options, **choice.options)
    optimizer.param_groups[0].update(choice.options)
    other.load_state_dict(optimizer.state_dict())
    optimizer._plan = None
    for each in (optimizer, other):
        step(each, range(3, 6))
    assert_same_bits(params_of(optimizer), params_of(other))
    for mine, theirs in zip(states_of(optimizer), states_of(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same_bits(mine[key], theirs[key])
