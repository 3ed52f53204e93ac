"""Averages of the weights: torch's AveragedModel, in every optimizer, saved and swapped."""

import copy
import io
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.optimizers import ROWS, Row
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((33, 7), (5,), (), (2000,), (0, 3), (4, 3, 5, 6), (40, 256))
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def params_of(
    dtype: torch.dtype = torch.float32, device: str = "cpu", shapes: Sequence[Any] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype.is_complex else torch.float32
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=real).to(device, dtype))
        for shape in shapes
    ]


def train(optimizer: Any, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.device, param.dtype)
        optimizer.step()


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To the last bit."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (each.detach().cpu().reshape(-1).view(torch.uint8) for each in (a, b))
        assert torch.equal(a, b)


def copies(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def everything(optimizer: Any) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    return [*params, *(s[key] for s in states for key in sorted(s) if torch.is_tensor(s[key]))]


def averaged(averages: list[Tensor] | None, params: Sequence[Tensor], decay: float) -> list[Tensor]:
    """As torch averages; weights of half precision as float32 ones."""
    weights = [
        p.detach().float() if p.dtype in (torch.bfloat16, torch.float16) else p.detach().clone()
        for p in params
    ]
    if averages is None:
        return weights
    for average, weight in zip(averages, weights, strict=True):
        if weight.is_complex():  # two reals
            average, weight = torch.view_as_real(average), torch.view_as_real(weight)
        average.lerp_(weight, 1 - decay)
    return averages


@every_row
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64],
    ids=str,
)
def test_averages_of_every_optimizer(row: Row, dtype: torch.dtype) -> None:
    """The bits of torch's lerp after each step, and steps as without averages."""
    params, others = params_of(dtype), params_of(dtype)
    optimizer: Any = row.ours(params, ema_decay=0.9)
    plain = row.ours(others)
    want: list[Tensor] | None = None
    for step in range(12):
        train(optimizer, range(step, step + 1))
        train(plain, range(step, step + 1))
        want = averaged(want, params, 0.9)
        assert_same([*optimizer.ema_params()], want)
    assert_same(params, others)
    for p, q in zip(params, others, strict=True):
        assert [key for key in optimizer.state[p] if key != "ema"] == [*plain.state[q]]


def test_averages_of_muon() -> None:
    params, others = (params_of(shapes=[(33, 7), (40, 40), (5,)]) for _ in range(2))
    groups = [{"params": params[:2]}, {"params": params[2:], "ema_decay": 0.5}]
    optimizer = fusedopt.Muon(groups, adamw={}, ema_decay=0.9)
    plain = fusedopt.Muon([{"params": others[:2]}, {"params": others[2:]}], adamw={})
    want: list[Tensor] | None = None
    last: list[Tensor] | None = None
    for step in range(6):
        train(optimizer, range(step, step + 1))
        train(plain, range(step, step + 1))
        want, last = averaged(want, params[:2], 0.9), averaged(last, params[2:], 0.5)
        averages = [*optimizer.ema_params()]
        assert_same(averages[:2], want)
        torch.testing.assert_close(averages[2], last[0])
    assert_same(params, others)


def test_as_averaged_model() -> None:
    """A model beside torch's AveragedModel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5))
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, ema_decay=0.99)
    other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in range(15):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        other.update_parameters(model)
    assert_same([*optimizer.ema_params()], [*other.module.parameters()])
    inputs = torch.randn(8, 20)
    with optimizer.swap_ema(), torch.no_grad():
        assert torch.equal(model(inputs), other(inputs))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9999])
def test_decays(decay: float) -> None:
    """Also those by which torch's lerp begins with the weights."""
    params = params_of(torch.float64)
    optimizer = fusedopt.SGD(params, lr=0.1, ema_decay=decay)
    want: list[Tensor] | None = None
    for step in range(5):
        train(optimizer, range(step, step + 1))
        want = averaged(want, params, decay)
    torch.testing.assert_close([*optimizer.ema_params()], want, rtol=1e-14, atol=1e-14)
    optimizer.param_groups[0]["ema_decay"] = 0.5
    train(optimizer, range(5, 6))
    want = averaged(want, params, 0.5)
    torch.testing.assert_close([*optimizer.ema_params()], want, rtol=1e-14, atol=1e-14)


STORAGES: dict[str, tuple[torch.dtype, dict[str, Any], torch.dtype]] = {
    "masters": (torch.bfloat16, {"master_bits": 32}, torch.float32),
    "24-bit-masters": (torch.bfloat16, {"master_bits": 24}, torch.float32),
    "int8": (torch.float32, {"state_dtype": "int8", "min_8bit_size": 1}, torch.float32),
    "int8-of-bfloat16": (torch.bfloat16, {"state_dtype": "int8"}, torch.float32),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}, torch.float32),
    "bfloat16": (torch.bfloat16, {"state_dtype": torch.bfloat16}, torch.bfloat16),
    "bfloat16-of-float32": (torch.float32, {"state_dtype": torch.bfloat16}, torch.bfloat16),
    "float16": (torch.float16, {"state_dtype": torch.float16}, torch.float16),
    "flat": (torch.float32, {"flat": True}, torch.float32),
    "clipped": (torch.float32, {"max_grad_norm": 0.1}, torch.float32),
}
every_storage = pytest.mark.parametrize("storage", STORAGES)


@every_storage
def test_storages(storage: str) -> None:
    dtype, options, expected = STORAGES[storage]
    params, others = params_of(dtype), params_of(dtype)
    optimizer = fusedopt.AdamW(params, lr=1e-2, ema_decay=0.9, **options)
    plain = fusedopt.AdamW(others, lr=1e-2, **options)
    want: list[Tensor] | None = None
    for step in range(8):
        train(optimizer, range(step, step + 1))
        train(plain, range(step, step + 1))
        want = averaged(want, params, 0.9)
    assert_same(params, others)
    averages = [*optimizer.ema_params()]
    assert {a.dtype for a in averages} == {expected}
    if expected == want[0].dtype:  # type: ignore[index]
        assert_same(averages, want)  # type: ignore[arg-type]
    else:
        torch.testing.assert_close(
            [a.float() for a in averages],
            want,
            rtol=8 * torch.finfo(expected).eps,
            atol=4 * torch.finfo(expected).eps,
        )


@every_storage
def test_swapped_weights_come_back(storage: str) -> None:
    """To the bit, with their masters; also after an error, and training goes on."""
    dtype, options, _ = STORAGES[storage]
    params, others = params_of(dtype), params_of(dtype)
    optimizer = fusedopt.AdamW(params, lr=1e-2, ema_decay=0.5, **options)
    other = fusedopt.AdamW(others, lr=1e-2, ema_decay=0.5, **options)
    train(optimizer, range(4))
    train(other, range(4))
    before = copies(everything(optimizer))
    averages = copies(optimizer.ema_params())
    with pytest.raises(KeyError), optimizer.swap_ema():
        assert_same(params, [a.to(dtype) for a in averages])
        assert_same([*optimizer.ema_params()], averages)
        optimizer.state_dict()
        raise KeyError
    assert_same(everything(optimizer), before)
    train(optimizer, range(4, 7))
    train(other, range(4, 7))
    assert_same(everything(optimizer), everything(other))


def test_a_step_while_swapped_is_an_error() -> None:
    params = params_of()
    optimizer = fusedopt.Adam(params, ema_decay=0.9)
    train(optimizer, range(2))
    with optimizer.swap_ema():
        before = copies(everything(optimizer))
        with pytest.raises(RuntimeError, match=r"Adam: step\(\) within swap_ema"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="swap_ema.. within swap_ema"), optimizer.swap_ema():
            pass
        assert_same(everything(optimizer), before)
    optimizer.step()


def test_groups_and_parameters_without() -> None:
    """Some groups have averages; frozen parameters, and those without a gradient so far, none."""
    params = params_of()
    params[1].requires_grad_(False)
    groups = [{"params": params[:4], "ema_decay": 0.9}, {"params": params[4:]}]
    optimizer = fusedopt.SGD(groups, lr=0.1)
    for p in params[:1] + params[2:3]:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    averages = [*optimizer.ema_params()]
    assert ["ema" in optimizer.state.get(p, {}) for p in params] == [
        p.grad is not None for p in params
    ]
    assert averages[1].data_ptr() == params[1].data_ptr()
    params[3].grad = torch.ones_like(params[3])
    optimizer.step()
    assert_same([optimizer.state[params[3]]["ema"]], [params[3].detach()])
    # They have one for as long as there is a state, whether or not there is a gradient.
    params[0].grad = None
    before = optimizer.state[params[0]]["ema"].clone()
    optimizer.step()
    assert not torch.equal(optimizer.state[params[0]]["ema"], before)


def test_none_asked_for() -> None:
    optimizer = fusedopt.AdamW(params_of())
    train(optimizer, range(2))
    assert all("ema" not in state for state in optimizer.state.values())
    assert "ema_decay" not in optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match=r"AdamW: there are no averages.*ema_decay="):
        optimizer.ema_params()
    with pytest.raises(RuntimeError, match=r"AdamW: there are no averages.*ema_decay="):
        optimizer.swap_ema()
    optimizer.add_param_group({"params": params_of(shapes=[(3,)]), "ema_decay": 0.5})
    train(optimizer, range(2))
    assert len([*optimizer.ema_params()]) == len(SHAPES) + 1


@every_row
def test_momentum_that_begins_later(row: Row) -> None:
    """An average is no state of the rule: what is the first step stays the first."""
    both: list[Any] = []
    for decay in (None, 0.9):
        optimizer = row.ours(params_of(), ema_decay=decay)
        if "momentum" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["momentum"] = 0
        train(optimizer, range(2))
        if "momentum" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, range(2, 4))
        both.append(optimizer)
    ours, plain = ([p for g in o.param_groups for p in g["params"]] for o in both)
    assert_same(plain, ours)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.9", True, [0.9]], ids=str)
def test_wrong_decays(decay: Any) -> None:
    for wrong in (
        lambda: fusedopt.AdamW(params_of(), ema_decay=decay),
        lambda: fusedopt.Muon(params_of(shapes=[(3, 3)]), ema_decay=decay),
    ):
        with pytest.raises((TypeError, ValueError), match=r"group 0: ema_decay is .*expected"):
            wrong()
    optimizer = fusedopt.AdamW(params_of(), ema_decay=0.9)
    train(optimizer, range(2))
    before = copies(everything(optimizer))
    optimizer.param_groups[0]["ema_decay"] = decay
    with pytest.raises((TypeError, ValueError), match="AdamW: group 0: ema_decay is"):
        optimizer.step()
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize(
    "average", [torch.zeros(3), 7, torch.zeros(33, 7).tolist()], ids=["shape", "number", "list"]
)
def test_what_is_no_average(average: Any) -> None:
    optimizer = fusedopt.AdamW(params_of(), ema_decay=0.9)
    train(optimizer, range(2))
    param = optimizer.param_groups[0]["params"][0]
    optimizer.state[param]["ema"] = average
    before = copies(everything(optimizer))
    with pytest.raises(
        (TypeError, ValueError), match="AdamW: state 'ema' of parameter 0 of group 0"
    ):
        optimizer.step()
    assert_same(everything(optimizer), before)


def test_averages_that_were_put_there() -> None:
    """A user's tensor is averaged into; one of another dtype is replaced by a converted copy."""
    params = params_of(shapes=[(6, 4), (5,)])
    optimizer = fusedopt.AdamW(params, ema_decay=0.75)
    train(optimizer, range(2))
    mine = torch.ones(4, 6).T
    optimizer.state[params[0]]["ema"] = mine
    optimizer.state[params[1]]["ema"] = torch.ones(5, dtype=torch.float64)
    train(optimizer, range(2, 4))
    assert optimizer.state[params[0]]["ema"] is mine
    assert optimizer.state[params[1]]["ema"].dtype == torch.float32
    assert mine.grad is None and not mine.requires_grad
    params[0].data = params[0].data.clone()  # elsewhere in memory
    want = mine.lerp(params[0].detach(), 0.25)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, range(4, 5))
    assert_same([mine], [want])


def test_nothing_is_kept_alive() -> None:
    """Neither states that were cleared, nor parameters that have left, nor what they pointed to."""
    params = params_of(shapes=[(6, 4), (5,), (7,)])
    optimizer = fusedopt.AdamW(params, ema_decay=0.5)
    train(optimizer, range(3))
    average = weakref.ref(optimizer.state[params[0]]["ema"])
    memory = weakref.ref(params[1].data.untyped_storage())
    leaving = weakref.ref(params[2])
    del optimizer.state[params[0]]
    params[1].data = params[1].data.clone()
    del optimizer.state[params[2]], optimizer.param_groups[0]["params"][2], params[2]
    assert average() is None and memory() is None and leaving() is None
    train(optimizer, range(3, 5))


def saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_storage
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_goes_on_with_the_same_bits(storage: str, how: str) -> None:
    dtype, options, _ = STORAGES[storage]
    optimizer = fusedopt.AdamW(params_of(dtype), lr=1e-2, ema_decay=0.9, **options)
    train(optimizer, range(4))
    if how == "state_dict":
        resumed = fusedopt.AdamW(params_of(dtype), lr=1e-2, ema_decay=0.9, **options)
        with torch.no_grad():
            groups = zip(optimizer.param_groups, resumed.param_groups, strict=True)
            for p, q in (
                (p, q) for a, b in groups for p, q in zip(a["params"], b["params"], strict=True)
            ):
                q.copy_(p)
        resumed.load_state_dict(saved(optimizer))
    elif how == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        resumed = torch.load(file, weights_only=False)
    train(optimizer, range(4, 8))
    train(resumed, range(4, 8))
    assert_same(everything(resumed), everything(optimizer))


@every_row
def test_checkpoints_without(row: Row) -> None:
    """One without averages lets them begin anew; one with them goes where there are none."""
    plain, optimizer = row.ours(params_of()), row.ours(params_of(), ema_decay=0.9)
    train(plain, range(3))
    train(optimizer, range(3))
    other = row.ours(params_of(), ema_decay=0.5)
    other.load_state_dict(saved(plain))
    assert other.param_groups[0]["ema_decay"] == 0.5
    train(other, range(3, 4))
    params = [p for g in other.param_groups for p in g["params"]]
    assert_same([*other.ema_params()], params)  # type: ignore[attr-defined]
    classes: list[Callable[..., Any]] = [row.ours, *([row.theirs] if row.theirs else [])]
    for make in classes:
        without = make(params_of())
        without.load_state_dict(saved(optimizer))
        train(without, range(3, 5))


def test_found_inf_skips_averages() -> None:
    optimizer: Any = fusedopt.AdamW(params_of(), ema_decay=0.9)
    train(optimizer, range(3))
    before = copies(everything(optimizer))
    optimizer.found_inf = torch.ones(1)
    train(optimizer, range(3, 4))
    assert_same(everything(optimizer), before)
    optimizer.found_inf = torch.zeros(1)
    train(optimizer, range(3, 4))
    assert not torch.equal(
        optimizer.state[optimizer.param_groups[0]["params"][0]]["ema"], before[0]
    )


def test_memory_report() -> None:
    sizes = []
    for decay in (None, 0.9):
        optimizer = fusedopt.AdamW(params_of(), ema_decay=decay)
        train(optimizer, range(1))
        sizes.append(fusedopt.memory_report(optimizer).total.states)
    elements = sum(p.numel() for p in params_of())
    assert sizes[1] - sizes[0] == 4 * elements


@every_row
def test_averages_on_a_device(row: Row, cuda: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for device in ("cpu", cuda):
            optimizer: Any = row.ours(params_of(dtype, device), ema_decay=0.9)
            train(optimizer, range(5))
            results.append(copies(optimizer.ema_params()))
        assert_same(results[1], results[0])


# -- what must not happen ------------------------------------------------------------------------


def test_a_wrong_average_is_not_swapped_in() -> None:
    params = params_of(shapes=[(3,), (4,)])
    optimizer = fusedopt.SGD(params, lr=0.1, ema_decay=0.5)
    train(optimizer, range(2))
    before = copies(params)
    for wrong in (torch.zeros(7), torch.tensor(5.0), torch.zeros(1).expand(4), params[1].detach()):
        optimizer.state[params[1]]["ema"] = wrong
        with (
            pytest.raises((TypeError, ValueError), match=r"SGD: state 'ema' of parameter 1"),
            optimizer.swap_ema(),
        ):
            pass
        with pytest.raises((TypeError, ValueError), match=r"SGD: state 'ema' of parameter 1"):
            optimizer.step()
        assert_same(params, before)
    other = fusedopt.SGD(params_of(shapes=[(3,), (4,)]), ema_decay=0.5)
    with pytest.raises((TypeError, ValueError), match=r"SGD: state 'ema' of parameter 1"):
        other.load_state_dict({**optimizer.state_dict(), "state": {1: {"ema": torch.zeros(7)}}})


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["wider", "narrower"],
)
@pytest.mark.parametrize("make", [fusedopt.AdamW, fusedopt.SGD, fusedopt.Muon])
def test_parameters_of_another_dtype_later(
    make: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """As model.float() and model.bfloat16() make them."""
    params = params_of(dtypes[0], shapes=[(6, 4), (12, 3)])
    optimizer = make(params, lr=0.1, ema_decay=0.5)
    train(optimizer, range(3))
    want = [average.float() for average in optimizer.ema_params()]
    for p in params:
        p.data = p.data.to(dtypes[1])
        p.grad = None
    for step in range(3, 6):
        train(optimizer, range(step, step + 1))
        want = averaged(want, params, 0.5)
    torch.testing.assert_close([*optimizer.ema_params()], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["cleared", "replaced"])
@pytest.mark.parametrize("make", [fusedopt.AdamW, fusedopt.Muon])
def test_states_that_were_cleared(make: Any, how: str) -> None:
    """Averages begin anew, and go on from there."""
    params = params_of(shapes=[(6, 4), (12, 3)])
    optimizer = make(params, lr=0.1, ema_decay=0.75)
    train(optimizer, range(3))
    if how == "cleared":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict)
    want: list[Tensor] | None = None
    for step in range(3, 7):
        train(optimizer, range(step, step + 1))
        want = averaged(want, params, 0.75)
    assert_same([*optimizer.ema_params()], want)  # type: ignore[arg-type]


def test_weights_that_somebody_set_stay() -> None:
    """A swap does not bring back what masters had been before."""
    params = params_of(torch.bfloat16, shapes=[(40,)])
    optimizer = fusedopt.AdamW(params, lr=1e-3, ema_decay=0.5, master_bits=32)
    train(optimizer, range(3))
    with torch.no_grad():
        params[0].fill_(3.0)
    with optimizer.swap_ema():
        pass
    assert (next(optimizer.master_params()) == 3.0).all()


def test_averages_of_groups_that_have_none_any_longer() -> None:
    params = params_of(shapes=[(3,), (4,)])
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = fusedopt.SGD(groups, lr=0.1, ema_decay=0.5)
    train(optimizer, range(3))
    optimizer.param_groups[1]["ema_decay"] = None
    old = optimizer.state[params[1]]["ema"].clone()
    train(optimizer, range(3, 5))
    assert torch.equal(optimizer.state[params[1]]["ema"], old)
    assert_same([[*optimizer.ema_params()][1]], [params[1]])
    before = params[1].detach().clone()
    with optimizer.swap_ema():
        assert torch.equal(params[1], before)
    # And those of one that has them only now.
    optimizer.param_groups[0]["ema_decay"] = None
    plain = fusedopt.AdamW(params_of())
    train(plain, range(1))
    plain.param_groups[0]["ema_decay"] = 0.5
    train(plain, range(1, 2))
    assert_same([*plain.ema_params()], plain.param_groups[0]["params"])


def test_a_first_step_that_is_skipped() -> None:
    params = params_of()
    optimizer: Any = fusedopt.AdamW(params, lr=0.1, ema_decay=0.9)
    optimizer.found_inf = torch.ones(1)
    train(optimizer, range(1))
    assert not any(optimizer.state.values())
    optimizer.found_inf = torch.zeros(1)
    train(optimizer, range(1))
    assert_same([*optimizer.ema_params()], params)


@pytest.mark.parametrize("make", [fusedopt.ScheduleFreeSGD, fusedopt.ScheduleFreeAdamW])
def test_nothing_else_while_swapped(make: Any) -> None:
    optimizer = make(params_of(), lr=0.1, ema_decay=0.5)
    optimizer.train()
    train(optimizer, range(3))
    saved_state = optimizer.state_dict()
    with optimizer.swap_ema():
        before = copies(everything(optimizer))
        for wrong in (
            optimizer.eval,
            lambda: optimizer.load_state_dict(saved_state),
            lambda: optimizer.load_master_params([*optimizer.master_params()]),
            lambda: copy.deepcopy(optimizer),
        ):
            with pytest.raises(RuntimeError, match=r"within swap_ema\(\)"):
                wrong()
        assert_same(everything(optimizer), before)


def test_an_average_of_the_users_is_averaged_into() -> None:
    """Also where states are made before the first step."""
    params = params_of(shapes=[(5,)])
    optimizer = fusedopt.AdamW(params, lr=0.1, flat=True, ema_decay=0.75)
    mine = torch.full((5,), 7.0)
    optimizer.state[params[0]]["ema"] = mine
    train(optimizer, range(1))
    assert_same([mine], [torch.full((5,), 7.0).lerp(params[0].detach(), 0.25)])


def test_a_changed_decay_is_resumed() -> None:
    optimizer = fusedopt.AdamW(params_of(), ema_decay=0.5)
    train(optimizer, range(2))
    optimizer.param_groups[0]["ema_decay"] = 0.99
    other = fusedopt.AdamW(params_of(), ema_decay=0.5)
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["ema_decay"] == 0.99
