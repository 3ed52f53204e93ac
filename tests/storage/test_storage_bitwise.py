"""Codes, masters and random rounding: the same bits on every instruction set, thread count, device
and layout in memory."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from support.accelerator import capture
from support.cases import (
    Data,
    Groups,
    Layout,
    Result,
    assert_same_result,
    harsh,
    realistic,
    reals,
    train,
)
from support.optimizers import ROWS, Options, Row
from support.storing import (
    BF16,
    CHOICES,
    PAIRS,
    SHAPES,
    Choice,
    every_pair,
    marks,
    masters_of,
    step,
)
from support.training import (
    Case,
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    clone_params,
    make_params,
    on,
    params_of,
    set_grads,
    snapshot,
    states_of,
)
from torch import Tensor
from torch.optim import Optimizer

import fusedopt
from fusedopt._extension import _C
from fusedopt._optimizer import FusedOptimizer

STEPS = 6
# In each set of options more elements than one thread takes, and a cut in a block, between two
# blocks and between two parameters.
LAYOUTS = [
    Layout(()),
    Layout((0,)),
    Layout((3,)),
    Layout((256,)),
    Layout((20011,)),
    Layout((9, 11), stride=(26, 2)),
    Layout((4, 3, 5, 6), stride=(90, 1, 18, 3)),
    Layout((1001,), offset=1),
    Layout((37, 29), stride=(1, 37), offset=3),
    Layout((23, 300)),
    Layout((7, 5, 13), offset=1),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "avx2": {"isa": "avx2"},
    "avx512": {"isa": "avx512"},
    "2-threads": {"threads": 2},
    "avx2-3-threads-flat": {"isa": "avx2", "threads": 3, "flat": True},
}


def groups_of(row: Row, choice: Choice) -> Groups:
    """A group for each set of options: one step covers them all."""
    suitable = [options for options in row.option_sets.values() if choice.suits(row, options)]
    return Groups(suitable, [LAYOUTS] * len(suitable))


WITH_ROWS = [
    pytest.param(name, row, id=f"{name}-{row.name}", marks=marks(row, name))
    for name, choice in CHOICES.items()
    for row in ROWS
    if groups_of(row, choice).options
]
"""Each choice with each optimizer that can store its states so."""


def run(
    row: Row,
    choice: Choice,
    data: Data,
    isa: str = "baseline",
    threads: int = 1,
    flat: bool = False,
    device: str = "cpu",
) -> Result:
    try:
        _C.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    torch.set_num_threads(threads)
    result = train(row.ours, groups_of(row, choice), data, device, flat, **choice.options)
    result.values["master"] = reals(masters_of(result.optimizer))
    return result


@lru_cache(maxsize=1)
def harsh_data(row_name: str, choice_name: str) -> Data:
    """Harsh in some runs of elements, so that there are blocks with and without special values."""
    row, choice = next(row for row in ROWS if row.name == row_name), CHOICES[choice_name]
    most = max(groups_of(row, CHOICES["float32-bfloat16"]).total for row in ROWS)
    size = choice.param, choice.param, most, STEPS  # made once for all choices of a dtype
    calm, rough = realistic(*size), harsh(*size)
    here = torch.arange(most) // 700 % 3 == 0
    mixed = Data(
        torch.where(here, rough.params, calm.params), torch.where(here, rough.grads, calm.grads)
    )
    return mixed.first(groups_of(row, choice).total)


@lru_cache(maxsize=1)
def plain_result(row_name: str, choice_name: str) -> Result:
    row = next(row for row in ROWS if row.name == row_name)
    return run(row, CHOICES[choice_name], harsh_data(row_name, choice_name))


# Settings innermost: the plain result is made once.
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("name", "row"), WITH_ROWS)
def test_same_bits(row: Row, name: str, setting: dict[str, Any]) -> None:
    ours = run(row, CHOICES[name], harsh_data(row.name, name), **setting)
    assert_same_result(ours, plain_result(row.name, name))


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize(("name", "row"), WITH_ROWS)
def test_same_bits_on_cuda(row: Row, name: str, flat: bool, cuda: str) -> None:
    ours = run(row, CHOICES[name], harsh_data(row.name, name), device=cuda, flat=flat)
    assert_same_result(ours, plain_result(row.name, name))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_data_is_harsh(row: Row) -> None:
    """In blocks with what is not finite, and in the codes of others."""
    codes = bool(groups_of(row, CHOICES["bfloat16-32-int8"]).options)
    values = plain_result(row.name, "bfloat16-32-int8" if codes else "bfloat16-32").values
    assert values["master"].numel() > 2 * 32768
    assert values["master"].isnan().sum() > 100
    averaged = "z" in row.begins  # with an Inf it becomes NaN
    assert averaged or values["master"].isinf().sum() > 50
    for key in values:
        if key.endswith("_scale"):
            assert (values[key] < 0).sum() > 20 and (values[key] > 0).sum() > 20


# -- the same values otherwise handed over ----------------------------------------------------


def laid(values: list[Tensor], how: str) -> list[torch.nn.Parameter]:
    """Copies in other memory, in which an element keeps its neighbours."""
    made = []
    for value in values:
        if how == "misaligned":
            memory = torch.empty(value.numel() + 1, dtype=value.dtype)
            made.append(memory[1:].view(value.shape).copy_(value))
        elif how == "gaps":
            memory = torch.empty(*value.shape, 2, dtype=value.dtype)
            made.append(memory[..., 0].copy_(value))
        else:
            made.append(value.clone())
    return [torch.nn.Parameter(value) for value in made]


@every_pair
@pytest.mark.parametrize("how", ["misaligned", "gaps", "FlatParameters", "flat"])
def test_wherever_a_parameter_lies(case: Case, choice: Choice, how: str) -> None:
    values = [p.detach() for p in choice.params(SHAPES)]
    params = laid(values, how)
    buffer = fusedopt.FlatParameters(params) if how == "FlatParameters" else None
    options = {**case.options, **choice.options}
    ours = case.ours(params, **options, flat=how == "flat")
    plain = case.ours(laid(values, "plain"), **options)
    for number in range(4):
        for optimizer in (ours, plain):
            for p in params_of(optimizer):
                random = torch.Generator().manual_seed(number * 100 + p.numel())
                grad = torch.randn(p.shape, generator=random).to(p.dtype)
                if how == "flat" and optimizer is ours:
                    p.grad.copy_(grad)
                else:
                    p.grad = grad
            optimizer.step()
    assert_equal(ours, plain)
    assert_same_bits(masters_of(ours), masters_of(plain))
    assert buffer is None or all(p.grad is not None for p in params)


@pytest.mark.parametrize(("case", "choice"), [p for p in PAIRS if p.values[1].param == BF16])
def test_float32_gradients_with_the_same_values(case: Case, choice: Choice) -> None:
    options = {**case.options, **choice.options}
    wide, narrow = (case.ours(choice.params(SHAPES), **options) for _ in range(2))
    for number in range(4):
        set_grads(params_of(narrow), number)
        for p, q in zip(params_of(wide), params_of(narrow), strict=True):
            p.grad_dtype = torch.float32
            p.grad = q.grad.float()
        wide.step()
        narrow.step()
    assert_equal(wide, narrow)


@every_pair
def test_codes_are_in_the_order_of_memory(case: Case, choice: Choice) -> None:
    """A channels_last parameter is as its elements are, one behind the other."""
    options = {**case.options, **choice.options}
    values = choice.params(((4, 3, 5, 6),))[0].detach()
    last = torch.nn.Parameter(values.contiguous(memory_format=torch.channels_last))
    line = torch.nn.Parameter(values.permute(0, 2, 3, 1).reshape(4, -1).clone())
    ours, plain = case.ours([last], **options), case.ours([line], **options)
    for number in range(4):
        set_grads([last], number)
        line.grad = last.grad.permute(0, 2, 3, 1).reshape(4, -1)
        ours.step()
        plain.step()
    assert_same_bits(last.detach().permute(0, 2, 3, 1).reshape(4, -1), line.detach())
    mine, theirs = states_of(ours)[0], states_of(plain)[0]
    if choice.codes:
        assert mine.pop("code_stride").tolist() == list(last.stride())
        assert theirs.pop("code_stride").tolist() == list(line.stride())
    for key in theirs:
        if key.endswith("_code"):
            mine[key] = mine[key].view(4, -1)
        elif theirs[key].shape == line.shape:
            mine[key] = mine[key].permute(0, 2, 3, 1).reshape(4, -1)
        assert_same_bits(mine[key], theirs[key])
    assert mine.keys() == theirs.keys()


# -- clipping and skipping --------------------------------------------------------------------


def pair(case: Case, choice: Choice, device: str, **options: Any) -> tuple[Optimizer, Optimizer]:
    """The same optimizer twice; the first has the further options."""
    common = {**case.options, **choice.options}
    ours, plain = (on(device, choice.params(SHAPES)) for _ in range(2))
    return case.ours(ours, **common, **options), case.ours(plain, **common)


def assert_same_values(a: Optimizer, b: Optimizer) -> None:
    """The same bits, wherever the counts of steps are."""
    assert_same_bits(params_of(a), params_of(b))
    assert_same_bits(masters_of(a), masters_of(b))
    for ours, theirs in zip(states_of(a), states_of(b), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_bits(value.cpu(), theirs[key].cpu())


@every_pair
def test_a_norm_that_clips_nothing(case: Case, choice: Choice, device: str) -> None:
    ours, plain = pair(case, choice, device, max_grad_norm=1e9)
    for optimizer in (ours, plain):
        step(optimizer, range(4))
    assert_same_values(ours, plain)


@every_pair
def test_clipping_and_a_scale(case: Case, choice: Choice, device: str) -> None:
    """A scale that is a power of two changes nothing."""
    ours, plain = (pair(case, choice, device, max_grad_norm=0.5)[0] for _ in range(2))
    unclipped, _ = pair(case, choice, device)
    for number in range(4):
        for optimizer in (ours, plain, unclipped):
            set_grads(params_of(optimizer), number)
        with torch.no_grad():
            for p in params_of(ours):
                p.grad *= 1024
        ours.grad_scale = torch.tensor(1024.0, device=device)
        for optimizer in (ours, plain, unclipped):
            optimizer.step()
        assert_same_bits(ours.grad_norm, plain.grad_norm)
    assert_equal(ours, plain)
    # Parameters may go the same way: the steps of some optimizers do not depend on a scale.
    clipped, whole = (
        [*params_of(each), *(value for state in states_of(each) for value in state.values())]
        for each in (plain, unclipped)
    )
    assert not all(torch.equal(a, b) for a, b in zip(clipped, whole, strict=True))


@every_pair
def test_a_skipped_step_changes_nothing(case: Case, choice: Choice, device: str) -> None:
    ours, plain = pair(case, choice, device)
    for number in range(4):
        step(ours, [number])
        step(plain, [number])
        before = snapshot(ours)
        set_grads(params_of(ours), 50 + number)
        params_of(ours)[0].grad.fill_(torch.inf)
        ours.found_inf = torch.tensor(1.0, device=device)
        ours.step()
        assert_unchanged(ours, before)
        del ours.found_inf
    assert_equal(ours, plain)


def test_the_first_step_is_skipped(device: str) -> None:
    for choice in CHOICES.values():
        ours = fusedopt.AdamW(on(device, choice.params(SHAPES)), **choice.options)
        before = [p.detach().clone() for p in params_of(ours)]
        ours.found_inf = torch.tensor(1.0, device=device)
        step(ours, [0])
        assert_same_bits([p.detach() for p in params_of(ours)], before)
        ours.found_inf = torch.tensor(0.0, device=device)
        plain = fusedopt.AdamW(on(device, choice.params(SHAPES)), **choice.options)
        for optimizer in (ours, plain):
            step(optimizer, range(1, 4))
        assert_equal(ours, plain)


@every_pair
def test_grad_scaler(
    case: Case, choice: Choice, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one gradient that overflows, in the second step, as with fused=True."""
    monkeypatch.setattr(FusedOptimizer, "_step_supports_amp_scaling", True)
    ours, plain = pair(case, choice, device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.tensor(1.0, device=device))
    for number in range(4):
        set_grads(params_of(ours), number)
        with torch.no_grad():
            for p in params_of(ours):
                p.grad *= scaler.get_scale()
        if number == 1:
            params_of(ours)[0].grad[0, 0] = torch.inf
        else:
            step(plain, [number])
        scaler.step(ours)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_equal(ours, plain)


# -- counts on the device ---------------------------------------------------------------------


@every_pair
def test_counts_on_the_device(case: Case, choice: Choice, cuda: str) -> None:
    """Rounding at random and dithering look at them."""
    ours, plain = pair(case, choice, cuda, capturable=True)
    for optimizer in (ours, plain):
        step(optimizer, range(5))
    assert_same_values(ours, plain)
    for state in states_of(ours):
        assert "step" not in state or state["step"].device.type == torch.device(cuda).type


@every_pair
def test_steps_that_the_device_skips(case: Case, choice: Choice, cuda: str) -> None:
    ours, plain = pair(case, choice, cuda, capturable=True)
    for number, found_inf in enumerate([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]):
        ours.found_inf = torch.tensor(found_inf, device=cuda)
        before = [p.detach().clone() for p in params_of(ours)]
        step(ours, [number])
        if found_inf:
            assert_same_bits([p.detach() for p in params_of(ours)], before)
        else:
            step(plain, [number])
    assert_same_values(ours, plain)


@every_pair
def test_a_graph_is_replayed(case: Case, choice: Choice, cuda: str) -> None:
    """Each replay rounds with the noise of its own step."""
    ours, plain = pair(case, choice, cuda, capturable=True)
    for optimizer in (ours, plain):
        step(optimizer, [0])
    grads = [p.grad for p in params_of(ours)]
    replay = capture(ours.step)
    for number in range(1, 5):
        step(plain, [number])
        for grad, p in zip(grads, params_of(plain), strict=True):
            grad.copy_(p.grad)
        replay()
    assert_same_values(ours, plain)


def test_weights_changed_before_a_capture(cuda: str) -> None:
    """A graph would find them changed at each replay."""
    optimizer = fusedopt.AdamW(on(cuda, make_params(BF16)), master_bits=32, capturable=True)
    step(optimizer, range(2))
    with torch.no_grad():
        params_of(optimizer)[1].fill_(0.5)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"AdamW: parameter 1 of group 0 .*changed since"):
        capture(optimizer.step)
    assert_unchanged(optimizer, before)
    step(optimizer, [2])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["bfloat16-24-int8", "bfloat16-random-int8", "float16-32"])
def test_a_checkpoint_goes_from_the_device_to_the_cpu(name: str, cuda: str) -> None:
    choice = CHOICES[name]
    options: Options = {"lr": 0.01, **choice.options}
    there = fusedopt.AdamW(on(cuda, choice.params(SHAPES)), **options)
    step(there, range(3))
    here = fusedopt.AdamW(clone_params(on("cpu", params_of(there))), **options)
    here.load_state_dict(there.state_dict())
    for optimizer in (there, here):
        step(optimizer, range(3, 6))
    for a, b in zip(params_of(there), params_of(here), strict=True):
        assert_same_bits(a.detach().cpu(), b.detach())
    for ours, theirs in zip(states_of(there), states_of(here), strict=True):
        assert_same_bits({k: v.cpu() for k, v in ours.items()}, theirs)
