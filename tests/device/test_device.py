"""Steps whose counts, options or say-so are on the device: capturable, graphs, GradScaler.

They need an accelerator: a CUDA device or, in tests/core/test_host_run.py, the host in its place.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accelerator import HOST_RUN, capture, launches
from support.optimizers import ROWS
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_close,
    assert_same_bits,
    assert_unchanged,
    make_params,
    on,
    params_of,
    set_grads,
    snapshot,
    states_of,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt

pytestmark = pytest.mark.cuda
every_case = pytest.mark.parametrize("case", EVERY_CASE, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
real_gpu = pytest.mark.skipif(bool(HOST_RUN), reason="says something about a real GPU only")


def pair(case: Case, device: str, **options: Any) -> tuple[Optimizer, Optimizer]:
    """The same optimizer twice: the device counts the steps of the first only."""
    both = case.ours(on(device, make_params()), **case.options, capturable=True, **options)
    return both, case.ours(on(device, make_params()), **case.options, **options)


def assert_same(a: Optimizer, b: Optimizer) -> None:
    """The same bits, wherever the counts of steps are."""
    assert_same_bits(params_of(a), params_of(b))
    for ours, theirs in zip(states_of(a), states_of(b), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_bits(value.cpu(), theirs[key].cpu())


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device)


# -- counts of steps on the device ------------------------------------------------------------


@every_case
def test_the_same_bits_as_with_counts_on_the_host(case: Case, cuda: str) -> None:
    ours, plain = pair(case, cuda)
    for optimizer in (ours, plain):
        train(optimizer, range(7))
    assert_same(ours, plain)
    for state in states_of(ours):
        if "step" in state:
            assert state["step"].device.type == cuda and float(state["step"]) == 7


@every_class
def test_gradients_that_are_missing_at_times(case: Case, cuda: str) -> None:
    """Counts of parameters that once were equal part, join in value, and part again."""
    ours, plain = pair(case, cuda)
    absent = [{0, 3}, {0}, {1, 2}, {0, 1, 2, 3, 4, 5}, {1}, set(), {3}, {2, 3}, {0, 5}, set()]
    for optimizer in (ours, plain):
        params = params_of(optimizer)
        for step, without in enumerate(absent):
            set_grads(params, step)
            for index in without:
                params[index].grad = None
            optimizer.step()
    assert_same(ours, plain)


def test_counts_that_somebody_writes_to(cuda: str) -> None:
    ours = fusedopt.AdamW(on(cuda, make_params()), capturable=True)
    plain = fusedopt.AdamW(on(cuda, make_params()))
    for optimizer in (ours, plain):
        train(optimizer, range(5))
        optimizer.state[params_of(optimizer)[1]]["step"].zero_()
        train(optimizer, range(5, 7))
    assert_same(ours, plain)


def test_a_replay_after_another_plan_was_made(cuda: str) -> None:
    """The counts part where no host sees it."""
    ours = fusedopt.AdamW(on(cuda, make_params()), capturable=True)
    plain = fusedopt.AdamW(on(cuda, make_params()))
    train(ours, [0])
    train(plain, [0])
    for p in params_of(ours)[1:]:
        p.grad = None
    kept = params_of(ours)[0].grad  # the graph reads it
    replay = capture(ours.step)
    extra = [nn.Parameter(torch.zeros(2, device=cuda)) for _ in range(2)]
    for optimizer, p in zip((ours, plain), extra, strict=True):
        optimizer.add_param_group({"params": [p]})
        train(optimizer, [1])
    params_of(ours)[0].grad = kept
    for _ in range(3):
        replay()
        for p in params_of(plain)[1:]:
            p.grad = None
        set_grads(params_of(plain)[:1], 0)
        plain.step()
    for optimizer in (ours, plain):
        train(optimizer, [2])
    assert_same(ours, plain)


def test_fused_true_counts_on_the_device_as_well(cuda: str) -> None:
    optimizer = fusedopt.AdamW(on(cuda, make_params()), fused=True)
    train(optimizer, range(2))
    assert {state["step"].device.type for state in states_of(optimizer)} == {cuda}
    if not HOST_RUN:
        theirs = torch.optim.AdamW(on(cuda, make_params()), fused=True)
        train(theirs, range(2))
        assert_close(optimizer, theirs)


@every_class
def test_loading_moves_the_counts(case: Case, cuda: str) -> None:
    ours, plain = pair(case, cuda)
    train(plain, range(3))
    saved = io.BytesIO()
    torch.save(plain.state_dict(), saved)
    saved.seek(0)
    train(ours, range(1))
    state_dict = torch.load(saved, weights_only=True)
    for group in state_dict["param_groups"]:
        group["capturable"] = True  # torch takes it from a checkpoint, as any option
    with torch.no_grad():
        for p, q in zip(params_of(ours), params_of(plain), strict=True):
            p.copy_(q)
    ours.load_state_dict(state_dict)
    for optimizer in (ours, plain):
        train(optimizer, range(3, 6))
    assert_same(ours, plain)

    back = case.ours(on(cuda, make_params()), **case.options)
    back.load_state_dict(
        {
            **ours.state_dict(),
            "param_groups": [{**g, "capturable": False} for g in ours.state_dict()["param_groups"]],
        }
    )
    for state in states_of(back):
        assert "step" not in state or state["step"].device.type == "cpu"


@every_class
def test_copies_go_on_alike(case: Case, cuda: str) -> None:
    ours, _ = pair(case, cuda, max_grad_norm=1.0)
    train(ours, range(3))
    twin = copy.deepcopy(ours)
    assert twin.max_grad_norm == 1.0
    for optimizer in (ours, twin):
        train(optimizer, range(3, 6))
    assert_same(ours, twin)
    assert_same_bits(ours.grad_norm, twin.grad_norm)


# -- options on the device --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_class
def test_options_that_are_tensors(case: Case, dtype: torch.dtype, cuda: str) -> None:
    ours, plain = pair(case, cuda)
    values: dict[str, Any] = {"lr": 0.015625, "weight_decay": 0.125}
    if "betas" in case.options or case.ours in (fusedopt.Adam, fusedopt.AdamW):
        values["betas"] = (0.75, 0.9375)
    for step in range(5):
        values["lr"] /= 2
        for optimizer in (ours, plain):
            for key, value in values.items():
                if optimizer is ours:
                    for_device = torch.tensor(value, device=cuda, dtype=dtype)
                    value = tuple(for_device) if key == "betas" else for_device
                optimizer.param_groups[0][key] = value
            train(optimizer, [step])
    assert_same(ours, plain)


@every_class
def test_a_schedule_changes_lr_in_place(case: Case, cuda: str) -> None:
    options = {**case.options, "lr": scalar(0.5, cuda)}
    ours = case.ours(on(cuda, make_params()), **options, capturable=True)
    plain = case.ours(on(cuda, make_params()), **{**case.options, "lr": 0.5})
    for optimizer in (ours, plain):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        for step in range(6):
            train(optimizer, [step])
            scheduler.step()
    assert ours.param_groups[0]["lr"].device.type == cuda
    assert float(ours.param_groups[0]["lr"]) == plain.param_groups[0]["lr"] == 0.0625
    assert_same(ours, plain)


# -- graphs -----------------------------------------------------------------------------------


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
    with pytest.raises(RuntimeError, match="take a step before capture"):
        capture(ours.step)
    assert not ours.state


# -- gradient scaling -------------------------------------------------------------------------


@every_case
def test_a_skipped_step_changes_nothing(case: Case, cuda: str) -> None:
    """Not even that the first one is still to come."""
    ours, plain = pair(case, cuda)
    taken = 0
    for number, found_inf in enumerate([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]):
        ours.found_inf, ours.grad_scale = scalar(found_inf, cuda), scalar(8.0, cuda)
        set_grads(params_of(ours), number)
        with torch.no_grad():
            for p in params_of(ours):
                p.grad *= 8
        before = [p.detach().clone() for p in params_of(ours)]
        ours.step()
        if found_inf:
            assert_same_bits(before, [p.detach() for p in params_of(ours)])
        else:
            train(plain, [number])
            taken += 1
        for state in states_of(ours):
            assert "step" not in state or float(state["step"]) == taken
    assert_same(ours, plain)


def test_a_checkpoint_after_a_skipped_first_step(cuda: str) -> None:
    options = {"momentum": 0.9, "dampening": 0.5}
    ours = fusedopt.SGD(on(cuda, make_params()), **options, capturable=True)
    ours.found_inf = scalar(1.0, cuda)
    train(ours, [0])
    assert not any(ours.state_dict()["state"].values())
    ours.found_inf = scalar(0.0, cuda)
    train(ours, [1])
    plain = fusedopt.SGD(on(cuda, make_params()), **options)
    train(plain, [1])
    assert_same_bits(ours.state_dict()["state"], plain.state_dict()["state"])
    assert_same(ours, plain)


@every_class
def test_found_inf_where_the_host_counts(case: Case, cuda: str) -> None:
    """Then the host asks for it."""
    _, plain = pair(case, cuda)
    train(plain, [0])
    set_grads(params_of(plain), 1)
    before = snapshot(plain)
    plain.found_inf = scalar(1.0, cuda)
    plain.step()
    assert_unchanged(plain, before)
    plain.found_inf = scalar(0.0, cuda)
    plain.step()
    assert all(float(state.get("step", 2)) == 2 for state in states_of(plain))


@pytest.mark.parametrize("capturable", [False, True])
@every_class
def test_grad_scaler(case: Case, capturable: bool, cuda: str) -> None:
    """With one gradient that overflows, in the second step."""
    ours = case.ours(on(cuda, make_params()), **case.options, capturable=capturable)
    plain = case.ours(on(cuda, make_params()), **case.options)
    scaler = torch.amp.GradScaler(cuda, init_scale=1024.0, growth_interval=100)
    scaler.scale(scalar(1.0, cuda))
    if capturable or HOST_RUN:
        assert ours._step_supports_amp_scaling
    for number in range(4):
        set_grads(params_of(ours), number)
        with torch.no_grad():
            for p in params_of(ours):
                p.grad *= scaler.get_scale()
        if number == 1:
            params_of(ours)[2].grad.fill_(torch.inf)
        else:
            train(plain, [number])
        scaler.step(ours)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(ours, plain)


def test_a_copy_after_a_skipped_first_step(cuda: str) -> None:
    ours = fusedopt.SGD(
        on(cuda, make_params()), lr=1.0, momentum=0.9, dampening=0.5, capturable=True
    )
    ours.found_inf = scalar(1.0, cuda)
    train(ours, [0])
    twin = copy.deepcopy(ours)
    ours.found_inf = scalar(0.0, cuda)
    for optimizer in (ours, twin):
        train(optimizer, [1])
    assert_same(ours, twin)


def test_a_first_step_that_was_skipped_before_the_host_counts(cuda: str) -> None:
    options = {"lr": 1.0, "momentum": 0.9, "dampening": 0.5}
    ours = fusedopt.SGD(on(cuda, make_params()), **options, capturable=True)
    plain = fusedopt.SGD(on(cuda, make_params()), **options)
    ours.found_inf = scalar(1.0, cuda)
    train(ours, [0])
    ours.param_groups[0]["capturable"] = False
    del ours.found_inf
    for optimizer in (ours, plain):
        for step in range(1, 4):
            extra = nn.Parameter(torch.zeros(2, device=cuda))
            optimizer.add_param_group({"params": [extra]})  # and a new plan
            train(optimizer, [step])
    assert_same(ours, plain)


# -- what a step costs ------------------------------------------------------------------------


def many(optimizer: Callable[..., Optimizer], device: str, groups: int, **options: Any) -> Any:
    params = on(device, make_params(shapes=((7,),) * 300))
    return optimizer([{"params": params[i::groups]} for i in range(groups)], **options)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("groups", [1, 100])
def test_launches(row: Any, groups: int, cuda: str) -> None:
    """One for all tensors and groups; one before it for a norm, one for counts on the device."""
    for options, expected in (
        ({}, 1),
        ({"max_grad_norm": 1.0}, 2),
        ({"capturable": True}, 1 + row.counts_steps),
        ({"capturable": True, "max_grad_norm": 1.0}, 2 + row.counts_steps),
    ):
        optimizer = many(row.ours, cuda, groups, **options)
        train(optimizer, range(2))
        assert launches(optimizer.step) == expected, options


@real_gpu
@every_class
def test_a_step_neither_waits_nor_allocates(case: Case, cuda: str) -> None:
    ours, plain = pair(case, cuda, max_grad_norm=1.0)
    ours.param_groups[0]["lr"] = scalar(0.1, cuda)
    ours.found_inf, ours.grad_scale = scalar(0.0, cuda), scalar(2.0, cuda)
    for optimizer in (ours, plain):
        train(optimizer, range(2))
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@real_gpu
def test_the_current_stream_is_used(cuda: str) -> None:
    """A step waits for gradients that are still being made on its own stream, and for no other."""
    stream = torch.cuda.Stream()
    p = nn.Parameter(torch.zeros(1 << 20, device=cuda))
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=1e9)
    p.grad = torch.zeros_like(p)
    optimizer.step()  # loads the kernels
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        p.grad = torch.zeros_like(p)
        torch.cuda._sleep(50_000_000)
        p.grad.fill_(1.0)
        optimizer.step()
        assert not stream.query()
    stream.synchronize()
    assert bool((p == -1).all()) and float(optimizer.grad_norm) == 1024


@real_gpu
@pytest.mark.slow
def test_more_elements_than_an_int32_counts_on_cuda(cuda: str) -> None:
    numel = 2**31 + 100
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip("needs 11 GB of free memory on the GPU")
    p = torch.zeros(numel, dtype=torch.bfloat16, device=cuda)
    p.grad = torch.zeros_like(p)
    edges = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, numel - 1]
    p.grad[edges] = 1
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=1e9)
    optimizer.step()
    assert [float(p[edge]) for edge in edges] == [-1.0] * len(edges)
    assert int((p != 0).sum()) == len(edges)
    torch.testing.assert_close(float(optimizer.grad_norm), len(edges) ** 0.5)
