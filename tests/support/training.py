"""What the tests share that train something: models, gradients, and comparisons of all there is."""

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fusedopt._formats import NUMBERS

from .optimizers import ROWS, Options, Row


@dataclass(frozen=True)
class Case:
    """An optimizer with one set of its options."""

    name: str
    row: Row
    options: Options

    def __str__(self) -> str:
        return self.name

    @property
    def ours(self) -> Callable[..., Optimizer]:
        return self.row.ours

    @property
    def counterpart(self) -> Callable[..., Optimizer]:
        """What ours is compared with: torch's class or, where there is none, the formula."""
        return self.row.counterpart

    @property
    def classes(self) -> tuple[Callable[..., Optimizer], Callable[..., Optimizer]]:
        return self.ours, self.counterpart

    @property
    def measures(self) -> bool:
        """Parameters as a whole, each of which is a span of its own then, also in a buffer."""
        return bool(self.row.measures(self.options))

    @property
    def state_keys(self) -> tuple[str, ...]:
        return tuple(self.row.keys(self.options))


EVERY_CASE = [
    Case(f"{row.name}-{name}", row, options)
    for row in ROWS
    for name, options in row.option_sets.items()
]


def with_own_states(cases: list[Case]) -> list[Case]:
    """The last one of a class whose states are the same with all options: what is done with it then
    does not depend on them, either."""
    alike = len({frozenset(case.state_keys) for case in cases}) == 1
    return cases[-1:] if alike else cases


# Those that the counterpart has, too.
CASES = [
    case
    for row in ROWS
    for case in with_own_states(
        [case for case in EVERY_CASE if case.row is row and row.counterpart_has(case.options)]
    )
]
# Of each class the one with the most states.
RICHEST = list(
    {case.ours: case for case in sorted(CASES, key=lambda case: len(case.state_keys))}.values()
)
# Of these, those whose counterpart is torch's class.
CASES_IN_TORCH = [case for case in CASES if case.row.theirs is not None]
RICHEST_IN_TORCH = [case for case in RICHEST if case.row.theirs is not None]

SHAPES = ((33, 7), (33,), (), (5, 33), (17,), (2, 3, 5, 5))
"""Vector body and tail, a scalar, and what conv and linear layers have."""


def make_params(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def clone_params(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Copies with the same strides, at other addresses."""
    return [nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]


def on(device: str, params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters with the same values on a device."""
    return [nn.Parameter(p.detach().to(device)) for p in params]


def set_grads(params: Iterable[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """Hand over gradients that depend on nothing but the step and the parameters' order."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        wide = torch.complex128 if p.is_complex() else torch.float64
        grad = torch.randn(p.shape, generator=generator, dtype=wide)
        if dtype is not None:
            p.grad_dtype = dtype
        p.grad = torch.empty_like(p, dtype=dtype or p.dtype).copy_(grad)


def train(optimizer: Optimizer, steps: Iterable[int]) -> None:
    """One step of the optimizer for each number in steps, with that number's gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """The state_dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def bits(tensor: Tensor) -> Tensor:
    """A tensor as integers, so that 0 is not -0 and NaN is NaN."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(size[tensor.element_size()])


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Tensors, or anything made of tensors, are equal to the last bit and of the same dtype."""
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not torch.equal(bits(ours), bits(theirs)):  # which is faster, but says nothing
            torch.testing.assert_close(bits(ours), bits(theirs), rtol=0, atol=0)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same_bits(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b)
    else:
        assert ours == theirs or (ours != ours and theirs != theirs)


def states_of(optimizer: Optimizer, frozen: bool = True) -> list[dict[str, Any]]:
    """Without those of frozen parameters, if asked for, which torch's distributed checkpoints leave
    out."""
    return [
        dict(optimizer.state.get(p, {}) if frozen or p.requires_grad else {})
        for p in params_of(optimizer)
    ]


def assert_equal(a: Optimizer, b: Optimizer, frozen: bool = True) -> None:
    """Two optimizers have the same parameters and states to the last bit."""
    assert_same_bits(params_of(a), params_of(b))
    assert_same_bits(states_of(a, frozen), states_of(b, frozen))


def assert_close(ours: Optimizer, theirs: Optimizer, frozen: bool = True) -> None:
    """Two optimizers have the same parameters and states, up to rounding in a few dozen steps."""
    states = list(zip(states_of(ours, frozen), states_of(theirs, frozen), strict=True))
    # Numbers are float32, unless torch has loaded them.
    has_numbers = any(a.keys() & NUMBERS - {"step"} for a, _ in states)
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32 if has_numbers else b.dtype))
    for a, b in states:
        assert set(a) == set(b)
        for key in a:
            dtype = torch.float32 if has_numbers or key in NUMBERS else b[key].dtype
            torch.testing.assert_close(a[key], b[key], check_dtype=False, **tolerance(dtype))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    size = 1e-10 if dtype == torch.float64 else 1e-5
    return {"rtol": size, "atol": size}


def snapshot(optimizer: Optimizer) -> Any:
    """Everything that a refused operation must leave as it was, copied."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    ids = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    params = [p.detach().clone() for p in params_of(optimizer)]
    return copy.deepcopy((params, states_of(optimizer), groups, ids, len(optimizer.state)))


def assert_unchanged(optimizer: Optimizer, before: Any) -> None:
    assert_same_bits(snapshot(optimizer), before)


def make_float64() -> list[nn.Parameter]:
    return make_params(torch.float64)


def both(
    case: Case, make: Callable[[], list[nn.Parameter]] = make_float64, **options: Any
) -> tuple[Optimizer, Optimizer]:
    """Our optimizer and its counterpart, each over parameters of its own.

    In float64, as what is compared between them here is never how they round.
    """
    args = {**case.options, **options}
    return case.ours(make(), **args), case.counterpart(make(), **args)
