"""FlatParameters: how it lays out parameters, what undoes that, and that training is the same."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
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
    clone_params,
    make_params,
    params_of,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt
from fusedopt import FlatParameters

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)
both_gradients = pytest.mark.parametrize("gradients", [False, True], ids=["params", "gradients"])

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "odd": lambda: torch.randn(7, 5),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "slot": lambda: torch.randn(64),
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(6, 10)[:, ::2],
    "misaligned": lambda: torch.randn(40)[3:],
}
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """One thread: for models this small, waiting for another would take most of the time."""
    torch.set_num_threads(1)
    yield
    assert not torch.__future__.get_swap_module_params_on_conversion()


class Model(nn.Module):
    """Small, but with what real ones have: tied weights, a convolution, a frozen part, a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(memory_format=torch.channels_last)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(self.embed(tokens))
        x = x + self.conv(x[:, None]).mean(1)
        return self.head(self.norm(x) * self.scale)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 11, (6, 9), generator=generator)
        out = self(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())


def fit(model: Model, optimizer: Optimizer, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def check_layout(flat: FlatParameters, params: list[Tensor]) -> None:
    """Everything that the documentation says of buffers, for parameters in their order."""
    assert flat.is_intact()
    kinds = list(dict.fromkeys((p.device, p.dtype) for p in params))
    assert [(b.device, b.dtype) for b in flat.buffers] == kinds
    for number, (device, dtype) in enumerate(kinds):
        members = [p for p in params if (p.device, p.dtype) == (device, dtype)]
        streams = [(flat.buffers[number], members)]
        if flat.grads:
            streams.append((flat.grads[number], [p.grad for p in members]))
        for buffer, tensors in streams:
            assert buffer.dim() == 1 and buffer.dtype == dtype and buffer.is_contiguous()
            assert buffer.data_ptr() % 64 == 0
            used = torch.zeros(buffer.numel(), dtype=torch.bool)
            for tensor in tensors:
                if tensor.numel() == 0:
                    continue
                offset = tensor.data_ptr() - buffer.data_ptr()
                assert offset % 64 == 0 and offset >= 0
                begin = offset // buffer.element_size()
                assert not used[begin : begin + tensor.numel()].any()
                used[begin : begin + tensor.numel()] = True
                # The tensor fills its part densely, in its own order.
                order = torch.as_strided(
                    buffer[begin : begin + tensor.numel()], tensor.shape, tensor.stride()
                )
                assert_same_bits(order, tensor.detach())
            assert not buffer[~used].any()
            assert buffer.numel() < used.sum() + 64 * (len(tensors) + 1)


# -- the layout -------------------------------------------------------------------------------


@both_gradients
def test_layout(gradients: bool) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(make().to(d)) for make in LAYOUTS.values() for d in KINDS]
    params += make_params()
    before = [p.detach().clone() for p in params]
    ids = [id(p) for p in params]
    flat = FlatParameters(params, gradients=gradients)
    assert ids == [id(p) for p in params]
    for p, value in zip(params, before, strict=True):
        assert_same_bits(p.detach(), value)
        assert p.is_leaf and p.requires_grad
        # Dense strides stay what they were; others become torch's choice for a dense copy.
        assert p.stride() == torch.empty_like(value).stride()
    if gradients:
        for p in params:
            assert p.grad.stride() == p.stride() and p.grad.dtype == p.dtype and not p.grad.any()
            p.grad.fill_(2)
    assert bool(flat.grads) is gradients
    check_layout(flat, params)


def test_views_are_live() -> None:
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    with torch.no_grad():
        params[1].fill_(3)
        params[1].grad.fill_(4)
    assert flat.buffers[0].eq(3).sum() == params[1].numel()
    assert flat.grads[0].eq(4).sum() == params[1].numel()
    flat.buffers[0].zero_()
    assert not any(p.any() for p in params)


def test_gradients_that_exist_are_kept() -> None:
    params = make_params()
    grads = [torch.randn_like(p) for p in params]
    for p, grad in zip(params[:3], grads, strict=False):
        p.grad = grad.clone()
    flat = FlatParameters(params, gradients=True)
    for p, grad in zip(params[:3], grads, strict=False):
        assert_same_bits(p.grad, grad)
    assert not any(p.grad.any() for p in params[3:])
    flat.zero_grad()
    assert not any(p.grad.any() for p in params)


def test_backward_accumulates_into_flat_gradients() -> None:
    model, plain = Model(), Model()
    flat = FlatParameters(model, gradients=True)
    addresses = [p.grad.data_ptr() for p in model.parameters() if p.requires_grad]
    for step in range(3):
        model.loss(step).backward()
        plain.loss(step).backward()
    mine = [p.grad for p in model.parameters() if p.requires_grad]
    assert [g.data_ptr() for g in mine] == addresses
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert_same_bits(p.grad, q.grad)
    total = sum(g.double().sum() for g in mine)
    torch.testing.assert_close(flat.grads[0].double().sum(), total)


def test_frozen_parameters_get_no_gradient() -> None:
    model = Model()
    flat = FlatParameters(model, gradients=True)
    assert model.frozen.weight.grad is None
    flat.zero_grad()
    assert model.frozen.weight.grad is None
    # Unfrozen later, it has a gradient as any parameter, and is trained.
    optimizer = fusedopt.AdamW(model.parameters())
    model.frozen.requires_grad_(True)
    before = model.frozen.weight.detach().clone()
    fit(model, optimizer, range(2))
    assert model.frozen.weight.ne(before).all()


def test_tied_parameters_stay_tied() -> None:
    model = Model()
    for params in (model, list(model.parameters()), [model.head.weight, model.embed.weight]):
        flat = FlatParameters(params)
        assert model.head.weight is model.embed.weight
        assert flat.is_intact()
    assert flat.buffers[0].numel() == 128  # 11 x 8, once


@pytest.mark.parametrize("kind", ["module", "parameters", "named"])
def test_what_it_takes(kind: str) -> None:
    model = Model()
    given: Any = {
        "module": lambda: model,
        "parameters": model.parameters,
        "named": model.named_parameters,
    }[kind]()
    check_layout(FlatParameters(given), list(model.parameters()))


def test_what_it_refuses() -> None:
    p = nn.Parameter(torch.zeros(8))
    with pytest.raises(TypeError, match="one tensor"):
        FlatParameters(p)
    with pytest.raises(ValueError, match="no parameters"):
        FlatParameters([])
    with pytest.raises(TypeError, match="parameter 1.*int64"):
        FlatParameters([p, torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(TypeError, match="parameter 1.*str"):
        FlatParameters([p, "weight"])
    with pytest.raises(TypeError, match="'?table'?.*sparse"):
        FlatParameters([("first", p), ("table", torch.eye(3).to_sparse())])
    with pytest.raises(ValueError, match="parameter 1.*expanded"):
        FlatParameters([p, torch.zeros(1).expand(5)])
    with pytest.raises(ValueError, match="overlap"):
        FlatParameters([p, p.detach()[2:4]])
    with pytest.raises(TypeError, match="parameter 1.*meta"):
        FlatParameters([p, torch.zeros(3, device="meta")])
    assert p.untyped_storage().nbytes() == 32  # not moved by any of these


# -- steps ------------------------------------------------------------------------------------


@every_class
def test_spans(case: Case) -> None:
    """One span per buffer with flat gradients, one per parameter with handed-over ones."""
    kinds = (torch.float32, torch.bfloat16)
    params = [p for kind in kinds for p in make_params(kind)]
    flat = FlatParameters(params, gradients=True)
    optimizer = case.ours(params, **case.options)
    for _ in range(3):
        flat.grads[0].normal_()
        optimizer.step()
        assert optimizer._plan.span_count == len(kinds)
        optimizer.zero_grad()
    train(optimizer, [0])
    assert optimizer._plan.span_count == len(params)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer._plan.span_count == len(kinds)


@every_class
def test_spans_of_groups(case: Case) -> None:
    """Groups of different options are spans of their own; those of equal ones may be one."""
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    optimizer = case.ours(groups, **case.options)
    flat.zero_grad()
    optimizer.step()
    assert optimizer._plan.span_count == 2


@every_class
def test_a_skipped_parameter_splits_the_span(case: Case) -> None:
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    optimizer = case.ours(params, **case.options)
    optimizer.step()
    params[2].grad = None
    before = params[2].detach().clone()
    flat.grads[0].fill_(0.5)
    optimizer.step()
    assert optimizer._plan.span_count == 2
    assert_same_bits(params[2].detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_same_bits_as_plain_parameters(case: Case, dtype: torch.dtype) -> None:
    plain = case.ours(make_params(dtype), **case.options)
    optimizer = case.ours(make_params(dtype), **case.options, flat=True)
    grads = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(params_of(plain), params_of(optimizer), strict=True):
            p.grad = torch.randn(p.shape, generator=grads, dtype=torch.float64).to(dtype)
            q.grad.copy_(p.grad)
        plain.step()
        optimizer.step()
        assert optimizer._plan.span_count == 1
    assert_equal(optimizer, plain)
    [flat] = optimizer._flats
    check_layout(flat, params_of(optimizer))


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model(case: Case, dtype: torch.dtype) -> None:
    """Trained flat and not: the same losses and parameters, to the last bit."""
    plain = Model().to(dtype)
    # Zero gradients step where none skip, so what has no gradient is left out.
    trained = [n for n, p in plain.named_parameters() if p.requires_grad and "unused" not in n]
    runs = []
    for kind in ("plain", "handed over", "flat"):
        model = copy.deepcopy(plain)
        flat = kind != "plain" and FlatParameters(model, gradients=kind == "flat")
        params = [p for n, p in model.named_parameters() if n in trained]
        optimizer = case.ours(params, **case.options)
        losses = fit(model, optimizer, range(8))
        assert not flat or flat.is_intact()
        runs.append((losses, values(model)))
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


@pytest.mark.parametrize("eps", [0.0, 1e-50, 1e-8])
@pytest.mark.parametrize("inside", [False, True])
def test_padding_stays_zero(eps: float, inside: bool) -> None:
    """Also where 0 / (0 + eps) is none, as when eps is zero in float32."""
    makers: list[Callable[..., Optimizer]] = [
        lambda params: fusedopt.RMSprop(params, eps=eps, eps_inside_sqrt=inside, momentum=0.9)
    ]
    if not inside:
        makers.append(lambda params: fusedopt.AdamW(params, eps=eps))
        makers.append(lambda params: fusedopt.Adam(params, eps=eps, amsgrad=True))
    for make in makers:
        params = make_params()
        flat = FlatParameters(params, gradients=True)
        optimizer = make(params)
        for _ in range(3):
            for p in params:
                p.grad.fill_(1.0)
            optimizer.step()
            check_layout(flat, params)
            assert all(p.isfinite().all() for p in params)


# -- zero_grad --------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_keeps_flat_gradients(set_to_none: bool) -> None:
    model = Model()
    optimizer = fusedopt.AdamW(model.parameters(), flat=True)
    [flat] = optimizer._flats
    addresses = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.requires_grad}
    for step in range(3):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert not flat.grads[0].any()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad.data_ptr() == addresses[name]
        assert flat.is_intact()


def test_zero_grad_by_the_model() -> None:
    """model.zero_grad() takes the flat gradients away; all is well all the same."""
    model, plain = Model(), Model()
    optimizer = fusedopt.AdamW(model.parameters(), flat=True)
    reference = fusedopt.AdamW(plain.parameters())
    for step in range(4):
        for m in (model, plain):
            m.zero_grad()
            m.loss(step).backward()
        optimizer.step()
        reference.step()
    assert_same_bits(values(model), values(plain))
    assert optimizer._plan.span_count > 1
    optimizer.zero_grad()
    model.loss(9).backward()
    reference.zero_grad()
    plain.loss(9).backward()
    [flat] = optimizer._flats
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert_same_bits(p.grad, q.grad)
    assert flat.grads[0].any()


def test_zero_grad_between_two_optimizers() -> None:
    """Each zeroes the gradients of its own parameters only."""
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    first, second = fusedopt.SGD(params[:3]), fusedopt.AdamW(params[3:])
    for _ in range(2):
        for p in params:
            p.grad.fill_(1)
        first.zero_grad()
        assert not any(p.grad.any() for p in params[:3])
        assert all(p.grad.eq(1).all() for p in params[3:])
        second.zero_grad(set_to_none=False)
        assert not flat.grads[0].any()
        first.step()
        second.step()
    params[0].grad = torch.ones_like(params[0])
    params[4].grad = torch.ones_like(params[4])
    first.zero_grad()
    assert not params[0].grad.any() and params[4].grad.all()
    params[1].grad.fill_(1)
    assert flat.grads[0].eq(1).sum() == params[1].numel()


def test_two_optimizers_of_all_parameters() -> None:
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    first, second = fusedopt.SGD(params), fusedopt.AdamW(params)
    plain = make_params()
    plain_first, plain_second = fusedopt.SGD(plain), fusedopt.AdamW(plain)
    for _ in range(3):
        for p, q in zip(params, plain, strict=True):
            p.grad.fill_(0.5)
            q.grad = torch.full_like(q, 0.5)
        for optimizer in (first, second, plain_first, plain_second):
            optimizer.step()
        first.zero_grad()
        assert not flat.grads[0].any()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in plain])


def test_zero_grad_of_torchs_optimizer() -> None:
    """It takes the gradients away, which is slower, never wrong."""
    model, plain = Model(), Model()
    flat = FlatParameters(model, gradients=True)
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (model, plain)]
    flat.zero_grad()
    model.zero_grad()
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        fit(m, optimizer, range(3))
    assert_same_bits(values(model), values(plain))
    assert flat.is_intact()


# -- what undoes it ---------------------------------------------------------------------------


def test_load_state_dict_keeps_it() -> None:
    model, other = Model(), Model()
    optimizer = fusedopt.AdamW(model.parameters(), flat=True)
    fit(model, optimizer, range(2))
    model.load_state_dict(other.state_dict())
    [flat] = optimizer._flats
    assert flat.is_intact()
    assert_same_bits(values(model), values(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, optimizer, range(2, 4))


def rebind(model: Model) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def rebind_one(model: Model) -> None:
    model.norm.weight.data = model.norm.weight.data.clone()


def rebind_contiguous(model: Model) -> None:
    """The idiom that silently detaches a view, as the convolution is channels_last."""
    for p in model.parameters():
        p.data = p.data.contiguous()
    model.conv.weight.data = model.conv.weight.data.clone(memory_format=torch.contiguous_format)


def swap(model: Model) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "there and back": lambda model: model.double().float(),
    "rebind": rebind,
    "rebind one": rebind_one,
    "rebind contiguous": rebind_contiguous,
    "shared memory": lambda model: model.share_memory(),
    "swap": swap,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before the first step", "in training"])
@pytest.mark.parametrize("zero_first", [True, False], ids=["zero_grad", "step"])
@both_gradients
def test_moved_parameters(change: str, when: str, zero_first: bool, gradients: bool) -> None:
    """Trained where they are now, with one warning, as if they had never been flat."""
    model, plain = Model(), Model()
    # Unused and frozen parameters have zero gradients in the one and none in the other.
    for m in (model, plain):
        for p in [*m.unused.parameters(), *m.frozen.parameters()]:
            p.requires_grad_(False)
    flat = FlatParameters(model, gradients=gradients)
    optimizer = fusedopt.AdamW(model.parameters())
    reference = fusedopt.AdamW(plain.parameters())
    if when == "in training":
        fit(model, optimizer, range(3))
        fit(plain, reference, range(3))
    else:
        model.loss(50).backward()
        plain.loss(50).backward()
    for m in (model, plain):
        CHANGES[change](m)
    assert not flat.is_intact()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3, 6):
            for m, o in ((model, optimizer), (plain, reference)):
                if zero_first or step > 3:
                    o.zero_grad()
                m.loss(step).backward()
                o.step()
    ours = [w for w in caught if "flat" in str(w.message)]
    assert len(ours) == 1 and "AdamW" in str(ours[0].message) and "0" in str(ours[0].message)
    assert_same_bits(values(model), values(plain))
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in plain.parameters()]


def test_zero_grad_after_a_move() -> None:
    """The gradients were moved, too: they are zero afterwards, wherever they are."""
    for change in CHANGES.values():
        model = Model()
        optimizer = fusedopt.AdamW(model.parameters(), flat=True)
        fit(model, optimizer, range(2))
        change(model)
        optimizer.zero_grad()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_moved_gradients() -> None:
    """grad.data may be re-bound as anything else: the gradient is where it is then."""
    params, plain = make_params(), make_params()
    flat = FlatParameters(params, gradients=True)
    optimizer, reference = fusedopt.AdamW(params), fusedopt.AdamW(plain)
    for p, q in zip(params, plain, strict=True):
        p.grad.data = torch.full_like(p, 0.5)
        q.grad = torch.full_like(q, 0.5)
    optimizer.step()
    reference.step()
    assert_equal(optimizer, reference)
    optimizer.zero_grad()
    assert flat.is_intact()
    assert all(p.grad is None or not p.grad.any() for p in params)


def test_made_flat_anew() -> None:
    """As the warning advises; the old objects may still be there."""
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [FlatParameters(trained, gradients=True) for _ in range(5)]
    optimizer = fusedopt.AdamW(trained)
    fit(model, optimizer, range(2))
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        kept.append(FlatParameters(trained, gradients=True))
        assert [flat.is_intact() for flat in kept] == [False] * (len(kept) - 1) + [True]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(model, optimizer, range(2, 4))
        assert optimizer._plan.span_count == 1
        assert kept[-1].is_intact()
        optimizer.zero_grad()
        assert not kept[-1].grads[0].any()


def test_flat_optimizer_of_flat_parameters() -> None:
    """flat=True for what is flat already leaves the user's object in order."""
    params = make_params()
    flat = FlatParameters(params, gradients=True)
    optimizer = fusedopt.AdamW(params, flat=True)
    assert flat.is_intact()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer._plan.span_count == 1


def test_forgotten_object() -> None:
    """Without the FlatParameters object the parameters are ordinary ones."""
    params, plain = make_params(), make_params()
    FlatParameters(params)
    gc.collect()
    optimizer, reference = fusedopt.AdamW(params), fusedopt.AdamW(plain)
    for each in (optimizer, reference):
        train(each, range(3))
    assert_equal(optimizer, reference)


def test_replaced_parameters() -> None:
    for replace in (
        lambda model: model.load_state_dict(Model().state_dict(), assign=True),
        lambda model: setattr(model.norm, "weight", nn.Parameter(torch.ones(8))),
        lambda model: model.add_module("more", nn.Linear(2, 2)),
    ):
        model = Model()
        flat = FlatParameters(model)
        assert flat.is_intact()
        replace(model)
        assert not flat.is_intact()


# -- in the constructor -----------------------------------------------------------------------


@every_class
def test_flat_groups(case: Case) -> None:
    def groups() -> list[dict[str, Any]]:
        return [
            {"params": make_params(), "lr": 0.02},
            {"params": make_params(torch.bfloat16, seed=1) + make_params(seed=2)},
        ]

    optimizer = case.ours(groups(), **case.options, flat=True)
    plain = case.ours(groups(), **case.options)
    for each in (optimizer, plain):
        each.add_param_group({"params": make_params(torch.float64, seed=3), "lr": 0.03})
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    grads = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(params_of(optimizer), params_of(plain), strict=True):
            q.grad = torch.randn(p.shape, generator=grads).to(p.dtype)
            p.grad.copy_(q.grad)
        optimizer.step()
        plain.step()
        assert optimizer._plan.span_count == 4
        optimizer.zero_grad()
        plain.zero_grad()
    assert_equal(optimizer, plain)
    for group in optimizer.param_groups:
        assert all(not p.grad.any() for p in group["params"])


def test_refused_group_is_not_moved() -> None:
    optimizer = fusedopt.AdamW(make_params(), flat=True)
    p = nn.Parameter(torch.zeros(5))
    address = p.data_ptr()
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [p], "lr": float("nan")})
    assert p.data_ptr() == address and len(optimizer.param_groups) == 1
    assert len(optimizer._flats) == 1


# -- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("flat", [False, True], ids=["FlatParameters", "flat=True"])
def test_copies(how: str, flat: bool) -> None:
    """Model and optimizer together: both train on as one that was never flat."""
    model = Model()
    kept = None if flat else FlatParameters(model, gradients=True)
    optimizer = fusedopt.AdamW(model.parameters(), flat=flat)
    fit(model, optimizer, range(2))
    copied = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}[how]
    before = values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin_model, twin = copied((model, optimizer))
        fit(twin_model, twin, range(2, 5))
        assert_same_bits(values(model), before)
        assert twin_model.head.weight is twin_model.embed.weight
        fit(model, optimizer, range(2, 5))
    for name, p in model.named_parameters():
        q = twin_model.get_parameter(name)
        if p.requires_grad and "unused" not in name:
            assert_same_bits(p.detach(), q.detach())
    assert kept is None or kept.is_intact()


def test_copy_of_a_model_alone() -> None:
    """As for an average of it: not flat, and no part of the buffer."""
    model = Model()
    flat = FlatParameters(model, gradients=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(p.any() for p in [model.norm.weight, model.embed.weight])
    assert flat.is_intact()
    assert len(pickle.dumps(twin)) < 1.2 * len(pickle.dumps(Model())) + 20_000


def test_saved_model_is_no_larger() -> None:
    params = nn.ParameterList(nn.Parameter(torch.zeros(1000)) for _ in range(50))
    size = len(pickle.dumps(params))
    FlatParameters(params)
    assert len(pickle.dumps(params)) < 1.05 * size


@every_class
def test_checkpoint_between_flat_and_not(case: Case) -> None:
    plain = case.ours(make_params(), **case.options)
    train(plain, range(2))
    flat = case.ours(clone_params(params_of(plain)), **case.options, flat=True)
    flat.load_state_dict(plain.state_dict())
    for each in (flat, plain):
        train(each, range(2, 4))
    assert_equal(flat, plain)
    back = case.theirs(clone_params(params_of(flat)), **case.options)
    back.load_state_dict(copy.deepcopy(flat.state_dict()))
    for each in (back, flat):
        train(each, [4])
    assert_close(flat, back)
