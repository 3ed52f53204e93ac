"""Two threads: one steps while the other assigns, replaces or clears what belongs to the user.

A program of its own imports torch once and forks for each race: a crash is that of one race.
"""

import functools
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import in_a_fork, once, output_of_program
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt

PACKAGES: dict[str, Any] = {"fusedopt": fusedopt, "torch": torch.optim}
# Gradients are one of these throughout: from their sum follows how often each of them was used.
SMALL_GRADIENT, LARGE_GRADIENT = 1.0, 65536.0


class Size:
    """How large parameters are, and how many steps are taken."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, steps: int) -> None:
        self.shapes, self.dtype, self.steps = shapes, dtype, steps

    def params(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(shape, dtype=self.dtype)) for shape in self.shapes]


SIZES = {
    "few": Size([(7, 5), (40,), ()], torch.float64, 200),
    "short": Size([(7, 5), (40,), ()], torch.float64, 1000),
    "long": Size([(2000, 1000), (500,)], torch.float32, 12),
    "many": Size([(7, 5), (40,), ()], torch.float64, 10_000),
}


def race(steps: int, step: Callable[[], object], change: Callable[[int], object]) -> None:
    """Take steps while another thread makes at least as many changes."""
    done = threading.Event()
    failures: list[BaseException] = []

    def make_changes() -> None:
        number = 0
        try:
            while number < steps or not done.is_set():
                change(number)
                number += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=make_changes)
    thread.start()
    try:
        for _ in range(steps):
            step()
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]


def one_value(tensor: Tensor) -> float:
    """The number that all elements are: nothing was done to a part of them only."""
    values = tensor.detach().flatten()
    assert bool(torch.eq(values, values[0]).all()), values
    assert bool(values.isfinite().all())
    return float(values[0])


def assert_whole(optimizer: Optimizer) -> None:
    """Every parameter, and all of its states, are one number throughout."""
    for p in params_of(optimizer):
        one_value(p)
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor):
                one_value(value)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def fill_grads(params: Sequence[Tensor], value: float) -> None:
    for p in params:
        p.grad = torch.full_like(p, value)


# -- races --------------------------------------------------------------------------------------


def gradients(package: Any, size: Size) -> None:
    """The memory of the gradient before is gone as soon as there is a new one."""
    params = size.params()
    optimizer = package.SGD(params, lr=1.0)
    fill_grads(params, SMALL_GRADIENT)

    def change(number: int) -> None:
        fill_grads(params, (SMALL_GRADIENT, LARGE_GRADIENT)[number % 2])

    race(size.steps, optimizer.step, change)
    for p in params:
        large, small = divmod(-one_value(p), LARGE_GRADIENT)
        assert large + small == size.steps, (large, small)


def gradients_in_place(package: Any, size: Size) -> None:
    """Of the data of a gradient that stays."""
    params = size.params()
    optimizer = package.SGD(params, lr=1.0)
    fill_grads(params, SMALL_GRADIENT)

    def change(number: int) -> None:
        for p in params:
            p.grad.data = torch.full_like(p, (SMALL_GRADIENT, LARGE_GRADIENT)[number % 2])

    race(size.steps, optimizer.step, change)
    for p in params:
        large, small = divmod(-one_value(p), LARGE_GRADIENT)
        assert large + small == size.steps, (large, small)


def data_in_turns(package: Any, size: Size) -> None:
    """Each step is of the one memory or of the other."""
    params = size.params()
    memories = [(p.data, torch.zeros_like(p)) for p in params]
    optimizer = package.SGD(params, lr=1.0)
    fill_grads(params, SMALL_GRADIENT)

    def change(number: int) -> None:
        for p, memory in zip(params, memories, strict=True):
            p.data = memory[number % 2]

    race(size.steps, optimizer.step, change)
    for first, second in memories:
        assert one_value(first) + one_value(second) == -size.steps


def new_data(package: Any, size: Size) -> None:
    """The memory before is gone then."""
    params = size.params()
    optimizer = package.SGD(params, lr=1.0)
    fill_grads(params, SMALL_GRADIENT)

    def change(number: int) -> None:
        for p in params:
            p.data = torch.zeros_like(p)

    race(size.steps, optimizer.step, change)
    for p in params:
        taken = -one_value(p)
        assert taken == int(taken) and 0 <= taken <= size.steps


def with_states(package: Any, size: Size) -> tuple[list[nn.Parameter], Optimizer]:
    params = size.params()
    optimizer = package.AdamW(params, amsgrad=True)
    fill_grads(params, SMALL_GRADIENT)
    optimizer.step()
    return params, optimizer


def state_tensors(package: Any, size: Size) -> None:
    params, optimizer = with_states(package, size)

    def change(number: int) -> None:
        for p in params:
            state = optimizer.state[p]
            state["exp_avg"] = torch.full_like(p, 0.5)
            state["step"] = torch.tensor(float(number % 7 + 1))

    race(size.steps, optimizer.step, change)
    assert_whole(optimizer)


def data_of_states(package: Any, size: Size) -> None:
    params, optimizer = with_states(package, size)

    def change(number: int) -> None:
        for p in params:
            optimizer.state[p]["exp_avg_sq"].data = torch.full_like(p, 0.5)

    race(size.steps, optimizer.step, change)
    assert_whole(optimizer)


def states_replaced(package: Any, size: Size) -> None:
    params, optimizer = with_states(package, size)

    def change(number: int) -> None:
        for p in params:
            optimizer.state[p] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.full_like(p, 0.5),
                "exp_avg_sq": torch.full_like(p, 0.25),
                "max_exp_avg_sq": torch.full_like(p, 0.25),
            }

    race(size.steps, optimizer.step, change)
    assert_whole(optimizer)


def states_emptied(package: Any, size: Size) -> None:
    params, optimizer = with_states(package, size)

    def change(number: int) -> None:
        for p in params:
            optimizer.state[p] = {}

    race(size.steps, optimizer.step, change)
    optimizer.step()
    assert_whole(optimizer)


def state_cleared(package: Any, size: Size) -> None:
    _, optimizer = with_states(package, size)
    race(size.steps, optimizer.step, lambda number: optimizer.state.clear())
    optimizer.step()
    assert_whole(optimizer)


def state_assigned(package: Any, size: Size) -> None:
    _, optimizer = with_states(package, size)

    def change(number: int) -> None:
        optimizer.state = defaultdict(dict)

    race(size.steps, optimizer.step, change)
    optimizer.step()
    assert_whole(optimizer)


def two_optimizers(package: Any, size: Size) -> None:
    """Neither knows of the other: the same as one after the other."""

    def make() -> list[Optimizer]:
        of_adam, of_sgd = size.params(), size.params()
        for params in (of_adam, of_sgd):
            fill_grads(params, 0.5)
        return [package.AdamW(of_adam, amsgrad=True), package.SGD(of_sgd, momentum=0.9)]

    together, apart = make(), make()
    threads = [
        threading.Thread(target=lambda each=each: [each.step() for _ in range(size.steps)])
        for each in together
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, alone in zip(together, apart, strict=True):
        for _ in range(size.steps):
            alone.step()
        for p, q in zip(params_of(each), params_of(alone), strict=True):
            assert torch.equal(p, q)


def one_optimizer(package: Any, size: Size) -> None:
    """What comes of it is anybody's guess, but it lies between no step and all steps."""
    params = size.params()
    sgd = package.SGD(params, lr=1.0)
    fill_grads(params, SMALL_GRADIENT)
    race(size.steps, sgd.step, lambda number: sgd.step() if number < size.steps else None)
    for p in params:
        low, high = -p.detach().max(), -p.detach().min()
        assert 1 <= low <= high <= 2 * size.steps
    _, adamw = with_states(package, size)
    race(size.steps, adamw.step, lambda number: adamw.step() if number < size.steps else None)
    adamw.step()
    for p in params_of(adamw):
        assert bool(p.isfinite().all())
        assert 1 <= float(adamw.state[p]["step"]) <= 2 * size.steps + 2


RACES: dict[str, Callable[[Any, Size], None]] = {
    race.__name__: race
    for race in (
        *(gradients, gradients_in_place, data_in_turns, new_data),
        *(state_tensors, data_of_states, states_replaced, states_emptied),
        *(state_cleared, state_assigned, two_optimizers, one_optimizer),
    )
}
# torch crashes, sooner or later, where `data` is assigned while an operation works on that tensor.
# That another thread sets gradients to None is no race here: whoever reads `.grad` meanwhile may
# find a tensor that is gone, which only torch could help.
NOT_WITH_TORCH = {"gradients_in_place", "data_in_turns", "new_data", "data_of_states"}


# -- the program that runs them -----------------------------------------------------------------


def run_races(size: str) -> None:
    """Print what went wrong in each race, as JSON."""
    # What is imported with the first optimizer of a process.
    torch.optim.SGD([torch.zeros(3, requires_grad=True)]).step()
    sys.setswitchinterval(1e-5)
    result = {}
    for name, run in RACES.items():
        for package, module in PACKAGES.items():
            if package == "torch" and (name in NOT_WITH_TORCH or size != "short"):
                continue
            # That torch.optim passes says that the race is a fair one; it need not run as long.
            chosen = SIZES["few" if package == "torch" else size]
            result[f"{name}-{package}"] = in_a_fork(functools.partial(run, module, chosen))
    print(json.dumps(result))


@functools.cache
def outcomes(size: str) -> dict[str, str]:
    program = f"import test_threads; test_threads.run_races('{size}')"
    folder = Path(__file__).parent
    return once(f"races-{size}", lambda: json.loads(output_of_program(program, folder)))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    "size", ["short", "long", pytest.param("many", marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", RACES)
def test_race(name: str, size: str, package: str) -> None:
    wrong = outcomes(size).get(f"{name}-{package}")
    if wrong is None:
        pytest.skip("not with torch.optim")
    assert not wrong, wrong
