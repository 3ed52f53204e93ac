"""Losses and gradients are no less exact than torch's, in the mean, for every dtype and option.

Measured against the formula with more digits: float64, and longdouble for float64.
"""

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from support.losses import (
    CASES,
    DTYPES,
    HALF,
    IN_TORCH,
    LINEAR_CROSS_ENTROPY,
    MOST_DTYPES,
    ROWS,
    Kind,
    Outcome,
    Problem,
    Row,
    mean_error,
    run,
    short,
    unit,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Means of 30,000 elements and more: what they differ by is no chance.
GRADIENTS = 1.02
# Means of some hundred numbers.
LOSSES = 1.05


def assert_no_less_exact(ours: Outcome, theirs: Outcome, want: Outcome) -> None:
    complaints = []
    for name, grad in ours.grads.items():
        error = mean_error(grad, want.grads[name])
        torch_error = mean_error(theirs.grads[name], want.grads[name])
        if not error <= GRADIENTS * torch_error:
            complaints.append(f"{name}: {error:.3e} > {torch_error:.3e}")
    assert not complaints, "; ".join(complaints)


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("case", IN_TORCH)
def test_gradients(case: str, dtype: torch.dtype) -> None:
    row, kind = CASES[case]
    problem = row.problem(kind, row.realistic, dtype)
    ours, theirs = run(row.ours, problem), run(row.theirs, problem)
    assert_no_less_exact(ours, theirs, row.expected(problem))


def loss_errors(
    row: Row, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, draws: int
) -> tuple[float, float]:
    """Of ours and of torch's, in units of the loss."""
    errors = [0.0, 0.0]
    for seed in range(draws):
        problem = replace(row.problem(kind, shape, dtype, seed), wanted=())
        want = row.expected(problem).loss
        size = float(abs(want).mean()) * unit(dtype) * draws
        for i, function in enumerate((row.ours, row.theirs)):
            loss = function(**problem.tensors, **problem.options)
            errors[i] += mean_error(loss, want) / size
    return errors[0], errors[1]


NONE = [case for case, (_, kind) in IN_TORCH.items() if kind.reduction == "none"]
REDUCED = [case for case in IN_TORCH if case not in NONE]


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("case", NONE)
def test_losses_of_rows(case: str, dtype: torch.dtype) -> None:
    row, kind = CASES[case]
    ours, theirs = loss_errors(row, kind, row.realistic, dtype, 2)
    assert ours <= LOSSES * theirs


@lru_cache
def reduced_errors(case: str, dtype: torch.dtype) -> tuple[float, float]:
    row, kind = CASES[case]
    return loss_errors(row, kind, (64, 100), dtype, 60 if dtype == torch.float64 else 20)


# Longdouble takes its time.
WITH_SLOW = [
    pytest.param(
        dtype,
        id=short(dtype),
        marks=[pytest.mark.slow] * (dtype in (torch.float64, torch.float16)),
    )
    for dtype in DTYPES
]


@pytest.mark.parametrize("dtype", WITH_SLOW)
@pytest.mark.parametrize("case", REDUCED)
def test_losses_in_one_number(case: str, dtype: torch.dtype) -> None:
    """Such as all batches of an epoch have. In float64, where both are rounded as often, this many
    of them only tell whether there is more to it; all kinds together tell who is the better."""
    ours, theirs = reduced_errors(case, dtype)
    assert ours <= (1.3 if dtype == torch.float64 else LOSSES) * theirs


@pytest.mark.parametrize("dtype", WITH_SLOW)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_losses_of_all_kinds(row: Row, dtype: torch.dtype) -> None:
    errors = [reduced_errors(case, dtype) for case in REDUCED if CASES[case][0] is row]
    ours, theirs = (sum(error) for error in zip(*errors, strict=True))
    assert ours <= theirs


# With one row at a time, a sum in the dtype itself is the plain one, which torch's is not.
CHUNKS = [(dtype, size) for dtype in DTYPES for size in (1, 7, 64) if size > 1 or dtype in HALF]


@pytest.mark.parametrize(
    ("dtype", "chunk_size"), CHUNKS, ids=[f"{short(dtype)}-{size}" for dtype, size in CHUNKS]
)
def test_many_chunks(dtype: torch.dtype, chunk_size: int) -> None:
    """The gradient of the weight is a sum over chunks, and is not rounded after each of them."""
    row = LINEAR_CROSS_ENTROPY
    for name in ("bias", "smooth-weighted-ignored", "ignored-none"):
        problem = row.problem(row.kinds[name], (128, 300), dtype)
        ours = run(row.ours, problem.asking(chunk_size=chunk_size))
        theirs, want = run(row.theirs, problem), row.expected(problem)
        if dtype in HALF:
            assert_no_less_exact(ours, theirs, want)
            continue
        # Products of few rows are added up by themselves: in another order, not a better one.
        for each, grad in ours.grads.items():
            torch_error = mean_error(theirs.grads[each], want.grads[each])
            assert mean_error(grad, want.grads[each]) <= 1.3 * torch_error, (name, each)


@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_as_many_tokens_as_training_has(dtype: torch.dtype) -> None:
    """A half-precision sum over 1000 rows that were added one by one would stand still."""
    row, kind = LINEAR_CROSS_ENTROPY, Kind({"reduction": "sum"}, biased=True)
    errors: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for seed in range(4):  # the bias has few elements
        problem = row.problem(kind, (1000, 300), dtype, seed)
        ours, theirs = run(row.ours, problem.asking(chunk_size=8)), run(row.theirs, problem)
        want = row.expected(problem)
        for name in problem.wanted:
            errors[name][0] += mean_error(ours.grads[name], want.grads[name])
            errors[name][1] += mean_error(theirs.grads[name], want.grads[name])
    assert errors.keys() == {"input", "linear_weight", "linear_bias"}
    assert all(error <= GRADIENTS * torch_error for error, torch_error in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_gradients_of_z_loss(dtype: torch.dtype) -> None:
    """As exact as torch's autograd over the plain formula."""
    (row, _) = CASES["cross_entropy-z"]

    def plain(input: torch.Tensor, target: torch.Tensor, z_loss: float) -> torch.Tensor:
        lse = torch.logsumexp(input, 1)
        return row.theirs(input, target) + z_loss * (lse**2).mean()

    problem = row.problem(row.kinds["z"], row.realistic, dtype)
    assert_no_less_exact(run(row.ours, problem), run(plain, problem), row.expected(problem))


def test_a_mean_of_very_many() -> None:
    """A float32 sum of 3 million squares, added one by one, would be off by much more."""
    problem = Problem({"input": torch.full((3000000,), 0.1), "target": torch.zeros(())}, {}, ())
    values = problem.tensors["input"]
    (row,) = [row for row in ROWS if row.name == "mse_loss"]
    loss = row.ours(values, torch.zeros(3000000), reduction="sum")
    want = 3000000 * float(values[0].double() ** 2)
    assert abs(float(loss) - want) <= unit(torch.float32) * want


def test_counts() -> None:
    """All ways to call a loss are among those that are compared, and more than once."""
    found = defaultdict(int)
    for case in (*NONE, *REDUCED):
        found[CASES[case][0].name] += 1
    assert set(found) == {row.name for row in ROWS}
    assert sum(found.values()) == len(IN_TORCH)
