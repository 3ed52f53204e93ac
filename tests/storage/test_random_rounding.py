"""Random rounding of parameters: right in the mean, and other noise for each element and step."""

from typing import Any

import pytest
import torch
from support.cases import bits
from support.storing import BF16, step
from support.training import RICHEST, Case, assert_same_bits, make_params, params_of, states_of
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


def on_their_way(change: float, steps: int, size: int = 1 << 16, **options: Any) -> Optimizer:
    """Ones, each moved by this much in each step."""
    p = nn.Parameter(torch.ones(size, dtype=BF16))
    optimizer = fusedopt.SGD([p], lr=1.0, **options)
    for _ in range(steps):
        p.grad = torch.full_like(p, -change)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("change", [2.0**-12, -(2.0**-12), 2.0**-10, 2.0**-15])
def test_the_mean_of_many_small_steps(change: float) -> None:
    """It is right, within five times its deviation, where rounding to nearest stays at one."""
    steps, size, distance = 64, 1 << 16, 2.0**-7 if change > 0 else 2.0**-8
    assert bool((params_of(on_their_way(change, steps))[0] == 1).all())
    p = params_of(on_their_way(change, steps, rounding="stochastic"))[0].detach().double()
    deviation = (steps * abs(change) * distance / size) ** 0.5
    assert abs(float(p.mean()) - 1 - steps * change) < 5 * deviation


@pytest.mark.parametrize("parts", [1, 5, 8, 15])
def test_a_neighbour_is_taken_as_often_as_it_is_near(parts: int) -> None:
    p = params_of(on_their_way(parts / 16 * 2**-7, 1, rounding="stochastic"))[0].detach()
    up = p == 1 + 2**-7
    assert bool((up | (p == 1)).all())
    share, size = parts / 16, p.numel()
    assert abs(float(up.double().mean()) - share) < 5 * (share * (1 - share) / size) ** 0.5


def test_what_needs_no_rounding_stays() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38])
    p = nn.Parameter(values.to(BF16).repeat(200))
    before = p.detach().clone()
    optimizer = fusedopt.SGD([p], lr=0.0, rounding="stochastic")
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert_same_bits(bits(p.detach()), bits(before))


def noise(optimizer: Optimizer) -> list[Tensor]:
    """Which elements are rounded up half-way between two numbers, in the next step."""
    result = []
    with torch.no_grad():
        for p in params_of(optimizer):
            p.fill_(1)
            p.grad = torch.full_like(p, -(2.0**-8))
    optimizer.step()
    for p in params_of(optimizer):
        assert bool(((p == 1) | (p == 1 + 2**-7)).all())
        result.append((p != 1).flatten())
    return result


def assert_unlike(a: Tensor, b: Tensor) -> None:
    """They agree by chance: in a half of the elements, within five times the deviation."""
    agree = float((a == b).double().mean())
    assert abs(agree - 0.5) < 2.5 * a.numel() ** -0.5, agree


def random_sgd(count: int = 1, size: int = 1 << 14, seed: int = 0, **options: Any) -> Optimizer:
    params = [nn.Parameter(torch.ones(size, dtype=BF16)) for _ in range(count)]
    return fusedopt.SGD(params, lr=1.0, rounding="stochastic", seed=seed, **options)


def test_noise_differs_by_parameter_step_and_seed() -> None:
    ours = random_sgd(3)
    first, second = noise(ours), noise(ours)
    other = noise(random_sgd(3, seed=1))
    far = noise(random_sgd(3, seed=2**64 - 1))
    everything = [*first, *second, *other, *far]
    for i, a in enumerate(everything):
        for b in everything[:i]:
            assert_unlike(a, b)
    again = random_sgd(3)
    assert_same_bits(noise(again), first)
    assert_same_bits(noise(again), second)


@pytest.mark.parametrize("distance", [1, 2, 16, 64, 127, 128, 129, 255, 256, 257, 512, 4096])
def test_noise_differs_by_element(distance: int) -> None:
    (drawn,) = noise(random_sgd(size=1 << 17))
    assert_unlike(drawn[distance:], drawn[:-distance])


def test_noise_depends_on_the_position_only() -> None:
    """Not on the groups, the sizes of others, or whether these have gradients."""
    alone = noise(random_sgd())[0]
    params = [nn.Parameter(torch.ones(n, dtype=BF16)) for n in (1 << 14, 77, 300)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    among = fusedopt.SGD(groups, lr=1.0, rounding="stochastic")
    params[0].grad = torch.full_like(params[0], -(2.0**-8))
    among.step()
    assert_same_bits(params[0] != 1, alone)
    second = [nn.Parameter(torch.ones(n, dtype=BF16)) for n in (5, 1 << 14)]
    assert_unlike(noise(fusedopt.SGD(second, lr=1.0, rounding="stochastic"))[1], alone)


@every_class
def test_what_random_rounding_leaves_alone(case: Case) -> None:
    """States are those of rounding to nearest, where the parameter does not count in them."""
    options = case.row.known({**case.options, "weight_decay": 0.0})
    ours = case.ours(make_params(BF16), **options, rounding="stochastic")
    plain = case.ours(make_params(BF16), **options)
    step(ours, range(5))
    step(plain, range(5))
    for mine, theirs in zip(states_of(ours), states_of(plain), strict=True):
        assert mine.keys() == theirs.keys() | {"step"}
        assert float(mine["step"]) == 5
        for key in theirs:
            if case.row.begins.get(key) != "parameter" and key != "ax":  # such states follow it
                assert_same_bits(mine[key], theirs[key])
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-5, atol=2**-5)
