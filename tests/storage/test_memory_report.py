"""memory_report: the bytes of an optimizer's tensors, and what other choices would take."""

from typing import Any

import pytest
import torch
from torch import nn

import fusedopt


def stepped(**options: Any) -> tuple[fusedopt.AdamW, list[nn.Parameter]]:
    params = [nn.Parameter(torch.randn(5000).bfloat16()), nn.Parameter(torch.randn(10).bfloat16())]
    groups = [{"params": [params[0]]}, {"params": [params[1]]}]
    optimizer = fusedopt.AdamW(groups, **options)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer, params


def test_the_report_adds_up_the_tensors() -> None:
    optimizer, params = stepped(master_bits=32, state_dtype="int8")
    report = fusedopt.memory_report(optimizer)
    blocks = 20  # of 5000 elements
    assert [(g.elements, g.parameters, g.gradients, g.masters) for g in report.groups] == [
        (5000, 10000, 10000, 10000),
        (10, 20, 20, 20),
    ]
    assert report.groups[0].states == 4 + 2 * (5000 + 4 * blocks)
    assert report.groups[1].states == 4 + 2 * 4 * 10  # too small for codes
    every = [t for s in optimizer.state.values() for t in s.values()]
    tensors = [*params, *(p.grad for p in params if p.grad is not None), *every]
    assert report.total.total == sum(t.nbytes for t in tensors)
    text = str(report)
    assert "group 0" in text and f"{report.total.total:,}" in text


@pytest.mark.parametrize(
    ("shape", "scales"), [((64, 512), 128), ((100, 64), 100), ((30, 300), 60), ((100, 63), 25)]
)
def test_codes_have_scales_for_each_row(shape: tuple[int, int], scales: int) -> None:
    optimizer = fusedopt.AdamW([nn.Parameter(torch.randn(shape))], state_dtype="int8")
    promised = fusedopt.memory_report(optimizer).alternatives["int8 states"]
    (param,) = optimizer.param_groups[0]["params"]
    assert promised == 4 * param.numel() + 4 + 2 * (param.numel() + 4 * scales)
    param.grad = torch.randn(shape)
    optimizer.step()
    assert fusedopt.memory_report(optimizer).total.states == 4 + 2 * (param.numel() + 4 * scales)


@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": "int8"}, {"master_bits": 32}, {"state_dtype": "int8", "master_bits": 24}],
)
def test_alternatives_are_what_the_choice_would_take(options: dict[str, Any]) -> None:
    name = {
        "": "float32 states",
        "state_dtype": "int8 states",
        "master_bits": "float32 states, master_bits=32",
        "state_dtype master_bits": "int8 states, master_bits=24",
    }[" ".join(options)]
    other, _ = stepped()
    optimizer, _ = stepped(**options)
    expected = fusedopt.memory_report(other).alternatives[name]
    assert fusedopt.memory_report(optimizer).total.total == expected


def test_what_is_not_possible_is_no_alternative() -> None:
    optimizer = fusedopt.AdamW([nn.Parameter(torch.zeros(10))])
    alternatives = fusedopt.memory_report(optimizer).alternatives
    assert "int8 states" in alternatives and not any("master" in name for name in alternatives)


def test_a_shared_parameter_counts_once_and_others_are_refused() -> None:
    param = nn.Parameter(torch.zeros(10))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fusedopt.SGD([param, param])
    assert fusedopt.memory_report(optimizer).total.elements == 10
    with pytest.raises(TypeError, match=r"memory_report: got a torch\.optim"):
        fusedopt.memory_report(torch.optim.SGD([param]))  # type: ignore[arg-type]
