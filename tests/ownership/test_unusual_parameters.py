"""Parameters that cannot be stepped, or not yet, and empty groups: until a step needs them."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import (
    RICHEST,
    Case,
    assert_close,
    make_params,
    set_grads,
    train,
)
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
every_class = pytest.mark.parametrize("case", RICHEST, ids=str)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = torch.utils._pytree.tree_map_only(Wrapper, lambda w: w.inner, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Wrapper(result)
        return result


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


UNUSUAL: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: frozen(torch.ones(5, dtype=torch.uint8)),
    "int8": lambda: frozen(torch.ones(5, dtype=torch.int8)),
    "int64": lambda: frozen(torch.ones(5, dtype=torch.int64)),
    "bool": lambda: frozen(torch.ones(5, dtype=torch.bool)),
    "float8": lambda: frozen(torch.ones(5).to(torch.float8_e4m3fn)),
    "meta": lambda: nn.Parameter(torch.ones(5, device="meta")),
    "frozen meta": lambda: frozen(torch.ones(5, device="meta")),
    "wrapper": lambda: nn.Parameter(Wrapper(torch.ones(5)), requires_grad=False),
    "lazy": lambda: nn.UninitializedParameter(),
    "sparse": lambda: frozen(torch.eye(3).to_sparse()),
    "expanded": lambda: frozen(torch.ones(1).expand(5)),
}


PLACES = ["first", "last", "alone in a group", "added", "put in by hand"]


def takes_them(cls: Any, case: Case) -> bool:
    """Whether a class constructs with such parameters: torch's do that make no states then."""
    return cls is case.ours or not case.row.states_at_once


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize(
    ("case", "where"),
    [
        (case, place)
        for case in RICHEST
        for place in (PLACES if case is RICHEST[0] else PLACES[1:2])
    ],
    ids=str,
)
def test_beside_others(case: Case, kind: str, where: str) -> None:
    """The others are trained; nothing happens to it, and there is no state for it."""
    pair = []
    for cls in case.classes:
        params, odd = make_params(torch.float64), UNUSUAL[kind]()
        groups: list[Any] = [{"params": params}]
        if not takes_them(cls, case):
            where = ""
        if where == "first":
            groups = [{"params": [odd, *params]}]
        elif where == "last":
            groups = [{"params": [*params, odd]}]
        elif where == "alone in a group":
            groups = [{"params": [odd]}, *groups]
        optimizer = cls(groups, **case.options)
        if where == "added":
            optimizer.add_param_group({"params": [odd]})
        elif where == "put in by hand":
            optimizer.param_groups[0]["params"].append(odd)
        for step in range(3):
            optimizer.zero_grad()
            set_grads(params, step)
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert odd not in optimizer.state and len(optimizer.state) == len(params)
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if p is not odd]
        pair.append(optimizer)
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("kind", UNUSUAL)
def test_nothing_else(case: Case, kind: str) -> None:
    for cls in (cls for cls in case.classes if takes_them(cls, case)):
        optimizer = cls([UNUSUAL[kind]()], **case.options)
        optimizer.step()
        optimizer.zero_grad()
        assert len(optimizer.state) == 0 and optimizer.state_dict()["state"] == {}
        assert len(optimizer.param_groups) == 1 and repr(optimizer)


@every_class
def test_a_gradient_for_one_on_meta(case: Case) -> None:
    """Only then does it go wrong, by name, and the others are as before."""
    params, odd = make_params(), nn.Parameter(torch.ones(5, device="meta"))
    optimizer = case.ours([*params, odd], **case.options)
    set_grads(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    odd.grad = torch.ones(5, device="meta")
    with pytest.raises((TypeError, ValueError), match=f"{case.ours.__name__}.*parameter 6.*meta"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    odd.grad = None
    optimizer.step()


@every_class
@pytest.mark.parametrize("how", ["swap", "to_empty", "frozen and back"])
def test_real_before_the_first_step(case: Case, how: str) -> None:
    """Put on meta to be built, and made real afterwards."""
    pair = []
    for cls in case.classes:
        with torch.device("meta" if how != "frozen and back" else "cpu"):
            model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
        if how == "frozen and back":
            model.requires_grad_(False)
        params = [*model.parameters()]
        optimizer = None
        if how == "frozen and back" or takes_them(cls, case):
            optimizer = cls(params, **case.options)
            optimizer.step()
        values = [p.detach() for p in make_params(torch.float64, [(7, 5), (7,), (3, 7), (3,)])]
        if how == "to_empty":
            old = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(True)
            try:
                model.to_empty(device="cpu")
            finally:
                torch.__future__.set_swap_module_params_on_conversion(old)
        for p, value in zip(params, values, strict=True):
            if how == "swap":
                torch.utils.swap_tensors(p, nn.Parameter(value.clone()))
            else:
                with torch.no_grad():
                    p.copy_(value)
        model.requires_grad_(True)
        assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
        optimizer = optimizer or cls(params, **case.options)
        train(optimizer, range(3))
        pair.append(optimizer)
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("first", ["optimizer", "step", "input"])
def test_lazy_modules(case: Case, first: str) -> None:
    pair = []
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
    for cls in case.classes:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that lazy modules may change
            model = nn.Sequential(nn.LazyLinear(7), nn.Tanh(), nn.LazyLinear(3)).double()
        if first == "input" or not takes_them(cls, case):
            model(x)
        optimizer = cls(model.parameters(), **case.options)
        if first == "step":
            optimizer.step()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        pair.append(optimizer)
    assert_close(*pair)


@every_class
@pytest.mark.parametrize("groups", [1, 3])
def test_only_empty_groups(case: Case, groups: int) -> None:
    """At first: a group added later, or parameters put into one of them, are trained."""
    pair = []
    for cls in case.classes:
        optimizer = cls([{"params": []} for _ in range(groups)], **case.options)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = copy.deepcopy(optimizer)
        optimizer.add_param_group({"params": make_params(torch.float64)})
        optimizer.add_param_group({"params": []})
        train(optimizer, range(2))
        optimizer.param_groups[0]["params"].extend(make_params(torch.float64, seed=4))
        train(optimizer, range(2, 4))
        pair.append(optimizer)
    assert_close(*pair)


@every_class
def test_empty_groups_among_others(case: Case) -> None:
    pair = []
    for cls in case.classes:
        params = make_params(torch.float64)
        groups = [{"params": []}, {"params": params[:3]}, {"params": []}, {"params": params[3:]}]
        optimizer = cls(groups, **case.options)
        train(optimizer, range(2))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, range(2, 4))
        pair.append(optimizer)
    assert_close(*pair)


def test_no_parameters_at_all() -> None:
    """An empty list is refused, by torch.optim as by ours."""
    for case in RICHEST:
        for cls in case.classes:
            with pytest.raises(ValueError, match="empty parameter list"):
                cls([], **case.options)
