"""Our constructors in the place of torch.optim's: signatures, defaults, flags, refusals."""

import inspect
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST,
    RICHEST_IN_TORCH,
    Case,
    assert_equal,
    both,
    make_params,
    train,
)

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
every_class_in_torch = pytest.mark.parametrize("case", RICHEST_IN_TORCH, ids=str)
of_ours = [case for case in RICHEST if case.row.theirs is None]
every_class_of_ours = pytest.mark.parametrize("case", of_ours, ids=str)


@every_class_in_torch
def test_signature(case: Case) -> None:
    ours = inspect.signature(case.ours).parameters
    theirs = inspect.signature(case.row.theirs).parameters
    added = [p for name, p in ours.items() if name not in theirs]
    shared = [(p.name, p.kind, p.default) for name, p in ours.items() if name in theirs]
    assert shared == [(p.name, p.kind, p.default) for p in theirs.values()]
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in added)


@every_class_in_torch
def test_is_torchs(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    theirs = case.row.theirs
    assert isinstance(optimizer, theirs) and case.ours.__name__ == theirs.__name__
    defaults = theirs(make_params(), **case.options).defaults
    assert {key: optimizer.defaults[key] for key in defaults} == defaults


@every_class_in_torch
@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("value", [True, False])
def test_implementation_flags_change_nothing(case: Case, flag: str, value: bool) -> None:
    if flag not in inspect.signature(case.row.theirs).parameters:
        pytest.skip(f"torch's {case.ours.__name__} has no {flag}")
    plain = case.ours(make_params(), **case.options)
    flagged = case.ours(make_params(), **case.options, **{flag: value})
    assert flagged.param_groups[0][flag] is value
    for optimizer in (plain, flagged):
        train(optimizer, range(3))
    assert_equal(flagged, plain)


@every_class_in_torch
def test_differentiable_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=rf"{case.ours.__name__}.*differentiable=True"):
        case.ours(make_params(), differentiable=True)


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"weight_decay": -1.0}, {"lr": torch.ones(2)}], ids=str
)
@every_class_in_torch
def test_refusals_of_the_constructor(case: Case, options: dict[str, Any]) -> None:
    if not case.row.known(options):
        pytest.skip(f"{case.ours.__name__} has no {', '.join(options)}")
    with pytest.raises(ValueError) as theirs:
        case.row.theirs(make_params(), **options)
    with pytest.raises(ValueError) as ours:
        case.ours(make_params(), **options)
    assert str(theirs.value) in str(ours.value)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps"])
@pytest.mark.parametrize("value", [-1.0, torch.tensor(-1.0)], ids=["number", "tensor"])
@every_class_of_ours
def test_negative_options(case: Case, key: str, value: Any) -> None:
    """Of classes that torch has none for."""
    if key not in case.row.defaults:
        pytest.skip(f"{case.ours.__name__} has no {key}")
    with pytest.raises(ValueError, match=f"{case.ours.__name__}: {key} is -1.0; expected at least"):
        case.ours(make_params(), **{key: value})


@every_class_of_ours
def test_betas(case: Case) -> None:
    """As many as there have to be, and each of them below 1."""
    betas = case.row.defaults.get("betas")
    if betas is None:
        pytest.skip(f"{case.ours.__name__} has none")
    name = case.ours.__name__
    for wrong in (betas[:-1], (*betas, 0.5), betas[0]):
        with pytest.raises(ValueError, match=rf"{name}: betas is .*; expected {len(betas)} num"):
            case.ours(make_params(), betas=wrong)
    for wrong, at in ((1.0, 1), (-0.1, 0), (torch.tensor(1.0), 1)):
        given = [*betas[:at], wrong, *betas[at + 1 :]]
        with pytest.raises(ValueError, match=rf"{name}: betas\[{at}\] is .*; expected at least 0"):
            case.ours(make_params(), betas=given)
    # The constructor does not look into groups.
    for wrong in (betas[:-1], betas[0]):
        at = len(betas) - 1 if isinstance(wrong, tuple) else 0
        with pytest.raises(ValueError, match=rf"{name}: group 0: betas\[{at}\] is missing in"):
            case.ours([{"params": make_params(), "betas": wrong}])


@pytest.mark.parametrize("adam", [fusedopt.Adam, fusedopt.AdamW])
def test_cautious_needs_a_first_moment(adam: Any) -> None:
    name = adam.__name__
    with pytest.raises(ValueError, match=f"{name}: group 0: cautious=True .* first_moment=False"):
        adam(make_params(), cautious=True, first_moment=False)
    optimizer = adam(make_params(), first_moment=False)
    with pytest.raises(ValueError, match=f"{name}: group 1: cautious=True"):
        optimizer.add_param_group({"params": make_params(), "cautious": True})


def test_muon_is_not_cautious() -> None:
    for group in ({"use_muon": False}, {}):
        with pytest.raises(ValueError, match="Muon: group 0 has cautious=True"):
            fusedopt.Muon(
                [{"params": [torch.ones(3, 3)], "cautious": True, **group}], lr=0.1, adamw={}
            )


@every_class_in_torch
def test_repr(case: Case) -> None:
    ours, theirs = both(case)
    assert set(repr(theirs).splitlines()) <= set(repr(ours).splitlines())


@every_class
def test_subclass(case: Case) -> None:
    class Mine(case.ours):  # type: ignore[name-defined,misc]
        def step(self, closure: Any = None) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    optimizer = Mine(make_params(), **case.options)
    plain = case.ours(make_params(), **case.options)
    for each in (optimizer, plain):
        train(each, range(3))
    assert_equal(optimizer, plain)
    assert optimizer.steps == 3
