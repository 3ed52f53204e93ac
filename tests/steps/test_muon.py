"""Muon: torch's steps, the iteration by its formula, and what belongs to the user."""

import copy
import io
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fusedopt
from fusedopt import _orthogonal
from fusedopt._orthogonal import NewtonSchulz

pytestmark = pytest.mark.usefixtures("one_thread")

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = ((64, 64), (64, 64), (24, 200), (200, 24), (33, 7), (1, 5), (5, 1), (64, 64))
OTHERS = ((64,), (), (3, 5))
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"lr": 0.02},
    "plain": {"lr": 0.02, "nesterov": False, "weight_decay": 0.0},
    "matched": {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.3, "ns_steps": 3},
    "original": {"lr": 0.02, "adjust_lr_fn": "original", "weight_decay": 1.0, "eps": 1e-3},
    "none": {"lr": 0.02, "ns_steps": 0},
}


def matrices(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_grads(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        grad = scale * torch.randn(param.shape, generator=generator)
        param.grad = grad.to(param.dtype)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def values_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    return [p.detach().clone() for p in params] + [
        state[key].clone() for state in states for key in sorted(state)
    ]


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To the last bit."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (each.detach().reshape(-1).view(torch.uint8) for each in (a, b))
        assert torch.equal(a, b)


# -- the iteration -----------------------------------------------------------------------------


def by_formula(
    matrix: Tensor, coefficients: Sequence[float], steps: int, dtype: torch.dtype
) -> Tensor:
    """As the authors write it, on the shorter side."""
    a, b, c = coefficients
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).double()


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda k: torch.ones_like(k),
    "1/k": lambda k: 1 / k,
    "1/k^2": lambda k: k**-2,
    "exponential": lambda k: torch.exp(-k / 20),
    "few": lambda k: torch.where(k < 10, 1.0, 1e-3),
    "one": lambda k: torch.where(k < 2, 1.0, 0.0),
}
SIDES = [(64, 64), (64, 128), (256, 64), (48, 480), (1, 9), (7, 2), (130, 129)]


def with_spectrum(sides: tuple[int, int], spectrum: Callable[[Tensor], Tensor]) -> Tensor:
    u, _, v = torch.linalg.svd(torch.randn(sides, dtype=torch.float64), full_matrices=False)
    values = spectrum(torch.arange(1, min(sides) + 1, dtype=torch.float64))
    return (u * values) @ v


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 8])
def test_iteration(sides: tuple[int, int], spectrum: Any, steps: int) -> None:
    """Off what the formula says in float64 by no more than three times what bfloat16 makes it."""
    matrix = with_spectrum(sides, spectrum)
    want = by_formula(matrix, COEFFICIENTS, steps, torch.float64)
    rounded = by_formula(matrix, COEFFICIENTS, steps, torch.bfloat16)
    got = matrix.clone()
    NewtonSchulz(COEFFICIENTS, steps, 1e-7).orthogonalize([got])
    bound = 3 * (rounded - want).norm() + 0.01 * want.norm()
    assert (got - want).norm() <= bound
    if steps == 5:
        assert torch.linalg.svdvals(got)[0] < 1.35


@pytest.mark.parametrize(
    "coefficients", [(8.2, -22.5, 15.7), (1.5, -0.5, 0.0), (13.0, -22.0, 10.0)]
)
def test_iteration_with_other_coefficients(coefficients: tuple[float, float, float]) -> None:
    """A first one so large that Gram matrices are not worth it, and one that lets errors be."""
    matrix = with_spectrum((32, 256), SPECTRA["1/k"])
    want = by_formula(matrix, coefficients, 3, torch.float64)
    rounded = by_formula(matrix, coefficients, 3, torch.bfloat16)
    got = matrix.clone()
    NewtonSchulz(coefficients, 3, 1e-7).orthogonalize([got])
    assert (got - want).norm() <= 3 * (rounded - want).norm() + 0.01 * want.norm()


@pytest.mark.parametrize("sides", [(100, 100), (100, 101), (101, 300)], ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_halves_of_symmetric_products(
    sides: tuple[int, int], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are computed, the iteration is the same."""
    matrix = with_spectrum(sides, SPECTRA["1/k"]).float()
    plain, halved = matrix.clone(), matrix.clone()
    NewtonSchulz(COEFFICIENTS, 5, 1e-7).orthogonalize([plain])
    monkeypatch.setattr(_orthogonal, "LEAST_HALVED", 0)
    monkeypatch.setattr(_orthogonal, "ROW_BLOCKS", blocks)
    NewtonSchulz(COEFFICIENTS, 5, 1e-7).orthogonalize([halved])
    assert (halved - plain).norm() <= 0.03 * plain.norm()


def test_many_matrices_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, in parts, one by one; wide beside tall; transposed ones; batches."""
    whole = [torch.randn(shape) for shape in ((6, 9), (9, 6), (6, 9), (20, 3), (9, 6), (6, 9))]
    iteration = NewtonSchulz(COEFFICIENTS, 5, 1e-7)
    alone = [w.clone() for w in whole]
    for matrix in alone:
        iteration.orthogonalize([matrix])
    for together in (2**20, 110, 1):
        monkeypatch.setitem(_orthogonal.MOST_TOGETHER, "cpu", together)
        got = [w.clone() for w in whole]
        got[4] = got[4].T.contiguous().T
        iteration.orthogonalize(got)
        for a, b in zip(got, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    batch = torch.stack([whole[0], whole[2], whole[5]])
    iteration.orthogonalize([batch, torch.empty(0, 4)])
    for a, number in zip(batch, (0, 2, 5), strict=True):
        torch.testing.assert_close(a, alone[number], rtol=0.05, atol=0.02)


def test_nothing_stays_nothing() -> None:
    for sides in ((4, 4), (3, 40)):
        zero = torch.zeros(sides)
        NewtonSchulz(COEFFICIENTS, 5, 1e-7).orthogonalize([zero])
        assert not zero.any()


# -- steps -------------------------------------------------------------------------------------


def far_apart(ours: Sequence[Tensor], theirs: Sequence[Tensor], begun: Sequence[Tensor]) -> float:
    """How far, of the way that they have gone."""
    way = [
        (b.detach().double() - p.detach().double()).norm()
        for b, p in zip(begun, theirs, strict=True)
    ]
    apart = [
        (p.detach().double() - q.detach().double()).norm()
        for p, q in zip(ours, theirs, strict=True)
    ]
    return float(sum(apart) / sum(way))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_as_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The same momentum; parameters apart by what bfloat16 loses in products."""
    begun = [p.detach().to(dtype) for p in matrices()]
    ours, theirs = ([nn.Parameter(p.clone()) for p in begun] for _ in range(2))
    optimizer, others = fusedopt.Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for step in range(40):
        set_grads(ours, step)
        set_grads(theirs, step)
        for p, q in zip(ours, theirs, strict=True):
            if step % 5 == 3 and p.shape[0] == 33:
                p.grad = q.grad = None
        optimizer.step()
        others.step()
    assert far_apart(ours, theirs, begun) < 0.02
    for p, q in zip(ours, theirs, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer, others.state[q]["momentum_buffer"], rtol=1e-5, atol=1e-6)
        assert optimizer.state[p].keys() == others.state[q].keys()


def test_steps_of_bfloat16() -> None:
    """With masters they are those of float32 parameters with the same gradients."""
    begun = [p.detach().bfloat16() for p in matrices()]
    low = [nn.Parameter(p.clone()) for p in begun]
    high = [nn.Parameter(p.float()) for p in begun]
    stored = fusedopt.Muon(low, lr=0.01, master_bits=32)
    plain = fusedopt.Muon(high, lr=0.01)
    for step in range(20):
        set_grads(low, step)
        for p, q in zip(low, high, strict=True):
            q.grad = p.grad.float()  # type: ignore[union-attr]
        stored.step()
        plain.step()
        for master, p, q in zip(stored.master_params(), low, high, strict=True):
            assert ((p - master).abs() <= 2**-8 * master.abs()).all()
            torch.testing.assert_close(master, q.detach(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "int8", "min_8bit_size": 1},
        {"state_dtype": torch.bfloat16},
        {"flat": True},
        {"max_grad_norm": 1e9},
    ],
    ids=str,
)
def test_options_of_storage(options: dict[str, Any]) -> None:
    begun = [p.detach().clone() for p in matrices()]
    plain, stored = matrices(), matrices()
    train(fusedopt.Muon(plain, lr=0.02), range(20))
    optimizer = fusedopt.Muon(stored, lr=0.02, **options)
    train(optimizer, range(20))
    assert far_apart(stored, plain, begun) < 0.05
    if options.get("state_dtype") == "int8":
        assert optimizer.state[stored[0]]["momentum_buffer_code"].dtype == torch.uint8


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    begun = torch.ones(64, 64, dtype=torch.bfloat16)
    params = [nn.Parameter(begun.clone()) for _ in range(20)]
    exact = nn.Parameter(begun.float())
    optimizer = fusedopt.Muon(params, lr=1e-4, weight_decay=0.0, rounding="stochastic")
    plain = fusedopt.Muon([exact], lr=1e-4, weight_decay=0.0)
    grad = torch.randn(64, 64)
    for _ in range(20):
        for p in params:
            p.grad = grad.bfloat16()
        exact.grad = grad.bfloat16().float()
        optimizer.step()
        plain.step()
    mean = torch.stack([p.detach().float() for p in params]).mean(0)
    change = exact.detach() - 1
    share = ((mean - 1) * change).sum() / (change**2).sum()
    assert abs(float(share) - 1) < 0.1
    assert float(optimizer.state[params[0]]["step"]) == 20


def test_clipping() -> None:
    """As torch's clipping before the step, of AdamW's gradients together with those of matrices."""
    ours, theirs = [matrices((*SHAPES, *OTHERS)) for _ in range(2)]
    both: list[Any] = []
    for params, options in ((ours, {"max_grad_norm": 0.5}), (theirs, {})):
        groups = [{"params": params[:8]}, {"params": params[8:], "use_muon": False}]
        both.append(fusedopt.Muon(groups, lr=0.02, adamw={"lr": 1e-2}, **options))
    for step in range(5):
        set_grads(ours, step, scale=10.0**step)
        set_grads(theirs, step, scale=10.0**step)
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        both[0].step()
        both[1].step()
        torch.testing.assert_close(both[0].grad_norm, norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


def test_maximize() -> None:
    up, down = matrices(), matrices()
    first, second = fusedopt.Muon(up, maximize=True), fusedopt.Muon(down)
    for step in range(3):
        set_grads(up, step)
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad  # type: ignore[operator]
        first.step()
        second.step()
    assert_equal(up, down)


def test_adamw_of_what_is_no_matrix() -> None:
    """The same bits as an optimizer for each of both kinds."""
    params, apart = matrices((*SHAPES, *OTHERS)), matrices((*SHAPES, *OTHERS))
    adamw = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    optimizer = fusedopt.Muon(
        [
            {"params": params[:8]},
            {"params": params[8:10]},
            {"params": params[10:], "use_muon": False, "lr": 3e-2},
        ],
        lr=0.02,
        adamw=adamw,
    )
    assert [group["use_muon"] for group in optimizer.param_groups[1:]] == [False, False]
    first = fusedopt.Muon(apart[:8], lr=0.02)
    second = fusedopt.AdamW(
        [{"params": apart[8:10]}, {"params": apart[10:], "lr": 3e-2}],
        **adamw,  # type: ignore[arg-type]
    )
    train(optimizer, range(5))
    for step in range(5):
        set_grads(apart, step)
        first.step()
        second.step()
    assert_equal(params, apart)
    assert optimizer.state[params[8]].keys() == second.state[apart[8]].keys()


@pytest.mark.parametrize("view", ["flatten", "batch"])
@pytest.mark.parametrize("shape", [(4, 6, 10), (8, 3, 5, 5), (2, 2, 7, 3)], ids=str)
def test_more_dimensions(view: str, shape: tuple[int, ...]) -> None:
    """A matrix that is flattened, or each of a batch, goes as it would alone."""
    param = matrices([shape])[0]
    whole = param.detach().clone()
    flat = whole.flatten(1)[None] if view == "flatten" else whole.flatten(0, -3)
    alone = [nn.Parameter(each.clone()) for each in flat]
    optimizer = fusedopt.Muon([param], lr=0.02, ns_view=view)
    others = fusedopt.Muon(alone, lr=0.02)
    for step in range(3):
        set_grads([param], step)
        assert param.grad is not None
        grads = param.grad.reshape(flat.shape)
        for p, grad in zip(alone, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        others.step()
    got = param.detach().reshape(flat.shape)
    torch.testing.assert_close(got, torch.stack([p.detach() for p in alone]), rtol=0, atol=1e-3)


def test_memory_formats() -> None:
    """Channels last, transposed, with gaps, and gradients in another order than parameters."""
    plain = [matrices([(8, 3, 5, 5)])[0], matrices([(12, 9)])[0], matrices([(12, 9)], 2)[0]]
    gaps = torch.zeros(12, 18)[:, ::2]
    gaps.copy_(plain[2].detach())
    others = [
        nn.Parameter(plain[0].detach().to(memory_format=torch.channels_last)),
        nn.Parameter(plain[1].detach().T.contiguous().T),
        nn.Parameter(gaps),
    ]
    first, second = fusedopt.Muon(plain, lr=0.02), fusedopt.Muon(others, lr=0.02)
    for step in range(4):
        set_grads(plain, step)
        for p, q in zip(plain, others, strict=True):
            q.grad = (
                p.grad.clone()
                if step % 2
                else p.grad.T.contiguous().T
                if p.dim() == 2
                else p.grad.clone()
            )  # type: ignore[union-attr]
        first.step()
        second.step()
    for p, q in zip(plain, others, strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-3)
        assert not q.is_contiguous()


def test_gradients_that_come_and_go() -> None:
    params = matrices()
    optimizer = fusedopt.Muon(params, lr=0.02)
    optimizer.step()
    assert not optimizer.state
    kept = [p.detach().clone() for p in params]
    for step in range(6):
        set_grads(params, step)
        for number, p in enumerate(params):
            if number % 2 != step // 2 % 2:
                p.grad = None
        optimizer.step()
        for number, (p, before) in enumerate(zip(params, kept, strict=True)):
            assert torch.equal(p, before) == (p.grad is None), number
        kept = [p.detach().clone() for p in params]
    optimizer.add_param_group({"params": matrices([(4, 4)], seed=5), "lr": 0.5})
    train(optimizer, range(2))
    # Others in their place, of another dtype.
    for p in params:
        p.data = p.data.double()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    params[0].grad = torch.ones(64, 64, dtype=torch.float64)
    for p in params[1:]:
        p.grad = None
    optimizer.step()
    assert params[0].dtype == torch.float64


@pytest.mark.parametrize(
    "options", [{"master_bits": 32}, {"state_dtype": "int8", "master_bits": 24}], ids=str
)
def test_states_stay_the_same_tensors(options: dict[str, Any]) -> None:
    """Also where codes lie in another order than rows."""
    param = nn.Parameter(torch.randn(96, 80).bfloat16().T)
    optimizer = fusedopt.Muon([param], lr=0.02, **options)
    train(optimizer, range(1))
    before = dict(optimizer.state[param])
    expected = {"int8": {"momentum_buffer_code", "momentum_buffer_scale", "code_stride"}}
    keys = expected.get(options.get("state_dtype", ""), {"momentum_buffer"})
    assert before.keys() == {*keys, "master_remainder"}
    train(optimizer, range(1, 4))
    assert list(optimizer.state[param]) == list(before)
    assert all(optimizer.state[param][key] is value for key, value in before.items())


# -- what belongs to the user --------------------------------------------------------------------


def test_gradients_stay() -> None:
    params = matrices()
    optimizer = fusedopt.Muon(params, lr=0.02, max_grad_norm=0.1)
    set_grads(params, 0)
    grads = [p.grad for p in params]
    copies = [g.clone() for g in grads]  # type: ignore[union-attr]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert_equal(grads, copies)  # type: ignore[arg-type]


def test_directions_have_memory_in_a_step_only() -> None:
    params = matrices()
    optimizer = fusedopt.Muon(params, lr=0.02)
    train(optimizer, range(2))
    directions = [optimizer._parts.directions.of(p) for p in params]
    assert all(d.untyped_storage().nbytes() == 0 and d.grad is None for d in directions)


def test_nothing_is_kept_alive() -> None:
    """Neither states that were cleared, nor parameters that have left."""
    params = matrices((*SHAPES, *OTHERS[:2]))
    groups = [{"params": params[:8]}, {"params": params[8:]}]
    optimizer = fusedopt.Muon(groups, adamw={})
    train(optimizer, range(2))
    freed = [
        weakref.ref(optimizer.state[params[0]]["momentum_buffer"]),
        weakref.ref(optimizer.state[params[9]]["exp_avg"]),
        weakref.ref(params[7]),
        weakref.ref(params[9]),
        weakref.ref(params[1].grad),
    ]
    del optimizer.state[params[0]]
    params[1].grad = None
    del optimizer.state[params[9]], optimizer.param_groups[1]["params"][1], params[9]
    del optimizer.state[params[7]], optimizer.param_groups[0]["params"][7], params[7]
    del groups
    assert [each() for each in freed] == [None] * 5
    train(optimizer, range(2, 4))


def spoil_gradient(optimizer: Any) -> str:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    params[9].grad = torch.ones_like(params[9]).to_sparse()
    return "sparse"


def spoil_matrix_gradient(optimizer: Any) -> str:
    param = optimizer.param_groups[0]["params"][3]
    param.grad = torch.ones_like(param).to_sparse()
    return "parameter 3 of group 0.*sparse"


def spoil(group: int, **options: Any) -> Callable[[Any], str]:
    def change(optimizer: Any) -> str:
        optimizer.param_groups[group].update(options)
        (key,) = options
        return f"group {group}.*{key}"

    return change


def spoil_state(optimizer: Any) -> str:
    param = optimizer.param_groups[0]["params"][2]
    optimizer.state[param]["momentum_buffer"] = torch.zeros(3)
    return "state 'momentum_buffer' of parameter 2 of group 0"


def spoil_master(optimizer: Any) -> str:
    param = optimizer.param_groups[0]["params"][2]
    optimizer.state[param]["master_remainder"] = torch.zeros(3)
    return "state 'master_remainder' of parameter 2 of group 0"


SPOILED: dict[str, Callable[[Any], str]] = {
    "gradient": spoil_gradient,
    "gradient of a matrix": spoil_matrix_gradient,
    "lr": spoil(0, lr=math.nan),
    "decay": spoil(0, weight_decay=-1.0),
    "steps": spoil(0, ns_steps=100),
    "coefficients": spoil(0, ns_coefficients=(1.0, 2.0)),
    "momentum": spoil(0, momentum="much"),
    "adjustment": spoil(0, adjust_lr_fn="any"),
    "betas": spoil(1, betas=(0.9,)),
    "state": spoil_state,
    "master": spoil_master,
}


@pytest.mark.parametrize(
    ("change", "begun"),
    [
        pytest.param(change, begun, id=f"{'later' if begun else 'first'}-{name}")
        for name, change in SPOILED.items()
        for begun in (False, True)
        if begun or change not in (spoil_state, spoil_master)  # of which there are none at first
    ],
)
def test_errors_come_before_anything_was_changed(change: Any, begun: bool) -> None:
    """And the next step goes on as if there had been none."""
    both: list[Any] = []
    for _ in range(2):
        params = [nn.Parameter(p.detach().bfloat16()) for p in matrices((*SHAPES, *OTHERS[:2]))]
        groups = [{"params": params[:8]}, {"params": params[8:]}]
        both.append(fusedopt.Muon(groups, lr=0.02, adamw={}, master_bits=32))
        if begun:
            train(both[-1], range(3))
    optimizer, other = both
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_grads(params, 5)
    options = [dict(group) for group in optimizer.param_groups]
    states = {p: dict(state) for p, state in optimizer.state.items()}
    before = values_of(optimizer) if begun else [p.detach().clone() for p in params]
    message = change(optimizer)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        optimizer.step()
    for group, was in zip(optimizer.param_groups, options, strict=True):
        group.update(was)
    if begun:
        for p, state in states.items():
            optimizer.state[p].update(state)
        assert_equal(values_of(optimizer), before)
    else:
        assert_equal(params, before)
        assert not any(optimizer.state.values())
    train(optimizer, range(5, 8))
    train(other, range(5, 8))
    assert_equal(values_of(optimizer), values_of(other))


def refused(options: dict[str, Any], shapes: Sequence[tuple[int, ...]] = ((4, 4),)) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        fusedopt.Muon(matrices(shapes), **options)
    return str(error.value)


def test_refused() -> None:
    text = refused({}, [(4, 4), (7,)])
    assert text.startswith("Muon: parameter 1 of group 0 has shape (7,)") and "adamw=" in text
    assert "use_muon=False" in refused({"adamw": {}}, [(4, 4), (7,)])
    assert "adamw has the option 'momentum'" in refused({"adamw": {"momentum": 0.9}})
    for options in (
        {"ns_coefficients": (1.0, 2.0)},
        {"ns_coefficients": (1.0, 2.0, math.inf)},
        {"ns_steps": 100},
        {"ns_steps": -1},
        {"ns_steps": 2.5},
        {"adjust_lr_fn": "other"},
        {"ns_view": "rows"},
        {"lr": -1.0},
        {"eps": -1.0},
        {"eps": math.nan},
        {"lr": "fast"},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
    ):
        (key,) = options
        text = refused(options)
        assert text.startswith("Muon: ") and key in text, text
    with pytest.raises(ValueError, match=r"group 0 has use_muon=False.*adamw="):
        fusedopt.Muon([{"params": matrices([(3,)]), "use_muon": False}])
    with pytest.raises(ValueError, match=r"group 1.*betas"):
        fusedopt.Muon(
            [{"params": matrices([(3, 3)])}, {"params": matrices([(3,)])}],
            adamw={"betas": (0.9, 0.9, 0.9)},
        )
    with pytest.raises(TypeError, match="complex"):
        fusedopt.Muon([nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))])


# -- checkpoints -------------------------------------------------------------------------------


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoints_of_matrices(direction: str) -> None:
    first, second = matrices(), matrices()
    makes: list[Any] = [torch.optim.Muon, fusedopt.Muon]
    if direction == "to torch":
        makes.reverse()
    optimizer = makes[0](first, lr=0.02, momentum=0.8)
    train(optimizer, range(4))
    resumed = makes[1](second)
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    resumed.load_state_dict(saved(optimizer))
    begun = [p.detach().clone() for p in first]
    train(optimizer, range(4, 10))
    train(resumed, range(4, 10))
    assert far_apart(second, first, begun) < 0.02
    assert resumed.param_groups[0]["momentum"] == 0.8


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "int8", "min_8bit_size": 1, "master_bits": 32},
        {"rounding": "stochastic"},
    ],
    ids=str,
)
def test_goes_on_with_the_same_bits(how: str, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if options else torch.float32

    def make() -> Any:
        params = [nn.Parameter(p.detach().to(dtype)) for p in matrices((*SHAPES, *OTHERS[:2]))]
        groups = [{"params": params[:8]}, {"params": params[8:]}]
        return fusedopt.Muon(groups, lr=0.02, adamw={"lr": 1e-2}, **options)

    optimizer = make()
    train(optimizer, range(4))
    if how == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    else:
        resumed = make()
        with torch.no_grad():
            for old, new in zip(optimizer.param_groups, resumed.param_groups, strict=True):
                for p, q in zip(old["params"], new["params"], strict=True):
                    q.copy_(p)
        resumed.load_state_dict(saved(optimizer))
    train(optimizer, range(4, 8))
    train(resumed, range(4, 8))
    assert_equal(values_of(resumed), values_of(optimizer))
    assert how == "state_dict" or resumed._adamw == optimizer._adamw
    resumed.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=dtype))]})
    assert resumed.param_groups[-1]["use_muon"] is False


# -- among trainers ----------------------------------------------------------------------------


def test_closures_hooks_and_schedulers() -> None:
    params = matrices()
    optimizer = fusedopt.Muon(params, lr=0.02)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("any"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> float:
        set_grads(params, 0)
        return 7.0

    try:
        assert optimizer.step(closure) == 7.0
    finally:
        handle.remove()
    assert sorted(calls) == ["after", "any", "before"]
    scheduler.step()
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step(closure)
    lengths = [float((p.detach() - b).norm()) for p, b in zip(params, before, strict=True)]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    again = [p.detach().clone() for p in params]
    optimizer.step(closure)
    more = [float((p.detach() - b).norm()) for p, b in zip(params, again, strict=True)]
    assert lengths == pytest.approx(more, rel=0.05)


def test_found_inf_skips_all() -> None:
    params = matrices((*SHAPES, *OTHERS[:1]))
    optimizer: Any = fusedopt.Muon(
        [{"params": params[:8]}, {"params": params[8:]}], adamw={}, lr=0.02
    )
    train(optimizer, range(1))
    before = values_of(optimizer)
    optimizer.found_inf = torch.ones(1)
    set_grads(params, 1)
    optimizer.step()
    assert_equal(values_of(optimizer), before)
    optimizer.found_inf = torch.zeros(1)
    optimizer.grad_scale = torch.full((1,), 4.0)
    other = fusedopt.Muon(
        [{"params": copied[:8]}, {"params": copied[8:]}]
        if (copied := [nn.Parameter(p.detach().clone()) for p in params])
        else [],
        adamw={},
        lr=0.02,
    )
    other.load_state_dict(optimizer.state_dict())
    set_grads(params, 2, scale=4.0)
    set_grads(copied, 2)
    optimizer.step()
    other.step()
    assert_equal(values_of(optimizer), values_of(other))


def test_memory_report() -> None:
    params = matrices([(64, 64)])
    optimizer = fusedopt.Muon(params, state_dtype="int8", min_8bit_size=1)
    train(optimizer, range(1))
    assert (
        fusedopt.memory_report(optimizer).total.states == 64 * 64 + 64 * 4
    )  # a scale for each row


# -- what must not happen ------------------------------------------------------------------------


def test_copies_keep_all_options() -> None:
    groups = [{"params": matrices([(4, 4)])}]
    optimizer = fusedopt.Muon(groups, adamw={"lr": 0.5}, maximize=True)
    resumed = copy.deepcopy(optimizer)
    vector = nn.Parameter(torch.zeros(3))
    resumed.add_param_group({"params": [vector]})
    assert resumed.param_groups[1]["maximize"] is True and resumed.param_groups[1]["lr"] == 0.5
    vector.grad = torch.ones(3)
    resumed.step()
    assert (vector > 0).all()


def test_a_skipped_step_has_no_norm() -> None:
    params = matrices()
    optimizer: Any = fusedopt.Muon(params, max_grad_norm=1.0)
    train(optimizer, range(1))
    assert optimizer.grad_norm.isfinite()
    optimizer.found_inf = torch.ones(1)
    train(optimizer, range(1))
    assert optimizer.grad_norm.isnan()
    optimizer.found_inf = None
    train(optimizer, range(1))
    assert optimizer.grad_norm.isfinite()


def test_names_in_errors() -> None:
    """Also where matrices of one group go by different lengths."""
    names = ["first", "second", "third"]
    params = [nn.Parameter(p.detach().bfloat16()) for p in matrices([(4, 4), (8, 4), (4, 4)])]
    optimizer = fusedopt.Muon([*zip(names, params, strict=True)], master_bits=32)
    train(optimizer, range(1))
    optimizer.state[params[2]]["master_remainder"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state 'master_remainder' of parameter 'third'"):
        optimizer.step()
    plain = fusedopt.Muon(matrices([(4, 4), (8, 4)]))
    train(plain, range(1))
    second = plain.param_groups[0]["params"][1]
    second.data = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0"):
        plain.step()


def test_a_group_that_turns_to_adamw() -> None:
    optimizer = fusedopt.Muon(matrices([(4, 4)]))
    optimizer.param_groups[0]["use_muon"] = False
    with pytest.raises(ValueError, match=r"group 0 has use_muon=False but no .*betas"):
        train(optimizer, range(1))


def test_random_bits_are_not_those_of_adamw() -> None:
    """Of a matrix and of a vector with the same number among their kind."""
    matrix, vector = (nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    groups = [{"params": [matrix]}, {"params": [vector], "use_muon": False}]
    optimizer = fusedopt.Muon(groups, adamw={}, rounding="stochastic", seed=7)
    seeds = [
        options.get("seed", 0)
        for _, rule, options in [*optimizer._groups_to_apply(), *optimizer._groups_to_average()]
    ]
    assert len({seeds[0], seeds[-1]}) == 2 and 0 <= seeds[0] < 2**64
