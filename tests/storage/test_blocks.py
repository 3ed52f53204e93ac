"""Codes in the parameter's shape: their blocks end with rows, wherever they lie in memory, and
those of older checkpoints load."""

import copy
from collections.abc import Callable
from math import ceil, prod
from typing import Any

import pytest
import torch
from support.storing import BF16, F32, INT8, LAID, decoded, step
from support.training import (
    assert_equal,
    assert_same_bits,
    clone_params,
    make_params,
    params_of,
    saved,
    states_of,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt
from fusedopt._extension import _C

ROWS = [63, 64, 65, 255, 256, 257, 300, 511, 512, 513]
ADAM = ("exp_avg", "exp_avg_sq")


def adamw(params: list[nn.Parameter], **options: Any) -> fusedopt.AdamW:
    return fusedopt.AdamW(params, lr=1e-2, **{**INT8, **options})


# -- where blocks end ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "how", "scales"),
    [
        *(((7, row), "contiguous", (7, ceil(row / 256))) for row in ROWS[1:]),
        ((7, 63), "contiguous", (2,)),
        ((1, 300), "contiguous", (1, 2)),
        ((300,), "contiguous", (2,)),
        ((), "contiguous", (1,)),
        ((0, 300), "contiguous", (0, 2)),
        ((300, 0), "contiguous", (0,)),
        ((5, 3, 100), "contiguous", (5, 2)),
        ((4, 3, 5, 6), "channels_last", (4, 1)),
        ((4, 3, 5, 4), "channels_last", (1,)),
        ((7, 300), "transposed", (9,)),
        ((3, 7, 100), "transposed", (3, 3)),
        ((7, 300), "gaps", (7, 2)),
    ],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], how: str, scales: tuple[int, ...]) -> None:
    param = nn.Parameter(LAID[how](torch.randn(shape)))
    optimizer = adamw([param])
    step(optimizer, range(2))
    state = optimizer.state[param]
    for name in ADAM:
        code, scale = state[f"{name}_code"], state[f"{name}_scale"]
        assert code.dtype == torch.uint8 and code.shape == shape and code.is_contiguous()
        assert scale.dtype == F32 and tuple(scale.shape) == scales and scale.is_contiguous()
        assert code.untyped_storage().nbytes() == prod(shape)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("row", ROWS[1:])
def test_a_row_is_as_a_parameter_of_its_own(row: int, isa: str, threads: int) -> None:
    """Codes that are rounded to nearest know nothing of their place."""
    try:
        _C.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    torch.set_num_threads(threads)
    (whole,) = make_params(shapes=((211, row),))
    rows = [nn.Parameter(part.clone()) for part in whole.detach()]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, **INT8}
    ours, theirs = fusedopt.SGD([whole], **options), fusedopt.SGD(rows, **options)
    for number in range(3):
        step(ours, [number])
        assert whole.grad is not None
        for p, grad in zip(rows, whole.grad, strict=True):
            p.grad = grad.clone()
        theirs.step()
    assert_same_bits(whole.detach(), torch.stack([p.detach() for p in rows]))
    state = states_of(ours)[0]
    assert state.pop("code_stride").tolist() == [row, 1]
    for key, value in state.items():
        assert_same_bits(value, torch.stack([state[key] for state in states_of(theirs)]))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_whole_blocks_are_those_of_a_line(row: int, rounding: str) -> None:
    """With the same random numbers; and where rows end otherwise, with others."""
    (matrix,) = make_params(BF16, shapes=((5, row),))
    line = nn.Parameter(matrix.detach().flatten())
    ours, theirs = (adamw([p], rounding=rounding) for p in (matrix, line))
    for number in range(4):
        step(ours, [number])
        assert matrix.grad is not None
        line.grad = matrix.grad.flatten()
        theirs.step()
    mine, others = (states_of(each)[0]["exp_avg_sq_code"] for each in (ours, theirs))
    same = torch.equal(mine.flatten(), others)
    assert same == (row in (63, 256, 512))
    if same:
        assert_same_bits(matrix.detach().flatten(), line.detach())


# -- wherever they lie --------------------------------------------------------------------------

GUARD = 171


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_codes_at_any_address(shift: int, threads: int, device: str) -> None:
    """They are stepped where they are, and what lies around them is left alone."""
    torch.set_num_threads(threads)
    shapes = [(9, row) for row in ROWS] + [(1000,), (3,), (), (5, 3, 100)]
    params = [nn.Parameter(p.detach().to(device)) for p in make_params(shapes=tuple(shapes))]
    ours, theirs = adamw(params), adamw(clone_params(params))
    for each in (ours, theirs):
        step(each, range(2))
    memory = []
    for param in params:
        for name in ADAM:
            code = ours.state[param][f"{name}_code"]
            around = torch.full((code.numel() + 80,), GUARD, dtype=torch.uint8, device=device)
            memory.append((around, slice(shift, shift + code.numel())))
            mine = around[memory[-1][1]].view(code.shape).copy_(code)
            ours.state[param][f"{name}_code"] = mine
    for each in (ours, theirs):
        step(each, range(2, 5))
    assert_equal(ours, theirs)
    codes = [ours.state[param][f"{name}_code"] for param in params for name in ADAM]
    for code, (around, inside) in zip(codes, memory, strict=True):
        assert code.data_ptr() == around[inside].data_ptr()
        outside = torch.cat([around[: inside.start], around[inside.stop :]])
        assert bool((outside == GUARD).all())


# -- older checkpoints --------------------------------------------------------------------------


def filled_up(code: Tensor) -> Tensor:
    """Codes of blocks that take no notice of rows, as they were stored up to version 0.1."""
    whole = code.numel() // 256 * 256
    rest = torch.zeros(-code.numel() % 256 + code.numel() - whole, dtype=torch.uint8)
    rest[: code.numel() - whole] = code.flatten()[whole:]
    words = rest.view(-1, 4, 64).swapaxes(1, 2).reshape(-1)
    return torch.cat([code.flatten()[:whole], words]).view(-1, 256)


def old_checkpoint(optimizer: Optimizer) -> dict[str, Any]:
    state_dict = saved(optimizer)
    for values in state_dict["state"].values():
        for key in [key for key in values if key.endswith("_code")]:
            scales = key.removesuffix("_code") + "_scale"
            values[key], values[scales] = filled_up(values[key]), values[scales].flatten()
    return state_dict


def assert_alike(a: Optimizer, b: Optimizer) -> None:
    """The same bits, in whatever order a state has its keys."""
    assert_same_bits(params_of(a), params_of(b))
    for ours, theirs in zip(states_of(a), states_of(b), strict=True):
        assert ours.keys() == theirs.keys()
        assert_same_bits(ours, {key: theirs[key] for key in ours})


def by_load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> Optimizer:
    optimizer.load_state_dict(state_dict)
    return optimizer


def by_hand(optimizer: Optimizer, state_dict: dict[str, Any]) -> Optimizer:
    for param, values in zip(params_of(optimizer), state_dict["state"].values(), strict=True):
        optimizer.state[param] = values
    return optimizer


def by_copies(optimizer: Optimizer, state_dict: dict[str, Any]) -> Optimizer:
    """As unpickling does."""
    return copy.deepcopy(by_hand(optimizer, state_dict))


LOADS = [by_load_state_dict, by_hand, by_copies]


@pytest.mark.parametrize("load", LOADS)
def test_an_old_checkpoint_whose_blocks_are_the_same(load: Any) -> None:
    """They begin anew with each row as they did: nothing is lost."""
    shapes = ((4, 256), (3, 512), (1, 300), (5, 63), (1000,), (3,), (), (0, 300), (2, 2, 128))
    params = [*make_params(shapes=shapes), nn.Parameter(LAID["transposed"](torch.randn(7, 300)))]
    start = adamw(params)
    step(start, range(3))
    old = old_checkpoint(start)
    assert old["state"][1]["exp_avg_code"].shape == (6, 256)
    ours = load(adamw(clone_params(params)), copy.deepcopy(old))
    for each in (ours, start):
        step(each, range(3, 5))
    assert_alike(ours, start)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("row", [64, 65, 300, 513])
def test_an_old_checkpoint_whose_blocks_are_others(row: int, load: Any) -> None:
    """Its numbers are encoded anew, each to nearest."""
    (matrix,) = make_params(shapes=((9, row),))
    line = nn.Parameter(matrix.detach().flatten())
    start = adamw([line])
    step(start, range(3))
    ours = load(adamw([matrix]), old_checkpoint(start))
    if load is not by_load_state_dict:
        ours._make_plan(ours.state)  # which converts
    for name, square in zip(ADAM, (False, True), strict=True):
        state = states_of(ours)[0]
        assert state[f"{name}_code"].shape == (9, row)
        got = decoded(state, name, matrix, square).view(9, row)
        want = decoded(states_of(start)[0], name, line, square).view(9, row)
        small = want.abs() < want.abs().amax() / 16
        apart = (got - want).abs()
        assert bool((apart <= 2**-4 * want.abs())[~small].all())
        assert bool((apart <= 2**-8 * want.abs().amax())[small].all())


@pytest.mark.parametrize(
    "mix",
    [
        lambda new, old: (new["code"], old["scale"]),
        lambda new, old: (old["code"], new["scale"]),
        lambda new, old: (old["code"][:-1], old["scale"][:-1]),
        lambda new, old: (new["code"].mT, new["scale"]),
        lambda new, old: (new["code"], new["scale"].mT),
    ],
)
def test_forms_that_do_not_go_together(mix: Callable[..., tuple[Tensor, Tensor]]) -> None:
    (param,) = make_params(shapes=((4, 300),))
    start = adamw([param])
    step(start, range(2))
    state_dict, old = saved(start), old_checkpoint(start)
    part = {end: state_dict["state"][0][f"exp_avg_{end}"] for end in ("code", "scale")}
    old_part = {end: old["state"][0][f"exp_avg_{end}"] for end in ("code", "scale")}
    code, scale = mix(part, old_part)
    state_dict["state"][0] |= {"exp_avg_code": code, "exp_avg_scale": scale}
    other = adamw(clone_params([param]))
    with pytest.raises(ValueError, match=r"AdamW: state 'exp_avg_(code|scale)' of parameter 0"):
        other.load_state_dict(state_dict)
    assert not other.state


# -- remainders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADS)
def test_a_remainder_is_bits(load: Any) -> None:
    """A view of 16 bits that processes can send each other; it was int16, and may be any bits."""
    params = make_params(BF16, shapes=((300, 300), (33,), ()))
    start = fusedopt.AdamW(params, master_bits=32)
    step(start, range(2))
    with torch.no_grad():
        remainder = start.state[params[0]]["master_remainder"]
        assert remainder.dtype == BF16 and remainder.shape == (300, 300)
        remainder.view(torch.int16).flatten()[: 1 << 16] = torch.arange(1 << 16).to(torch.int16)
    masters = [*start.master_params()]
    for dtype in (BF16, torch.int16):
        state_dict = saved(start)
        for values in state_dict["state"].values():
            values["master_remainder"] = values["master_remainder"].view(dtype)
        other = load(fusedopt.AdamW(clone_params(params), master_bits=32), state_dict)
        assert_same_bits([*other.master_params()], masters)
        again = copy.deepcopy(start)
        for each in (other, again):
            step(each, [2])
        assert_alike(other, again)


def test_a_remainder_of_numbers_is_refused() -> None:
    params = make_params(BF16)
    start = fusedopt.AdamW(params, master_bits=32)
    step(start, range(2))
    state_dict = saved(start)
    values = state_dict["state"][0]
    values["master_remainder"] = values["master_remainder"].float()
    with pytest.raises(ValueError, match=r"master_remainder.*float32.*expected torch\.bfloat16"):
        fusedopt.AdamW(clone_params(params), master_bits=32).load_state_dict(state_dict)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (300,), (2, 70), (1, 300), (4, 300)])
def test_scales_have_ordinary_strides(shape: tuple[int, ...]) -> None:
    """Those of one element, too: torch views no other as bytes."""
    param = nn.Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    optimizer = fusedopt.AdamW([param], state_dtype="int8", min_8bit_size=0)
    optimizer.step()
    scales = optimizer.state[param]["exp_avg_scale"]
    assert scales.stride() == torch.empty(scales.shape).stride()
    assert scales.view(torch.uint8).numel() == 4 * scales.numel()
