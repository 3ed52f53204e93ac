"""Counts and options on the device, and what a step there costs."""

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accelerator import HOST_RUN, capture, launches
from support.device import assert_same, pair, scalar
from support.optimizers import ROWS
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_close,
    assert_same_bits,
    make_params,
    on,
    params_of,
    set_grads,
    states_of,
    train,
)
from torch import nn
from torch.optim import Optimizer

import fusedopt
from fusedopt._extension import _C

pytestmark = pytest.mark.cuda
every_case = pytest.mark.parametrize("case", EVERY_CASE, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
real_gpu = pytest.mark.skipif(bool(HOST_RUN), reason="says something about a real GPU only")


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
    if "betas" in case.row.defaults:
        values["betas"] = (0.75, 0.9375, 0.875)[: len(case.row.defaults["betas"])]
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


# -- what a step costs ------------------------------------------------------------------------


def many(optimizer: Callable[..., Optimizer], device: str, groups: int, **options: Any) -> Any:
    params = on(device, make_params(shapes=((7,),) * 300))
    return optimizer([{"params": params[i::groups]} for i in range(groups)], **options)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("groups", [1, 100])
def test_launches(row: Any, groups: int, cuda: str) -> None:
    """One for all tensors and groups; one before it for a norm, one for counts on the device, which
    has whether a step is the first one where steps are not counted. Two where parameters are
    measured, and with counts a third, as these are advanced after rows are made."""
    counts = row.counts_steps or bool(row.keys(row.defaults))
    for options, expected in (
        ({}, 1),
        ({"max_grad_norm": 1.0}, 2),
        ({"capturable": True}, 1 + counts),
        ({"capturable": True, "max_grad_norm": 1.0}, 2 + counts),
    ):
        optimizer = many(row.ours, cuda, groups, **options)
        train(optimizer, range(2))
        measures = _C.measures(row.ours._rule, optimizer.param_groups[0])
        more = 2 + ("capturable" in options) if measures else 0
        assert launches(optimizer.step) == expected + more, options


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
def test_an_optimizer_dies_after_a_step_on_another_stream(cuda: str) -> None:
    """What is allocated then is not the memory that the step is still to use."""
    p = nn.Parameter(torch.zeros(1000, device=cuda))
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=1e9)
    p.grad = torch.ones_like(p)
    optimizer.step()  # allocates on the stream that others allocate on below
    torch.cuda.synchronize()
    gc.collect()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        optimizer.step()
    del optimizer
    gc.collect()
    # All that is free of the pieces that its memory was made of.
    others = [torch.full((512,), 0xFF, dtype=torch.uint8, device=cuda) for _ in range(8192)]
    torch.cuda.current_stream().synchronize()
    assert not stream.query()
    torch.cuda.synchronize()
    del others
    assert bool((p == -2).all())


@real_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"capturable": True}], ids=str)
def test_parameters_on_two_gpus(options: dict[str, Any], cuda: str) -> None:
    """As on one."""
    spread = [nn.Parameter(p.detach().to(f"cuda:{i % 2}")) for i, p in enumerate(make_params())]
    ours = fusedopt.AdamW(spread, lr=0.1, **options)
    on_one = fusedopt.AdamW(on(cuda, make_params()), lr=0.1, **options)
    for number in range(3):
        for optimizer in (ours, on_one):
            set_grads(params_of(optimizer), number)
            optimizer.step()
    for a, b in zip(params_of(ours), params_of(on_one), strict=True):
        # Norms are added up device by device.
        close = 1e-6 if "max_grad_norm" in options else 0
        torch.testing.assert_close(a.to(cuda), b, rtol=close, atol=close)


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
