"""Pickles of optimizers: those of version 0.1.0 step on, and new ones name no file of ours."""

import copy
import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import assert_same_bits, params_of
from torch import nn
from torch.optim import Optimizer

import fusedopt

TESTS = next(folder for folder in Path(__file__).parents if folder.name == "tests")
OLD = TESTS / "data" / "pickles_0_1"
NAMES = sorted(file.stem for file in OLD.glob("*.pickle") if file.stem != "memory_report")


def load_pickle(name: str, expected: dict[str, Any]) -> Optimizer:
    return pickle.loads((OLD / f"{name}.pickle").read_bytes())


def load_saved(name: str, expected: dict[str, Any]) -> Optimizer:
    return torch.load(OLD / f"{name}.pt", weights_only=False)


def load_state(name: str, expected: dict[str, Any]) -> Optimizer:
    params = [nn.Parameter(start) for start in expected["start"]]
    groups = [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:]}]
    optimizer = getattr(fusedopt, expected["class"])(groups, **expected["options"])
    optimizer.load_state_dict(torch.load(OLD / f"{name}_state_dict.pt", weights_only=True))
    return optimizer


WAYS = {"pickle": load_pickle, "torch.save": load_saved, "state_dict": load_state}


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def test_there_are_files() -> None:
    assert len(NAMES) == 8


@pytest.mark.parametrize("again", [None, "pickle", "deepcopy"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_steps_on_to_the_same_bits(name: str, way: str, again: str | None) -> None:
    expected = torch.load(OLD / f"{name}_expected.pt", weights_only=True)
    optimizer = WAYS[way](name, expected)
    if again is not None:
        optimizer = {"pickle": pickled, "deepcopy": copy.deepcopy}[again](optimizer)
    assert type(optimizer) is getattr(fusedopt, expected["class"])
    params = params_of(optimizer)
    assert_same_bits(params, expected["start"])
    assert optimizer.state[params[0]]["of_the_user"][0] == 1
    for grads in expected["grads"]:
        for param, grad in zip(params[:3], grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(params, expected["params"])
    assert_same_bits([*optimizer.master_params()], expected["masters"])
    assert params[3] not in optimizer.state


def test_a_memory_report() -> None:
    report, text = pickle.loads((OLD / "memory_report.pickle").read_bytes())
    assert type(report) is fusedopt.MemoryReport and str(report) == text


PUBLIC = [value for name in fusedopt.__all__ if inspect.isclass(value := getattr(fusedopt, name))]


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_new_pickles_name_the_package(cls: type) -> None:
    assert pickle.dumps(cls, protocol=0).split()[:2] == [b"cfusedopt", cls.__name__.encode()]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("adam", ["Adam", "AdamW"]),
        ("rmsprop", ["RMSprop"]),
        ("sgd", ["SGD"]),
        ("_flat", ["FlatParameters"]),
        ("_report", ["MemoryReport"]),
    ],
)
def test_old_names_of_modules(module: str, names: list[str]) -> None:
    found = importlib.import_module(f"fusedopt.{module}")
    for name in names:
        assert getattr(found, name) is getattr(fusedopt, name)
