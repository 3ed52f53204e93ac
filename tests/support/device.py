"""What the tests on a device share: a pair of optimizers, and their comparison.

They need an accelerator: a CUDA device or, in tests/core/test_host_run.py, the host in its place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .training import Case, assert_same_bits, make_params, on, params_of, states_of


def pair(case: Case, device: str, **options: Any) -> tuple[Optimizer, Optimizer]:
    """The same optimizer twice: the device counts the steps of the first only."""
    both = case.ours(on(device, make_params()), **case.options, capturable=True, **options)
    return both, case.ours(on(device, make_params()), **case.options, **options)


def assert_same(a: Optimizer, b: Optimizer) -> None:
    """The same bits, wherever the counts of steps are."""
    assert_same_bits(params_of(a), params_of(b))
    for ours, theirs in zip(states_of(a), states_of(b), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_bits(value.cpu(), theirs[key].cpu())


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device)
