"""The values, dtypes, shapes and gradients of torch's losses, for every way to call them."""

import warnings
from typing import Any

import pytest
import torch
from support.cases import widened
from support.losses import (
    CASES,
    CROSS_ENTROPY,
    DTYPES,
    HALF,
    IN_TORCH,
    LINEAR_CROSS_ENTROPY,
    MOST_DTYPES,
    MSE,
    OVER_CLASSES,
    ROWS,
    SPREADS,
    Outcome,
    Problem,
    Row,
    assert_expected,
    assert_near,
    assert_same_outcome,
    assert_same_tensor,
    run,
    short,
    spread,
    unit,
)
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from fusedopt.nn import functional as ours

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = [1, 2, 3, 31, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2049]


def assert_as_expected(row: Row, got: Outcome, problem: Problem, what: str = "") -> None:
    assert_expected(got, row.expected(problem), row.roundings, what)


def assert_alike(got: Outcome, theirs: Outcome, what: str = "") -> None:
    """All but the values: those are compared with what both should be."""
    assert got.loss.dtype == theirs.loss.dtype and got.loss.shape == theirs.loss.shape, what
    assert got.grads.keys() == theirs.grads.keys()
    for name, grad in got.grads.items():
        their = theirs.grads[name]
        assert grad.dtype == their.dtype and grad.shape == their.shape, (what, name)


@pytest.mark.parametrize("case", IN_TORCH)
def test_the_formula_is_that_of_torch(case: str) -> None:
    """In float64, where torch's own rounding does not show."""
    row, kind = CASES[case]
    for shape in row.shapes:
        problem = row.problem(kind, shape, torch.float64)
        want = row.expected(problem)
        assert_expected(run(row.theirs, problem), want, 64 * row.roundings, str(shape))


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity(case: str, dtype: torch.dtype) -> None:
    row, kind = CASES[case]
    for shape in row.shapes:
        problem = row.problem(kind, shape, dtype)
        got = run(row.ours, problem)
        assert_as_expected(row, got, problem, str(shape))
        if kind.is_in_torch:
            assert_alike(got, run(row.theirs, problem), str(shape))


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("name", ["default", "smooth-weighted-ignored", "probabilities", "z-none"])
def test_numbers_of_classes(name: str, dtype: torch.dtype) -> None:
    """Around those where the loops change: few classes, slots, chunks."""
    for classes in CLASSES:
        for rows in (1, 17):
            problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds[name], (rows, classes), dtype)
            got = run(CROSS_ENTROPY.ours, problem)
            assert_as_expected(CROSS_ENTROPY, got, problem, f"{rows} x {classes}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", ["ignored", "smooth-weighted-ignored", "probabilities-weighted"])
def test_the_classes_of_a_language_model(name: str, dtype: torch.dtype) -> None:
    problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds[name], (5, 50257), dtype)
    assert_as_expected(CROSS_ENTROPY, run(CROSS_ENTROPY.ours, problem), problem)


@pytest.mark.parametrize("case", CASES)
def test_without_gradients(case: str) -> None:
    """The loss is the same to the last bit when nobody wants a gradient."""
    row, kind = CASES[case]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in row.shapes:
            problem = row.problem(kind, shape, dtype)
            alone = row.ours(**problem.tensors, **problem.options)
            assert not alone.requires_grad
            assert_same_tensor(alone, run(row.ours, problem).loss, str(shape))


@pytest.mark.parametrize("case", CASES)
def test_each_gradient_by_itself(case: str) -> None:
    row, kind = CASES[case]
    for shape in row.shapes[:5]:
        problem = row.problem(kind, shape, torch.float32)
        everything = run(row.ours, problem)
        for name in problem.wanted:
            alone = run(row.ours, Problem(problem.tensors, problem.options, (name,)))
            if "target" in problem.wanted and row is LINEAR_CROSS_ENTROPY:
                continue  # all logits at once, where others go chunk by chunk
            assert_same_tensor(alone.loss, everything.loss, f"{shape} {name}")
            assert_same_tensor(alone.grads[name], everything.grads[name], f"{shape} {name}")


IN_LAYOUTS = [
    f"cross_entropy-{name}"
    for name in (
        *("none", "weighted-ignored", "smooth-weighted-ignored-none", "z-none"),
        *("probabilities", "probabilities-smooth-weighted-none"),
    )
]
IN_LAYOUTS += ["linear_cross_entropy-bias", "linear_cross_entropy-chunked-smooth-none"]
IN_LAYOUTS += ["linear_cross_entropy-chunked-probabilities", "mse_loss-default", "mse_loss-sum"]


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("case", IN_LAYOUTS)
def test_layouts(case: str, how: str) -> None:
    """The same bits, wherever the tensors lie in memory; and they are not written to."""
    row, kind = CASES[case]
    for dtype in (torch.float32, torch.float16):
        for shape in row.shapes:
            problem = row.problem(kind, shape, dtype)
            tensors = {
                name: spread(t, how) if t.dim() else t for name, t in problem.tensors.items()
            }
            elsewhere = Problem(tensors, problem.options, problem.wanted)
            got, plain = run(row.ours, elsewhere), run(row.ours, problem)
            if row is not LINEAR_CROSS_ENTROPY:
                assert_same_outcome(got, plain, str(shape))
            else:  # torch's products of matrices are rounded as their layouts have it
                assert_as_expected(row, got, problem, str(shape))
            for name, tensor in tensors.items():
                assert_same_tensor(tensor, problem.tensors[name], name)


@pytest.mark.parametrize("name", ["default", "smooth-weighted-ignored", "probabilities"])
def test_expanded_logits(name: str) -> None:
    """All rows at one address: none has the gradient of another."""
    kind = CROSS_ENTROPY.kinds[name]
    problem = CROSS_ENTROPY.problem(kind, (6, 70), torch.float32)
    row = problem.tensors["input"][:1]
    got = run(CROSS_ENTROPY.ours, problem.having(input=row.expand(6, 70)))
    assert_same_outcome(
        got, run(CROSS_ENTROPY.ours, problem.having(input=row.repeat(6, 1))), "rows"
    )
    column = problem.tensors["input"][:, :1]
    got = run(CROSS_ENTROPY.ours, problem.having(input=column.expand(6, 70)))
    assert_same_outcome(
        got, run(CROSS_ENTROPY.ours, problem.having(input=column.repeat(1, 70))), "classes"
    )


# -- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int32], ids=short)
@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_dtypes_of_classes(row: Row, target_dtype: torch.dtype) -> None:
    for name, kind in row.kinds.items():
        if kind.target == "classes" and not (kind.ignored and target_dtype == torch.uint8):
            problem = row.problem(kind, (9, 70), torch.float32)
            narrow = problem.having(target=problem.tensors["target"].to(target_dtype))
            assert_same_outcome(run(row.ours, narrow), run(row.ours, problem), name)


def test_ignored_in_uint8() -> None:
    logits, target = torch.randn(6, 7), torch.tensor([0, 255, 3, 6, 255, 1], dtype=torch.uint8)
    problem = Problem({"input": logits, "target": target}, {"ignore_index": 255}, ("input",))
    got, theirs = run(ours.cross_entropy, problem), run(F.cross_entropy, problem)
    torch.testing.assert_close(got.loss, theirs.loss)
    torch.testing.assert_close(got.grads, theirs.grads)


@pytest.mark.parametrize("target_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dtypes_of_probabilities(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    """The loss is promoted; each gradient has the dtype of what it is of."""
    for name in ("probabilities", "probabilities-none"):
        problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds[name], (9, 70), dtype)
        target = problem.tensors["target"].to(target_dtype)
        problem = problem.having(target=target)
        got, theirs = run(ours.cross_entropy, problem), run(F.cross_entropy, problem)
        assert_alike(got, theirs, name)
        assert_as_expected(CROSS_ENTROPY, got, problem, name)


# Of logits, probabilities and weights. Weights go with the logits, or with what both are promoted
# to; others are refused, as the documentation has it.
WITH_WEIGHTS = [
    (dtype, target, weight)
    for dtype in DTYPES
    for target in DTYPES
    for weight in dict.fromkeys([dtype, torch.promote_types(dtype, target)])
]


@pytest.mark.parametrize(
    ("dtype", "target_dtype", "weight_dtype"),
    WITH_WEIGHTS,
    ids=["-".join(map(short, dtypes)) for dtypes in WITH_WEIGHTS],
)
def test_dtypes_of_weights_of_probabilities(
    dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    kind = CROSS_ENTROPY.kinds["probabilities-weighted"]
    problem = CROSS_ENTROPY.problem(kind, (9, 70), dtype)
    problem = problem.having(
        target=problem.tensors["target"].to(target_dtype),
        weight=problem.tensors["weight"].to(weight_dtype),
    )
    got, theirs = run(ours.cross_entropy, problem), run(F.cross_entropy, problem)
    assert_alike(got, theirs)
    assert_as_expected(CROSS_ENTROPY, got, problem)


@pytest.mark.parametrize("dtype", HALF, ids=short)
@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_float32_weights_of_classes_in_half_precision(row: Row, dtype: torch.dtype) -> None:
    """torch has them only under autocast, and for probabilities."""
    for name in ("weighted", "smooth-weighted-ignored", "probabilities-weighted"):
        problem = row.problem(row.kinds[name], (9, 70), dtype)
        wide = problem.having(weight=problem.tensors["weight"].float())
        assert_same_outcome(run(row.ours, wide), run(row.ours, problem), name)


# -- reductions as they were --------------------------------------------------------------------

LEGACY: list[dict[str, Any]] = [
    {"size_average": average, "reduce": reduce}
    for average in (None, True, False)
    for reduce in (None, True, False)
]


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("legacy", LEGACY, ids=str)
@pytest.mark.parametrize("row", [CROSS_ENTROPY, MSE], ids=lambda row: row.name)
def test_size_average_and_reduce(row: Row, legacy: dict[str, Any]) -> None:
    for reduction in ("mean", "sum", "none"):
        kind = row.kinds["default"]
        problem = row.problem(kind, (5, 11), torch.float32).asking(reduction=reduction, **legacy)
        got, theirs = run(row.ours, problem), run(row.theirs, problem)
        assert_alike(got, theirs, reduction)
        torch.testing.assert_close(got.loss, theirs.loss)
        torch.testing.assert_close(got.grads, theirs.grads)


@pytest.mark.parametrize("row", [CROSS_ENTROPY, MSE], ids=lambda row: row.name)
def test_size_average_warns_as_torch_does(row: Row) -> None:
    problem = row.problem(row.kinds["default"], (5, 11), torch.float32)

    def warned(function: Any) -> list[tuple[type[Warning], str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(**problem.tensors, size_average=False)
        return [(each.category, str(each.message)) for each in caught]

    assert warned(row.ours) == warned(row.theirs) != []


# -- broadcasting -------------------------------------------------------------------------------

BROADCAST = [
    ((4, 5), (5,)),
    ((5,), (4, 5)),
    ((4, 1), (1, 5)),
    ((3,), ()),
    ((4, 5), (4, 1)),
    ((), (2, 3)),
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("shape", "target_shape"), BROADCAST, ids=str)
def test_broadcasting(
    shape: tuple[int, ...], target_shape: tuple[int, ...], reduction: str
) -> None:
    def warned(function: Any) -> tuple[Outcome, list[tuple[type[Warning], str, str]]]:
        torch.manual_seed(0)
        tensors = {"input": torch.randn(shape), "target": torch.randn(target_shape)}
        problem = Problem(tensors, {"reduction": reduction}, ("input", "target"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = run(function, problem)
        return outcome, [(w.category, str(w.message), w.filename) for w in caught]

    (got, said), (theirs, they_said) = warned(ours.mse_loss), warned(F.mse_loss)
    assert said == they_said and len(said) == 1
    assert_alike(got, theirs)
    torch.testing.assert_close(got.loss, theirs.loss)
    torch.testing.assert_close(got.grads, theirs.grads)


@pytest.mark.parametrize("target_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_mse_of_two_dtypes(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    problem = MSE.problem(MSE.kinds["default"], (9, 70), dtype)
    problem = problem.having(target=problem.tensors["target"].to(target_dtype))
    got = run(ours.mse_loss, problem)
    # Before 2.13 torch's backward pass fails with two.
    if dtype == target_dtype or TorchVersion(torch.__version__) >= "2.13":
        assert_alike(got, run(F.mse_loss, problem))
    assert_as_expected(MSE, got, problem)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_with_weights_is_that_of_torch(reduction: str) -> None:
    tensors = {name: torch.randn(5, 7) for name in ("input", "target", "weight")}
    problem = Problem(tensors, {"reduction": reduction}, ("input", "target"))
    assert_same_outcome(run(ours.mse_loss, problem), run(F.mse_loss, problem))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=short)
def test_mse_of_other_dtypes(dtype: torch.dtype) -> None:
    """Is left to torch, which has a loss or an error."""
    tensors = [torch.arange(5).to(dtype), torch.ones(5).to(dtype)]

    def said(function: Any) -> Any:
        try:
            return function(*tensors)
        except (RuntimeError, NotImplementedError) as error:
            return type(error), str(error)

    assert said(ours.mse_loss) == said(F.mse_loss)


# -- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", HALF, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_autocast(row: Row, dtype: torch.dtype, autocast: torch.dtype) -> None:
    def cast(function: Any, problem: Problem) -> Outcome:
        # The gradients are worked out afterwards, as training does.
        leaves = problem.leaves()
        with torch.autocast("cpu", autocast):
            loss = function(**leaves, **problem.options)
        wanted = [leaves[name] for name in problem.wanted]
        grads = torch.autograd.grad(loss, wanted, torch.ones_like(loss))
        return Outcome(loss.detach(), dict(zip(problem.wanted, grads, strict=True)))

    for name, kind in row.kinds.items():
        if not kind.is_in_torch:
            continue
        problem = row.problem(kind, (9, 70), dtype)
        got, theirs = cast(row.ours, problem), cast(row.theirs, problem)
        assert_alike(got, theirs, name)
        # A linear layer is of half precision, and so are its gradients, but for float64.
        narrow = row is LINEAR_CROSS_ENTROPY and dtype != torch.float64
        problem = problem.to(autocast).to(dtype) if narrow else problem
        got.loss = got.loss.to(dtype)
        limit = row.roundings * (unit(autocast) / unit(dtype) if narrow else 1)
        assert_expected(got, row.expected(problem), limit, name)


@pytest.mark.parametrize("autocast", HALF, ids=short)
@pytest.mark.parametrize("weight_dtype", [torch.float32, *HALF], ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=short)
def test_weights_under_autocast(
    dtype: torch.dtype, weight_dtype: torch.dtype, autocast: torch.dtype
) -> None:
    """Of any dtype: torch casts them to float32 with all the rest."""
    for name in ("weighted", "weighted-none", "probabilities-weighted"):
        problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds[name], (9, 70), dtype)
        problem = problem.having(weight=problem.tensors["weight"].to(weight_dtype))
        with torch.autocast("cpu", autocast):
            got, theirs = run(ours.cross_entropy, problem), run(F.cross_entropy, problem)
        assert_alike(got, theirs, name)
        assert_as_expected(CROSS_ENTROPY, got, problem, name)


@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_a_loss_under_autocast_is_not_rounded_to_half(dtype: torch.dtype) -> None:
    for row in (CROSS_ENTROPY, MSE):
        problem = row.problem(row.kinds["default"], (9, 70), dtype)
        with torch.autocast("cpu", dtype):
            got = run(row.ours, problem)
        want = row.expected(problem)
        assert_near(got.loss, want.loss, row.roundings)
        assert got.grads["input"].dtype == dtype


# -- nothing, and nearly nothing ----------------------------------------------------------------

EMPTY = [(0, 5), (0, 5, 3), (3, 5, 0), (0, 1500)]


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_empty_batches(row: Row, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name, kind in row.kinds.items():
        if kind.is_in_torch:
            problem = row.problem(kind, shape, dtype)
            got, theirs = run(row.ours, problem), run(row.theirs, problem)
            assert_alike(got, theirs, name)
            # torch's sum of nothing is -0 here and there.
            torch.testing.assert_close(got.loss, theirs.loss, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(got.grads, theirs.grads, rtol=0, atol=0)


def test_mse_of_nothing() -> None:
    for shape in ((0,), (3, 0, 2)):
        for reduction in ("mean", "sum", "none"):
            tensors = {"input": torch.empty(shape), "target": torch.empty(shape)}
            problem = Problem(tensors, {"reduction": reduction}, ("input", "target"))
            assert_same_outcome(run(ours.mse_loss, problem), run(F.mse_loss, problem))


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("shape", [(4, 7), (3, 7, 2), (3, 100), (2, 1500)], ids=str)
@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_all_ignored(row: Row, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A mean of no row is NaN, and what nobody asked for has a gradient of zero."""
    for name, kind in row.kinds.items():
        if kind.target == "classes" and "chunk_size" not in kind.options:
            problem = row.problem(kind, shape, dtype).asking(z_loss=0.0)
            index = kind.options.get("ignore_index", -100)
            problem = problem.having(target=torch.full_like(problem.tensors["target"], index))
            got = run(row.ours, problem)
            options = {k: v for k, v in problem.options.items() if k != "z_loss"}
            theirs = run(row.theirs, Problem(problem.tensors, options, problem.wanted))
            assert_alike(got, theirs, name)
            assert_same_tensor(got.loss, theirs.loss, name)
            for each, grad in got.grads.items():
                assert torch.equal(grad, theirs.grads[each]) or grad.isnan().all(), (name, each)
                assert torch.equal(grad.isnan(), theirs.grads[each].isnan()), (name, each)


@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_only_one_is_not_ignored(row: Row) -> None:
    problem = row.problem(row.kinds["default"], (70, 7), torch.float32)
    target = torch.full_like(problem.tensors["target"], -100)
    target[69] = 3
    problem = problem.having(target=target)
    assert_as_expected(row, run(row.ours, problem), problem)


def test_an_ignored_row_may_be_nan() -> None:
    """Nothing of it gets into the loss, nor into the gradient."""
    for classes in (7, 300, 2500):
        logits = torch.randn(3, classes)
        logits[1] = torch.nan
        target = torch.tensor([0, -100, 2])
        for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
            problem = Problem({"input": logits, "target": target}, options, ("input",))
            got = run(ours.cross_entropy, problem)
            assert got.loss.isfinite().all()
            assert torch.equal(got.grads["input"][1], torch.zeros(classes))
            assert got.grads["input"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ["weighted", "smooth-weighted-ignored", "probabilities-weighted"])
def test_weights_that_are_all_zero(kind: str, dtype: torch.dtype) -> None:
    for reduction in ("mean", "sum", "none"):
        problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds[kind], (9, 70), dtype)
        problem = problem.asking(reduction=reduction).having(weight=torch.zeros(70, dtype=dtype))
        got, theirs = run(ours.cross_entropy, problem), run(F.cross_entropy, problem)
        assert_alike(got, theirs, reduction)
        torch.testing.assert_close(got.loss, theirs.loss, equal_nan=True)
        torch.testing.assert_close(got.grads, theirs.grads, equal_nan=True)


# -- logits that are not finite, or large --------------------------------------------------------


def one_in_a_row(value: float) -> Any:
    def put(logits: Tensor) -> None:
        logits[1, logits.shape[1] // 2] = value

    return put


def a_chunk(logits: Tensor) -> None:
    logits[1, :1024] = -torch.inf


def some(logits: Tensor) -> None:
    logits[:, 1::3] = -torch.inf


def a_row(logits: Tensor) -> None:
    logits[1] = -torch.inf


def both(logits: Tensor) -> None:
    logits[1, 0], logits[1, -1] = torch.inf, -torch.inf


def large(logits: Tensor) -> None:
    logits[0, 0], logits[1, -1], logits[2] = 1e4, -1e4, 1e4


def all_large(logits: Tensor) -> None:
    logits.mul_(2000)


ODD = {
    "-inf": one_in_a_row(-torch.inf),
    "+inf": one_in_a_row(torch.inf),
    "nan": one_in_a_row(torch.nan),
    "some": some,
    "a chunk": a_chunk,
    "a row": a_row,
    "both": both,
    "large": large,
    "all large": all_large,
}


def assert_as_torch(got: Tensor, theirs: Tensor, what: str) -> None:
    """theirs was computed in float64: NaN and Inf are where they are there."""
    theirs = theirs.to(got.dtype)
    assert torch.equal(got.isnan(), theirs.isnan()), what
    odd = ~theirs.isfinite()
    assert torch.equal(got[odd].nan_to_num(), theirs[odd].nan_to_num()), what
    # Nor is torch exact in float64.
    units = 1000 if got.dtype == torch.float64 else 16
    assert_near(got[~odd], widened(theirs)[~odd.numpy()], units, what)


@pytest.mark.parametrize("classes", [5, 64, 65, 2500])
@pytest.mark.parametrize("how", ODD)
def test_logits_that_are_not_finite_or_large(how: str, classes: int) -> None:
    for name in (
        *("default", "none", "smooth", "weighted", "smooth-weighted-ignored-none"),
        *("probabilities", "probabilities-none", "probabilities-smooth-weighted-none"),
    ):
        for dtype in DTYPES:
            kind = CROSS_ENTROPY.kinds[name]
            problem = CROSS_ENTROPY.problem(kind, (3, classes), dtype)
            logits = problem.tensors["input"].clone()
            ODD[how](logits)
            problem = problem.having(input=logits)
            if kind.target == "classes":
                # One that the odd ones do not reach, so that the loss is not Inf for all.
                problem = problem.having(target=torch.tensor([0, classes - 1, 2]))
            got = run(ours.cross_entropy, problem)
            theirs = run(F.cross_entropy, problem.to(torch.float64))
            what = f"{name} {short(dtype)}"
            assert_as_torch(got.loss, theirs.loss, f"{what} loss")
            for each, grad in got.grads.items():
                assert_as_torch(grad, theirs.grads[each], f"{what} gradient of {each}")


@pytest.mark.parametrize("classes", [5, 300, 3000])
def test_a_target_that_is_not_possible(classes: int) -> None:
    """-inf at the target: the loss is inf, the gradient still a number."""
    logits = torch.randn(3, classes)
    logits[1, 2] = -torch.inf
    problem = Problem(
        {"input": logits, "target": torch.tensor([0, 2, 1])}, {"reduction": "none"}, ("input",)
    )
    got = run(ours.cross_entropy, problem)
    assert got.loss[1] == torch.inf
    theirs = run(F.cross_entropy, problem.to(torch.float64))
    assert_as_torch(got.loss, theirs.loss, "loss")
    assert_as_torch(got.grads["input"], theirs.grads["input"], "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_mse_of_numbers_that_are_not_finite_or_large(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    values = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, most, -most, 0.0], dtype=dtype)
    for reduction in ("mean", "sum"):
        for first in range(7):
            for second in range(7):
                pair = {"input": values[first, None], "target": values[second, None]}
                problem = Problem(pair, {"reduction": reduction}, ("input", "target"))
                got, theirs = run(ours.mse_loss, problem), run(F.mse_loss, problem)
                what = f"{reduction} {first} {second}"
                torch.testing.assert_close(got.loss, theirs.loss, equal_nan=True, msg=what)
                torch.testing.assert_close(got.grads, theirs.grads, equal_nan=True, msg=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_loss_that_overflows(dtype: torch.dtype) -> None:
    """Is infinite, as it is in torch; and the gradient of -inf is the usual one."""
    most = torch.finfo(dtype).max
    logits = torch.tensor([[most, -most, 0.0]], dtype=dtype)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction}
        problem = Problem({"input": logits, "target": torch.tensor([1])}, options, ("input",))
        got, theirs = run(ours.cross_entropy, problem), run(F.cross_entropy, problem)
        torch.testing.assert_close(got.loss, theirs.loss)
        torch.testing.assert_close(got.grads, theirs.grads)


def test_a_sum_that_overflows_half_precision() -> None:
    """Only what is rounded to it at the end."""
    problem = MSE.problem(MSE.kinds["sum"], (200, 1000), torch.float16)
    assert run(ours.mse_loss, problem).loss == torch.inf
    mean = run(ours.mse_loss, problem.asking(reduction="mean"))
    assert_as_expected(MSE, mean, problem.asking(reduction="mean"))


# -- what torch does not have -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_return_lse(row: Row, dtype: torch.dtype) -> None:
    """Of all rows, also of those that are ignored; float32 for half precision."""
    for name in ("default", "ignored-none", "smooth-weighted-ignored", "probabilities", "z-none"):
        kind = row.kinds[name]
        for shape in row.shapes:
            problem = row.problem(kind, shape, dtype)
            plain, got = run(row.ours, problem), run(row.ours, problem, return_lse=True)
            assert_same_tensor(got.loss, plain.loss, f"{name} {shape}")
            if row is not LINEAR_CROSS_ENTROPY or kind.target == "classes":
                for each, grad in got.grads.items():
                    assert_same_tensor(grad, plain.grads[each], f"{name} {shape} {each}")
            wide = problem.to(torch.float64).tensors
            logits = wide["input"]
            if row is LINEAR_CROSS_ENTROPY:
                flat = wide["linear_weight"].flatten(0, -2)
                bias = wide["linear_bias"].flatten() if "linear_bias" in wide else None
                logits = F.linear(logits, flat, bias)
                logits = logits.unflatten(-1, wide["linear_weight"].shape[:-1])
            want = torch.logsumexp(logits, 0 if len(shape) == 1 else 1)
            assert got.lse.dtype == (torch.float32 if dtype in HALF else dtype)
            assert not got.lse.requires_grad and got.lse.grad_fn is None
            if row is CROSS_ENTROPY or dtype not in HALF:
                assert_near(got.lse, want.numpy(), row.roundings, f"{name} {shape}")
            else:  # of logits that are rounded
                torch.testing.assert_close(got.lse.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("classes", [5, 64, 65, 1500])
@pytest.mark.parametrize("how", ODD)
def test_lse_of_logits_that_are_not_finite_or_large(how: str, classes: int) -> None:
    for dtype in DTYPES:
        logits = 3 * torch.randn(3, classes, dtype=dtype)
        ODD[how](logits)
        for target in (torch.tensor([0, classes - 1, 2]), torch.tensor([-100, -100, 1])):
            _, lse = ours.cross_entropy(logits, target, return_lse=True)
            assert_as_torch(lse, torch.logsumexp(logits.double(), 1), short(dtype))


def test_z_loss_by_hand() -> None:
    """The plain formula, over the rows that are not ignored, without their weights."""
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target, weight = (
        torch.tensor([0, -100, 3, 1, -100]),
        torch.tensor([2.0, 0.0, 1.0, 5.0]).double(),
    )
    valid = target != -100
    squares = torch.logsumexp(logits, 1)[valid] ** 2
    plain = F.cross_entropy(logits, target, weight) + 0.3 * squares.mean()
    (want,) = torch.autograd.grad(plain, logits)
    loss = ours.cross_entropy(logits, target, weight, z_loss=0.3)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


def test_no_z_loss_is_no_multiplication_by_zero() -> None:
    logits = torch.full((2, 3), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert ours.cross_entropy(logits, torch.tensor([0, 1])).isfinite()


def test_negative_label_smoothing_is_that_of_torch() -> None:
    """torch takes it for none."""
    logits, target = torch.randn(4, 7), torch.tensor([0, 1, 2, 3])
    problem = Problem({"input": logits, "target": target}, {"label_smoothing": -0.3}, ("input",))
    got, theirs = run(ours.cross_entropy, problem), run(F.cross_entropy, problem)
    torch.testing.assert_close(got.loss, theirs.loss)
    torch.testing.assert_close(got.grads, theirs.grads)
