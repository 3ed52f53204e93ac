"""Steps captured in graphs and replayed."""

import pytest
from support.accelerator import capture
from support.device import assert_same, pair, scalar
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_same_bits,
    assert_unchanged,
    make_params,
    on,
    params_of,
    set_grads,
    snapshot,
    train,
)
from torch import nn
from torch.optim import Optimizer

import fusedopt

pytestmark = pytest.mark.cuda
every_case = pytest.mark.parametrize("case", EVERY_CASE, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


class Graph:
    """Steps that are replayed from a graph, with gradients at fixed places."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        train(optimizer, [0])
        self.grads = [p.grad for p in params_of(optimizer)]
        self.replay = capture(optimizer.step)

    def step(self, number: int) -> None:
        for grad, p in zip(self.grads, params_of(self.optimizer), strict=True):
            set_grads([p], number)
            grad.copy_(p.grad)
            p.grad = grad
        self.replay()


@every_case
def test_a_graph_is_replayed(case: Case, cuda: str) -> None:
    lr = scalar(0.25, cuda)
    ours = case.ours(on(cuda, make_params()), **{**case.options, "lr": lr}, capturable=True)
    plain = case.ours(on(cuda, make_params()), **{**case.options, "lr": 0.25})
    graph = Graph(ours)
    train(plain, [0])
    before = params_of(ours)[0].detach().clone()
    assert_same_bits(before, params_of(plain)[0].detach())  # capturing has stepped nothing
    for number in range(6):
        plain.param_groups[0]["lr"] /= 2
        lr /= 2
        for p in params_of(plain):
            set_grads([p], number)
        plain.step()
        graph.step(number)
    assert_same(ours, plain)
    train(ours, [100])  # and without the graph
    train(plain, [100])
    assert_same(ours, plain)


def test_a_graph_that_clips_and_skips(cuda: str) -> None:
    options = {"lr": 0.1, "max_grad_norm": 0.5}
    ours = fusedopt.AdamW(on(cuda, make_params()), **options, capturable=True)
    ours.found_inf, ours.grad_scale = scalar(0.0, cuda), scalar(2.0, cuda)
    plain = fusedopt.AdamW(on(cuda, make_params()), **options)
    plain.grad_scale = 2.0
    graph = Graph(ours)
    train(plain, [0])
    for number, found_inf in enumerate([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]):
        ours.found_inf.fill_(found_inf)
        graph.step(number)
        if not found_inf:
            for p in params_of(plain):
                set_grads([p], number)
            plain.step()
            assert_same_bits(ours.grad_norm, plain.grad_norm)
    assert_same(ours, plain)


@every_class
def test_a_graph_outlives_a_change_of_the_plan(case: Case, cuda: str) -> None:
    """The memory that its kernels work in must not go to anybody else."""
    ours = case.ours(on(cuda, make_params()), **case.options, capturable=True, max_grad_norm=1.0)
    plain = case.ours(on(cuda, make_params()), **case.options, max_grad_norm=1.0)
    graph = Graph(ours)
    train(plain, [0])
    extra = on(cuda, make_params(shapes=((3, 3),) * 200))
    for optimizer in (ours, plain):
        mine = [nn.Parameter(p.detach().clone()) for p in extra]
        optimizer.add_param_group({"params": mine})
        set_grads(params_of(optimizer), 1)
        optimizer.step()
        for p in mine:
            p.grad = None
    for p in params_of(plain)[:6]:
        set_grads([p], 2)
    plain.step()
    graph.optimizer = type("Members", (), {"param_groups": ours.param_groups[:1]})()
    graph.step(2)
    assert_same(ours, plain)


@every_class
def test_capture_needs_capturable(case: Case, cuda: str) -> None:
    _, plain = pair(case, cuda)
    train(plain, [0])
    set_grads(params_of(plain), 1)
    before = snapshot(plain)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .*capturable=True"):
        capture(plain.step)
    assert_unchanged(plain, before)


@every_class
def test_the_first_step_cannot_be_captured(case: Case, cuda: str) -> None:
    ours, _ = pair(case, cuda)
    set_grads(params_of(ours), 0)
    # Where the constructor makes the states, there is only the device's memory to get.
    at_once = case.row.states_at_once
    what = "take one like it before capture" if at_once else "take a step before capture"
    with pytest.raises(RuntimeError, match=what):
        capture(ours.step)
    assert at_once or not ours.state
