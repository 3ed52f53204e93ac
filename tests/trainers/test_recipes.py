"""Recipes as they stand in training scripts: densification as gsplat's, one optimizer for each
parameter as torchtune's, a container of optimizers as torchtitan's."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import fusedopt

MAKES = pytest.mark.parametrize("name", ["AdamW", "Adam"])


# -- points that are split, and taken away, while they are trained --------------------------------


def replace(optimizer: Any, group: dict[str, Any], change: Any) -> nn.Parameter:
    """Another parameter in the place of a group's, with its state changed likewise."""
    (param,) = group["params"]
    state = optimizer.state.pop(param)
    for key, value in state.items():
        if key != "step":
            state[key] = change(value, torch.zeros_like)
    new = nn.Parameter(change(param.detach(), torch.clone))
    group["params"] = [new]
    optimizer.state[new] = state
    return new


def split(chosen: Tensor, value: Tensor, of_new: Any) -> Tensor:
    return torch.cat([value, of_new(value[chosen])])


def prune(chosen: Tensor, value: Tensor, of_new: Any) -> Tensor:
    return value[~chosen]


def densified(make: Any) -> list[Tensor]:
    """Positions and colours of points; some are split, then some pruned."""
    torch.manual_seed(0)
    begin = {"means": torch.randn(50, 3), "colours": torch.rand(50, 4)}
    params = {name: nn.Parameter(value) for name, value in begin.items()}
    optimizer = make([{"params": [p], "lr": 1e-2, "name": name} for name, p in params.items()])
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            goal = torch.randn(param.shape, generator=generator)
            (param - goal).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (3, 8):
            chosen = torch.arange(len(params["means"])) % 3 == 0
            change = split if step == 3 else prune
            for group in optimizer.param_groups:
                params[group["name"]] = replace(optimizer, group, partial(change, chosen))
    return [p.detach() for p in params.values()]


@MAKES
def test_densification(name: str) -> None:
    got, want = (densified(getattr(m, name)) for m in (fusedopt, torch.optim))
    torch.testing.assert_close(got, want)


# -- an optimizer for each parameter, in its hook, and GradientRelease in its place ---------------


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2))


def backward(model: nn.Module, step: int) -> None:
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    model(inputs).square().mean().backward()


@MAKES
def test_an_optimizer_for_each_parameter(name: str) -> None:
    """torchtune's optimizer_in_bwd, with ours as the optimizers, and by GradientRelease."""

    def in_hooks(make: Any) -> list[Tensor]:
        model = model_of()
        optimizers = {p: make([p], lr=1e-2) for p in model.parameters()}

        def step(param: Tensor) -> None:
            optimizers[param].step()
            optimizers[param].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for number in range(6):
            backward(model, number)
        return [p.detach() for p in model.parameters()]

    def released(make: Any) -> list[Tensor]:
        model = model_of()
        optimizer = make(model.parameters(), lr=1e-2)
        fusedopt.GradientRelease(optimizer)
        for number in range(6):
            backward(model, number)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    ours, theirs = getattr(fusedopt, name), getattr(torch.optim, name)
    torch.testing.assert_close(in_hooks(ours), in_hooks(theirs))
    for got, want in zip(released(ours), in_hooks(ours), strict=True):
        assert torch.equal(got, want)


# -- several models, each with an optimizer, which are one to the rest ----------------------------


class Container(Optimizer):
    """Optimizers of several parts of a model, saved by the names of parameters."""

    def __init__(self, parts: list[nn.Module], make: Any) -> None:
        self.parts = parts
        self.optimizers = [make(part.parameters(), lr=1e-2) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {"lr": 1e-2})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        found: dict[str, Any] = {}
        for number, (part, each) in enumerate(zip(self.parts, self.optimizers, strict=True)):
            states = get_optimizer_state_dict(part, each, options=options)
            found |= {f"{number}.{key}": value for key, value in states.items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for number, (part, each) in enumerate(zip(self.parts, self.optimizers, strict=True)):
            mark = f"{number}."
            states = {k.removeprefix(mark): v for k, v in state_dict.items() if k.startswith(mark)}
            set_optimizer_state_dict(part, each, states, options=options)


@MAKES
def test_a_container_of_optimizers(name: str) -> None:
    def made(make: Any) -> tuple[list[nn.Module], Container]:
        parts = [model_of(), model_of()]
        return parts, Container(parts, make)

    def train(parts: list[nn.Module], container: Container, steps: range) -> list[Tensor]:
        for step in steps:
            for number, part in enumerate(parts):
                backward(part, 10 * step + number)
            container.step()
            container.zero_grad()
        return [p.detach().clone() for part in parts for p in part.parameters()]

    ours, theirs = made(getattr(fusedopt, name)), made(getattr(torch.optim, name))
    torch.testing.assert_close(train(*ours, range(4)), train(*theirs, range(4)))
    saved = copy.deepcopy([ours[1].state_dict(), *(p.state_dict() for p in ours[0])])
    wanted = train(*ours, range(4, 8))
    resumed = made(getattr(fusedopt, name))
    for part, values in zip(resumed[0], saved[1:], strict=True):
        part.load_state_dict(values)
    resumed[1].load_state_dict(saved[0])
    for got, want in zip(train(*resumed, range(4, 8)), wanted, strict=True):
        assert torch.equal(got, want)
