"""Rules that measure whole parameters: by the formula of each parameter, however it is stepped."""

from typing import Any

import pytest
import torch
from support.reference import FormulaOptimizer
from support.training import CASES, Case, assert_same_bits, make_params, params_of, train
from torch import nn

import fusedopt

MEASURED = [case for case in CASES if case.row.measures(case.options)]
measured = pytest.mark.parametrize("case", MEASURED, ids=str)
# A scalar, one element, lanes and chunks cut off, and one that no thread takes as a whole.
SHAPES = ((), (1,), (63,), (65, 5), (0, 3), (16384,), (16385,), (7, 3000), (600, 500))


def both(case: Case, **options: Any) -> tuple[Any, Any]:
    """Ours, and the formula in float64."""
    ours = case.ours(make_params(shapes=SHAPES), **case.options, **options)
    made = {"formula": case.row.step, "defaults": case.row.defaults, "begins": case.row.begins}
    wide = [nn.Parameter(p.detach().double()) for p in params_of(ours)]
    return ours, FormulaOptimizer(wide, **made, keys=case.row.ordered_keys, **case.options)


@measured
@pytest.mark.parametrize("flat", [False, True])
def test_every_parameter_by_its_own_measure(case: Case, flat: bool) -> None:
    ours, formula = both(case, flat=flat)
    scales = [10.0**n for n in range(-4, len(SHAPES) - 4)]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        pairs = zip(params_of(ours), params_of(formula), scales, strict=True)
        for number, (p, q, scale) in enumerate(pairs):
            grad = scale * torch.randn(p.shape, generator=generator)
            skips = number == 3 and step == 2
            p.grad, q.grad = (None, None) if skips else (grad, grad.double())
        for optimizer in (ours, formula):
            optimizer.step()
    for p, q in zip(params_of(ours), params_of(formula), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6)


@measured
def test_the_same_bits_in_any_number_of_threads(case: Case) -> None:
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            ours, _ = both(case)
            train(ours, range(3))
        finally:
            torch.set_num_threads(threads)
        results.append([p.detach() for p in params_of(ours)])
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            assert_same_bits(p, q)


def test_options_may_change() -> None:
    """What is measured is looked up in each step."""
    ours = fusedopt.AdamW(make_params(), lr=0.1)
    other = fusedopt.AdamW(make_params(), lr=0.1)
    train(ours, range(2))
    train(other, range(2))
    ours.param_groups[0]["cautious"] = True
    train(ours, range(2, 4))
    train(other, range(2, 4))
    assert not torch.equal(params_of(ours)[0], params_of(other)[0])
    ours.param_groups[0]["cautious"] = False
    before = [p.detach().clone() for p in params_of(ours)]
    plain = fusedopt.AdamW([nn.Parameter(p.clone()) for p in before], lr=0.1)
    plain.load_state_dict(ours.state_dict())
    for each in (ours, plain):
        train(each, range(4, 6))
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("make", [fusedopt.LAMB, fusedopt.LARS])
def test_parameters_and_gradients_of_zero(make: Any) -> None:
    """Their norms say nothing: the step is one without them."""
    params = [nn.Parameter(torch.zeros(100)), nn.Parameter(torch.ones(100))]
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    ours, without = make(params, lr=0.1, weight_decay=0.1), make(plain, lr=0.1, weight_decay=0.0)
    params[0].grad = torch.ones(100)
    plain[0].grad = torch.ones(100)
    params[1].grad = torch.zeros(100)
    ours.step()
    without.step()
    torch.testing.assert_close(params[0], plain[0])
    assert params[1].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@measured
def test_what_is_no_number_stays_where_it_is(case: Case, value: float) -> None:
    """Or makes all of its parameter NaN; it is never lost, and other parameters know nothing."""
    ours, plain = (case.ours(make_params(), **case.options) for _ in range(2))
    for each in (ours, plain):
        train(each, range(2))
    for each in (ours, plain):
        for p in params_of(each):
            p.grad = torch.ones_like(p)
    params_of(ours)[0].grad[3] = value
    for each in (ours, plain):
        each.step()
    sick, *others = zip(params_of(ours), params_of(plain), strict=True)
    if case.row.name != "lion" or value != float("inf"):  # whose steps have one length
        assert not sick[0].flatten().isfinite().all()
    for p, q in others:
        assert_same_bits(p.detach(), q.detach())
