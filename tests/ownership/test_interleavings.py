"""Another thread steps, or gives new states, between any two lines of a change of states.

What is freed is overwritten at once here, so that a step that reads it crashes.
"""

import functools
import itertools
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.forks import in_a_fork, once, output_of_program
from torch import Tensor, nn

import fusedopt
from fusedopt import _watched_state
from fusedopt._step import FREE_PLANS


class Interleaved:
    """Has actions run by another thread before the lines, by number, of what is run in this one."""

    def __init__(self, actions: dict[int, Callable[[], object]]) -> None:
        self.actions = actions
        self.lines = 0
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def run(self, change: Callable[[], object]) -> None:
        sys.settrace(self._called)
        try:
            change()
        finally:
            sys.settrace(None)
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename == _watched_state.__file__:
            return self._line
        return None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            if self.lines in self.actions:
                act = functools.partial(self._act, self.actions[self.lines])
                self.threads.append(threading.Thread(target=act))
                self.threads[-1].start()
                # It may have to wait for what it interrupts.
                self.threads[-1].join(0.02)
            self.lines += 1
        return self._line

    def _act(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            self.failures.append(error)


Trained = tuple[list[Tensor], Any]


def trained() -> Trained:
    params: list[Tensor] = [nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(3))]
    optimizer = fusedopt.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params, optimizer


def new_state(p: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.tensor(1.0),
        "exp_avg": torch.full_like(p, 0.5),
        "exp_avg_sq": torch.full_like(p, 0.25),
    }


CHANGES: dict[str, Callable[[Any, Tensor], object]] = {
    "state set": lambda state, p: state.__setitem__(p, new_state(p)),
    "state deleted": lambda state, p: state.__delitem__(p),
    "state popped": lambda state, p: state.pop(p),
    "last state popped": lambda state, p: state.popitem(),
    "state set by default": lambda state, p: state.setdefault(p, new_state(p)),
    "states cleared": lambda state, p: state.clear(),
    "states updated": lambda state, p: state.update({p: new_state(p)}),
    "value set": lambda state, p: state[p].__setitem__("exp_avg", torch.full_like(p, 0.5)),
    "value deleted": lambda state, p: state[p].__delitem__("exp_avg"),
    "value popped": lambda state, p: state[p].pop("exp_avg"),
    "last value popped": lambda state, p: state[p].popitem(),
    "values cleared": lambda state, p: state[p].clear(),
    "values updated": lambda state, p: state[p].update(new_state(p)),
}


def lines_of(change: Callable[[Any, Tensor], object]) -> int:
    params, optimizer = trained()
    counting = Interleaved({})
    counting.run(lambda: change(optimizer.state, params[0]))
    return counting.lines


def give(params: list[Tensor], optimizer: Any) -> None:
    """New states, in a dictionary that tells of changes, and a step that knows them."""
    for p in params:
        values = optimizer.state[p]
        values.update(new_state(p))
    optimizer.step()


def one_trial(change: Callable[[Any, Tensor], object], lines: tuple[int, int]) -> None:
    params, optimizer = trained()

    def step() -> None:
        between = [torch.rand(40) for _ in range(20)]  # where something was freed
        optimizer.step()
        del between

    actions = dict(zip(lines, (lambda: give(params, optimizer), step), strict=True))
    Interleaved(actions).run(lambda: change(optimizer.state, params[0]))
    for _ in range(2):
        optimizer.step()
    for p in params:
        assert bool((p.isfinite() & (p < 1)).all())
        assert all(bool(value.isfinite().all()) for value in optimizer.state[p].values())


def trials(change: Callable[[Any, Tensor], object]) -> None:
    for lines in itertools.combinations(range(lines_of(change)), 2):
        one_trial(change, lines)


def run_trials() -> None:
    """Print what went wrong with each change, as JSON."""
    torch.optim.SGD([torch.zeros(3, requires_grad=True)]).step()
    print(
        json.dumps(
            {name: in_a_fork(functools.partial(trials, run)) for name, run in CHANGES.items()}
        )
    )


@functools.cache
def outcomes() -> dict[str, str]:
    program = "import test_interleavings; test_interleavings.run_trials()"
    folder, env = Path(__file__).parent, {"PYTHONMALLOC": "debug"}
    return once("interleavings", lambda: json.loads(output_of_program(program, folder, env)))


@pytest.mark.parametrize("change", CHANGES)
def test_another_thread_at_any_line(change: str) -> None:
    assert not outcomes()[change], outcomes()[change]


def overtaken(optimizer: Any) -> list[threading.Thread]:
    """After each plan that it makes, another thread empties a state; those that did, or will."""
    threads: list[threading.Thread] = []
    make_plan = optimizer._make_plan
    (param,) = optimizer.param_groups[0]["params"]

    def make_and_change(*args: Any) -> Any:
        plan = make_plan(*args)
        empty = functools.partial(optimizer.state.__setitem__, param, {})
        threads.append(threading.Thread(target=empty))
        threads[-1].start()
        threads[-1].join(0.1)  # where it has to wait, the step is taken first
        return plan

    optimizer._make_plan = make_and_change
    return threads


def test_a_step_that_is_overtaken_again_and_again() -> None:
    """It is taken once: in the end the others wait."""
    param = nn.Parameter(torch.zeros(50))
    param.grad = torch.ones(50)
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.9)
    threads = overtaken(optimizer)
    optimizer.step()
    for thread in threads:
        thread.join()
    assert torch.equal(param, torch.full((50,), -1.0))
    assert len(threads) == 1 + FREE_PLANS + 1
    assert optimizer.state[param] == {}


def test_a_step_that_may_wait_for_others_gives_up() -> None:
    """To hold what threads change that it waits for would have all wait for ever."""
    param = nn.Parameter(torch.zeros(50))
    param.grad = torch.ones(50)
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.9)
    optimizer._norm_group = SimpleNamespace(group=None)
    threads = overtaken(optimizer)
    with pytest.raises(RuntimeError, match="SGD: another thread changes .* nothing was stepped"):
        optimizer.step()
    for thread in threads:
        thread.join()
    assert torch.equal(param, torch.zeros(50))
