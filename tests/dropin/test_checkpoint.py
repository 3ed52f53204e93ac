"""State dicts: to and from torch.optim, and back into fusedopt to the last bit."""

import copy

import pytest
import torch
from support.training import (
    CASES,
    CASES_IN_TORCH,
    EVERY_CASE,
    RICHEST,
    SHAPES,
    Case,
    assert_close,
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    both,
    clone_params,
    make_params,
    params_of,
    saved,
    set_grads,
    snapshot,
    states_of,
    train,
)
from torch import nn
from torch.optim import Optimizer

import fusedopt
from fusedopt._extension import _C
from fusedopt._formats import NUMBERS

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_case_in_torch = pytest.mark.parametrize("case", CASES_IN_TORCH, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
with_steps = pytest.mark.parametrize(
    "case", [case for case in RICHEST if "step" in case.state_keys], ids=str
)
DTYPES = [*_C.combinations(), (torch.complex64, torch.complex64, torch.float32)]


# -- to and from torch ------------------------------------------------------------------------


@every_case_in_torch
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_exchange_with_torch(case: Case, direction: str) -> None:
    first, then = case.classes[:: 1 if direction == "to torch" else -1]
    start, control = (
        cls([{"params": make_params(torch.float64)}], **case.options)
        for cls in (first, case.counterpart)
    )
    for optimizer in (start, control):
        train(optimizer, range(3))
        optimizer.param_groups[0]["lr"] = 0.004
        optimizer.param_groups[0]["mine"] = ["kept"]
    # A constructor with other options: all of them come from the checkpoint.
    others = case.row.known({"lr": 0.9, "weight_decay": 0.9})
    other = then(clone_params(params_of(start)), **others)
    other.load_state_dict(saved(start))
    for key, value in control.param_groups[0].items():
        if key != "params":
            assert other.param_groups[0][key] == value
    for optimizer in (other, control):
        train(optimizer, range(3, 6))
    if then is case.ours:
        assert_close(other, control)
    else:
        assert_close(control, other)


@every_case_in_torch
def test_there_and_back(case: Case) -> None:
    """Each takes over from the other in turns."""
    ours, theirs = both(case)
    control = case.counterpart(make_params(torch.float64), **case.options)
    current, waiting = ours, theirs
    for turn in range(4):
        steps = range(2 * turn, 2 * turn + 2)
        train(current, steps)
        train(control, steps)
        waiting.load_state_dict(saved(current))
        for a, b in zip(params_of(waiting), params_of(current), strict=True):
            a.data.copy_(b.data)
        current, waiting = waiting, current
    assert_close(current, control)


STEPS = {
    "int": 4,
    "float": 4.0,
    "1-d": torch.tensor([4.0]),
    "int64": torch.tensor(4),
    "float64": torch.tensor(4.0, dtype=torch.float64),
    "bfloat16": torch.tensor(4.0, dtype=torch.bfloat16),
}


@with_steps
@pytest.mark.parametrize("kind", STEPS)
def test_old_forms_of_step(case: Case, kind: str) -> None:
    """pytorch#103256, #108860, #80809: a step is whatever the version of then made of it."""
    start = case.counterpart(make_params(torch.float64), **case.options)
    train(start, range(4))
    state_dict = copy.deepcopy(start.state_dict())
    for values in state_dict["state"].values():
        values["step"] = STEPS[kind]
    before = copy.deepcopy(state_dict)
    optimizer = case.ours(clone_params(params_of(start)), **case.options)
    optimizer.load_state_dict(state_dict)
    # It is torch's own form from now on, and the caller's is what it was.
    for values in states_of(optimizer):
        assert values["step"].dtype == torch.float32 and values["step"].dim() == 0
    assert_same_bits(state_dict["state"], before["state"])
    for each in (optimizer, start):
        train(each, range(4, 8))
    assert_close(optimizer, start)


@with_steps
@pytest.mark.parametrize("kind", STEPS)
def test_old_forms_of_step_put_into_state(case: Case, kind: str) -> None:
    optimizer, twin = (case.ours(make_params(), **case.options) for _ in range(2))
    for each in (optimizer, twin):
        train(each, range(4))
    for p in params_of(optimizer):
        optimizer.state[p]["step"] = copy.deepcopy(STEPS[kind])
    for each in (optimizer, twin):
        train(each, range(4, 6))
    if kind == "1-d":  # which is as good as torch's own form, and stays what it is
        for p in params_of(optimizer):
            optimizer.state[p]["step"] = optimizer.state[p]["step"].reshape(())
    assert_equal(optimizer, twin)


@every_class
def test_missing_group_keys(case: Case) -> None:
    """A checkpoint of a version that did not have these options yet."""
    old = {"lr", "betas", "eps", "weight_decay", "momentum", "dampening", "alpha", "params"}
    old |= {"rho", "lr_decay", "initial_accumulator_value", "etas", "step_sizes"}
    options = {k: v for k, v in case.options.items() if k in old}
    start = case.counterpart(make_params(torch.float64), **options)
    train(start, range(3))
    state_dict = saved(start)
    group = state_dict["param_groups"][0]
    state_dict["param_groups"] = [{k: v for k, v in group.items() if k in old}]
    optimizer = case.ours(clone_params(params_of(start)), **options)
    optimizer.load_state_dict(state_dict)
    assert set(group) - {"cautious", "cautious_weight_decay"} <= set(optimizer.param_groups[0])
    for each in (optimizer, start):
        train(each, range(3, 6))
    assert_close(optimizer, start)


@pytest.mark.parametrize("how", ["load", "put there"])
def test_momentum_buffer_none(how: str) -> None:
    """What old versions saved for parameters without a gradient: the first step is to come."""
    options = {"momentum": 0.9, "dampening": 0.5}
    ours = fusedopt.SGD(make_params(torch.float64), **options)
    theirs = torch.optim.SGD(make_params(torch.float64), **options)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        if how == "load":
            state_dict = copy.deepcopy(optimizer.state_dict())
            state_dict["state"][1]["momentum_buffer"] = None
            state_dict["state"][2] = {}
            del state_dict["state"][3]
            optimizer.load_state_dict(state_dict)
        else:
            params = params_of(optimizer)
            optimizer.state[params[1]]["momentum_buffer"] = None
            optimizer.state[params[2]] = {}
            del optimizer.state[params[3]]
        train(optimizer, range(2, 5))
    assert_close(ours, theirs)


def test_adams_checkpoint_in_adamw() -> None:
    """torch's AdamW decays decoupled, whatever the checkpoint says."""
    start = torch.optim.Adam(make_params(torch.float64), weight_decay=0.1)
    train(start, range(3))
    ours, theirs = (
        cls(clone_params(params_of(start))) for cls in (fusedopt.AdamW, torch.optim.AdamW)
    )
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved(start))
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)


def test_options_that_torch_lacks_stay() -> None:
    start = torch.optim.RMSprop(make_params())
    train(start, range(3))
    optimizer = fusedopt.RMSprop(clone_params(params_of(start)), eps_inside_sqrt=True)
    optimizer.load_state_dict(saved(start))
    assert optimizer.param_groups[0]["eps_inside_sqrt"] is True
    # It comes from a checkpoint that has it.
    plain = fusedopt.RMSprop(make_params())
    assert "eps_inside_sqrt" not in plain.param_groups[0]
    plain.load_state_dict(saved(optimizer))
    assert plain.param_groups[0]["eps_inside_sqrt"] is True


def test_half_checkpoint_of_torch_in_float32_states() -> None:
    """torch's states of half parameters are half: they are widened, and exact."""
    start = torch.optim.AdamW(make_params(torch.bfloat16))
    train(start, range(3))
    optimizer = fusedopt.AdamW(clone_params(params_of(start)))
    optimizer.load_state_dict(saved(start))
    for a, b in zip(states_of(optimizer), states_of(start), strict=True):
        assert a["exp_avg"].dtype == torch.float32
        assert_same_bits(a["exp_avg"], b["exp_avg"].float())
    train(optimizer, [3])


# -- back into fusedopt -----------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_resumes_to_the_last_bit(case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    param, grad, state = dtypes
    shapes = ((33,), (), (5, 7))

    def make(params: list[nn.Parameter]) -> Optimizer:
        return case.ours(params, **case.options, state_dtype=state)

    def go(optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            set_grads(params_of(optimizer), step, grad)
            optimizer.step()

    optimizer = make(make_params(param, shapes))
    go(optimizer, range(3))
    resumed = make(clone_params(params_of(optimizer)))
    resumed.load_state_dict(saved(optimizer))
    assert_equal(resumed, optimizer)
    for values in states_of(resumed):
        for key, value in values.items():
            real = value.dtype.to_real() if value.is_complex() else value.dtype
            assert real == (torch.float32 if key in NUMBERS else state)
    for each in (optimizer, resumed):
        go(each, range(3, 6))
    assert_equal(resumed, optimizer)


@every_class
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_resumes_where_it_has_already_stepped(case: Case, flat: bool) -> None:
    optimizer = case.ours(make_params(), **case.options, flat=flat)
    train(optimizer, range(3))
    other = case.ours(make_params(seed=3), **case.options, flat=flat)
    train(other, range(50, 57))
    other.load_state_dict(saved(optimizer))
    with torch.no_grad():
        for a, b in zip(params_of(other), params_of(optimizer), strict=True):
            a.copy_(b)
    for each in (optimizer, other):
        train(each, range(3, 6))
    assert_equal(other, optimizer)


@every_class
def test_the_state_is_not_the_callers(case: Case) -> None:
    """pytorch#196083: neither a step nor a change of the checkpoint reaches the other."""
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    state_dict = saved(optimizer)
    before = copy.deepcopy(state_dict)
    other = case.ours(clone_params(params_of(optimizer)), **case.options)
    other.load_state_dict(state_dict)
    for mine, given in zip(states_of(other), state_dict["state"].values(), strict=True):
        for key in mine:
            assert mine[key].untyped_storage().data_ptr() != given[key].untyped_storage().data_ptr()
    train(other, range(2, 4))
    assert_same_bits(state_dict, before)
    expected = snapshot(other)
    for values in state_dict["state"].values():
        for value in values.values():
            value.fill_(7)
    state_dict["param_groups"][0]["lr"] = 7
    assert_unchanged(other, expected)


@every_class
def test_a_checkpoint_of_its_own(case: Case) -> None:
    """state_dict() is live; loading it back, as some do, changes nothing."""
    optimizer, twin = (case.ours(make_params(), **case.options) for _ in range(2))
    for each in (optimizer, twin):
        train(each, range(2))
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert_equal(optimizer, twin)
    for each in (optimizer, twin):
        train(each, range(2, 4))
    assert_equal(optimizer, twin)


@every_class
def test_loaded_states_are_in_flat_buffers(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    other = case.ours(clone_params(params_of(optimizer)), **case.options, flat=True)
    other.load_state_dict(saved(optimizer))
    other.step()
    assert other._plan.span_count == (len(params_of(other)) if case.measures else 1)
    for key in states_of(other)[0]:
        addresses = [values[key].data_ptr() for values in states_of(other)]
        if key in NUMBERS:
            assert [a - addresses[0] for a in addresses] == [4 * i for i in range(len(SHAPES))]
        else:
            assert all(a % 64 == 0 for a in addresses)
            sizes = [-(-values[key].numel() // 64) * 256 for values in states_of(other)]
            assert addresses == [addresses[0] + sum(sizes[:i]) for i in range(len(sizes))]


@every_class
@pytest.mark.parametrize("wide", [True, False])
def test_state_dtype_of_the_constructor_wins(case: Case, wide: bool) -> None:
    mine, theirs = (torch.float32, torch.bfloat16)[:: 1 if wide else -1]
    start = case.ours(make_params(torch.bfloat16), **case.options, state_dtype=theirs)
    train(start, range(2))
    # As default and as an option of a group.
    for groups, options in (
        (make_params(torch.bfloat16), {"state_dtype": mine}),
        ([{"params": make_params(torch.bfloat16), "state_dtype": mine}], {}),
    ):
        optimizer = case.ours(groups, **case.options, **options)
        optimizer.load_state_dict(saved(start))
        assert optimizer.param_groups[0]["state_dtype"] == str(mine).removeprefix("torch.")
        train(optimizer, range(2, 4))
        for values in states_of(optimizer):
            assert all(value.dtype == mine for key, value in values.items() if key not in NUMBERS)


@every_class
def test_other_things_in_state(case: Case) -> None:
    """Keys of the user's travel along, and entries that belong to no parameter."""
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    extra = torch.arange(3)
    optimizer.state[params_of(optimizer)[0]]["mine"] = {"a": extra, "b": [1, "x"]}
    optimizer.state["global"] = {"count": 3}
    other = case.ours(clone_params(params_of(optimizer)), **case.options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state["global"] == {"count": 3}
    mine = other.state[params_of(other)[0]]["mine"]
    assert mine["b"] == [1, "x"] and torch.equal(mine["a"], extra) and mine["a"] is not extra
    for each in (optimizer, other):
        train(each, range(2, 4))
    assert "mine" in other.state[params_of(other)[0]]


def test_weights_loaded_into_a_model_in_training() -> None:
    """Megatron-Bridge#4082: a step after load_state_dict starts from the loaded weights."""
    optimizers = []
    for cls in (fusedopt.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        weights = {k: torch.full_like(v, 0.3) for k, v in model.state_dict().items()}
        optimizer = cls(model.parameters())
        train(optimizer, range(3))
        model.load_state_dict(weights)
        train(optimizer, range(3, 6))
        optimizers.append(optimizer)
    assert_close(*optimizers)


# -- parameters with and without state --------------------------------------------------------


@every_case
def test_frozen_and_unfrozen(case: Case) -> None:
    """Steps are counted per parameter (apex#1615), and survive a checkpoint as they are."""
    ours, theirs = both(case)

    def go(optimizer: Optimizer, step: int, trained: list[int]) -> None:
        optimizer.zero_grad()
        params = params_of(optimizer)
        set_grads([params[i] for i in trained], step)
        optimizer.step()

    for optimizer in (ours, theirs):
        for step, trained in enumerate([[0, 1, 2], [1, 2, 4], [1], [0, 1, 2, 3, 4]]):
            go(optimizer, step, trained)
        assert (params_of(optimizer)[5] in optimizer.state) == case.row.states_at_once
    assert_close(ours, theirs)
    if "step" in case.state_keys:
        counts = [float(values.get("step", 0)) for values in states_of(ours)]
        assert counts == [2, 4, 3, 1, 2, 0]
    # From each, a checkpoint with a hole goes on in the other (torchtitan#4474).
    swapped = case.ours(clone_params(params_of(ours)), **case.options)
    swapped.load_state_dict(saved(theirs))
    for optimizer in (swapped, ours, theirs):
        assert (params_of(optimizer)[5] in optimizer.state) == case.row.states_at_once
        for step, trained in enumerate([[5], [0, 5], [0, 1, 2, 3, 4, 5]], start=4):
            go(optimizer, step, trained)
    assert_close(ours, theirs)
    assert_close(swapped, theirs)


@every_class
def test_frozen_by_requires_grad(case: Case) -> None:
    optimizers = []
    for cls in case.classes:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2)).double()
        optimizer = cls(model.parameters(), **case.options)
        x = torch.randn(8, 5, dtype=torch.float64)
        for step in range(9):
            model[0].requires_grad_(not 3 <= step < 6)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        optimizers.append(optimizer)
    assert_close(*optimizers)
