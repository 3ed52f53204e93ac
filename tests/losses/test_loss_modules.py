"""The losses as modules: in the place of torch.nn's, and in copies, files and state dicts."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.losses import CASES, OVER_CLASSES, ROWS, Kind, Row, assert_same_tensor

import fusedopt
from fusedopt import nn

pytestmark = pytest.mark.usefixtures("one_thread")

MADE: dict[str, Callable[[], torch.nn.Module]] = {
    "cross entropy": nn.CrossEntropyLoss,
    "cross entropy, all": lambda: nn.CrossEntropyLoss(
        torch.arange(11.0), None, 3, None, "sum", 0.1, inplace=True, z_loss=0.1, return_lse=True
    ),
    "mse": nn.MSELoss,
    "mse, sum": lambda: nn.MSELoss(reduction="sum"),
    "linear": lambda: nn.LinearCrossEntropyLoss(5, 11),
    "linear, all": lambda: nn.LinearCrossEntropyLoss(
        5,
        11,
        bias=True,
        weight=torch.arange(11.0),
        reduction="none",
        ignore_index=3,
        label_smoothing=0.1,
        chunk_size=2,
        z_loss=0.1,
        return_lse=True,
    ),
    "linear, outputs": lambda: nn.LinearCrossEntropyLoss(5, 11, out_features=(2, 3), bias=True),
}


def result(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Of some input, the same each time."""
    random = torch.Generator().manual_seed(5)
    target = torch.tensor([0, 3, 10, 5])
    first = torch.randn(4, 11, generator=random)
    if isinstance(module, torch.nn.LinearCrossEntropyLoss):
        first = first[:, :5]
        if module.out_features:
            target = target[:, None, None].expand(4, 2, 3)
    elif isinstance(module, torch.nn.MSELoss):
        target = torch.randn(4, 11, generator=random)
    got = module(first, target)
    return got if isinstance(got, tuple) else (got,)


def assert_same_module(copied: torch.nn.Module, module: torch.nn.Module) -> None:
    assert type(copied) is type(module)
    for got, want in zip(result(copied), result(module), strict=True):
        assert_same_tensor(got.detach(), want.detach())


@pytest.mark.parametrize("name", MADE)
def test_copies(name: str) -> None:
    module = MADE[name]()
    assert_same_module(copy.copy(module), module)
    assert_same_module(copy.deepcopy(module), module)
    assert_same_module(pickle.loads(pickle.dumps(module)), module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert_same_module(torch.load(file, weights_only=False), module)


@pytest.mark.parametrize("name", MADE)
def test_state_dicts(name: str) -> None:
    """To and from torch's module."""
    module = MADE[name]()
    (row,) = [row for row in ROWS if row.our_module is type(module)]
    arguments: dict[str, Any] = {}
    if isinstance(module, torch.nn.LinearCrossEntropyLoss):
        arguments = {"in_features": 5, "num_classes": 11, "out_features": module.out_features}
        arguments["bias"] = module.linear.bias is not None
    if getattr(module, "weight", None) is not None:
        arguments["weight"] = torch.zeros(11)
    theirs = row.their_module(**arguments)
    state = module.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, state[key])
    fresh = row.our_module(**arguments)
    fresh.load_state_dict(theirs.state_dict())
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in theirs.parameters()]


@pytest.mark.parametrize("name", MADE)
def test_repr(name: str) -> None:
    """As torch's module is shown."""
    module = MADE[name]()
    theirs = type(module).__mro__[1]
    assert issubclass(theirs, torch.nn.Module) and theirs.__module__ == "torch.nn.modules.loss"
    assert repr(module).startswith(f"{theirs.__name__}(")
    assert module.extra_repr() == theirs.extra_repr(module)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_in_the_place_of_torchs(row: Row) -> None:
    if row.their_module is torch.nn.Module:
        pytest.skip("this torch has no such class")
    assert issubclass(row.our_module, row.their_module)
    assert row.our_module.__name__ == row.their_module.__name__
    mine = inspect.signature(row.our_module.__init__).parameters
    theirs = inspect.signature(row.their_module.__init__).parameters
    if row.name != "linear_cross_entropy":  # which passes keywords on
        shared = [name for name in mine if name in theirs]
        assert shared == list(theirs)
        for name in theirs:
            assert mine[name].default == theirs[name].default
            assert mine[name].kind == theirs[name].kind
    extra = [mine[name] for name in mine if name not in theirs]
    kinds = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert all(each.kind in kinds for each in extra)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_functions_in_the_place_of_torchs(row: Row) -> None:
    """The same names in the same order, with the same defaults; and then ours, by name only."""
    if row.their_module is torch.nn.Module:
        pytest.skip("this torch has no such function")
    mine, theirs = (inspect.signature(each).parameters for each in (row.ours, row.theirs))
    assert list(mine)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert mine[name].kind == parameter.kind and mine[name].default == parameter.default, name
    for name in list(mine)[len(theirs) :]:
        assert mine[name].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_its_function(case: str) -> None:
    row, kind = CASES[case]
    shape = (5, 11)
    problem = row.problem(kind, shape, torch.float32)
    options = dict(problem.options)
    tensors = dict(problem.tensors)
    if "weight" in tensors:
        options["weight"] = tensors.pop("weight")
    if row.name == "linear_cross_entropy":
        bias = tensors.pop("linear_bias", None)
        weight = tensors.pop("linear_weight")
        module = row.our_module(weight.shape[1], shape[1], bias=bias is not None, **options)
        assert isinstance(module.linear, torch.nn.Linear)
        module.linear.weight.data = weight
        if bias is not None:
            module.linear.bias.data = bias
    else:
        module = row.our_module(**options)
    got = module(tensors["input"], tensors["target"])
    assert_same_tensor(got.detach(), row.ours(**problem.tensors, **problem.options))


@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_extra_arguments(row: Row) -> None:
    arguments = (24, 11) if row.name == "linear_cross_entropy" else ()
    plain = row.our_module(*arguments)
    assert plain.z_loss == 0 and plain.return_lse is False
    problem = row.problem(Kind(), (5, 11), torch.float32)
    module = row.our_module(*arguments, z_loss=0.1, return_lse=True)
    if arguments:
        module.linear.weight.data = problem.tensors["linear_weight"]
    loss, lse = module(problem.tensors["input"], problem.tensors["target"])
    want = row.ours(**problem.tensors, z_loss=0.1, return_lse=True)
    assert_same_tensor(loss.detach(), want[0])
    assert_same_tensor(lse, want[1])


def test_inplace_module() -> None:
    leaf = torch.randn(4, 11, requires_grad=True)
    logits = leaf * 1
    before = logits.detach().clone()
    nn.CrossEntropyLoss(inplace=True)(logits, torch.arange(4)).backward()
    assert not torch.equal(logits, before) and leaf.grad is not None
    assert_same_tensor(logits.detach(), leaf.grad)


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_size_average_of_modules() -> None:
    for legacy in ({"size_average": False}, {"reduce": False}, {"size_average": True}):
        for row in ROWS:
            if row.name != "linear_cross_entropy":
                module, theirs = row.our_module(**legacy), row.their_module(**legacy)
                assert module.reduction == theirs.reduction


def test_moves_of_modules() -> None:
    """Weights of classes are a buffer, and go with the module."""
    module = nn.CrossEntropyLoss(torch.ones(11)).double()
    assert module.weight is not None and module.weight.dtype == torch.float64
    assert module(torch.randn(4, 11).double(), torch.arange(4)).dtype == torch.float64
    linear = nn.LinearCrossEntropyLoss(5, 11, bias=True).to(torch.bfloat16)
    assert all(param.dtype == torch.bfloat16 for param in linear.parameters())
    assert linear(torch.randn(4, 5).bfloat16(), torch.arange(4)).dtype == torch.bfloat16
    assert [p.device.type for p in linear.to("meta").parameters()] == ["meta", "meta"]


def test_linear_modules_train() -> None:
    """With an optimizer, as torch's does."""
    losses = []
    for made in (nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss):
        torch.manual_seed(3)
        module = made(5, 11, bias=True, dtype=torch.float64)
        optimizer = fusedopt.SGD(module.parameters(), lr=0.5)
        x, target = torch.randn(20, 5, dtype=torch.float64), torch.randint(11, (20,))
        for _ in range(20):
            optimizer.zero_grad()
            loss = module(x, target)
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 2 and abs(losses[0] - losses[1]) < 1e-12


def test_exports() -> None:
    assert "nn" in fusedopt.__all__ and fusedopt.nn is nn
    assert sorted(nn.__all__) == [
        *("CrossEntropyLoss", "LinearCrossEntropyLoss", "MSELoss", "functional")
    ]
    assert {row.name for row in ROWS} == set(nn.functional.__all__)
    assert all(getattr(nn.functional, row.name) is row.ours for row in ROWS)
    assert {row.our_module.__name__ for row in ROWS} == set(nn.__all__) - {"functional"}
