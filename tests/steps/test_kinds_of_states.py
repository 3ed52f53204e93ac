"""Kinds of states that no rule of ours has: like a weight, or begun with something but zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.storing import BF16, CHOICES, F32, INT8, LAID, decoded, masters_of
from support.training import make_params, params_of, set_grads
from torch import Tensor, nn

import fusedopt
from fusedopt._rules import rule_info

# Short in binary, unlike the value of eps: what a state begins with can be told from the sum.
BETAS = (0.5, 0.75)


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the module declare something else of Adam's states, which kernels do not look at."""

    def change(what: str, **declared: str) -> None:
        for key, value in declared.items():
            monkeypatch.setitem(rule_info("adam")[what], key, value)  # type: ignore[literal-required]

    return change


def begin(param: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A parameter's gradient and its states after a step that leaves the parameter alone."""
    optimizer = fusedopt.Adam([param], lr=0.0, betas=BETAS, eps=0.1, **options)
    set_grads([param], 0)
    optimizer.step()
    return param.grad, dict(optimizer.state[param])


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", LAID)
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_what_a_state_begins_with(
    dtype: torch.dtype, how: str, flat: bool, declare: Callable[..., None]
) -> None:
    """The parameter, or an option's value exactly; of complex numbers in both parts."""
    declare("beginnings", exp_avg="parameter", exp_avg_sq="eps")
    param = nn.Parameter(LAID[how](torch.randn(4, 3, 5, 6, dtype=dtype)))
    if flat:
        fusedopt.FlatParameters([param])
    grad, state = begin(param)
    wide = torch.complex64 if dtype.is_complex else torch.float64
    p, g = (x.detach().to(wide) for x in (param, grad))
    torch.testing.assert_close(state["exp_avg"].to(wide), 0.5 * p + 0.5 * g)
    squares = torch.view_as_complex(torch.view_as_real(g) ** 2) if dtype.is_complex else g**2
    value = complex(0.1, 0.1) if dtype.is_complex else 0.1
    expected = 0.75 * value + 0.25 * squares
    torch.testing.assert_close(state["exp_avg_sq"].to(wide), expected, rtol=1e-6, atol=0)


def test_a_state_in_codes_begins_alike(declare: Callable[..., None]) -> None:
    declare("beginnings", exp_avg="parameter", exp_avg_sq="eps")
    (param,) = make_params(shapes=((3, 300),))
    _, plain = begin(nn.Parameter(param.detach().clone()))
    _, coded = begin(param, **INT8)
    for key, square in (("exp_avg", False), ("exp_avg_sq", True)):
        near = decoded(coded, key, param, square).view(param.shape)
        torch.testing.assert_close(near, plain[key], rtol=2**-4, atol=float(plain[key].max()) / 64)


@pytest.mark.parametrize("name", ["bfloat16-32", "float16-32"])
def test_a_state_begins_as_the_exact_weights(name: str, declare: Callable[..., None]) -> None:
    """With masters that were loaded before the first step."""
    declare("beginnings", exp_avg="parameter")
    (param,) = CHOICES[name].params(((300,),))
    optimizer = fusedopt.Adam([param], lr=0.0, betas=BETAS, **CHOICES[name].options)
    exact = torch.randn(300)
    optimizer.load_master_params([exact])
    set_grads([param], 0)
    optimizer.step()
    expected = 0.5 * exact + 0.5 * param.grad.float()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(masters_of(optimizer)[0], exact)


@pytest.mark.parametrize(
    ("dtype", "instead"),
    [
        (F32, "torch.float32 or torch.bfloat16"),
        (BF16, "torch.float32 or torch.bfloat16"),
        (torch.float16, "torch.float32 or torch.float16"),
    ],
    ids=str,
)
def test_a_state_like_a_weight_in_codes(
    dtype: torch.dtype, instead: str, declare: Callable[..., None]
) -> None:
    """Refused by name, however small the parameter is; other storages are not."""
    declare("kinds", max_exp_avg_sq="weight")
    params = make_params(dtype)
    optimizer = fusedopt.Adam(params[:1], state_dtype="int8")  # has no such state
    match = (
        r'Adam: parameter 0 of group 1: state_dtype="int8": its state \'max_exp_avg_sq\' is like a '
        f"weight, or grows for ever, and errors of codes would add up in it; use {instead}$"
    )
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": params[1:], "amsgrad": True})
    optimizer.add_param_group({"params": params[1:], "amsgrad": True, "state_dtype": None})
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    report = fusedopt.memory_report(fusedopt.Adam(make_params(dtype), amsgrad=True))
    assert report.alternatives and not any("int8" in choice for choice in report.alternatives)
