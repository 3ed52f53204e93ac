"""Our classes in the place of torch.optim's: what code that was written for those relies on."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.training import (
    CASES,
    RICHEST,
    Case,
    assert_close,
    assert_equal,
    assert_same_bits,
    assert_unchanged,
    both,
    clone_params,
    make_params,
    params_of,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import fusedopt

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


# -- the constructor --------------------------------------------------------------------------


@every_class
def test_signature(case: Case) -> None:
    ours = inspect.signature(case.ours).parameters
    theirs = inspect.signature(case.theirs).parameters
    added = [p for name, p in ours.items() if name not in theirs]
    shared = [(p.name, p.kind, p.default) for name, p in ours.items() if name in theirs]
    assert shared == [(p.name, p.kind, p.default) for p in theirs.values()]
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in added)


@every_class
def test_is_torchs(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    assert isinstance(optimizer, case.theirs) and case.ours.__name__ == case.theirs.__name__
    defaults = case.theirs(make_params(), **case.options).defaults
    assert {key: optimizer.defaults[key] for key in defaults} == defaults


@every_class
@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("value", [True, False])
def test_implementation_flags_change_nothing(case: Case, flag: str, value: bool) -> None:
    if flag not in inspect.signature(case.theirs).parameters:
        pytest.skip(f"torch's {case.theirs.__name__} has no {flag}")
    plain = case.ours(make_params(), **case.options)
    flagged = case.ours(make_params(), **case.options, **{flag: value})
    assert flagged.param_groups[0][flag] is value
    for optimizer in (plain, flagged):
        train(optimizer, range(3))
    assert_equal(flagged, plain)


@every_class
def test_differentiable_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=rf"{case.ours.__name__}.*differentiable=True"):
        case.ours(make_params(), differentiable=True)


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"weight_decay": -1.0}, {"lr": torch.ones(2)}], ids=str
)
@every_class
def test_refusals_of_the_constructor(case: Case, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:
        case.theirs(make_params(), **options)
    with pytest.raises(ValueError) as ours:
        case.ours(make_params(), **options)
    assert str(theirs.value) in str(ours.value)


@every_class
def test_repr(case: Case) -> None:
    ours, theirs = both(case)
    assert set(repr(theirs).splitlines()) <= set(repr(ours).splitlines())


# -- state ------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(6, 5),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(6, 10)[:, ::2],
    "complex": lambda: torch.randn(6, 5, dtype=torch.complex64),
    "float64": lambda: torch.randn(6, 5, dtype=torch.float64),
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_laid_out_as_torchs(case: Case, layout: str) -> None:
    value = LAYOUTS[layout]()
    ours, theirs = (
        cls([nn.Parameter(copy.deepcopy(value))], **case.options) for cls in case.classes
    )
    for step in range(2):
        for optimizer in (ours, theirs):
            train(optimizer, [step])
    [p], [q] = params_of(ours), params_of(theirs)
    assert p.stride() == q.stride()
    assert list(ours.state.get(p, {})) == list(theirs.state.get(q, {}))
    for key, state in theirs.state.get(q, {}).items():
        mine = ours.state[p][key]
        assert (mine.shape, mine.stride(), mine.dtype) == (state.shape, state.stride(), state.dtype)
        assert mine.device == state.device and type(mine) is type(state)
        torch.testing.assert_close(mine, state)
    torch.testing.assert_close(p, q)


@every_case
def test_state_without_a_gradient(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        optimizer.step()
        assert len(optimizer.state) == 0
        set_grads(params_of(optimizer)[:2], 0)
        optimizer.step()
    assert len(ours.state) == len(theirs.state)
    assert_close(ours, theirs)


@every_class
def test_states_are_live(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        for p in params_of(optimizer):
            for value in optimizer.state[p].values():
                value.mul_(2)
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)


@every_class
def test_states_can_be_replaced_and_removed(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        first, second, *_ = params_of(optimizer)
        for key, value in optimizer.state[first].items():
            optimizer.state[first][key] = value * 2
        del optimizer.state[second]
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.state.clear()
        train(optimizer, range(6, 9))
    assert_close(ours, theirs)
    for optimizer in (ours, theirs):
        # How a restart is often written.
        optimizer.state = type(theirs.state)(dict)
        train(optimizer, range(9, 12))
    assert_close(ours, theirs)


# -- step, closures, hooks --------------------------------------------------------------------


@every_class
def test_closure(case: Case) -> None:
    ours, theirs = both(case)
    losses = []
    for optimizer in (ours, theirs):
        calls = []

        def closure(optimizer: Optimizer = optimizer, calls: list[float] = calls) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum(((p - 1) ** 2).sum() for p in params_of(optimizer))
            loss.backward()
            calls.append(loss.item())
            return loss

        with torch.no_grad():
            returned = [optimizer.step(closure) for _ in range(3)]
            returned.append(optimizer.step(closure=closure))
        assert calls == [loss.item() for loss in returned]
        losses.append(calls)
        assert optimizer.step() is None
    torch.testing.assert_close(*losses)
    assert_close(ours, theirs)


def test_step_leaves_grad_mode_alone() -> None:
    for enabled in (True, False):
        optimizer = fusedopt.AdamW(make_params())
        set_grads(params_of(optimizer), 0)
        with torch.set_grad_enabled(enabled):
            optimizer.step()
            assert torch.is_grad_enabled() is enabled
        assert all(p.requires_grad and p.is_leaf for p in params_of(optimizer))


@every_class
def test_step_hooks(case: Case) -> None:
    """Of instances and global ones: called in torch's order, with torch's arguments."""
    logs = []
    for optimizer in both(case):
        log: list[Any] = []

        def note(name: str, optimizer: Optimizer = optimizer, log: list[Any] = log) -> Any:
            def hook(opt: Optimizer, args: Any, kwargs: Any) -> None:
                assert opt is optimizer
                log.append((name, params_of(opt)[2].item(), len(args), sorted(kwargs)))

            return hook

        handles = [
            optimizer.register_step_post_hook(note("post")),
            optimizer.register_step_pre_hook(note("pre")),
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        train(optimizer, range(2))
        optimizer.step(closure=lambda: None)
        for handle in handles:
            handle.remove()
        train(optimizer, range(2))
        logs.append(log)
    ours, theirs = logs
    assert [entry[0] for entry in ours] == ["global pre", "pre", "post", "global post"] * 3
    assert [(e[0], *e[2:]) for e in ours] == [(e[0], *e[2:]) for e in theirs]
    torch.testing.assert_close([e[1] for e in ours], [e[1] for e in theirs])


def test_step_pre_hook_changes_the_arguments() -> None:
    optimizer = fusedopt.SGD(make_params())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 3.0), {}))
    assert optimizer.step() == 3.0


def test_step_pre_hook_clips() -> None:
    ours, theirs = both(next(case for case in CASES if case.name == "sgd-momentum"))
    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(
            lambda opt, args, kwargs: nn.utils.clip_grad_norm_(params_of(opt), 0.1) and None
        )
        train(optimizer, range(5))
    assert_close(ours, theirs)


@every_class
def test_state_dict_hooks(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    log: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: log.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda opt: log.append("first"), prepend=True)

    def in_place(opt: Optimizer, state_dict: dict[str, Any]) -> None:
        assert type(state_dict["state"]) is dict and type(state_dict["state"][0]) is dict
        state_dict["state"][0]["mine"] = 1
        state_dict["extra"] = True

    optimizer.register_state_dict_post_hook(in_place)
    optimizer.register_state_dict_post_hook(lambda opt, d: {**d, "replaced": True})
    saved = optimizer.state_dict()
    assert log == ["first", "pre"]
    assert saved["extra"] and saved["replaced"] and saved["state"][0]["mine"] == 1
    assert "mine" not in optimizer.state[params_of(optimizer)[0]]


@every_class
def test_state_dict_post_hook_that_prepends(case: Case) -> None:
    """A hook that is first still sees plain dictionaries, and leaves no trace of ours."""
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(2))
    seen: list[type] = []
    optimizer.register_state_dict_post_hook(
        lambda opt, d: seen.append(type(d["state"][0])), prepend=True
    )
    hooks = len(optimizer._optimizer_state_dict_post_hooks)
    optimizer.state_dict()
    assert seen == [dict] and len(optimizer._optimizer_state_dict_post_hooks) == hooks


@every_class
def test_load_hooks(case: Case) -> None:
    """Hooks that change what is loaded, in place or by returning another dictionary."""
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))
        saved = copy.deepcopy(optimizer.state_dict())
        renamed = {**saved, "state": {k: {"old": v} for k, v in saved["state"].items()}}
        log: list[str] = []

        def rename(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {
                **state_dict,
                "state": {k: dict(v["old"]) for k, v in state_dict["state"].items()},
            }

        def double(opt: Optimizer, state_dict: dict[str, Any]) -> None:
            for values in state_dict["state"].values():
                for key in values:
                    values[key] = values[key] * 2
            state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
            state_dict["param_groups"][0]["lr"] = 0.5

        optimizer.register_load_state_dict_pre_hook(double)
        optimizer.register_load_state_dict_pre_hook(rename, prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda opt, log=log: log.append("post"))
        hooks = len(optimizer._optimizer_load_state_dict_pre_hooks)
        optimizer.load_state_dict(renamed)
        assert log == ["post"] and optimizer.param_groups[0]["lr"] == 0.5
        assert len(optimizer._optimizer_load_state_dict_pre_hooks) == hooks
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)


@every_class
def test_load_post_hook_sees_and_changes_what_was_loaded(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(3))

        def double(opt: Optimizer) -> None:
            for p in params_of(opt):
                for value in opt.state[p].values():
                    value.mul_(2)

        optimizer.register_load_state_dict_post_hook(double)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, range(3, 6))
    assert_close(ours, theirs)


# -- parameter groups -------------------------------------------------------------------------


@every_class
def test_add_param_group(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        optimizer.add_param_group({"params": make_params(torch.float64, seed=1), "lr": 0.03})
        optimizer.add_param_group(
            {"params": nn.Parameter(torch.ones(5, dtype=torch.float64)), "weight_decay": 0.5}
        )
        train(optimizer, range(2, 5))
        p = params_of(optimizer)[0]
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": [p]})
        assert len(optimizer.param_groups) == 3
        train(optimizer, range(5, 7))
    assert_close(ours, theirs)


@every_class
def test_groups_with_options_of_their_own(case: Case) -> None:
    ours, theirs = (
        cls(
            [
                {"params": make_params(torch.float64, seed=0)},
                {"params": make_params(torch.float64, seed=1), "lr": 0.1, "weight_decay": 0.3},
                {"params": make_params(torch.float64, seed=2), "maximize": True},
            ],
            **case.options,
        )
        for cls in case.classes
    )
    for optimizer in (ours, theirs):
        train(optimizer, range(5))
    assert_close(ours, theirs)


@every_class
def test_group_options_changed_by_hand(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        train(optimizer, range(2))
        for key, value in {"lr": 0.05, "weight_decay": 0.2, "maximize": True}.items():
            optimizer.param_groups[0][key] = value
            train(optimizer, range(2, 4))
        # Parameters, too, are taken out and put in by hand.
        removed = optimizer.param_groups[0]["params"].pop(1)
        train(optimizer, range(4, 6))
        optimizer.param_groups[0]["params"].append(removed)
        train(optimizer, range(6, 8))
    assert_close(ours, theirs)


@every_class
def test_named_parameters(case: Case) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = case.ours(model.named_parameters(), **case.options)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    train(optimizer, range(2))
    # Names of a checkpoint replace those at hand, as in torch.
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"] = ["a", "b", "c", "d"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
    del saved["param_groups"][0]["param_names"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
    model[1].weight.grad.data = torch.zeros(7)
    with pytest.raises(ValueError, match=rf"{case.ours.__name__}.*'c'"):
        optimizer.step()


# -- hyper-parameters that are tensors --------------------------------------------------------


@every_class
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_tensor_lr(case: Case, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.25, dtype=torch.float64)
    ours = case.ours(make_params(), **{**case.options, "lr": lr})
    plain = case.ours(make_params(), **{**case.options, "lr": 0.25})
    for optimizer in (ours, plain):
        train(optimizer, range(2))
    lr.fill_(0.5)
    plain.param_groups[0]["lr"] = 0.5
    for optimizer in (ours, plain):
        train(optimizer, range(2, 4))
    assert_equal(ours, plain)
    assert ours.param_groups[0]["lr"] is lr and float(lr) == 0.5


@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.AdamW])
def test_tensor_betas(cls: type[Optimizer]) -> None:
    betas = (torch.tensor(0.5), torch.tensor([0.75]))
    ours = cls(make_params(), betas=betas)
    plain = cls(make_params(), betas=(0.5, 0.75))
    for optimizer in (ours, plain):
        train(optimizer, range(2))
    for optimizer, beta in ((ours, torch.tensor(0.25)), (plain, 0.25)):
        optimizer.param_groups[0]["betas"] = (beta, 0.75)
        train(optimizer, range(2, 4))
    assert_equal(ours, plain)


def test_tensor_weight_decay() -> None:
    ours = fusedopt.SGD(make_params(), weight_decay=torch.tensor(0.125))
    plain = fusedopt.SGD(make_params(), weight_decay=0.125)
    for optimizer in (ours, plain):
        train(optimizer, range(2))
    assert_equal(ours, plain)


# -- schedulers and averages ------------------------------------------------------------------

S = lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LRScheduler": lambda o: type("Root", (S.LRScheduler,), {"get_lr": root_lr})(o),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: S.StepLR(o, 3),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, 1.0, 4), S.ExponentialLR(o, 0.8)], [4]
    ),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 7),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    # These two change betas or momentum, too.
    "CyclicLR": lambda o: S.CyclicLR(
        o, 0.001, 0.05, step_size_up=3, cycle_momentum="alpha" not in o.defaults
    ),
    "OneCycleLR": lambda o: S.OneCycleLR(
        o, 0.05, total_steps=12, cycle_momentum="alpha" not in o.defaults
    ),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "SWALR": lambda o: SWALR(o, swa_lr=0.002, anneal_epochs=4),
}


def root_lr(self: Any) -> list[Any]:
    return [base / (1 + self.last_epoch) ** 0.5 for base in self.base_lrs]


def test_every_scheduler_is_covered() -> None:
    found = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value)
        and (issubclass(value, lr_scheduler.LRScheduler) or hasattr(value, "get_last_lr"))
        and not name.startswith("_")
    }
    assert found <= set(SCHEDULERS)


@every_class
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(case: Case, name: str, tensor_lr: bool) -> None:
    histories, optimizers = [], []
    for cls in case.classes:
        lr: Any = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
        params = make_params(torch.float64, shapes=((7,), (3, 2)))
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": lr / 2}]
        # torch's foreach step, its default for some, takes no tensor for lr.
        optimizer = cls(groups, **{**case.options, "lr": lr}, foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        history = []
        for step in range(10):
            train(optimizer, [step])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            # As floats: a scheduler changes a tensor in place.
            history += [float(group["lr"]) for group in optimizer.param_groups]
            for key in ("momentum", "betas"):
                history += [group[key] for group in optimizer.param_groups if key in group]
            history += [float(lr) for lr in scheduler.get_last_lr()]
        histories.append(history)
        optimizers.append(optimizer)
    assert histories[0] == histories[1]
    assert len(set(map(str, histories[0]))) > 2
    assert_close(*optimizers)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    # No bias before the normalisation: it has a gradient of nothing but rounding errors.
    layers = nn.Linear(6, 20, bias=False), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3)
    return nn.Sequential(*layers).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    random = partial(torch.randn, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [(random(16, 6), random(16, 3)) for _ in range(6)]


def fit(model: nn.Module, optimizer: Optimizer, after: Callable[[], Any] = lambda: None) -> None:
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        after()


@every_class
@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_averaged_models(case: Case, ema: bool, flat: bool) -> None:
    torch.set_num_threads(1)  # the model is too small for two
    averages = []
    for cls, options in ((case.ours, {"flat": flat}), (case.theirs, {})):
        model = small_model()
        optimizer = cls(model.parameters(), **case.options, **options)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8) if ema else None)
        scheduler = SWALR(optimizer, swa_lr=0.05)
        fit(
            model,
            optimizer,
            lambda a=average, m=model, s=scheduler: (a.update_parameters(m), s.step()),
        )
        update_bn([x for x, _ in batches()], average)
        averages.append(average)
    torch.testing.assert_close(
        averages[0].state_dict(), averages[1].state_dict(), rtol=1e-9, atol=1e-9
    )


# -- copies -----------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: reload(thing, weights_only=False),
}


def reload(thing: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@every_case
@pytest.mark.parametrize("how", COPIES)
def test_copies_train_on_alike_and_apart(case: Case, how: str) -> None:
    optimizer = case.ours(make_params(), **case.options)
    train(optimizer, range(3))
    before = snapshot(optimizer)
    twin = COPIES[how](optimizer)
    assert type(twin) is case.ours and repr(twin) == repr(optimizer)
    assert_equal(twin, optimizer)
    train(twin, range(3, 6))
    assert_unchanged(optimizer, before)
    train(optimizer, range(3, 6))
    assert_equal(twin, optimizer)


@every_class
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole(case: Case, how: str) -> None:
    """Whatever the constructor sets is there in a copy, which never saw the constructor."""
    case = replace(case, options={**case.options, "state_dtype": torch.bfloat16})
    optimizer = case.ours(make_params(torch.bfloat16), **case.options)
    for before in (True, False):
        twin = COPIES[how](optimizer)
        assert twin.defaults == optimizer.defaults
        assert twin._step_supports_amp_scaling is True
        twin.add_param_group({"params": make_params(torch.bfloat16, seed=3)})
        assert twin.param_groups[1]["state_dtype"] == torch.bfloat16
        calls: list[int] = []
        twin.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        train(twin, range(2))
        assert calls == [1, 1]
        twin.zero_grad()
        twin.load_state_dict(copy.deepcopy(twin.state_dict()))
        train(twin, range(2, 4))
        if before:
            train(optimizer, range(2))


def test_a_copy_of_a_scheduled_optimizer() -> None:
    optimizer = fusedopt.AdamW(make_params())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(optimizer, range(2))
    scheduler.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = snapshot(optimizer)
        train(twin, range(2, 4))
        assert_unchanged(optimizer, before)


@every_case
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_pickles_are_no_larger_than_torchs(case: Case, flat: bool) -> None:
    shapes = ((1000,),) * 20
    ours = case.ours(make_params(shapes=shapes), **case.options, flat=flat)
    theirs = case.theirs(make_params(shapes=shapes), **case.options)
    for optimizer in (ours, theirs):
        train(optimizer, range(1))
        optimizer.zero_grad()

    def saved(thing: Any) -> int:
        file = io.BytesIO()
        torch.save(thing, file)
        return file.tell()

    assert len(pickle.dumps(ours)) < 1.02 * len(pickle.dumps(theirs)) + 1000
    assert saved(ours.state_dict()) < 1.02 * saved(theirs.state_dict()) + 1000


@every_class
def test_state_dict_is_weights_only(case: Case) -> None:
    options = {**case.options, "state_dtype": torch.bfloat16}
    optimizer = case.ours(make_params(torch.bfloat16), **options)
    train(optimizer, range(3))
    twin = case.ours(clone_params(params_of(optimizer)), **options)
    twin.load_state_dict(reload(optimizer.state_dict(), weights_only=True))
    for each in (optimizer, twin):
        train(each, range(3, 6))
    assert_equal(twin, optimizer)


def child(queue: Any, optimizer: Optimizer) -> None:
    train(optimizer, range(3, 6))
    queue.put([p.detach().clone().tolist() for p in params_of(optimizer)])


def test_another_process() -> None:
    """A process gets the optimizer in shared memory: both train the same tensors."""
    context = torch.multiprocessing.get_context("spawn")
    optimizer = fusedopt.AdamW(make_params())
    twin = fusedopt.AdamW(make_params())
    train(optimizer, range(3))
    train(twin, range(6))
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, optimizer))
    process.start()
    values = queue.get(timeout=60)
    process.join()
    assert process.exitcode == 0
    assert values == [p.tolist() for p in params_of(twin)]
    # The parameters are shared, the states were moved to shared memory: this one trains on.
    assert_same_bits(params_of(optimizer), params_of(twin))
    train(optimizer, range(6, 8))


@every_class
def test_states_moved_to_shared_memory(case: Case) -> None:
    optimizer, twin = (case.ours(make_params(), **case.options) for _ in range(2))
    for each in (optimizer, twin):
        train(each, range(3))
    for p in params_of(optimizer):
        p.share_memory_()
        for value in optimizer.state[p].values():
            value.share_memory_()
    for each in (optimizer, twin):
        train(each, range(3, 6))
    assert_equal(optimizer, twin)


# -- mixed precision --------------------------------------------------------------------------


def scale_grads(optimizer: Optimizer, factor: float) -> None:
    for p in params_of(optimizer):
        p.grad.mul_(factor)


def scaler_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, step: int, bad: bool) -> None:
    """A step with gradients as a scaled loss leaves them, one of them infinite where bad."""
    set_grads(params_of(optimizer), step)
    # Makes the scaler allocate its scale, as any loss does.
    factor = float(scaler.scale(torch.ones(())))
    scale_grads(optimizer, factor)
    if bad:
        params_of(optimizer)[-1].grad.flatten()[-1] = torch.inf
    scaler.step(optimizer)
    scaler.update()


@every_case
@pytest.mark.parametrize("pattern", ["good", "bad first", "bad later"])
def test_grad_scaler(case: Case, pattern: str) -> None:
    bad = {"good": (), "bad first": (0, 1), "bad later": (2, 4)}[pattern]
    ours, theirs = both(case)
    scales = []
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales.append([])
        for step in range(6):
            before = snapshot(optimizer)
            scaler_step(scaler, optimizer, step, step in bad)
            if step in bad:
                assert_unchanged(optimizer, before)
            scales[-1].append(scaler.get_scale())
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    assert scales[0] == scales[1]
    assert_close(ours, theirs)


@every_class
def test_gradients_after_a_scaled_step(case: Case) -> None:
    """They are only read: README says that, other than torch's, they stay scaled."""
    optimizer = both(case)[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    set_grads(params_of(optimizer), 0)
    scale_grads(optimizer, float(scaler.scale(torch.ones(()))))
    before = [p.grad.clone() for p in params_of(optimizer)]
    scaler.step(optimizer)
    assert_same_bits([p.grad for p in params_of(optimizer)], before)


@every_class
def test_unscale_and_clip(case: Case) -> None:
    ours, theirs = both(case)
    norms = []
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            set_grads(params_of(optimizer), step)
            scale_grads(optimizer, float(scaler.scale(torch.ones(()))))
            if step == 1:
                params_of(optimizer)[0].grad[0, 0] = torch.nan
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(params_of(optimizer), 0.5))
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(norms[:4], norms[4:], equal_nan=True)
    assert_close(ours, theirs)


@every_class
def test_scaler_with_float16_gradients(case: Case) -> None:
    """torch refuses to unscale those by itself, and leaves it to steps that can."""
    optimizer = case.ours(make_params(torch.float16), **case.options)
    twin = case.ours(make_params(torch.float16), **case.options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(3):
        scaler_step(scaler, optimizer, step, bad=step == 1)
        if step != 1:
            train(twin, [step])
    # Scaling by a power of two is exact.
    assert_equal(optimizer, twin)


@every_class
def test_disabled_scaler(case: Case) -> None:
    ours, theirs = both(case)
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        set_grads(params_of(optimizer), 0)
        scaler.step(optimizer)
        scaler.update()
    assert_close(ours, theirs)


@every_class
def test_steps_on_a_cpu_support_scaling(case: Case) -> None:
    for options in ({}, {"foreach": True}, {"flat": True}):
        assert case.ours(make_params(), **case.options, **options)._step_supports_amp_scaling


# -- autograd, profiler, subclasses -----------------------------------------------------------


@every_class
def test_a_stale_graph_is_noticed(case: Case) -> None:
    for flat in (False, True):
        params = make_params()
        optimizer = case.ours(params, **case.options, flat=flat)
        loss = (params[0] * params[0]).sum()
        loss.backward(retain_graph=True)
        versions = [p._version for p in params]
        optimizer.step()
        assert params[0]._version > versions[0]
        if not flat:  # these have no gradient
            assert [p._version for p in params[1:]] == versions[1:]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_class
def test_a_skipped_step_leaves_versions_alone(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    versions = [p._version for p in params_of(optimizer)]
    scaler_step(scaler, optimizer, 0, bad=True)
    assert [p._version for p in params_of(optimizer)] == versions


@every_class
@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_profiler_names(case: Case, flat: bool) -> None:
    optimizer = case.ours(make_params(), **case.options, flat=flat)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, [0])
        optimizer.zero_grad()
    names = {event.name for event in profile.events()}
    name = case.ours.__name__
    assert f"Optimizer.step#{name}.step" in names
    assert f"Optimizer.zero_grad#{name}.zero_grad" in names


@every_class
def test_step_is_hooked_once(case: Case) -> None:
    """torch wraps the class's step by its first instance; ours is not to be wrapped twice."""
    optimizer = case.ours(make_params(), **case.options)
    case.ours(make_params(), **case.options)
    assert case.ours.step.hooked
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1]


@every_class
def test_subclass(case: Case) -> None:
    class Mine(case.ours):  # type: ignore[name-defined,misc]
        def step(self, closure: Any = None) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    optimizer = Mine(make_params(), **case.options)
    plain = case.ours(make_params(), **case.options)
    for each in (optimizer, plain):
        train(each, range(3))
    assert_equal(optimizer, plain)
    assert optimizer.steps == 3


@every_class
def test_zero_grad(case: Case) -> None:
    optimizer = case.ours(make_params(), **case.options)
    set_grads(params_of(optimizer), 0)
    grads = [p.grad for p in params_of(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    for p, grad in zip(params_of(optimizer), grads, strict=True):
        assert p.grad is grad and not grad.any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params_of(optimizer))


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    from torch.optim import optimizer as module

    yield
    assert not module._global_optimizer_pre_hooks and not module._global_optimizer_post_hooks
