"""The choices of storage that the tests run through, and how they read masters and states."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fusedopt._extension import _C

from .optimizers import ROWS, Options, Row
from .training import EVERY_CASE, RICHEST, Case, make_params, params_of, set_grads

BLOCK: int = _C.block


@dataclass(frozen=True)
class Choice:
    """How a parameter and its states are stored."""

    param: torch.dtype
    options: Options

    @property
    def codes(self) -> bool:
        return self.options.get("state_dtype") == "int8"

    @property
    def masters(self) -> bool:
        return "master_bits" in self.options

    @property
    def stochastic(self) -> bool:
        return "rounding" in self.options

    def suits(self, row: Row, options: Options) -> bool:
        """Whether an optimizer with these options can store its states so."""
        return not self.codes or row.takes_codes(options)

    def params(self, shapes: Iterable[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
        return make_params(self.param, tuple(shapes), seed)


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Small parameters in codes, too.
INT8: Options = {"state_dtype": "int8", "min_8bit_size": 0}
RANDOM: Options = {"rounding": "stochastic", "seed": 5}
CHOICES = {
    "float32-int8": Choice(F32, INT8),
    "float32-bfloat16": Choice(F32, {"state_dtype": BF16}),
    "bfloat16-int8": Choice(BF16, INT8),
    "bfloat16-32": Choice(BF16, {"master_bits": 32}),
    "bfloat16-32-int8": Choice(BF16, {"master_bits": 32, **INT8}),
    "bfloat16-32-bfloat16": Choice(BF16, {"master_bits": 32, "state_dtype": BF16}),
    "bfloat16-24": Choice(BF16, {"master_bits": 24}),
    "bfloat16-24-int8": Choice(BF16, {"master_bits": 24, **INT8}),
    "bfloat16-24-bfloat16": Choice(BF16, {"master_bits": 24, "state_dtype": BF16}),
    "bfloat16-random": Choice(BF16, RANDOM),
    "bfloat16-random-int8": Choice(BF16, {**RANDOM, **INT8}),
    "bfloat16-random-bfloat16": Choice(BF16, {**RANDOM, "state_dtype": BF16}),
    "float16-int8": Choice(F16, INT8),
    "float16-32": Choice(F16, {"master_bits": 32}),
    "float16-32-int8": Choice(F16, {"master_bits": 32, **INT8}),
}


def richest_with(case: Case, choice: Choice) -> Case | None:
    """Of the same class, the one with the most states that can be stored so."""
    same = [c for c in EVERY_CASE if c.ours is case.ours and choice.suits(c.row, c.options)]
    if case in same:
        return case
    return max(same, key=lambda c: (len(c.state_keys), len(c.options)), default=None)


FIRST = 2
"""Rows of the table of which every choice is among the fast tests, as of a third of others."""


def marks(row: Row, choice: str) -> tuple[pytest.MarkDecorator, ...]:
    """Of a test of this row with this choice."""
    place, number = ROWS.index(row), list(CHOICES).index(choice)
    return () if place < FIRST or place % 3 == number % 3 else (pytest.mark.slow,)


PAIRS = [
    pytest.param(richest, choice, id=f"{name}-{richest}", marks=marks(richest.row, name))
    for name, choice in CHOICES.items()
    for case in RICHEST
    if (richest := richest_with(case, choice)) is not None
]
"""Each choice with each class that can store its states so."""

every_pair = pytest.mark.parametrize(("case", "choice"), PAIRS)
RICHEST_IN_CODES = [
    case for case in RICHEST if richest_with(case, CHOICES["float32-int8"]) is not None
]
"""Of each class, the one with the most states, where these may be codes with some options."""

# Some blocks and a rest, one block, less than one, a scalar, nothing, and what conv layers have.
SHAPES = ((5, 307), (256,), (33,), (), (0, 3), (4, 3, 5, 6))


LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda p: p.contiguous(),
    "channels_last": lambda p: p.contiguous(memory_format=torch.channels_last),
    "transposed": lambda p: p.mT.contiguous().mT,
    "gaps": lambda p: torch.stack([p, p], -1)[..., 0],
}


def masters_of(optimizer: Optimizer) -> list[Tensor]:
    return [*optimizer.master_params()]


def step(optimizer: Optimizer, steps: Iterable[int], dtype: torch.dtype | None = None) -> None:
    """One step for each number, with gradients of this dtype; None: the parameters'."""
    for number in steps:
        set_grads(params_of(optimizer), number, dtype)
        optimizer.step()


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """What a parameter is for its master: bfloat16 rounds ties away from zero, float16 to even."""
    if dtype != BF16:
        return master.to(dtype)
    nan = master.isnan()
    bits = (master.masked_fill(nan, 0).view(torch.int32).long() + 0x8000) & 0xFFFF0000
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    return bits.int().view(F32).masked_fill(nan, torch.nan).to(BF16)


def decoded(state: dict[str, Any], name: str, param: Tensor, square: bool) -> Tensor:
    """A state in codes, in float32 and in the order of the elements in memory."""
    codes, scales = state[f"{name}_code"], state[f"{name}_scale"]
    row = param.numel() // len(param) if scales.dim() == 2 else param.numel()
    return _C.decode(codes.reshape(-1), scales.reshape(-1), row, square)
