"""The losses in autograd's graph: backward passes of every sort, hooks, modes, and what is refused.

Their gradient is there before the backward pass, which must not show.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.losses import (
    CASES,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    MSE,
    OVER_CLASSES,
    ROWS,
    Outcome,
    Problem,
    Row,
    assert_expected,
    assert_near,
    assert_same_outcome,
    assert_same_tensor,
    run,
    short,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from fusedopt.nn import functional as ours

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"cross_entropy": (5, 11), "linear_cross_entropy": (9, 11), "mse_loss": (5, 11)}
SOME = ["cross_entropy-default", "cross_entropy-smooth-weighted-ignored-none"]
SOME += ["cross_entropy-probabilities", "cross_entropy-probabilities-smooth-weighted-none"]
SOME += ["linear_cross_entropy-bias", "linear_cross_entropy-chunked-smooth-none"]
SOME += ["linear_cross_entropy-chunked", "linear_cross_entropy-probabilities"]
SOME += ["mse_loss-default", "mse_loss-sum"]
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
by_case = pytest.mark.parametrize("case", SOME)


def example(case: str, dtype: torch.dtype = torch.float32) -> tuple[Row, Problem]:
    row, kind = CASES[case]
    return row, row.problem(kind, SHAPES[row.name], dtype)


def forward(row: Row, problem: Problem) -> tuple[Tensor, list[Tensor]]:
    leaves = problem.leaves()
    loss = row.ours(**leaves, **problem.options)
    return loss, [leaves[name] for name in problem.wanted]


def ones(loss: Tensor) -> Tensor:
    return torch.ones_like(loss)


# -- more than one backward pass ----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_second_backward_pass_gives_the_same(case: str) -> None:
    """Also after one by another gradient: what is kept is not scaled itself."""
    row, problem = example(case)
    loss, wanted = forward(row, problem)
    first = torch.autograd.grad(loss, wanted, ones(loss), retain_graph=True)
    torch.autograd.grad(loss, wanted, 3 * ones(loss), retain_graph=True)
    second = torch.autograd.grad(loss, wanted, ones(loss), retain_graph=True)
    third = torch.autograd.grad(loss, wanted, ones(loss))
    for before, after, last in zip(first, second, third, strict=True):
        assert_same_tensor(before, after)
        assert_same_tensor(before, last)


@by_case
def test_what_one_backward_pass_returned_may_be_written_to(case: str) -> None:
    """As an optimizer, or clipping, does: the next one has the gradient as it was."""
    row, problem = example(case)
    loss, wanted = forward(row, problem)
    first = [g.clone() for g in torch.autograd.grad(loss, wanted, ones(loss), retain_graph=True)]
    for tensor in wanted:
        tensor.grad = None
    loss.backward(ones(loss), retain_graph=True)
    for tensor, grad in zip(wanted, first, strict=True):
        assert tensor.grad is not None
        assert_same_tensor(tensor.grad, grad)
        tensor.grad.mul_(100)
        tensor.grad = None
    try:
        loss.backward(ones(loss))
    except RuntimeError as error:
        # torch's saved tensors say so themselves; a wrong gradient would be the fault.
        assert "modified by an inplace operation" in str(error)
        return
    for tensor, grad in zip(wanted, first, strict=True):
        assert tensor.grad is not None
        assert_same_tensor(tensor.grad, grad)


@by_case
def test_backward_accumulates(case: str) -> None:
    row, problem = example(case)
    single = run(row.ours, problem)
    loss, wanted = forward(row, problem)
    for _ in range(3):
        loss.backward(ones(loss), retain_graph=True)
    for tensor, name in zip(wanted, problem.wanted, strict=True):
        grad = single.grads[name]
        assert tensor.grad is not None
        assert_same_tensor(tensor.grad, grad + grad + grad, name)


@pytest.mark.parametrize("case", CASES)
def test_a_second_backward_pass_without_the_graph(case: str) -> None:
    row, problem = example(case)
    loss, wanted = forward(row, problem)
    loss.backward(ones(loss))
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward(ones(loss))


@by_case
def test_memory_goes_with_the_graph(case: str) -> None:
    """After a backward pass nothing holds what was saved, though the loss is still there; but for
    leaves, which the graph leads to."""
    row, problem = example(case)
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            saved.append(weakref.ref(tensor))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, wanted = forward(row, problem)
    loss.backward(ones(loss))
    del wanted
    gc.collect()
    assert saved and all(each() is None for each in saved)
    assert loss.grad_fn is not None


# -- incoming gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("case", CASES)
def test_incoming_gradients(case: str, dtype: torch.dtype) -> None:
    """Scaled ones, and other ones for each row: as torch has them."""
    row, kind = CASES[case]
    for shape in row.shapes[1::2]:
        problem = row.problem(kind, shape, dtype)
        plain = row.ours(**problem.tensors, **problem.options)
        random = torch.Generator().manual_seed(1)
        grad = torch.randn(plain.shape, generator=random).to(dtype)
        got = run(row.ours, problem, grad)
        # The formula has the gradients of a sum over rows; weigh the rows before.
        if plain.dim() == 0:
            want = row.expected(problem)
            factor = float(grad)
            want.grads = {name: each * factor for name, each in want.grads.items()}
            want.grad_scale *= abs(factor)
            assert_expected(got, want, 1.5 * row.roundings, str(shape))
        elif kind.is_in_torch:
            theirs = run(row.theirs, problem.to(torch.float64), grad.double())
            for name, each in got.grads.items():
                units, want_grad = 3 * row.roundings, theirs.grads[name].numpy()
                assert_near(each, want_grad, units, f"{shape} {name}", 1.0)


@by_case
def test_a_gradient_of_zero_and_one_that_is_not_finite(case: str) -> None:
    row, problem = example(case)
    single = run(row.ours, problem)
    zero = run(row.ours, problem, torch.zeros_like(single.loss))
    assert all(not grad.any() for grad in zero.grads.values())
    nan = run(row.ours, problem, torch.full_like(single.loss, torch.nan))
    if "ignored" not in case and "chunked-smooth-none" not in case:  # it has ignored rows, too
        assert all(bool(grad.isnan().all()) for grad in nan.grads.values())


def test_expanded_and_strided_incoming_gradients() -> None:
    for case in ("cross_entropy-none", "linear_cross_entropy-none", "mse_loss-none"):
        row, problem = example(case)
        shape = run(row.ours, problem).loss.shape
        for grad in (torch.tensor(2.0).expand(shape), torch.randn(*shape, 2)[..., 0]):
            got, want = run(row.ours, problem, grad), run(row.ours, problem, grad.contiguous())
            assert_same_outcome(got, want, case)


def test_incoming_gradients_of_rows_of_images() -> None:
    problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds["none"], (3, 5, 2, 4), torch.float64)
    grad = torch.randn(3, 2, 4, dtype=torch.float64)
    got, theirs = run(ours.cross_entropy, problem, grad), run(CROSS_ENTROPY.theirs, problem, grad)
    torch.testing.assert_close(got.grads, theirs.grads, rtol=1e-12, atol=1e-14)


@by_row
def test_a_loss_that_is_part_of_another(row: Row) -> None:
    """A scaled mean, beside something else: as a GradScaler and an auxiliary loss make it."""
    problem = row.problem(row.kinds["default"], SHAPES[row.name], torch.float64)

    def whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(**arguments: Any) -> Tensor:
            regular = arguments["input"].tanh().square().sum()
            return (1024.0 * function(**arguments) - 3) ** 2 + regular

        return loss

    got, theirs = run(whole(row.ours), problem), run(whole(row.theirs), problem)
    torch.testing.assert_close(got.loss, theirs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grads, theirs.grads, rtol=1e-9, atol=1e-9)


@by_row
def test_micro_batches(row: Row) -> None:
    """Gradients that are accumulated over parts of a batch are those of the whole."""
    problem = row.problem(row.kinds["sum"], (12, 11), torch.float64)
    whole = run(row.ours, problem)
    leaves = problem.leaves()
    for begin in range(0, 12, 4):
        part = {
            name: tensor[begin : begin + 4] if name in ("input", "target") else tensor
            for name, tensor in leaves.items()
        }
        row.ours(**part, **problem.options).backward()
    for name in problem.wanted:
        grad = leaves[name].grad
        assert grad is not None
        torch.testing.assert_close(grad, whole.grads[name], rtol=1e-12, atol=1e-14)


# -- derivatives of derivatives, and forward ones -----------------------------------------------


@by_case
def test_create_graph_that_nobody_uses(case: str) -> None:
    row, problem = example(case)
    plain = run(row.ours, problem)
    loss, wanted = forward(row, problem)
    grads = torch.autograd.grad(loss, wanted, ones(loss), create_graph=True)
    for name, grad in zip(problem.wanted, grads, strict=True):
        assert grad.requires_grad
        assert_same_tensor(grad.detach(), plain.grads[name], name)


@by_case
def test_second_derivatives_are_refused(case: str) -> None:
    """Zero would be wrong, without a word."""
    row, problem = example(case)
    loss, wanted = forward(row, problem)
    grads = torch.autograd.grad(loss, wanted, ones(loss), create_graph=True)
    for grad in grads:
        # Of probabilities, a linear layer and a cross-entropy are two of them.
        name = row.name.removeprefix("linear_" if "probabilities" in case else "")
        with pytest.raises(RuntimeError, match=rf"torch\.nn\.functional\.{name}"):
            torch.autograd.grad(grad.sum(), wanted, retain_graph=True, allow_unused=True)


@by_row
def test_a_gradient_penalty_is_refused(row: Row) -> None:
    """In the middle of a model, where the second derivative is only a part of the way."""
    problem = row.problem(row.kinds["default"], SHAPES[row.name], torch.float32)
    leaves = problem.leaves()
    hidden = leaves["input"].tanh()
    loss = row.ours(**{**leaves, "input": hidden}, **problem.options)
    (grad,) = torch.autograd.grad(loss, leaves["input"], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"torch\.nn\.functional\.{row.name}"):
        grad.square().sum().backward()


@by_case
def test_forward_mode_is_refused(case: str) -> None:
    row, problem = example(case)
    if problem.options.get("reduction") == "none" and row is MSE:
        return  # torch's own
    for name in problem.wanted:
        leaves = dict(problem.tensors)
        with forward_ad.dual_level():
            tangent = torch.ones_like(leaves[name])
            leaves[name] = forward_ad.make_dual(leaves[name], tangent)
            with pytest.raises(NotImplementedError, match=r"torch\.nn\.functional\."):
                row.ours(**leaves, **problem.options)


@by_case
def test_functional_gradients(case: str) -> None:
    row, problem = example(case, torch.float64)
    want = run(row.ours, problem)

    def of_input(input: Tensor) -> Tensor:
        loss: Tensor = row.ours(**{**problem.tensors, "input": input}, **problem.options)
        return loss.sum()

    got = torch.func.grad(of_input)(problem.tensors["input"])
    torch.testing.assert_close(got, want.grads["input"], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    """The gradient is the slope of the loss."""
    row, kind = CASES[case]
    shapes = [(3, 4), (1, 66)] if row is not CROSS_ENTROPY else [(3, 4), (2, 3, 2), (1, 66)]
    for shape in shapes:
        problem = row.problem(kind, shape, torch.float64)
        leaves = problem.leaves()

        def loss(*wanted: Tensor, leaves: Any = leaves, problem: Problem = problem) -> Any:
            named = dict(zip(problem.wanted, wanted, strict=True))
            return row.ours(**{**leaves, **named}, **problem.options)

        inputs = [leaves[name] for name in problem.wanted]
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=shape == (1, 66))


# -- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@by_case
def test_without_grad(case: str, mode: Any) -> None:
    row, problem = example(case)
    want = run(row.ours, problem).loss
    leaves = problem.leaves()
    with mode():
        loss = row.ours(**leaves, **problem.options)
    assert not loss.requires_grad and loss.grad_fn is None
    assert_same_tensor(loss, want)


@by_case
def test_inference_tensors(case: str) -> None:
    """They can be input, as long as nobody wants a gradient."""
    row, problem = example(case)
    with torch.inference_mode():
        tensors = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    assert_same_tensor(row.ours(**tensors, **problem.options), run(row.ours, problem).loss)


@by_case
def test_set_grad_enabled_inside_of_no_grad(case: str) -> None:
    row, problem = example(case)
    with torch.no_grad(), torch.enable_grad():
        got = run(row.ours, problem)
    assert_same_outcome(got, run(row.ours, problem))


@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_lse_has_no_gradient(row: Row) -> None:
    for name in ("default", "none", "probabilities"):
        problem = row.problem(row.kinds[name], (5, 11), torch.float32)
        loss, lse = row.ours(**problem.leaves(), **problem.options, return_lse=True)
        assert loss.requires_grad and not lse.requires_grad and lse.is_leaf
        with pytest.raises(RuntimeError, match="does not require grad"):
            lse.sum().backward()


# -- hooks --------------------------------------------------------------------------------------


@by_case
def test_hooks_on_tensors(case: str) -> None:
    row, problem = example(case)
    plain = run(row.ours, problem)
    leaves = problem.leaves()
    seen = {}
    for name in problem.wanted:

        def hook(grad: Tensor, name: str = name) -> Tensor:
            seen[name] = grad.clone()
            return 2 * grad

        leaves[name].register_hook(hook)
    loss = row.ours(**leaves, **problem.options)
    loss.register_hook(lambda grad: 4 * grad)
    loss.backward(ones(loss))
    for name in problem.wanted:
        grad = leaves[name].grad
        assert grad is not None
        if row is not LINEAR_CROSS_ENTROPY or plain.loss.dim() == 0:
            assert_same_tensor(seen[name], 4 * plain.grads[name], name)
        assert_same_tensor(grad, 2 * seen[name], name)


@by_case
def test_hooks_on_the_node(case: str) -> None:
    row, problem = example(case)
    loss, wanted = forward(row, problem)
    assert loss.grad_fn is not None and loss.grad_fn.name().startswith("Fused")
    calls: list[str] = []
    loss.grad_fn.register_prehook(lambda grads: calls.append("before"))
    loss.grad_fn.register_hook(lambda inputs, outputs: calls.append("after"))
    loss.backward(ones(loss))
    assert calls == ["before", "after"]


@by_case
def test_hooks_on_saved_tensors(case: str) -> None:
    """What is saved may be put elsewhere, as save_on_cpu and activation offloading do."""
    row, problem = example(case)
    plain = run(row.ours, problem)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.clone())
        return packed[-1]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        got = run(row.ours, problem)
    assert packed
    assert_same_outcome(got, plain)
    with torch.autograd.graph.save_on_cpu():
        assert_same_outcome(run(row.ours, problem), plain)


@by_case
def test_checkpointing(case: str) -> None:
    """torch.utils.checkpoint: the forward pass is run once more."""
    row, problem = example(case)

    def checkpointed(**arguments: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda: row.ours(**arguments), use_reentrant=False)

    assert_same_outcome(run(checkpointed, problem), run(row.ours, problem))


@by_case
def test_only_what_is_needed_has_a_gradient(case: str) -> None:
    row, problem = example(case)
    for name in problem.wanted:
        alone = Problem(problem.tensors, problem.options, (name,))
        loss, (leaf,) = forward(row, alone)
        loss.backward(ones(loss))
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
    loss, wanted = forward(row, problem)
    (first,) = torch.autograd.grad(loss, wanted[:1], ones(loss), retain_graph=True)
    (last,) = torch.autograd.grad(loss, wanted[-1:], ones(loss))
    everything = run(row.ours, problem)
    assert_same_tensor(first, everything.grads[problem.wanted[0]])
    assert_same_tensor(last, everything.grads[problem.wanted[-1]])


@by_case
def test_two_threads_in_one_graph(case: str) -> None:
    """Two losses of the same tensors, with one backward pass."""
    row, problem = example(case)
    leaves = problem.leaves()
    total = sum(row.ours(**leaves, **problem.options).sum() for _ in range(2))
    assert isinstance(total, Tensor)
    total.backward()
    single = run(row.ours, problem)
    for name in problem.wanted:
        grad = leaves[name].grad
        assert grad is not None
        assert_same_tensor(grad, 2 * single.grads[name], name)


def test_the_loss_does_not_change_what_it_was_given() -> None:
    for case, (row, kind) in CASES.items():
        problem = row.problem(kind, SHAPES[row.name], torch.float32)
        before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
        versions = {name: tensor._version for name, tensor in problem.tensors.items()}
        run(row.ours, problem)
        for name, tensor in problem.tensors.items():
            assert_same_tensor(tensor, before[name], f"{case} {name}")
            assert tensor._version == versions[name]


def test_writing_to_what_was_saved_is_noticed() -> None:
    """Of "none", and of probabilities, tensors are needed in the backward pass as they were."""
    for case, name in [
        ("linear_cross_entropy-none", "input"),
        ("linear_cross_entropy-none", "linear_weight"),
        ("linear_cross_entropy-none", "target"),
        ("linear_cross_entropy-weighted-none", "weight"),
        ("cross_entropy-probabilities", "input"),
        ("cross_entropy-probabilities-weighted", "weight"),
    ]:
        row, problem = example(case)
        leaves = problem.leaves()
        loss = row.ours(**leaves, **problem.options)
        with torch.no_grad():
            leaves[name].add_(0 if name == "target" else 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_writing_to_what_is_not_needed_is_no_harm() -> None:
    """The gradient is there already: logits may be overwritten, as torch's cannot."""
    problem = CROSS_ENTROPY.problem(CROSS_ENTROPY.kinds["default"], (5, 11), torch.float32)
    plain = run(ours.cross_entropy, problem)
    leaves = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    leaf = leaves["input"].requires_grad_()
    loss = ours.cross_entropy(leaf, leaves["target"])
    with torch.no_grad():
        leaf.zero_()
        leaves["target"].zero_()
    loss.backward()
    got = Outcome(loss.detach(), {"input": leaf.grad})
    assert_same_outcome(got, plain)
