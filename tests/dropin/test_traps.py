"""Traps that other optimizers fell into; each test names a thread that tells of it."""

import math
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import (
    EVERY_CASE,
    RICHEST,
    Case,
    assert_close,
    assert_equal,
    assert_same_bits,
    both,
    clone_params,
    make_float64,
    make_params,
    params_of,
    set_grads,
    states_of,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


# -- parameters -------------------------------------------------------------------------------


@every_class
def test_parameters_bound_to_other_memory(case: Case) -> None:
    # pytorch#7844, fairscale#781: the old memory was trained on.
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        old = [p.data for p in params_of(optimizer)]
        kept = [value.clone() for value in old]
        for p in params_of(optimizer):
            p.data = p.data + 0.5
        train(optimizer, range(2, 4))
        assert_same_bits(old, kept)
        # Into a buffer of the user's, as data-parallel wrappers do.
        buffer = torch.zeros(1000, dtype=torch.float64)
        offset = 3
        for p in params_of(optimizer):
            view = buffer[offset : offset + p.numel()].view(p.shape)
            view.copy_(p.data)
            p.data = view
            offset += p.numel()
        train(optimizer, range(4, 6))
        assert not buffer[:3].any() and not buffer[offset:].any()
        # To other strides: those of the states follow.
        first = params_of(optimizer)[0]
        first.data = first.data.t().contiguous().t()
        train(optimizer, range(6, 8))
    assert_close(ours, theirs)


@every_class
def test_parameter_given_another_dtype(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    before = states_of(optimizer)
    for p in params_of(optimizer):
        p.grad = None
        p.data = p.data.bfloat16()
    train(optimizer, [2])
    for p, old in zip(params_of(optimizer), before, strict=True):
        assert p.dtype == torch.bfloat16
        for key, value in optimizer.state[p].items():
            # float32 states fit bfloat16 parameters: they go on where they are.
            assert value is old[key]


def test_parameter_given_another_shape() -> None:
    """Its states belong to another tensor: refused, as nothing else could be right."""
    optimizer = fusedopt.AdamW(make_params())
    train(optimizer, range(2))
    p = params_of(optimizer)[1]
    p.grad = None
    p.data = torch.zeros(5)
    before = [q.detach().clone() for q in params_of(optimizer)]
    set_grads(params_of(optimizer), 2)
    with pytest.raises(ValueError, match=r"AdamW.*parameter 1 of group 0.*\(33,\).*\(5,\)"):
        optimizer.step()
    assert_same_bits([q.detach() for q in params_of(optimizer)], before)


@every_class
def test_tied_parameters(case: Case) -> None:
    # pytorch#40967: a parameter given twice was updated twice.
    params, plain = make_params(), make_params()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = case.ours([params[0], *params, params[0]], **case.options)
    reference = case.ours(plain, **case.options)
    for step in range(3):
        set_grads(params, step)
        set_grads(plain, step)
        optimizer.step()
        reference.step()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in plain])
    for p, q in zip(params, plain, strict=True):
        assert_same_bits(dict(optimizer.state[p]), dict(reference.state[q]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed_params = clone_params(params)
        resumed = case.ours([resumed_params[0], *resumed_params, resumed_params[0]], **case.options)
        flat = case.ours([params[0], *params, params[0]], **case.options, flat=True)
    resumed.load_state_dict(optimizer.state_dict())
    for q in resumed_params:
        q.grad = torch.ones_like(q)
    resumed.step()
    for p in params:
        p.grad = torch.ones_like(p)
    flat.load_state_dict(optimizer.state_dict())
    flat.step()
    assert_same_bits([p.detach() for p in params], [q.detach() for q in resumed_params])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_the_memory_of_a_dtensor_is_its_local_tensor_s() -> None:
    # Its data_ptr() is 0: a kernel given that reads from nowhere.
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        distribute_tensor,
        init_device_mesh,
    )

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("localhost", port, 1, True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()]))
        optimizer = fusedopt.AdamW([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert isinstance(optimizer.state[p]["exp_avg"], DTensor)
        plain = nn.Parameter(torch.ones(5))
        optimizer = fusedopt.AdamW([plain])
        plain.grad = torch.ones(5)
        optimizer.step()
        assert torch.equal(p.detach().to_local(), plain.detach())
    finally:
        torch.distributed.destroy_process_group()


# -- hyper-parameters -------------------------------------------------------------------------


@every_class
def test_one_lr_tensor_for_several_groups(case: Case) -> None:
    # pytorch#162359: a scheduler scaled the shared tensor once for each group.
    histories, optimizers = [], []
    for cls in case.classes:
        lr = torch.tensor(0.01, dtype=torch.float64)
        groups = [{"params": make_float64()}, {"params": make_params(torch.float64, seed=1)}]
        loop = {} if cls is case.ours else {"foreach": False}
        optimizer = cls(groups, **{**case.options, "lr": lr}, **loop)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        history = []
        for step in range(4):
            train(optimizer, [step])
            scheduler.step()
            history.append([float(group["lr"]) for group in optimizer.param_groups])
        histories.append(history)
        optimizers.append(optimizer)
    assert histories[0] == histories[1]
    assert_close(*optimizers)


@pytest.mark.parametrize("cls", ["Adam", "AdamW"])
def test_betas_changed_in_training(cls: str) -> None:
    # pytorch#133898. Bias correction takes the betas at hand, to the power of the step.
    ours, theirs = (getattr(module, cls)(make_float64()) for module in (fusedopt, torch.optim))
    for optimizer in (ours, theirs):
        for step, betas in enumerate([(0.9, 0.999), (0.5, 0.9), (0.0, 0.0), (0.95, 0.99)]):
            optimizer.param_groups[0]["betas"] = betas
            train(optimizer, [step])
    assert_close(ours, theirs)


def test_decay_of_adam_is_not_adamws() -> None:
    # FlagGems#4988: the rule of the one in the other, unseen as long as weight_decay is 0.
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    adam = fusedopt.Adam(make_params(), **options)
    adamw = fusedopt.AdamW(make_params(), **options)
    decoupled = fusedopt.Adam(make_params(), **options, decoupled_weight_decay=True)
    for optimizer in (adam, adamw, decoupled):
        train(optimizer, range(3))
    assert_equal(decoupled, adamw)
    for p, q in zip(params_of(adam), params_of(adamw), strict=True):
        assert (p - q).abs().max() > 5e-5
    for p in params_of(adamw):
        value, state = p.detach().clone(), adamw.state[p]["exp_avg"].clone()
        p.grad = torch.zeros_like(p)
        adamw.step()
        # Decoupled decay is no part of the averages.
        torch.testing.assert_close(adamw.state[p]["exp_avg"], 0.9 * state)
        assert p.ne(value).all()
        p.grad = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decay_of_half_parameters(dtype: torch.dtype) -> None:
    # OneTrainer#996: decay and update, rounded one after the other, were each rounded to nothing.
    ulp = torch.finfo(dtype).eps
    p = nn.Parameter(torch.ones(100, dtype=dtype))
    p.grad = torch.ones_like(p)
    # Below 1 numbers are half an eps apart: each of the two alone is rounded to nothing.
    part = 0.2 * ulp
    assert (torch.ones(1, dtype=dtype) - part).to(dtype) == 1
    fusedopt.AdamW([p], lr=part, weight_decay=1.0).step()
    assert p.eq(1 - ulp / 2).all()


@pytest.mark.parametrize("state", [torch.float16, torch.float32], ids=str)
def test_eps_in_float16(state: torch.dtype) -> None:
    # pytorch#147437: 1e-8 is zero in float16, and 0 / 0 no number.
    for cls in (fusedopt.Adam, fusedopt.AdamW, fusedopt.RMSprop):
        p = nn.Parameter(torch.ones(100, dtype=torch.float16))
        optimizer = cls([p], lr=1e-3, weight_decay=0, state_dtype=state)
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert p.eq(1).all()
        # A gradient whose square is zero in float16.
        p.grad = torch.full_like(p, 1e-4)
        optimizer.step()
        assert p.isfinite().all()


@pytest.mark.parametrize("inside", [False, True])
def test_eps_of_rmsprop(inside: bool) -> None:
    # pytorch#23796: outside the root in torch, inside in TensorFlow; it matters where v is small.
    g, lr, alpha, eps = 1e-3, 0.1, 0.9, 1e-2
    p = nn.Parameter(torch.ones(17, dtype=torch.float64))
    optimizer = fusedopt.RMSprop([p], lr=lr, alpha=alpha, eps=eps, eps_inside_sqrt=inside)
    expected, v = 1.0, 0.0
    for _ in range(3):
        p.grad = torch.full_like(p, g)
        optimizer.step()
        v = alpha * v + (1 - alpha) * g * g
        expected -= lr * g / (math.sqrt(v + eps) if inside else math.sqrt(v) + eps)
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=1e-12, atol=0)


def test_options_off_are_branches() -> None:
    """Zero times infinity is no number: what is off must not be a multiplication by zero."""
    for case in EVERY_CASE:
        if "z" in case.state_keys:
            continue  # the average of two infinities is none, in the authors' code neither
        if case.options.get("always_adapt"):
            continue  # the norm of the parameter is on, and infinite
        options = case.row.known({**case.options, "weight_decay": 0.0, "lambd": 0.0})
        p = nn.Parameter(torch.full((40,), 1e38))
        p.detach()[7] = torch.inf
        optimizer = case.ours([p], **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert p.detach()[7] == torch.inf, case


# -- skipped steps and what they count --------------------------------------------------------


@every_class
def test_steps_are_counted_per_parameter(case: Case) -> None:
    # apex#1615, DeepSpeed#8471: one count for a group or a dtype.
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        for step in range(6):
            optimizer.zero_grad()
            params = params_of(optimizer)
            set_grads([p for i, p in enumerate(params) if step % (i + 1) == 0], step)
            optimizer.step()
    assert_close(ours, theirs)


@every_class
def test_a_skipped_step_counts_for_nobody(case: Case) -> None:
    # pytorch#95847, accelerate#4242. Also the first one, and while parameters differ in steps.
    optimizer, twin = (case.ours(make_params(), **case.options) for _ in range(2))
    for step in range(4):
        for each in (optimizer, twin):
            each.zero_grad()
            set_grads(params_of(each)[step:], step)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        twin.step()
    assert_equal(optimizer, twin)


def test_dampening_starts_with_the_second_step() -> None:
    """Of each parameter, whenever its first one is, and after a checkpoint."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours = fusedopt.SGD(make_float64(), **options)
    theirs = torch.optim.SGD(make_float64(), **options)
    for optimizer in (ours, theirs):
        for step in range(5):
            optimizer.zero_grad()
            set_grads(params_of(optimizer)[: step + 2], step)
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
    assert_close(ours, theirs)


def test_momentum_turned_on_later() -> None:
    ours = fusedopt.SGD(make_float64(), dampening=0.5)
    theirs = torch.optim.SGD(make_float64(), dampening=0.5)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        for momentum in (0.9, 0.0, 0.5):
            optimizer.param_groups[0]["momentum"] = momentum
            train(optimizer, range(2, 4))
    assert_close(ours, theirs)


# -- odd ways of use --------------------------------------------------------------------------


def test_params_in_a_tuple() -> None:
    """Put there by hand; torch does not mind. In another process, lest it never ends."""
    code = """if True:
        import torch, fusedopt
        p = torch.ones(5, requires_grad=True)
        optimizer = fusedopt.SGD([p], lr=1.0)
        optimizer.param_groups[0]["params"] = (p,)
        p.grad = torch.ones(5)
        optimizer.step()
        assert not p.any()
    """
    home = Path(fusedopt.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=home)


@every_class
def test_groups_replaced_by_hand(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        [group] = optimizer.param_groups
        params = group["params"]
        optimizer.param_groups = [
            {**group, "params": params[3:], "lr": 0.1},
            {**group, "params": params[:3]},
        ]
        set_grads(params, 5)
        optimizer.step()
        optimizer.param_groups.reverse()
        optimizer.step()
        del optimizer.param_groups[0]["params"][:]
        optimizer.step()
    assert_close(ours, theirs)


@every_class
def test_under_inference_and_no_grad(case: Case) -> None:
    plain = case.ours(make_params(), **case.options)
    train(plain, range(3))
    for mode in (torch.no_grad, torch.enable_grad):
        optimizer = case.ours(make_params(), **case.options)
        with mode():
            train(optimizer, range(3))
        assert_equal(optimizer, plain)
        assert not any(s.requires_grad for state in states_of(optimizer) for s in state.values())


@every_class
def test_gradients_of_gradients(case: Case) -> None:
    """A gradient with a graph of its own, from create_graph=True."""
    optimizers: list[Optimizer] = []
    for cls in case.classes:
        p = nn.Parameter(torch.linspace(-1, 1, 20, dtype=torch.float64))
        optimizer = cls([p], **case.options)
        for _ in range(3):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (p**4).sum().backward(create_graph=True)
            assert p.grad.requires_grad
            optimizer.step()
        optimizers.append(optimizer)
    assert_close(*optimizers)


@every_class
def test_optimizer_in_backward(case: Case) -> None:
    """One optimizer per parameter, stepped by its hook (pytorch#124523)."""
    params, plain = make_params(), make_params()
    optimizers = {p: case.ours([p], **case.options) for p in params}
    together = case.ours(plain, **case.options)

    def hook(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        sum(p.square().sum() for p in params).backward()
        together.zero_grad()
        sum(p.square().sum() for p in plain).backward()
        together.step()
    assert all(p.grad is None for p in params)
    assert_same_bits([p.detach() for p in params], [p.detach() for p in plain])
