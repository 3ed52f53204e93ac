"""Whatever the shapes, dtypes, options and layouts: what has to hold of every loss and gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.losses import (
    CASES,
    CROSS_ENTROPY,
    DTYPES,
    LINEAR_CROSS_ENTROPY,
    MSE,
    SPREADS,
    Kind,
    Outcome,
    Problem,
    Row,
    assert_expected,
    assert_near,
    assert_same_outcome,
    assert_same_tensor,
    run,
    spread,
    unit,
)

from fusedopt.nn import functional as ours

pytestmark = pytest.mark.usefixtures("one_thread")

F32 = torch.float32
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)
# Around those where the loops change, and any.
numbers_of_classes = st.one_of(
    st.integers(1, 70),
    st.sampled_from([255, 256, 257, 1023, 1024, 1025, 2049]),
    st.integers(1, 400),
)
reductions = st.sampled_from(["mean", "sum", "none"])


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    options = {
        "reduction": draw(reductions),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])),
    }
    probable = draw(st.booleans())
    if draw(st.booleans()):
        options["z_loss"] = draw(st.sampled_from([1e-4, 0.1]))
    return Kind(
        options,
        target="probabilities" if probable else "classes",
        weighted=draw(st.booleans()),
        ignored=not probable and draw(st.booleans()),
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    classes = draw(numbers_of_classes)
    if draw(st.integers(0, 9)) == 0:
        return (classes,)
    outer = draw(st.lists(st.integers(1, 4), max_size=3))
    return (draw(st.integers(1, 7)), classes, *outer)


@settings(max_examples=150)
@given(kind=kinds(), shape=shapes(), dtype=dtypes, how=st.sampled_from(SPREADS), seed=seeds)
def test_any_cross_entropy(
    kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, how: str, seed: int
) -> None:
    """Is that of the formula, and has the same bits in any layout and in place."""
    row = CROSS_ENTROPY
    problem = row.problem(kind, shape, dtype, seed)
    got = run(row.ours, problem)
    assert_expected(got, row.expected(problem), row.roundings)
    tensors = {name: spread(t, how) if t.dim() else t for name, t in problem.tensors.items()}
    elsewhere = replace(problem, tensors=tensors)
    assert_same_outcome(run(row.ours, elsewhere), got, "elsewhere")
    if kind.target == "classes":
        assert_same_outcome(run(row.ours, elsewhere, inplace=True), got, "in place")


@settings(max_examples=40)
@given(
    kind=kinds(),
    rows=st.integers(1, 40),
    classes=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    chunks=st.lists(st.integers(1, 45), min_size=1, max_size=3),
    seed=seeds,
)
def test_the_size_of_chunks_does_not_matter(
    kind: Kind, rows: int, classes: int, dtype: torch.dtype, chunks: list[int], seed: int
) -> None:
    """Beyond rounding."""
    row, kind = LINEAR_CROSS_ENTROPY, replace(kind, biased=seed % 2 == 0)
    problem = row.problem(kind, (rows, classes), dtype, seed)
    if kind.target == "probabilities":  # whose own gradient is not worked out in chunks
        problem = replace(problem, wanted=tuple(n for n in problem.wanted if n != "target"))
    want = row.expected(problem)
    for chunk_size in (None, *chunks):
        got = run(row.ours, problem.asking(chunk_size=chunk_size))
        assert_expected(got, want, row.roundings, str(chunk_size))


# test_loss_bitwise.py has those whose dimensions are permuted.
in_order = st.sampled_from([how for how in SPREADS if how not in ("transposed", "classes last")])


@settings(max_examples=60)
@given(shape=shapes(), dtype=dtypes, how=in_order, reduction=reductions, seed=seeds)
def test_any_mse(
    shape: tuple[int, ...], dtype: torch.dtype, how: str, reduction: str, seed: int
) -> None:
    problem = MSE.problem(Kind({"reduction": reduction}, target="values"), shape, dtype, seed)
    got = run(MSE.ours, problem)
    assert_expected(got, MSE.expected(problem), MSE.roundings)
    tensors = {name: spread(tensor, how) for name, tensor in problem.tensors.items()}
    assert_same_outcome(run(MSE.ours, replace(problem, tensors=tensors)), got)


def rows_of(kind: Kind, classes: int, seed: int, dtype: torch.dtype = F32) -> Problem:
    return CROSS_ENTROPY.problem(kind, (6, classes), dtype, seed)


@given(classes=numbers_of_classes, smoothing=st.sampled_from([0.0, 0.1, 1.0]), seed=seeds)
def test_gradients_of_a_row_sum_to_zero(classes: int, smoothing: float, seed: int) -> None:
    """Moving all its logits changes no loss."""
    for target in ("classes", "probabilities"):
        kind = Kind({"reduction": "sum", "label_smoothing": smoothing}, target=target)
        got = run(CROSS_ENTROPY.ours, rows_of(kind, classes, seed))
        sums = got.grads["input"].double().sum(1)
        assert sums.abs().max() <= 16 * unit(F32)


@given(classes=numbers_of_classes, shift=st.sampled_from([-1024, -3, 17, 4096]), seed=seeds)
def test_a_shift_of_all_logits(classes: int, shift: int, seed: int) -> None:
    """By a number that rounds none of them, it changes the lse and nothing else."""
    problem = rows_of(Kind({"reduction": "none"}), classes, seed, torch.float64)
    logits = (problem.tensors["input"] * 1024).round() / 1024
    plain = run(ours.cross_entropy, problem.having(input=logits), return_lse=True)
    moved = run(ours.cross_entropy, problem.having(input=logits + shift), return_lse=True)
    assert_same_tensor(moved.grads["input"], plain.grads["input"])
    assert_same_tensor(moved.loss, plain.loss)
    torch.testing.assert_close(moved.lse, plain.lse + shift, rtol=1e-14, atol=1e-14)


@given(classes=numbers_of_classes, seed=seeds)
def test_losses_are_not_negative_and_gradients_are_probabilities(classes: int, seed: int) -> None:
    problem = rows_of(Kind({"reduction": "none"}), classes, seed)
    got = run(ours.cross_entropy, problem)
    grad, target = got.grads["input"], problem.tensors["target"]
    assert (got.loss >= 0).all()
    own = grad.gather(1, target[:, None])
    assert ((own <= 0) & (own >= -1)).all()
    others = grad.scatter(1, target[:, None], 0)
    assert ((others >= 0) & (others <= 1)).all()


@given(kind=kinds(), classes=numbers_of_classes, seed=seeds)
def test_a_sum_is_the_sum_of_rows(kind: Kind, classes: int, seed: int) -> None:
    options = {**kind.options, "reduction": "none"}
    problem = rows_of(replace(kind, options=options), classes, seed, torch.float64)
    none, total = (
        run(ours.cross_entropy, problem),
        run(ours.cross_entropy, problem.asking(reduction="sum")),
    )
    assert_same_tensor(none.grads["input"], total.grads["input"])
    torch.testing.assert_close(none.loss.sum(), total.loss, rtol=1e-14, atol=1e-15)


@given(classes=numbers_of_classes, seed=seeds, dtype=dtypes)
def test_classes_are_probabilities_of_one(classes: int, seed: int, dtype: torch.dtype) -> None:
    """Both go by other loops: the same, but for rounding."""
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        problem = rows_of(Kind(options), classes, seed, dtype)
        hot = torch.nn.functional.one_hot(problem.tensors["target"], classes).to(dtype)
        got = run(ours.cross_entropy, problem)
        probable = run(ours.cross_entropy, replace(problem.having(target=hot), wanted=("input",)))
        want = CROSS_ENTROPY.expected(problem)
        assert_expected(probable, want, CROSS_ENTROPY.roundings)
        assert_expected(got, want, CROSS_ENTROPY.roundings)


@given(classes=st.integers(2, 300), rows=st.integers(1, 9), seed=seeds)
def test_rows_in_another_order(classes: int, rows: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for name in ("none", "smooth-weighted-ignored-none", "probabilities-none"):
        problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds[name], (rows, classes), F32, seed)
        order = torch.randperm(rows, generator=random)
        tensors = problem.tensors
        mixed = problem.having(input=tensors["input"][order], target=tensors["target"][order])
        got, plain = run(ours.cross_entropy, mixed), run(ours.cross_entropy, problem)
        want = Outcome(plain.loss[order], {n: g[order] for n, g in plain.grads.items()})
        assert_same_outcome(got, want, name)


@given(seed=seeds, factor=st.sampled_from([2.0, 0.25, 1024.0]), case=st.sampled_from([*CASES]))
def test_scaling_by_powers_of_two(seed: int, factor: float, case: str) -> None:
    """As a GradScaler does: exact, as long as nothing overflows."""
    row, kind = CASES[case]
    problem = row.problem(kind, (5, 11), F32, seed)
    plain = run(row.ours, problem)
    scaled = run(row.ours, problem, torch.full_like(plain.loss, factor))
    for name, grad in scaled.grads.items():
        assert_same_tensor(grad, plain.grads[name] * factor, name)


@given(seed=seeds, row=st.sampled_from([CROSS_ENTROPY, LINEAR_CROSS_ENTROPY]), kind=kinds())
def test_weights_of_one_are_none(seed: int, row: Row, kind: Kind) -> None:
    problem = row.problem(replace(kind, weighted=False), (7, 90), torch.float64, seed)
    ones = problem.having(weight=torch.ones(90, dtype=torch.float64))
    assert_same_outcome(run(row.ours, ones), run(row.ours, problem))


@given(seed=seeds, index=st.sampled_from([-100, -1, 3, 2**40]))
def test_ignored_rows_might_as_well_not_be_there(seed: int, index: int) -> None:
    kind = Kind({"ignore_index": index, "z_loss": 0.1}, weighted=True, ignored=True)
    problem = CROSS_ENTROPY.problem(kind, (20, 13), torch.float64, seed)
    target = problem.tensors["target"]
    there = target != index
    if not there.any():
        return
    got = run(ours.cross_entropy, problem)
    fewer = problem.having(input=problem.tensors["input"][there], target=target[there])
    alone = run(ours.cross_entropy, fewer)
    assert_near(got.loss, alone.loss.numpy(), 4)
    assert_near(got.grads["input"][there], alone.grads["input"].numpy(), 4)
    assert not got.grads["input"][~there].any()
