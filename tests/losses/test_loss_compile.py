"""The losses under torch.compile, in one graph, and their operators under torch's own checks."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.losses import (
    CASES,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    MSE,
    Outcome,
    Problem,
    assert_same_outcome,
    assert_same_tensor,
    run,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from fusedopt import nn
from fusedopt.nn import functional as ours

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def without_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(
    step: Callable[..., Tensor], model: torch.nn.Module, *args: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """A loss and the gradients of the model's parameters."""
    model.zero_grad()
    loss = step(*args)
    loss.backward()
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return loss.detach(), [grad.clone() for grad in grads]


LOSSES: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": nn.CrossEntropyLoss,
    "inplace": lambda: nn.CrossEntropyLoss(inplace=True),
    "all": lambda: nn.CrossEntropyLoss(
        torch.arange(11) / 10, ignore_index=3, label_smoothing=0.1, z_loss=1e-3
    ),
    "lse": lambda: nn.CrossEntropyLoss(return_lse=True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_model_with_cross_entropy(name: str, backend: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 11))
    criterion = LOSSES[name]()
    x, target = torch.randn(5, 6), torch.tensor([0, 3, 10, 5, 5])

    def step(x: Tensor, target: Tensor) -> Tensor:
        result = criterion(model(x), target)
        loss: Tensor = result[0] + 0 * result[1].sum() if isinstance(result, tuple) else result
        return loss

    want = trained(step, model, x, target)
    got = trained(torch.compile(step, backend=backend, fullgraph=True), model, x, target)
    assert_alike(got, want, exact=backend == "aot_eager")


def assert_alike(
    got: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]], exact: bool
) -> None:
    """Inductor's own code rounds otherwise."""
    if exact:
        assert_same_tensor(got[0], want[0])
        for mine, other in zip(got[1], want[1], strict=True):
            assert_same_tensor(mine, other)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_with_mse(backend: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    criterion = nn.MSELoss()
    args = torch.randn(5, 6), torch.randn(5, 3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = criterion(model(x), y)
        return loss

    want = trained(step, model, *args)
    got = trained(torch.compile(step, backend=backend, fullgraph=True), model, *args)
    assert_alike(got, want, exact=backend == "aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "chunk_size": 2},
        {"reduction": "none"},
        {"bias": True, "label_smoothing": 0.1, "z_loss": 1e-3},
        {"out_features": (2,)},
    ],
    ids=str,
)
def test_a_model_with_linear_cross_entropy(options: dict[str, Any], backend: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh())
    criterion = nn.LinearCrossEntropyLoss(8, 11, **options)
    both = torch.nn.ModuleList([model, criterion])
    target = torch.tensor([0, 3, 10, 5, 5])
    if "out_features" in options:
        target = target[:, None].expand(5, 2).contiguous()
    args = torch.randn(5, 6), target

    def step(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = criterion(model(x), target)
        return loss.sum()

    want = trained(step, both, *args)
    got = trained(torch.compile(step, backend=backend, fullgraph=True), both, *args)
    assert_alike(got, want, exact=backend == "aot_eager")


SOME = [
    "cross_entropy-smooth-weighted-ignored-none",
    "cross_entropy-probabilities",
    "cross_entropy-probabilities-smooth-weighted-none",
    "cross_entropy-z-weighted-ignored",
    "linear_cross_entropy-chunked-smooth-none",
    "linear_cross_entropy-probabilities",
    "mse_loss-sum",
    "mse_loss-none",
]


@pytest.mark.parametrize("case", SOME)
def test_functions(case: str) -> None:
    row, kind = CASES[case]
    problem = row.problem(kind, (5, 11), torch.float32)
    compiled = torch.compile(row.ours, backend="aot_eager", fullgraph=True)
    assert_same_outcome(run(compiled, problem), run(row.ours, problem))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_all_kinds(case: str, dtype: torch.dtype) -> None:
    row, kind = CASES[case]
    problem = row.problem(kind, (5, 11), dtype)
    compiled = torch.compile(row.ours, backend="aot_eager", fullgraph=True)
    got, want = run(compiled, problem), run(row.ours, problem)
    assert got.loss.dtype == want.loss.dtype
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.grads, want.grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_shapes(backend: str) -> None:
    """One graph for every batch size."""
    counter, traced = CompileCounterWithBackend(backend), []

    def loss(x: Tensor, y: Tensor, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return (
            ours.cross_entropy(x * 1, target, inplace=True)
            + ours.cross_entropy(x, y.softmax(1), label_smoothing=0.1)
            + ours.mse_loss(x, y)
            + ours.linear_cross_entropy(hidden, weight, target)
        )

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(11, 4, requires_grad=True)
    for rows in (5, 9, 17):
        args = [torch.randn(rows, 11), torch.randn(rows, 11), torch.randn(rows, 4)]
        args = [tensor.requires_grad_() for tensor in args] + [weight]
        target = torch.randint(11, (rows,))
        results = []
        for function in (loss, compiled):
            value = function(*args, target)
            results.append((value.detach(), torch.autograd.grad(value, args)))
        torch.testing.assert_close(results[1], results[0])
        traced.append(counter.frame_count)
    assert traced[0] == traced[-1]


def test_autocast_inside() -> None:
    linear = torch.nn.Linear(6, 11)

    def step(x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours.cross_entropy(linear(x), target)

    args = torch.randn(5, 6), torch.tensor([0, 3, 10, 5, 5])
    want = trained(step, linear, *args)
    got = trained(torch.compile(step, backend="aot_eager", fullgraph=True), linear, *args)
    assert got[0].dtype == want[0].dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_without_gradients() -> None:
    compiled = torch.compile(ours.cross_entropy, backend="aot_eager", fullgraph=True)
    logits, target = torch.randn(5, 11), torch.arange(5)
    with torch.no_grad():
        assert_same_tensor(compiled(logits, target), ours.cross_entropy(logits, target))


def test_in_place_writes_to_the_logits_that_were_given() -> None:
    """Where these are an input of the graph, too."""
    target = torch.arange(5)
    compiled = torch.compile(ours.cross_entropy, backend="aot_eager", fullgraph=True)
    memory = []
    for function in (ours.cross_entropy, compiled):
        torch.manual_seed(1)
        logits = torch.randn(5, 11)
        with torch.no_grad():
            function(logits, target, inplace=True)
        memory.append(logits)
    assert_same_tensor(*memory)


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return ours.cross_entropy(x, target, label_smoothing=0.1)

    args = torch.randn(5, 11), torch.arange(5)
    exported = torch.export.export(Model(), args)
    assert_same_tensor(exported.module()(*args), Model()(*args))


# -- the operators ------------------------------------------------------------------------------

ops = torch.ops.fusedopt
logits, target, weight = torch.randn(5, 11), torch.tensor([0, 3, 10, -100, 5]), torch.rand(11)
images, places = torch.randn(3, 5, 2, 4), torch.randint(5, (3, 2, 4))
hidden, linear_weight = torch.randn(5, 7), torch.randn(11, 7)
# op, arguments: reductions are 0 none, 1 mean, 2 sum.
OPERATORS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mean": (ops._cross_entropy, (logits, target, None, 1, -100, 0.0, 0.0, False, False, True)),
    "all": (ops._cross_entropy, (logits, target, weight, 2, -100, 0.1, 1e-3, False, True, True)),
    "none": (ops._cross_entropy, (images, places, None, 0, -100, 0.0, 0.0, False, True, True)),
    "no gradient": (
        ops._cross_entropy,
        (images, places, None, 1, -100, 0.0, 0.0, False, False, False),
    ),
    "probabilities": (
        ops._cross_entropy,
        (logits, logits.softmax(1), weight, 1, -100, 0.1, 0.0, False, False, True),
    ),
    "half": (
        ops._cross_entropy,
        (logits.bfloat16(), target, None, 1, -100, 0.0, 0.0, True, True, True),
    ),
    "inplace": (ops._cross_entropy_, (logits, target, None, 1, -100, 0.0, 0.0, False, True)),
    "inplace images": (
        ops._cross_entropy_,
        (images, places, None, 0, -100, 0.1, 0.0, False, False),
    ),
    "linear": (
        ops._linear_cross_entropy,
        (hidden, linear_weight, target, None, weight, 1, -100, 0.1, 0.0, False, True, 2)
        + (True, True, False),
    ),
    "linear none": (
        ops._linear_cross_entropy,
        (hidden, linear_weight, target, weight, None, 0, -100, 0.0, 0.0, False, False, 0)
        + (False, False, False),
    ),
    "linear rows": (
        ops._linear_cross_entropy_rows,
        (torch.rand(5), hidden, linear_weight, target, weight, None, -100, 0.0, 0.0, 2)
        + (True, True, True),
    ),
    "mse": (ops._mse_loss, (logits, logits.flip(0), 1, False, True)),
    "mse strided": (ops._mse_loss, (images[..., ::2], images[..., 1::2], 2, False, True)),
    "mse transposed": (ops._mse_loss, (logits.t(), logits.flip(0).t(), 1, False, True)),
    "mse half": (ops._mse_loss, (logits.half(), logits.half(), 1, True, False)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    """Schema, fake tensors and tracing, static and dynamic. They have no derivative themselves:
    that is the business of the composite operators."""
    op, args = OPERATORS[name]
    copies = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
    if "strided" in name or "transposed" in name:
        copies = args
    torch.library.opcheck(op, copies)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SOME, "cross_entropy-default", "linear_cross_entropy-bias"])
def test_composite_operators_with_gradients(case: str) -> None:
    row, kind = CASES[case]
    if case == "mse_loss-none":
        return  # torch's own
    problem = row.problem(kind, (5, 11), torch.float32)
    leaves, options = problem.leaves(), dict(problem.options)
    reduction = {"none": 0, "mean": 1, "sum": 2}[options.get("reduction", "mean")]
    if row is MSE:
        args: tuple[Any, ...] = (leaves["input"], leaves["target"], reduction)
        torch.library.opcheck(ops.mse_loss, args)
        return
    common = (options.get("ignore_index", -100), options.get("label_smoothing", 0.0))
    common += (options.get("z_loss", 0.0), False)
    if row is CROSS_ENTROPY:
        args = (leaves["input"], leaves["target"], leaves.get("weight"), reduction, *common, False)
        torch.library.opcheck(ops.cross_entropy, args)
        return
    assert row is LINEAR_CROSS_ENTROPY
    if kind.target == "probabilities":
        leaves["target"] = leaves["target"].detach()  # Python has another way for its gradient
    args = (leaves["input"], leaves["linear_weight"], leaves["target"], leaves.get("linear_bias"))
    args += (leaves.get("weight"), reduction, *common, options.get("chunk_size", 0))
    torch.library.opcheck(ops.linear_cross_entropy, args)


def test_fake_results_lie_as_real_ones_do() -> None:
    """Strides, too, which a compiled graph relies on."""
    for name, (op, args) in OPERATORS.items():
        copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        real = op(*copies)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
            fake = op(*fakes)
        for one, other in zip(
            real if isinstance(real, tuple) else (real,),
            fake if isinstance(fake, tuple) else (fake,),
            strict=True,
        ):
            assert one.dtype == other.dtype and one.shape == other.shape, name
            assert one.stride() == other.stride(), name


def test_dtypes_of_outcomes_do_not_hang_on_tracing() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        problem = Problem(
            {"input": torch.randn(5, 11, dtype=dtype), "target": torch.arange(5)}, {}, ("input",)
        )
        compiled = torch.compile(ours.cross_entropy, backend="aot_eager", fullgraph=True)
        got = run(compiled, problem, return_lse=True)
        want = run(ours.cross_entropy, problem, return_lse=True)
        assert isinstance(got, Outcome)
        assert_same_outcome(got, want)
