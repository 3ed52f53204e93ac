"""torch's schedulers and averaged models with our optimizers."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.training import RICHEST, Case, assert_close, make_params, train
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

every_class = pytest.mark.parametrize("case", RICHEST, ids=str)

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
        o, 0.001, 0.05, step_size_up=3, cycle_momentum=has_momentum(o)
    ),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.05, total_steps=12, cycle_momentum=has_momentum(o)),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "SWALR": lambda o: SWALR(o, swa_lr=0.002, anneal_epochs=4),
}


def has_momentum(optimizer: Optimizer) -> bool:
    """Of gradients; RMSprop's is one of changes."""
    options = optimizer.defaults.keys()
    return "alpha" not in options and bool({"momentum", "betas"} & options)


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
        loop = {} if cls is case.ours else {"foreach": False}
        optimizer = cls(groups, **{**case.options, "lr": lr}, **loop)
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
    for cls, options in ((case.ours, {"flat": flat}), (case.counterpart, {})):
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
