"""optimizer.state as torch.optim has it: laid out alike, live, and free to be replaced."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.training import CASES, RICHEST, Case, assert_close, both, params_of, set_grads, train
from torch import Tensor, nn

import fusedopt

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(6, 5),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(6, 10)[:, ::2],
    "complex": lambda: torch.randn(6, 5, dtype=torch.complex64),
    "float64": lambda: torch.randn(6, 5, dtype=torch.float64),
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_laid_out_as_torchs(case: Case, layout: str) -> None:
    value = LAYOUTS[layout]()
    ours, theirs = (
        cls([nn.Parameter(copy.deepcopy(value))], **case.options) for cls in case.classes
    )
    for step in range(2):
        for optimizer in (ours, theirs):
            train(optimizer, [step])
    [p], [q] = params_of(ours), params_of(theirs)
    assert p.stride() == q.stride()
    assert list(ours.state.get(p, {})) == list(theirs.state.get(q, {}))
    for key, state in theirs.state.get(q, {}).items():
        mine = ours.state[p][key]
        assert (mine.shape, mine.stride(), mine.dtype) == (state.shape, state.stride(), state.dtype)
        assert mine.device == state.device and type(mine) is type(state)
        torch.testing.assert_close(mine, state)
    torch.testing.assert_close(p, q)


@every_case
def test_state_without_a_gradient(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        optimizer.step()
        assert len(optimizer.state) == (len(params_of(optimizer)) if case.row.states_at_once else 0)
        set_grads(params_of(optimizer)[:2], 0)
        optimizer.step()
    assert len(ours.state) == len(theirs.state)
    assert_close(ours, theirs)


@every_class
def test_states_are_live(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        for p in params_of(optimizer):
            for value in optimizer.state[p].values():
                value.mul_(2)
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)


@every_class
def test_states_can_be_replaced_and_removed(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        first, second, *_ = params_of(optimizer)
        for key, value in optimizer.state[first].items():
            optimizer.state[first][key] = value * 2
        del optimizer.state[second]
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.state.clear()
        train(optimizer, range(6, 9))
    assert_close(ours, theirs)
    for optimizer in (ours, theirs):
        # How a restart is often written.
        optimizer.state = type(theirs.state)(dict)
        train(optimizer, range(9, 12))
    assert_close(ours, theirs)


# -- states of the constructor ----------------------------------------------------------------

at_once = pytest.mark.parametrize(
    "case", [case for case in CASES if case.row.states_at_once], ids=str
)


@at_once
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_states_that_the_constructor_makes(case: Case, layout: str, flat: bool) -> None:
    """Those of torch, also of what is frozen; not where a step has nothing to walk over."""
    value, options = LAYOUTS[layout](), case.options
    theirs, ours = ([nn.Parameter(copy.deepcopy(value)) for _ in range(3)] for _ in range(2))
    for params in (theirs, ours):
        params[1].requires_grad_(False)
    if layout == "strided" and flat:
        pytest.skip("flat parameters are dense")
    odd: list[Tensor] = [
        nn.Parameter(torch.ones(5, device="meta")),
        nn.UninitializedParameter(),
        nn.Parameter(torch.ones(5, dtype=torch.int32), requires_grad=False),
        nn.Parameter(torch.ones(1).expand(5), requires_grad=False),
    ]
    mine = case.ours([{"params": ours}, {"params": odd}][: 1 if flat else 2], **options, flat=flat)
    other = case.counterpart(theirs, **options)
    assert {id(p) for p in mine.state} == {id(p) for p in ours}
    for p, q in zip(ours, theirs, strict=True):
        assert list(mine.state[p]) == list(other.state[q])
        for key, state in other.state[q].items():
            made = mine.state[p][key]
            assert (made.shape, made.stride(), made.dtype) == (
                (state.shape, state.stride(), state.dtype)
            )
            torch.testing.assert_close(made, state)
    address = mine.state[ours[0]]["sum"].data_ptr()
    for optimizer in (mine, other):
        params = ours if optimizer is mine else theirs
        set_grads([params[0], params[2]], 3)
        optimizer.step()
    assert mine.state[ours[0]]["sum"].data_ptr() == address
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(dict(mine.state[p]), dict(other.state[q]))


@at_once
def test_states_of_the_constructor_are_saved_and_shared(case: Case) -> None:
    ours, theirs = both(case)
    for first, then in ((ours, theirs), (theirs, ours)):
        then.load_state_dict(copy.deepcopy(first.state_dict()))
    ours.share_memory()
    assert all(ours.state[p]["sum"].is_shared() for p in params_of(ours))
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]})
        assert params_of(optimizer)[-1] not in optimizer.state
        train(optimizer, range(3, 5))
    assert_close(ours, theirs)


def test_a_group_begins_with_a_value_of_its_own() -> None:
    """Which torch's constructor does not look at."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "initial_accumulator_value": 0.5}]
    optimizer = fusedopt.Adagrad(groups, initial_accumulator_value=0.25)
    begun = [optimizer.state[p]["sum"] for p in params]
    torch.testing.assert_close(begun, [torch.full((3,), 0.25), torch.full((3,), 0.5)])
