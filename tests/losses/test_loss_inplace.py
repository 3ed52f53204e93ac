"""inplace=True: the logits' memory becomes their gradient, and whoever needs them is told so."""

from collections.abc import Callable

import pytest
import torch
from support.losses import (
    CROSS_ENTROPY,
    MOST_DTYPES,
    Outcome,
    Problem,
    assert_same_outcome,
    assert_same_tensor,
    run,
    spread,
)
from torch import Tensor

from fusedopt.nn.functional import cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {name: kind for name, kind in CROSS_ENTROPY.kinds.items() if kind.target == "classes"}
SHAPES = [*CROSS_ENTROPY.shapes, (130, 64), (2, 33000)]


def problem_of(name: str = "default", shape: tuple[int, ...] = (5, 11)) -> Problem:
    return CROSS_ENTROPY.problem(KINDS[name], shape, torch.float32)


@pytest.mark.parametrize("dtype", MOST_DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_same_bits_as_not_in_place(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        problem = CROSS_ENTROPY.problem(KINDS[name], shape, dtype)
        for lse in (False, True):
            plain = run(cross_entropy, problem, return_lse=lse)
            assert_same_outcome(
                run(cross_entropy, problem, return_lse=lse, inplace=True), plain, str(shape)
            )


def through(problem: Problem, lay: Callable[[Tensor], Tensor]) -> tuple[Outcome, Tensor, Tensor]:
    """Of a leaf whose values are laid into other memory: the outcome, and that memory before and
    after. The memory is not a leaf."""
    leaf = problem.tensors["input"].clone().requires_grad_()
    logits = lay(leaf)
    before, version = logits.detach().clone(), logits._version
    loss = cross_entropy(logits, problem.tensors["target"], inplace=True, **problem.options)
    assert logits._version > version
    loss.backward(torch.ones_like(loss))
    return Outcome(loss.detach(), {"input": leaf.grad}), before, logits.detach()


@pytest.mark.parametrize("shape", [(5, 11), (7,), (3, 70), (2, 1500), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("name", ["default", "smooth-weighted-ignored-none", "ignored-sum"])
def test_the_memory_of_the_logits_is_the_gradient(name: str, shape: tuple[int, ...]) -> None:
    problem = problem_of(name, shape)
    leaf = problem.tensors["input"].clone().requires_grad_()
    logits = leaf * 1
    address = logits.data_ptr()
    weight = problem.tensors.get("weight")
    loss = cross_entropy(logits, problem.tensors["target"], weight, **problem.options, inplace=True)
    plain = run(cross_entropy, problem)
    assert_same_tensor(logits.detach(), plain.grads["input"])
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss), retain_graph=True)
    assert grad.data_ptr() == address == logits.data_ptr()
    # A gradient other than one is a product; in memory of its own, as the graph is kept.
    three = 3 * torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, logits, three, retain_graph=True)
    assert grad.data_ptr() != address
    assert_same_tensor(logits.detach(), plain.grads["input"])
    assert_same_tensor(grad, 3 * plain.grads["input"])
    (grad,) = torch.autograd.grad(loss, logits, three)
    assert_same_tensor(grad, 3 * plain.grads["input"])


@pytest.mark.parametrize("how", ["strided", "gaps", "transposed", "classes last", "offset"])
@pytest.mark.parametrize("shape", [(5, 11), (70, 3), (3, 1500), (3, 5, 4), (2, 3, 4, 5)], ids=str)
def test_layouts_in_place(shape: tuple[int, ...], how: str) -> None:
    """Logits that are a part of something: no other element is touched."""
    problem = problem_of("none", shape)
    plain = run(cross_entropy, problem)

    def lay(leaf: Tensor) -> Tensor:
        laid = spread(leaf.detach(), how)
        whole = laid.as_strided(
            (laid.untyped_storage().nbytes() // laid.element_size(),), (1,), 0
        ).clone()
        return whole.as_strided(laid.shape, laid.stride(), laid.storage_offset()).copy_(leaf)

    leaf = problem.tensors["input"].clone().requires_grad_()
    logits = lay(leaf)
    whole = logits.detach().as_strided(
        (logits.untyped_storage().nbytes() // logits.element_size(),), (1,), 0
    )
    mine = torch.zeros(whole.shape, dtype=torch.bool)
    mine.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
    around = whole[~mine].clone()
    loss = cross_entropy(logits, problem.tensors["target"], inplace=True, **problem.options)
    assert_same_tensor(logits.detach(), plain.grads["input"])
    assert torch.equal(whole[~mine], around) or around.isnan().any()
    loss.backward(torch.ones_like(loss))
    assert_same_tensor(leaf.grad, plain.grads["input"]) if leaf.grad is not None else None
    assert leaf.grad is not None


def test_the_version_is_counted_up() -> None:
    outcome, before, after = through(problem_of(), lambda leaf: leaf * 1)
    assert not torch.equal(before, after)
    assert_same_outcome(outcome, run(cross_entropy, problem_of()))


def test_also_where_nobody_wants_a_gradient() -> None:
    problem = problem_of()
    logits = problem.tensors["input"].clone()
    version = logits._version
    loss = cross_entropy(logits, problem.tensors["target"], inplace=True)
    assert logits._version > version and not loss.requires_grad
    plain = run(cross_entropy, problem)
    assert_same_tensor(logits, plain.grads["input"])
    assert_same_tensor(loss, plain.loss)


def test_a_leaf_that_wants_none_may_be_overwritten_without_grad() -> None:
    problem = problem_of()
    leaf = problem.tensors["input"].clone().requires_grad_()
    with torch.no_grad():
        cross_entropy(leaf, problem.tensors["target"], inplace=True)
    assert_same_tensor(leaf.detach(), run(cross_entropy, problem).grads["input"])


def test_inference_mode() -> None:
    problem = problem_of()
    with torch.inference_mode():
        logits = problem.tensors["input"].clone()
        loss = cross_entropy(logits, problem.tensors["target"], inplace=True)
    assert_same_tensor(logits, run(cross_entropy, problem).grads["input"])
    assert_same_tensor(loss, run(cross_entropy, problem).loss)


# -- layers that have saved the logits ----------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [torch.tanh, torch.sigmoid, torch.exp, lambda x: x.softmax(1), torch.relu]
)
def test_a_layer_that_saved_its_output_raises(layer: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(5, 11, requires_grad=True)
    loss = cross_entropy(layer(leaf), torch.arange(5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "layer", [lambda x: x * 1, lambda x: x + 1, torch.nn.Linear(11, 11), torch.nn.Conv1d(5, 5, 1)]
)
def test_a_layer_that_saved_none_is_right(layer: Callable[[Tensor], Tensor]) -> None:
    values, target = torch.randn(5, 11), torch.arange(5)
    grads = []
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        cross_entropy(layer(leaf), target, inplace=inplace).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert_same_tensor(*grads)


def test_a_second_use_of_the_logits_raises() -> None:
    leaf = torch.randn(5, 11, requires_grad=True)
    logits = leaf * 1
    other = logits.square().sum()  # which needs them as they were
    loss = cross_entropy(logits, torch.arange(5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.parametrize("write", [Tensor.zero_, lambda x: x.add_(1), lambda x: x[0].mul_(2)])
def test_logits_that_are_written_to_between_forward_and_backward(
    write: Callable[[Tensor], Tensor],
) -> None:
    """They are the gradient: it would be wrong without a word."""
    leaf = torch.randn(5, 11, requires_grad=True)
    logits = leaf * 1
    loss = cross_entropy(logits, torch.arange(5), inplace=True)
    with torch.no_grad():
        write(logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_view_that_is_written_to() -> None:
    leaf = torch.randn(2, 5, 11, requires_grad=True)
    whole = leaf * 1
    loss = cross_entropy(whole[0], torch.arange(5), inplace=True)
    with torch.no_grad():
        whole[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_same_logits_twice() -> None:
    """The second loss would be one of the gradient."""
    leaf = torch.randn(5, 11, requires_grad=True)
    logits = leaf * 1
    first = cross_entropy(logits, torch.arange(5), inplace=True)
    second = cross_entropy(logits, torch.arange(5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()


def test_views_of_logits_that_are_not_leaves() -> None:
    """As a model has them that drops the last position."""
    values, target = torch.randn(4, 6, 11), torch.randint(11, (4, 5))
    outcomes = []
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        logits = (leaf * 1)[:, :-1]
        loss = cross_entropy(logits.transpose(1, 2), target, inplace=inplace)
        loss.backward()
        outcomes.append(Outcome(loss.detach(), {"input": leaf.grad}))
    assert_same_outcome(*outcomes)


def test_reshaped_logits_of_a_language_model() -> None:
    values, target = torch.randn(4, 6, 110), torch.randint(110, (4, 6))
    outcomes = []
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        logits = leaf * 1
        loss = cross_entropy(logits.view(-1, 110), target.view(-1), inplace=inplace)
        loss.backward()
        assert leaf.grad is not None
        if inplace:
            assert_same_tensor(logits.detach(), leaf.grad)
        outcomes.append(Outcome(loss.detach(), {"input": leaf.grad}))
    assert_same_outcome(*outcomes)


def test_gradients_that_were_returned_stay_as_they_are() -> None:
    """Whatever the next backward pass multiplies them by, in place or not."""
    problem = problem_of()
    plain = run(cross_entropy, problem).grads["input"]
    for inplace in (False, True):
        logits = problem.tensors["input"].clone().requires_grad_() * 1
        loss = cross_entropy(logits, problem.tensors["target"], inplace=inplace)
        (first,) = torch.autograd.grad(loss, logits, torch.tensor(1.0), retain_graph=True)
        (second,) = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)
        (third,) = torch.autograd.grad(loss, logits, torch.tensor(5.0))
        for grad, factor in ((first, 1), (second, 3), (third, 5)):
            assert_same_tensor(grad, factor * plain)


def test_a_second_backward_pass_in_place() -> None:
    problem = problem_of()
    plain = run(cross_entropy, problem).grads["input"]
    logits = problem.tensors["input"].clone().requires_grad_() * 1
    loss = cross_entropy(logits, problem.tensors["target"], inplace=True)
    for factor in (1.0, 2.0, 1.0):
        (grad,) = torch.autograd.grad(loss, logits, torch.tensor(factor), retain_graph=True)
        assert_same_tensor(grad, factor * plain)


def test_without_the_graph() -> None:
    loss, _ = in_place_loss()
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


def in_place_loss() -> tuple[Tensor, Tensor]:
    leaf = torch.randn(5, 11, requires_grad=True)
    return cross_entropy(leaf * 1, torch.arange(5), inplace=True), leaf


# -- what is refused ----------------------------------------------------------------------------


def test_leaves_are_refused() -> None:
    leaf = torch.randn(5, 11, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf that requires a gradient"):
        cross_entropy(leaf, torch.arange(5), inplace=True)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize(
    "view", [lambda x: x.view(5, 11), lambda x: x[:5], lambda x: x.t(), lambda x: x.detach().t()]
)
def test_views_of_leaves_are_refused(view: Callable[[Tensor], Tensor]) -> None:
    """But for one that is not in the graph."""
    leaf = torch.randn(11, 11)[:5].clone() if view(torch.empty(5, 11)).shape == (5, 11) else None
    leaf = torch.randn(11, 5) if leaf is None else leaf
    leaf.requires_grad_()
    before = leaf.detach().clone()
    logits = view(leaf)
    if not logits.requires_grad:
        cross_entropy(logits, torch.arange(5), inplace=True)
        assert not torch.equal(leaf, before)
        return
    with pytest.raises(RuntimeError, match="leaf that requires a gradient"):
        cross_entropy(logits, torch.arange(5), inplace=True)
    assert torch.equal(leaf, before) and leaf._version == 0


def test_expanded_logits_are_refused() -> None:
    row = torch.randn(1, 11)
    before = row.clone()
    leaf = row.clone().requires_grad_()
    for logits in (row.expand(5, 11), (leaf * 1).expand(5, 11)):
        with pytest.raises(RuntimeError, match=r"expand\(\)"):
            cross_entropy(logits, torch.arange(5), inplace=True)
    assert torch.equal(row, before)


def test_overlapping_logits_are_refused() -> None:
    """Rows that share elements."""
    memory = torch.randn(30)
    before = memory.clone()
    with pytest.raises(RuntimeError, match="lie at one address"):
        cross_entropy(memory.as_strided((5, 11), (3, 1)), torch.arange(5), inplace=True)
    assert torch.equal(memory, before)


def test_probabilities_are_refused() -> None:
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(5, 11)
        before = logits.clone()
        with pytest.raises(RuntimeError, match="does not take probabilities"):
            cross_entropy(logits, torch.rand(5, 11, dtype=dtype), inplace=True)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("shape", [(5, 11), (5, 70), (5, 1500), (2, 40000)], ids=str)
def test_nothing_was_written_when_a_target_is_wrong(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True) * 1
    before = logits.detach().clone()
    target = torch.zeros(shape[0], dtype=torch.int64)
    target[-1] = shape[1]
    with pytest.raises(IndexError, match=f"Target {shape[1]} is out of bounds"):
        cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits, before) and logits._version == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": torch.zeros(4, dtype=torch.int64)},
        {"target": torch.zeros(5)},
        {"weight": torch.ones(10)},
        {"label_smoothing": 1.5},
        {"reduction": "none of these"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_nothing_was_written_when_something_does_not_fit(wrong: dict[str, object]) -> None:
    logits = torch.randn(5, 11, requires_grad=True) * 1
    before = logits.detach().clone()
    arguments: dict[str, object] = {"target": torch.arange(5), **wrong}
    with pytest.raises((RuntimeError, ValueError)):
        cross_entropy(logits, inplace=True, **arguments)  # type: ignore[arg-type]
    assert torch.equal(logits, before) and logits._version == 0
