"""linear_cross_entropy: its chunks, its memory, several dimensions, and the options of torch."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.losses import (
    DTYPES,
    HALF,
    LINEAR_CROSS_ENTROPY,
    MOST_DTYPES,
    Kind,
    assert_expected,
    assert_near,
    assert_same_outcome,
    assert_same_tensor,
    run,
    short,
)
from torch import Tensor
from torch.nn import functional as F

from fusedopt.nn.functional import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

ROW = LINEAR_CROSS_ENTROPY


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 36, 37, 38, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_chunks(dtype: torch.dtype, chunk_size: int) -> None:
    """The last one may be short."""
    for name in ("bias", "smooth-weighted-ignored", "z-weighted-ignored", "probabilities", "none"):
        problem = ROW.problem(ROW.kinds[name], (37, 70), dtype).asking(chunk_size=chunk_size)
        assert_expected(run(ROW.ours, problem), ROW.expected(problem), ROW.roundings, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_chunk_is_the_plain_way(dtype: torch.dtype) -> None:
    """To the last bit: a linear layer, and cross_entropy in place."""
    for name in ("bias", "smooth-weighted-ignored", "weighted-none", "z-sum"):
        problem = ROW.problem(ROW.kinds[name], (37, 70), dtype)

        def plain(
            input: Tensor,
            linear_weight: Tensor,
            target: Tensor,
            linear_bias: Tensor | None = None,
            chunk_size: int = 0,
            **options: Any,
        ) -> Tensor:
            logits = F.linear(input, linear_weight, linear_bias)
            return cross_entropy(logits, target, inplace=True, **options)

        got, want = run(ROW.ours, problem.asking(chunk_size=37)), run(plain, problem)
        assert_same_tensor(got.loss, want.loss, name)
        assert_expected(got, ROW.expected(problem), ROW.roundings, name)


@pytest.mark.parametrize("rows", [640, 641, 1290])
@pytest.mark.parametrize("chunk_size", [None, 64, 80, 81])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_products_that_are_transposed(rows: int, chunk_size: int | None, biased: bool) -> None:
    """Those of whole blocks of rows, which a last chunk may not have; by 1024 columns at a time."""
    generator = torch.Generator().manual_seed(rows)
    hidden, classes = 256, 1300
    shapes = [(rows, hidden), (classes, hidden)] + [(classes,)] * biased
    tensors = [torch.randn(shape, generator=generator) * 0.25 for shape in shapes]
    target = torch.randint(classes, (rows,), generator=generator)

    def gradients(dtype: torch.dtype, loss: Any, **options: Any) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        bias = leaves[2] if biased else None
        found = loss(*leaves[:2], target, linear_bias=bias, **options)
        return [found.detach(), *torch.autograd.grad(found, leaves)]

    def plain(
        input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None
    ) -> Tensor:
        return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)

    want = gradients(torch.float64, plain)
    of_torch = gradients(torch.float32, plain)
    got = gradients(torch.float32, linear_cross_entropy, chunk_size=chunk_size)
    for ours, theirs, right in zip(got, of_torch, want, strict=True):
        error, allowed = ((one - right).abs().mean() for one in (ours, theirs))
        assert error <= 1.5 * allowed + 1e-7 * right.abs().max()


@pytest.mark.parametrize("outputs", [(2,), (3, 2), (1,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", MOST_DTYPES)
def test_losses_of_several_dimensions(dtype: torch.dtype, outputs: tuple[int, ...]) -> None:
    for name, kind in ROW.kinds.items():
        problem = ROW.problem(kind, (5, 7, *outputs), dtype)
        got = run(ROW.ours, problem)
        assert_expected(got, ROW.expected(problem), ROW.roundings, name)
        rows = (5, *outputs)
        assert got.loss.shape == (rows if kind.reduction == "none" else ())
        _, lse = ROW.ours(**problem.tensors, **problem.options, return_lse=True)
        assert lse.shape == rows and lse.dtype == (torch.float32 if dtype in HALF else dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_chunk_size": 3},
        {"chunking_method": "aspect_ratio:2"},
        {"allow_retain_graph": True},
    ],
    ids=["default", "batch_chunk_size", "method", "retain"],
)
def test_options_of_torch(options: dict[str, Any]) -> None:
    """Whatever they are, a second backward pass is right."""
    made = torch.nn.LinearCrossEntropyOptions(**options)
    for name in ("default", "bias", "weighted-ignored", "none"):
        problem = ROW.problem(ROW.kinds[name], (37, 70), torch.float64)
        got = run(ROW.ours, problem.asking(options=made))
        assert_expected(got, ROW.expected(problem), ROW.roundings, name)
        leaves = problem.leaves()
        loss = ROW.ours(**leaves, **problem.options, options=made)
        wanted = [leaves[each] for each in problem.wanted]
        for _ in range(2):
            grads = torch.autograd.grad(loss, wanted, torch.ones_like(loss), retain_graph=True)
            for each, grad in zip(problem.wanted, grads, strict=True):
                assert_same_tensor(grad, got.grads[each])


def test_options_of_torch_are_chunks() -> None:
    """batch_chunk_size is chunk_size, to the last bit; chunk_size goes first."""
    problem = ROW.problem(ROW.kinds["bias"], (37, 70), torch.float32)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=3)
    three, five = (run(ROW.ours, problem.asking(chunk_size=size)) for size in (3, 5))
    assert_same_outcome(run(ROW.ours, problem.asking(options=options)), three)
    assert_same_outcome(run(ROW.ours, problem.asking(options=options, chunk_size=5)), five)


@pytest.mark.parametrize("wanted", [("input",), ("linear_weight",), ("linear_bias",), ()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts(reduction: str, wanted: tuple[str, ...]) -> None:
    """Only what wants a gradient gets one: the same as when all do."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = Kind({"reduction": reduction, "chunk_size": 4}, biased=True, ignored=True)
        problem = ROW.problem(kind, (37, 70), dtype)
        everything = run(ROW.ours, problem)
        leaves = {
            name: tensor.detach().requires_grad_(name in wanted)
            for name, tensor in problem.tensors.items()
        }
        loss = ROW.ours(**leaves, **problem.options)
        assert_same_tensor(loss.detach(), everything.loss)
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.backward(torch.ones_like(loss))
        for name, leaf in leaves.items():
            if name in wanted:
                assert leaf.grad is not None
                assert_same_tensor(leaf.grad, everything.grads[name])
            else:
                assert leaf.grad is None


def test_one_row_without_a_batch() -> None:
    for name, kind in ROW.kinds.items():
        problem = ROW.problem(kind, (7,), torch.float64)
        loss, lse = ROW.ours(**problem.tensors, **problem.options, return_lse=True)
        assert loss.shape == lse.shape == (), name
        assert_near(loss, ROW.expected(problem).loss, ROW.roundings, name, 1.0)


def test_tied_weights() -> None:
    """The embedding's weight is the output layer's: its gradients are added up."""
    ids, target = torch.tensor([1, 4, 2, 2]), torch.tensor([0, 5, 6, 1])
    values = torch.randn(7, 5, dtype=torch.float64)
    grads = []
    for function in (linear_cross_entropy, F.linear_cross_entropy):
        weight = values.clone().requires_grad_()
        function(F.embedding(ids, weight).tanh(), weight, target).backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_autocast_of_parameters(dtype: torch.dtype) -> None:
    """Hidden states in half precision, parameters in float32: as a linear layer has them."""
    problem = ROW.problem(ROW.kinds["bias"], (37, 70), dtype)
    leaves = problem.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = (
            F.linear(leaves["input"], torch.eye(24, dtype=dtype))
            if dtype == torch.float32
            else leaves["input"]
        )
        assert hidden.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        loss = ROW.ours(**{**leaves, "input": hidden}, **problem.options)
    loss.backward()
    assert loss.dtype == (torch.float32 if dtype == torch.float32 else dtype)
    want = ROW.expected(problem)
    units = ROW.roundings * (2**16 if dtype == torch.float32 else 1)
    assert_near(loss.detach(), want.loss, units)
    for name in problem.wanted:
        grad = leaves[name].grad
        assert grad is not None and grad.dtype == dtype
        assert_near(grad, want.grads[name], units, name)


def test_empty_batches() -> None:
    """Parameters have gradients of zero."""
    for dtype in DTYPES:
        for reduction in ("mean", "sum", "none"):
            kind = Kind({"reduction": reduction, "chunk_size": 4}, biased=True)
            problem = ROW.problem(kind, (0, 7), dtype)
            got = run(ROW.ours, problem)
            assert got.loss.isnan() if reduction == "mean" else not got.loss.any()
            for name, grad in got.grads.items():
                assert torch.equal(grad, torch.zeros_like(problem.tensors[name])), name


@pytest.mark.parametrize("shape", [(64, 1), (3, 2)], ids=str)
def test_few_classes(shape: tuple[int, int]) -> None:
    for name, kind in ROW.kinds.items():
        problem = ROW.problem(kind, shape, torch.float64)
        assert_expected(run(ROW.ours, problem), ROW.expected(problem), ROW.roundings, name)


MEMORY = """
import resource, sys, torch
from fusedopt.nn.functional import cross_entropy, linear_cross_entropy

torch.set_num_threads(1)
rows, classes, features = 1024, 20000, 16
hidden = torch.randn(rows, features, requires_grad=True)
weight = torch.randn(classes, features, requires_grad=True)
target = torch.randint(classes, (rows,))
linear_cross_entropy(hidden[:64], weight, target[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, target).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux only")
def test_there_are_never_all_logits() -> None:
    """78 MB here; an eighth of it at a time, as documented, and torch's buffers for products."""
    pytest.importorskip("resource")
    output = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    ).stdout
    assert int(output) * 1024 < 1024 * 20000 * 4 / 8 + (8 << 20)


def test_logits_are_not_kept() -> None:
    """What is saved for the backward pass are gradients of the size of the arguments."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    problem = ROW.problem(ROW.kinds["bias"], (64, 300), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ROW.ours(**problem.leaves())
    assert sorted(saved) == sorted(problem.tensors[name].numel() for name in problem.wanted)
