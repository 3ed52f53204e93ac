"""Losses and gradients have the same bits on every instruction set, thread count and layout."""

from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from support.losses import (
    CASES,
    CROSS_ENTROPY,
    DTYPES,
    LINEAR_CROSS_ENTROPY,
    MOST_DTYPES,
    MSE,
    Kind,
    Outcome,
    Problem,
    Row,
    assert_same_outcome,
    choose_isa,
    run,
    short,
    spread,
    unit,
)


@dataclass(frozen=True)
class Setting:
    """How a loss is computed, which must not matter."""

    isa: str = "baseline"
    threads: int = 1
    flush: bool = False
    how: str = "contiguous"
    inplace: bool = False


PLAIN = Setting()
SETTINGS = {
    "avx2": Setting("avx2"),
    "avx512": Setting("avx512"),
    "2-threads": Setting(threads=2),
    "3-threads": Setting(threads=3),
    "strided": Setting(how="strided"),
    "transposed": Setting(how="transposed"),
    "flush": Setting(flush=True),
    "inplace": Setting(inplace=True),
    "flush-avx2-2-threads-strided-inplace": Setting("avx2", 2, True, "strided", True),
    "flush-avx512-3-threads-offset": Setting("avx512", 3, True, "offset"),
}
# Products of matrices are torch's, whose bits hang on the number of threads and on the layout.
OF_ONE_THREAD = [key for key, each in SETTINGS.items() if each.threads == 1]


def run_as(row: Row, problem: Problem, setting: Setting) -> Outcome:
    choose_isa(setting.isa)
    torch.set_num_threads(setting.threads)
    if setting.how != "contiguous":
        tensors = {n: spread(t, setting.how) if t.dim() else t for n, t in problem.tensors.items()}
        problem = replace(problem, tensors=tensors)
    if not torch.set_flush_denormal(setting.flush) and setting.flush:
        pytest.skip("this processor cannot flush denormals")
    try:
        more = {"inplace": True} if setting.inplace else {}
        if row.with_lse:
            more["return_lse"] = True
        return run(row.ours, problem, **more)
    finally:
        torch.set_flush_denormal(False)


def harsh(problem: Problem) -> Problem:
    """Among what is realistic: logits that make exponentials denormal, or zero; and Inf and NaN,
    each in a row of its own."""
    x = problem.tensors["input"].clone()
    rows = x.movedim(1, -1).reshape(-1, x.shape[1]) if x.dim() > 1 else x[None]
    rows = rows.clone()
    wide = rows.shape[1]
    deep = {torch.float64: -720.0, torch.float16: -60.0}.get(x.dtype, -95.0)
    for number, row in enumerate(rows):
        row[number % 3 :: 7] += deep
        if number % 5 == 1:
            row[::11] = -torch.inf
        if number % 13 == 3:
            row[number % wide] = torch.inf
        if number % 13 == 7:
            row[number % wide] = torch.nan
        if number % 13 == 9:
            row[:1024] = -torch.inf
    if x.dim() > 1:
        shape = (x.shape[0], *x.shape[2:], x.shape[1])
        return problem.having(input=rows.reshape(shape).movedim(-1, 1).contiguous())
    return problem.having(input=rows[0])


# What is shared by threads in each of the ways: rows of few classes, long rows, parts of rows.
# Threads get pieces of 8192 logits and more.
SHAPES = [(3400, 5), (270, 64), (265, 65), (17, 1025), (3, 9001), (270, 33, 2), (3, 257, 2, 12)]
KINDS = ["ignored", "smooth-weighted-ignored-none", "probabilities-smooth-weighted", "z-none"]


@lru_cache(maxsize=len(SHAPES))
def harsh_problem(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Problem, Outcome]:
    problem = harsh(CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds[name], shape, dtype))
    problem = replace(problem, wanted=("input",))
    return problem, run_as(CROSS_ENTROPY, problem, PLAIN)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_same_bits(name: str, dtype: torch.dtype, setting: Setting) -> None:
    if setting.inplace and CROSS_ENTROPY.kinds[name].target == "probabilities":
        setting = replace(setting, inplace=False)  # which refuses them
    for shape in SHAPES:
        problem, plain = harsh_problem(name, shape, dtype)
        assert_same_outcome(run_as(CROSS_ENTROPY, problem, setting), plain, str(shape))


def test_the_data_is_harsh() -> None:
    for dtype in (torch.float32, torch.float64):
        _, plain = harsh_problem("ignored", (17, 1025), dtype)
        grad = plain.grads["input"]
        tiny = torch.finfo(dtype).tiny
        denormal = (grad != 0) & (grad.abs() < tiny)
        for kind in (grad.isnan(), denormal, grad == 0, grad.abs() > 1e-3):
            assert kind.sum() > 20


@pytest.mark.parametrize(("isa", "threads"), [("baseline", 2), ("avx2", 3), ("avx512", 3)])
@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_rows_that_threads_share(name: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    """Fewer long rows than threads take another path: with 3 threads, 2 of these rows do."""
    for shape in CROSS_ENTROPY.long_rows:
        problem, plain = harsh_problem(name, shape, dtype)
        setting = Setting(isa, threads)
        assert_same_outcome(run_as(CROSS_ENTROPY, problem, setting), plain, str(shape))
        if CROSS_ENTROPY.kinds[name].target == "classes":
            setting = Setting(isa, threads, True, "strided", True)
            assert_same_outcome(run_as(CROSS_ENTROPY, problem, setting), plain, str(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_kinds_where_threads_share_rows(dtype: torch.dtype) -> None:
    for name, kind in CROSS_ENTROPY.kinds.items():
        for shape in CROSS_ENTROPY.long_rows[:1]:
            problem = CROSS_ENTROPY.problem(kind, shape, dtype)
            plain = run_as(CROSS_ENTROPY, problem, PLAIN)
            got = run_as(CROSS_ENTROPY, problem, Setting(threads=3))
            assert_same_outcome(got, plain, f"{name} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_row_that_is_ignored_and_shared(dtype: torch.dtype) -> None:
    """All of it is zero, whether or not its lse is wanted, and not the logits in place."""
    for lse in (False, True):
        for inplace in (False, True):
            problem = CROSS_ENTROPY.problem(Kind({"reduction": "sum"}), (2, 40000), dtype)
            problem = problem.having(target=torch.tensor([-100, 5]))
            torch.set_num_threads(3)
            got = run(CROSS_ENTROPY.ours, problem, return_lse=lse, inplace=inplace)
            assert not got.grads["input"][0].any() and got.grads["input"][1].any()


@pytest.mark.parametrize("setting", OF_ONE_THREAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_linear(dtype: torch.dtype, setting: str) -> None:
    """What comes after one and the same product of matrices."""
    if SETTINGS[setting].inplace or SETTINGS[setting].how != "contiguous":
        setting = "avx2"
    for name in ("bias", "chunked-weighted-ignored", "chunked-smooth-none", "z-none"):
        kind = LINEAR_CROSS_ENTROPY.kinds[name]
        problem = LINEAR_CROSS_ENTROPY.problem(kind, (17, 1025), dtype)
        plain = run_as(LINEAR_CROSS_ENTROPY, problem, PLAIN)
        got = run_as(LINEAR_CROSS_ENTROPY, problem, SETTINGS[setting])
        assert_same_outcome(got, plain, name)


@lru_cache(maxsize=8)
def harsh_mse(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Problem, Outcome]:
    problem = MSE.problem(MSE.kinds[name], shape, dtype)
    x, tiny = problem.tensors["input"].clone(), torch.finfo(dtype).tiny
    flat, y = x.view(-1), problem.tensors["target"].clone()
    flat[::5] = tiny / 8
    y.view(-1)[::5] = tiny / 2
    flat[1::7] *= tiny**0.5 / 10  # the square is denormal
    y.view(-1)[1::7] = 0
    # Inf and NaN where they do not spoil everything: in a gradient.
    problem = problem.having(input=x, target=y)
    return problem, run_as(MSE, problem, PLAIN)


@pytest.mark.parametrize(
    "setting", [each for each in SETTINGS.values() if not each.inplace], ids=lambda each: repr(each)
)
@pytest.mark.parametrize("dtype", MOST_DTYPES)
def test_mse(dtype: torch.dtype, setting: Setting) -> None:
    for name, shape in (("default", (100003,)), ("sum", (129, 1025)), ("sum", (7, 5, 3))):
        problem, plain = harsh_mse(name, shape, dtype)
        assert_same_outcome(run_as(MSE, problem, setting), plain, f"{name} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_mse_of_permuted_dimensions(dtype: torch.dtype) -> None:
    """The sum goes along memory, so that nothing is copied: it is the same up to the rounding of a
    sum in float64, and the gradient to the bit."""
    for shape in ((5, 11), (4, 6, 5), (129, 1025)):
        for seed in range(8):
            problem = MSE.problem(MSE.kinds["sum"], shape, dtype, seed)
            plain = run_as(MSE, problem, PLAIN)
            got = run_as(MSE, problem, Setting(how="transposed"))
            error = (got.loss.double() - plain.loss.double()).abs()
            bound = 2 * unit(dtype) * plain.loss.double()
            assert got.loss.equal(plain.loss) or error <= bound
            assert_same_outcome(replace(got, loss=plain.loss), plain, f"{shape} {seed}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_mse_of_infinite_and_nan(dtype: torch.dtype) -> None:
    """The gradient has them where they are, whatever the instruction set."""
    problem, _ = harsh_mse("default", (129, 1025), dtype)
    x = problem.tensors["input"].clone()
    x[3, 5], x[7, 11], x[128, 1024] = torch.inf, -torch.inf, torch.nan
    problem = problem.having(input=x)
    plain = run_as(MSE, problem, PLAIN)
    assert plain.loss.isnan() and plain.grads["input"].isnan().sum() == 1
    assert plain.grads["input"].isinf().sum() == 2
    for isa in ("avx2", "avx512"):
        assert_same_outcome(run_as(MSE, problem, Setting(isa, 3)), plain)


@pytest.mark.parametrize("case", CASES)
def test_instruction_sets_of_all_kinds(case: str) -> None:
    row, kind = CASES[case]
    for dtype in (torch.float32, torch.float16):
        for shape in row.shapes[1::2]:
            problem = row.problem(kind, shape, dtype)
            plain = run_as(row, problem, PLAIN)
            for isa in ("avx2", "avx512"):
                got = run_as(row, problem, Setting(isa))
                assert_same_outcome(got, plain, f"{isa} {shape} {short(dtype)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    """Many short rows are computed at once: each as if it were alone."""
    for classes in (3, 17, 64, 65, 1030):
        kind = CROSS_ENTROPY.kinds["smooth-weighted-ignored-none"]
        problem = CROSS_ENTROPY.problem(kind, (40, classes), dtype)
        together = run(CROSS_ENTROPY.ours, problem)
        for number in (0, 13, 39):
            one = slice(number, number + 1)
            tensors = problem.tensors
            alone = problem.having(input=tensors["input"][one], target=tensors["target"][one])
            got = run(CROSS_ENTROPY.ours, alone)
            want = Outcome(together.loss[one], {"input": together.grads["input"][one]})
            assert_same_outcome(got, want, f"{classes} {number}")
