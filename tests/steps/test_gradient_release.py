"""Gradients that are freed in the backward pass: the bits of ordinary steps, and less memory."""

import contextlib
import copy
import gc
import inspect
import io
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.optimizers import ROWS, Row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import fusedopt
from benchmarks.models.networks import GPT

pytestmark = pytest.mark.usefixtures("one_thread")

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
Make = Callable[..., Any]


class Model(nn.Module):
    """With weights that are tied, used twice, frozen, and not used at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 300)
        self.second = nn.Linear(300, 16)
        self.twice = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.norm = nn.LayerNorm(16)
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.second(torch.relu(self.first(x)))
        x = x + self.twice(torch.tanh(self.twice(x)))
        return self.head(self.norm(x + self.frozen(x)))


def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
    tokens = torch.randint(20, (2, 9), generator=generator)
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


class Training:
    def __init__(
        self, make: Make, released: bool, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.model = Model().to(dtype)
        self.optimizer = make(self.model.parameters(), **options)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.release = fusedopt.GradientRelease(self.optimizer) if released else None
        self.generator = torch.Generator().manual_seed(1)
        self.left: set[str] = set()  # what had a gradient after the last backward pass

    def step(self, microbatches: int = 1) -> None:
        for number in range(microbatches):
            last = number == microbatches - 1
            keep = self.release is not None and not last
            with self.release.accumulate() if keep else contextlib.nullcontext():
                (loss_of(self.model, self.generator) / microbatches).backward()
        self.left = {n for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()

    def everything(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, param in self.model.named_parameters():
            found[name] = param.detach()
            # Ordinary steps make no state for what never has a gradient.
            if name != "unused":
                values = self.optimizer.state.get(param, {})
                found |= {f"{name}.{k}": v for k, v in values.items() if torch.is_tensor(v)}
        return found


def assert_same(one: Training, other: Training) -> None:
    """To the last bit."""
    got, want = one.everything(), other.everything()
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        same = torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (got[key], value)))
        assert same, key


def check_bits(make: Make, microbatches: int = 1, steps: int = 20, **options: Any) -> Training:
    released, ordinary = Training(make, True, **options), Training(make, False, **options)
    for _ in range(steps):
        released.step(microbatches)
        ordinary.step(microbatches)
    assert_same(released, ordinary)
    return released


@every_row
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_bits_of_ordinary_steps(row: Row, microbatches: int, max_grad_norm: float | None) -> None:
    released = check_bits(row.ours, microbatches, max_grad_norm=max_grad_norm)
    names = {name for name, p in released.model.named_parameters() if p.requires_grad}
    assert released.left == (set() if max_grad_norm is None else names - {"unused"})


@every_row
def test_bits_with_all_options(row: Row) -> None:
    for options in row.option_sets.values():
        check_bits(row.ours, steps=6, **options)


STORAGES: dict[str, dict[str, Any]] = {
    "int8": {"state_dtype": "int8", "min_8bit_size": 1},
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "masters": {"dtype": torch.bfloat16, "master_bits": 32},
    "masters of 24 bits": {"dtype": torch.bfloat16, "master_bits": 24},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "averages": {"ema_decay": 0.9},
}


@every_row
@pytest.mark.parametrize("storage", STORAGES)
def test_bits_of_every_storage(row: Row, storage: str) -> None:
    options = STORAGES[storage]
    if storage == "int8" and not row.takes_codes(row.defaults):
        pytest.skip("its states are no codes")
    check_bits(row.ours, steps=8, **options)


def of_muon(params: Any, **options: Any) -> fusedopt.Muon:
    return fusedopt.Muon(params, adamw={"lr": 1e-3}, **options)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"ema_decay": 0.9}], ids=str)
def test_bits_of_muon(options: dict[str, Any], microbatches: int) -> None:
    """Matrices, which are orthogonalised in batches, wait; all others do not."""

    def make(params: Any, **more: Any) -> fusedopt.Muon:
        params = [*params]
        matrices = [p for p in params if p.dim() == 2 and p.requires_grad]
        others = [p for p in params if p.dim() < 2 and p.requires_grad]
        groups = [{"params": matrices}, {"params": others, "use_muon": False}]
        return of_muon(groups, **more)

    released = check_bits(make, microbatches, steps=8, **options)
    matrices = {
        n for n, p in released.model.named_parameters() if p.dim() == 2 and "frozen" not in n
    }
    if "max_grad_norm" not in options:
        assert released.left == matrices


# -- memory and time ------------------------------------------------------------------------------


def test_gradients_take_little_memory() -> None:
    """Of a GPT with 24 layers, at most 8% of all gradients exist at a time."""
    torch.manual_seed(0)
    model = GPT(65, context=8, width=32, blocks=24)
    optimizer = fusedopt.AdamW(model.parameters())
    params = [*model.parameters()]
    most = 0

    def look(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in params if p.grad is not None))

    handles = [p.register_post_accumulate_grad_hook(look) for p in params]  # before ours
    release = fusedopt.GradientRelease(optimizer)
    tokens = torch.randint(65, (2, 8))
    for _ in range(3):
        cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        assert all(p.grad is None for p in params)
        optimizer.step()
    assert 0 < most <= 0.08 * sum(p.nbytes for p in params)
    release.remove()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("make", [fusedopt.AdamW, fusedopt.SGD], ids=lambda make: make.__name__)
def test_no_parameter_costs_a_walk_over_all(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan serves all partial steps, those of the first backward pass, too."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50)))
    optimizer = make(model.parameters(), lr=0.1)
    made = 0
    make_plan = type(optimizer)._make_plan

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(type(optimizer), "_make_plan", counted)
    fusedopt.GradientRelease(optimizer)
    for _ in range(4):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert made <= 2


# -- what goes on around it -----------------------------------------------------------------------


def test_one_step_for_hooks_and_schedulers() -> None:
    training = Training(fusedopt.AdamW, True)
    calls: list[str] = []
    training.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    training.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(training.optimizer, 1, 0.5)
    training.step()
    schedule.step()
    assert calls == ["before", "after"]
    ordinary = Training(fusedopt.AdamW, False)
    ordinary.step()
    assert_same(training, ordinary)


def test_step_with_a_closure() -> None:
    trainings = [Training(fusedopt.AdamW, released) for released in (True, False)]
    for training in trainings:

        def closure(training: Training = training) -> Tensor:
            training.optimizer.zero_grad()
            loss = loss_of(training.model, training.generator)
            loss.backward()
            return loss

        for _ in range(3):
            assert training.optimizer.step(closure) > 0
    assert_same(*trainings)


def test_several_optimizers() -> None:
    def train(released: bool) -> list[Tensor]:
        model = Model()
        halves = [*model.first.parameters()], [*model.second.parameters(), *model.norm.parameters()]
        optimizers = [fusedopt.AdamW(halves[0]), fusedopt.Lion(halves[1])]
        releases = [fusedopt.GradientRelease(each) for each in optimizers if released]
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            loss_of(model, generator).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert len(releases) == 2 * released
        return [p.detach() for p in model.parameters()]

    for got, want in zip(train(True), train(False), strict=True):
        assert torch.equal(got, want)


def test_checkpoints_in_between() -> None:
    """Saved while gradients are let go of, loaded into either; also a copy."""
    one = Training(fusedopt.AdamW, True, state_dtype=torch.bfloat16)
    for _ in range(3):
        one.step()
    saved = io.BytesIO()
    torch.save([one.model.state_dict(), one.optimizer.state_dict()], saved)
    others = [Training(fusedopt.AdamW, released, state_dtype=torch.bfloat16) for released in (1, 0)]
    for other in others:
        saved.seek(0)
        weights, states = torch.load(saved)
        other.model.load_state_dict(weights)
        other.optimizer.load_state_dict(states)
        other.generator.set_state(one.generator.get_state())
    for _ in range(3):
        for each in (one, *others):
            each.step()
    for other in others:
        assert_same(one, other)
    assert copy.deepcopy(one.optimizer)._release is None


def test_loaded_in_the_same_run() -> None:
    """Options are other dictionaries after that."""
    one, other = Training(fusedopt.AdamW, True), Training(fusedopt.AdamW, False)
    for each in (one, other):
        each.step()
        each.optimizer.load_state_dict(copy.deepcopy(each.optimizer.state_dict()))
        each.optimizer.param_groups[0]["lr"] = 0.1
        each.step()
    assert_same(one, other)


def test_removed() -> None:
    one, other = Training(fusedopt.AdamW, True), Training(fusedopt.AdamW, False)
    for each in (one, other):
        each.step()
    one.release.remove()
    for each in (one, other):
        each.step()
        assert "first.weight" in each.left
    assert_same(one, other)
    fusedopt.GradientRelease(one.optimizer)


def test_parameters_that_come_later() -> None:
    """Thawed ones, and those of a new group, are let go of from the next step on."""
    one, other = Training(fusedopt.AdamW, True), Training(fusedopt.AdamW, False)
    for each in (one, other):
        torch.manual_seed(2)
        each.step()
        each.model.frozen.requires_grad_(True)
        each.model.twice = nn.Linear(16, 16)
        each.optimizer.add_param_group({"params": each.model.twice.parameters(), "lr": 0.1})
        each.step()
    assert "frozen.weight" in one.left and "twice.weight" in one.left
    for each in (one, other):
        each.step()
    assert one.left == set()
    assert_same(one, other)


def test_gradients_given_by_hand() -> None:
    one, other = Training(fusedopt.AdamW, True), Training(fusedopt.AdamW, False)
    for each in (one, other):
        for _ in range(3):
            each.model.unused.grad = torch.ones(3)
            each.step()
        assert each.optimizer.state[each.model.unused]["step"] == 3
    assert torch.equal(one.model.unused, other.model.unused)


def test_it_goes_with_its_optimizer() -> None:
    """Parameters do not keep it alive."""
    model = Model()
    optimizer = fusedopt.AdamW(model.parameters())
    gone = [weakref.ref(optimizer), weakref.ref(fusedopt.GradientRelease(optimizer))]
    del optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    loss_of(model, torch.Generator()).backward()
    assert model.first.weight.grad is not None


# -- what cannot be -------------------------------------------------------------------------------


def test_backward_twice() -> None:
    model = nn.Linear(4, 4)
    optimizer = fusedopt.AdamW(model.named_parameters())
    fusedopt.GradientRelease(optimizer)
    loss = model(torch.ones(2, 4)).sum()  # whose backward pass needs no weights
    loss.backward(retain_graph=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="'(weight|bias)' gets a second gradient"):
        loss.backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 1


def test_accumulation_after_the_step() -> None:
    training = Training(fusedopt.AdamW, True)
    loss_of(training.model, training.generator).backward()
    with (
        training.release.accumulate(),
        pytest.raises(RuntimeError, match=r"second gradient.*release\.accumulate\(\)"),
    ):
        loss_of(training.model, training.generator).backward()


def test_a_second_gradient_by_hand() -> None:
    training = Training(fusedopt.AdamW, True)
    loss_of(training.model, training.generator).backward()
    training.model.norm.bias.grad = torch.ones(16)
    with pytest.raises(RuntimeError, match="gets a second gradient"):
        training.optimizer.step()


def test_reentrant_checkpoints() -> None:
    """A backward pass within a backward pass gives a part of a gradient only."""
    model = nn.Linear(4, 4)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1)
    release = fusedopt.GradientRelease(optimizer)
    x = torch.ones(2, 4, requires_grad=True)

    def twice(use_reentrant: bool) -> Tensor:
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        return checkpoint(model, y, use_reentrant=use_reentrant).sum()

    twice(use_reentrant=False).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        twice(use_reentrant=True).backward()
    release.remove()


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(fused: bool) -> None:
    model = Model()
    optimizer = fusedopt.AdamW(model.parameters(), fused=fused)
    release = fusedopt.GradientRelease(optimizer)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"torch\.amp\.GradScaler divides .* bfloat16"):
        scaler.scale(loss_of(model, torch.Generator())).backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    optimizer.zero_grad()
    # Where the optimizer is to unscale, it says so; otherwise torch misses the gradients.
    error, message = (RuntimeError, "GradScaler divides") if fused else (AssertionError, "No inf")
    release._stepped.add(id(model.first.weight))  # as if it had been
    with pytest.raises(error, match=message):
        scaler.step(optimizer)
    release.remove()
    del scaler


def test_a_scaler_that_is_garbage() -> None:
    """Nobody has it any longer, but it was not collected yet."""
    scaler: Any = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.itself = scaler
    del scaler
    check_bits(fusedopt.AdamW, steps=2)


def test_a_scaler_that_is_not_used() -> None:
    scalers = [torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)]
    scalers[1].scale(torch.ones(()))
    check_bits(fusedopt.AdamW, steps=2)


def test_constructor_refuses() -> None:
    model = Model()
    with pytest.raises(TypeError, match=r"torch\.optim\.adamw\.AdamW; expected one of fusedopt's"):
        fusedopt.GradientRelease(torch.optim.AdamW(model.parameters()))
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.GradientRelease(optimizer)
    with pytest.raises(ValueError, match=r"has one already; remove\(\) it first"):
        fusedopt.GradientRelease(optimizer)
    flat = fusedopt.AdamW(Model().parameters(), flat=True)
    with pytest.raises(ValueError, match="is flat, .* use flat=False"):
        fusedopt.GradientRelease(flat)
    assert flat._release is None
    of_others = Model()
    of_others.norm.weight.ds_id = 3
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO stage 3"):
        fusedopt.GradientRelease(fusedopt.AdamW(of_others.parameters()))


def test_errors_of_a_step_are_those_of_the_backward_pass() -> None:
    table = nn.Embedding(9, 4, sparse=True)
    optimizer = fusedopt.SGD(table.parameters(), lr=0.1)
    fusedopt.GradientRelease(optimizer)
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        table(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(table.weight, before)


def test_modes_of_other_optimizers() -> None:
    training = Training(fusedopt.ScheduleFreeAdamW, True)
    training.step()
    training.optimizer.eval()
    with pytest.raises(RuntimeError, match=r"evaluation mode.*call train\(\) first"):
        loss_of(training.model, training.generator).backward()
    averaging = Training(fusedopt.AdamW, True, ema_decay=0.9)
    averaging.step()
    with averaging.optimizer.swap_ema(), pytest.raises(RuntimeError, match=r"within swap_ema\(\)"):
        loss_of(averaging.model, averaging.generator).backward()


# -- what changes under its hands -----------------------------------------------------------------


def by_hand(released: bool, change: Callable[[Any, list[nn.Parameter]], None]) -> list[float]:
    """Three parameters, of which the groups are changed by hand after the first iteration."""
    params = [nn.Parameter(torch.tensor([float(i)])) for i in range(1, 4)]
    groups = [{"params": [params[0]], "lr": 1.0}, {"params": params[1:], "lr": 0.1}]
    optimizer = fusedopt.AdamW(groups)
    release = fusedopt.GradientRelease(optimizer) if released else None
    for iteration in range(4):
        if iteration == 1:
            change(optimizer, params)
        torch.stack([p * p for p in params]).sum().backward()
        optimizer.step()
        for p in params:
            p.grad = None
    assert (release is None) == (not released)
    return [p.item() for p in params]


def reverse_groups(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.reverse()


def swap_within(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["params"].reverse()


def move_between(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = params[:2]
    optimizer.param_groups[1]["params"] = params[2:]


def delete_group(optimizer: Any, params: list[nn.Parameter]) -> None:
    del optimizer.param_groups[0]


def delete_last(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["params"].pop()


def put_in_front(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].insert(0, nn.Parameter(torch.zeros(2)))


CHANGES = [reverse_groups, swap_within, move_between, delete_group, delete_last, put_in_front]


@pytest.mark.parametrize("change", CHANGES)
def test_groups_that_are_changed_by_hand(change: Callable[..., None]) -> None:
    assert by_hand(True, change) == by_hand(False, change)


def late(make: Make, released: bool, **options: Any) -> dict[str, Any]:
    """A parameter that has its first gradient late, when its weights are others."""
    params = [nn.Parameter(torch.full((4,), float(i))) for i in range(1, 3)]
    optimizer = make(params, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    release = fusedopt.GradientRelease(optimizer) if released else None
    found: dict[str, Any] = {}
    for iteration in range(5):
        if iteration == 2:
            with torch.no_grad():
                params[1].fill_(5.0)
            optimizer.param_groups[0]["lr"] = 0.01
        used = params if iteration >= 3 else params[:1]
        sum((p * p).sum() for p in used).backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"keys {iteration}"] = sorted(optimizer.state_dict()["state"])
    for number, p in enumerate(params):
        found |= {f"{number}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
        found[f"{number}"] = p.detach()
    assert (release is None) == (not released)
    return found


@every_row
def test_first_gradients_that_come_late(row: Row) -> None:
    """States are those of the weights and options of then; before, there are none."""
    got, want = late(row.ours, True, lr=1.0), late(row.ours, False, lr=1.0)
    assert got.keys() == want.keys()
    for key, value in want.items():
        if torch.is_tensor(value):
            assert torch.equal(got[key].nan_to_num(7.0), value.nan_to_num(7.0)), key
        else:
            assert got[key] == value, key


def test_what_a_user_adds_to_a_state_stays() -> None:
    """To that of a parameter without a gradient, too, which was made along with others'."""
    training = Training(fusedopt.AdamW, True)
    optimizer, unused = training.optimizer, training.model.unused
    loss_of(training.model, training.generator).backward()
    optimizer.state[unused]["mine"] = 1
    optimizer.step()
    assert optimizer.state[unused]["mine"] == 1
    other = Training(fusedopt.AdamW, True)
    other.step()
    assert other.model.unused not in other.optimizer.state


def test_states_that_are_not_all_there() -> None:
    """By the user's hand, by other options, and by masters that were set before the first step."""

    def run(released: bool) -> Training:
        training = Training(fusedopt.AdamW, released, dtype=torch.bfloat16, master_bits=32, lr=1e-2)
        optimizer, model = training.optimizer, training.model
        optimizer.load_master_params([2 * m for m in optimizer.master_params()])
        optimizer.state[model.norm.bias]["mine"] = 1
        training.step()
        del optimizer.state[model.norm.weight]["exp_avg"]
        training.step()
        optimizer.param_groups[0]["amsgrad"] = True
        training.step()
        assert "max_exp_avg_sq" in optimizer.state[model.norm.bias]
        return training

    assert_same(run(True), run(False))


def test_an_optimizer_that_was_replaced() -> None:
    """As by a cell of a notebook that is run again."""
    model = nn.Linear(3, 3)
    for lr in (0.1, 0.0):
        optimizer = fusedopt.SGD(model.parameters(), lr=lr)
        fusedopt.GradientRelease(optimizer)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert len(model.weight._post_accumulate_grad_hooks) == 1  # type: ignore[attr-defined]


def test_a_parameter_of_two() -> None:
    model = nn.Linear(3, 3)
    first, second = (fusedopt.SGD(model.parameters(), lr=0.1) for _ in range(2))
    release = fusedopt.GradientRelease(first)
    with pytest.raises(ValueError, match=r"shape \(3, 3\) has another GradientRelease"):
        fusedopt.GradientRelease(second)
    release.remove()
    fusedopt.GradientRelease(second)


def test_backward_passes_in_several_threads() -> None:
    """As autograd has them for several devices: states are made by one at a time."""

    def run(released: bool) -> list[Tensor]:
        halves = [[nn.Parameter(torch.ones(7)) for _ in range(12)] for _ in range(2)]
        optimizer = fusedopt.AdamW([p for half in halves for p in half])
        if released:
            fusedopt.GradientRelease(optimizer)

        def backward(half: list[nn.Parameter]) -> None:
            sum((p * p).sum() for p in half).backward()

        for _ in range(3):
            threads = [threading.Thread(target=backward, args=(half,)) for half in halves]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for half in halves for p in half]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        want = run(False)
        for _ in range(10):
            for got, each in zip(run(True), want, strict=True):
                assert torch.equal(got, each)
    finally:
        sys.setswitchinterval(before)


def test_parameters_that_overlap_later() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = fusedopt.SGD(params, lr=0.1)
    fusedopt.GradientRelease(optimizer)
    sum(p.sum() for p in params).backward()
    optimizer.step()
    params[1].data = params[0].data
    with pytest.raises(ValueError, match="overlap"):
        sum(p.sum() for p in params).backward()


def test_clipping_that_comes_too_late() -> None:
    training = Training(fusedopt.AdamW, True)
    loss_of(training.model, training.generator).backward()
    training.optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm was set after the backward pass"):
        training.optimizer.step()


def test_found_inf_that_is_set() -> None:
    training = Training(fusedopt.AdamW, True)
    training.optimizer.found_inf = torch.ones(())
    with pytest.raises(RuntimeError, match="GradScaler"):
        loss_of(training.model, training.generator).backward()


def test_after_an_error() -> None:
    """zero_grad() and step() end an iteration that has failed; so does a loaded state_dict."""
    training = Training(fusedopt.AdamW, True)
    saved = copy.deepcopy(training.optimizer.state_dict())
    for recover in (training.optimizer.step, lambda: training.optimizer.load_state_dict(saved)):
        loss_of(training.model, training.generator).backward()
        training.optimizer.zero_grad()
        recover()
        training.step()


def test_no_property_raises() -> None:
    """Debuggers and trainers look at all of them."""
    training = Training(fusedopt.AdamW, True)
    assert dict(inspect.getmembers(training.optimizer))["_step_supports_amp_scaling"] is False
