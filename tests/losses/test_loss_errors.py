"""Bad input of losses: torch's own errors, or one that names what is wrong, before anything is
written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.losses import DTYPES, OVER_CLASSES, Row, short
from torch import Tensor
from torch.nn import functional as F

from fusedopt import nn
from fusedopt.nn import functional as ours

pytestmark = pytest.mark.usefixtures("one_thread")


def said(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - it is compared with torch's
        function(*args, **options)
    return caught.type, str(caught.value)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def classes(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# -- targets that are no class ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("wrong", [12, 11, -1, -99, -101, 2**40, -(2**40)])
def test_a_target_out_of_range_is_named(wrong: int, dtype: torch.dtype) -> None:
    """The first of them, and its row."""
    target = torch.tensor([0, 10, wrong, 999, -100])
    for reduction in ("mean", "sum", "none"):
        kind, text = said(
            ours.cross_entropy, floats(5, 11, dtype=dtype), target, reduction=reduction
        )
        assert kind is IndexError
        assert f"Target {wrong} is out of bounds" in text and "row 2 of 5" in text
        assert "11 classes" in text and "ignore_index=-100" in text


def test_torch_says_it_in_the_same_words() -> None:
    kind, text = said(F.cross_entropy, floats(5, 11), torch.tensor([0, 1, 12, 3, 4]))
    assert kind is IndexError and "Target 12 is out of bounds" in text
    kind, text = said(ours.cross_entropy, floats(5, 11), torch.tensor([0, 1, 12, 3, 4]))
    assert kind is IndexError and "Target 12 is out of bounds" in text


@pytest.mark.parametrize("shape", [(11,), (3, 11, 2), (40, 11), (2, 40000)], ids=str)
def test_out_of_range_in_any_shape(shape: tuple[int, ...]) -> None:
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = classes(*rows)
    target.view(-1)[-1] = 50000
    count = target.numel()
    for options in ({}, {"label_smoothing": 0.1}, {"weight": floats(shape[len(shape) > 1])}):
        kind, text = said(ours.cross_entropy, floats(*shape), target, **options)
        assert kind is IndexError
        assert f"Target 50000 is out of bounds. It is that of row {count - 1} of {count}" in text


def test_out_of_range_in_other_dtypes() -> None:
    for dtype in (torch.int32, torch.uint8):
        target = torch.tensor([0, 12, 1], dtype=dtype)
        kind, text = said(ours.cross_entropy, floats(3, 11), target)
        assert kind is IndexError and "Target 12 is out of bounds" in text
    # No uint8 is -1.
    kind, text = said(ours.cross_entropy, floats(1, 11), torch.tensor([255], dtype=torch.uint8))
    assert kind is IndexError and "Target 255 is out of bounds" in text


def test_an_ignored_class_is_not_out_of_range() -> None:
    for index in (-1, 11, 10**12, -(10**12)):
        loss = ours.cross_entropy(floats(2, 11), torch.tensor([3, index]), ignore_index=index)
        torch.testing.assert_close(loss, torch.tensor(11.0).log())


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_out_of_range_in_a_linear_layer(reduction: str, chunk_size: int | None) -> None:
    """Found before the first chunk, and counted through all of them."""
    target = torch.tensor([0, 1, 2, 3, 4, 5, 12, 7])
    options = {"reduction": reduction, "chunk_size": chunk_size}
    x, w = floats(8, 4).requires_grad_(), floats(11, 4).requires_grad_()
    kind, text = said(ours.linear_cross_entropy, x, w, target, **options)
    assert kind is IndexError
    assert "Target 12 is out of bounds. It is that of row 6 of 8" in text


def test_out_of_range_in_modules() -> None:
    kind, text = said(nn.CrossEntropyLoss(), floats(3, 11), torch.tensor([0, 12, 1]))
    assert kind is IndexError and "Target 12 is out of bounds" in text
    linear = nn.LinearCrossEntropyLoss(4, 11)
    kind, text = said(linear, floats(3, 4), torch.tensor([0, 12, 1]))
    assert kind is IndexError and "Target 12 is out of bounds" in text


# -- what torch refuses -------------------------------------------------------------------------

CROSS_ENTROPY: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "batch": ((floats(3, 5), classes(4)), {}),
    "no batch": ((floats(5), classes(5)), {}),
    "batch of one, smooth": ((floats(5), classes(1)), {"label_smoothing": 0.1}),
    "batch of one, in float": ((floats(5), floats(1)), {}),
    "size": ((floats(3, 5, 2), classes(3, 4)), {}),
    "dimensions": ((floats(3, 5, 2), classes(3)), {}),
    "too many dimensions": ((floats(3, 5), classes(3, 1)), {}),
    "no dimension": ((floats(), classes()), {}),
    "classes as probabilities": ((floats(3, 5), classes(3, 5)), {}),
    "float classes": ((floats(3, 5), floats(3)), {}),
    "double classes": ((floats(3, 5), floats(3, dtype=torch.float64)), {}),
    "bool classes": ((floats(3, 5), classes(3, dtype=torch.bool)), {}),
    "int16 classes": ((floats(3, 5), classes(3, dtype=torch.int16)), {}),
    "int8 classes": ((floats(3, 5), classes(3, dtype=torch.int8)), {}),
    "integers": ((classes(3, 5), classes(3)), {}),
    "bool": ((classes(3, 5, dtype=torch.bool), classes(3)), {}),
    "complex": ((floats(3, 5, dtype=torch.complex64), classes(3)), {}),
    "few weights": ((floats(3, 5), classes(3), floats(4)), {}),
    "many weights": ((floats(3, 5), classes(3), floats(6)), {}),
    "weights of two dimensions": ((floats(3, 5), classes(3), floats(1, 5)), {}),
    "weight that is a number": ((floats(3, 5), classes(3), floats()), {}),
    "double weights": ((floats(3, 5), classes(3), floats(5, dtype=torch.float64)), {}),
    "half weights": ((floats(3, 5), classes(3), floats(5, dtype=torch.float16)), {}),
    "integer weights": ((floats(3, 5), classes(3), classes(5)), {}),
    "few weights of probabilities": ((floats(3, 5), floats(3, 5), floats(4)), {}),
    "few weights, smooth": ((floats(3, 5), classes(3), floats(4)), {"label_smoothing": 0.1}),
    "smoothing above one": ((floats(3, 5), classes(3)), {"label_smoothing": 1.5}),
    "smoothing of probabilities": ((floats(3, 5), floats(3, 5)), {"label_smoothing": 1.5}),
    "ignored probabilities": ((floats(3, 5), floats(3, 5)), {"ignore_index": 2}),
    "reduction": ((floats(3, 5), classes(3)), {"reduction": "average"}),
    "reduction is no text": ((floats(3, 5), classes(3)), {"reduction": None}),
    "target on meta": ((floats(3, 5), classes(3).to("meta")), {}),
    "weight on meta": ((floats(3, 5), classes(3), floats(5).to("meta")), {}),
}


@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_cross_entropy_raises_what_torch_raises(case: str) -> None:
    """Type and text, also with gradients and in place; and the logits stay as they are."""
    args, options = CROSS_ENTROPY[case]
    want = said(F.cross_entropy, *args, **options)
    assert said(ours.cross_entropy, *args, **options) == want
    before = args[0].clone()
    assert said(ours.cross_entropy, *args, inplace=True, **options) == want
    assert torch.equal(args[0], before) and args[0]._version == 0
    if args[0].is_floating_point():
        leaf = args[0].clone().requires_grad_()
        assert said(ours.cross_entropy, leaf, *args[1:], **options) == want


@pytest.mark.parametrize("case", [c for c, (args, _) in CROSS_ENTROPY.items() if len(args) == 2])
def test_the_module_raises_what_torch_raises(case: str) -> None:
    args, options = CROSS_ENTROPY[case]
    want = said(lambda: torch.nn.CrossEntropyLoss(**options)(*args))
    assert said(lambda: nn.CrossEntropyLoss(**options)(*args)) == want


MSE: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "shapes": ((floats(3, 5), floats(4)), {}),
    "integers": ((classes(3), classes(3)), {}),
    "bool": ((classes(3, dtype=torch.bool), classes(3, dtype=torch.bool)), {}),
    "reduction": ((floats(3), floats(3)), {"reduction": "average"}),
    "target on meta": ((floats(3), floats(3).to("meta")), {}),
    "weight": ((floats(3), floats(3)), {"weight": floats(2)}),
    "weight, reduction": ((floats(3), floats(3)), {"weight": floats(3), "reduction": "average"}),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", MSE)
def test_mse_raises_what_torch_raises(case: str) -> None:
    args, options = MSE[case]
    assert said(ours.mse_loss, *args, **options) == said(F.mse_loss, *args, **options)


LINEAR: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "no dimension": ((floats(), floats(5, 4), classes()), {}),
    "three dimensions": ((floats(2, 3, 4), floats(5, 4), classes(2, 3)), {}),
    "weight of one": ((floats(3, 4), floats(4), classes(3)), {}),
    "features": ((floats(3, 4), floats(5, 6), classes(3)), {}),
    "batch": ((floats(3, 4), floats(5, 4), classes(2)), {}),
    "bias": ((floats(3, 4), floats(5, 4), classes(3)), {"linear_bias": floats(4)}),
    "bias of two": ((floats(3, 4), floats(5, 4), classes(3)), {"linear_bias": floats(1, 5)}),
    "outputs without a batch": ((floats(4), floats(5, 2, 4), classes(2)), {}),
    "ignored probabilities": ((floats(3, 4), floats(5, 4), floats(3, 5)), {"ignore_index": -100}),
    "float classes": ((floats(3, 4), floats(5, 4), floats(3)), {}),
    "classes as probabilities": ((floats(3, 4), floats(5, 4), classes(3, 5)), {}),
    "weights": ((floats(3, 4), floats(5, 4), classes(3)), {"weight": floats(4)}),
    "double weights": (
        (floats(3, 4), floats(5, 4), classes(3)),
        {"weight": floats(5, dtype=torch.float64)},
    ),
    "smoothing": ((floats(3, 4), floats(5, 4), classes(3)), {"label_smoothing": 1.5}),
    "reduction": ((floats(3, 4), floats(5, 4), classes(3)), {"reduction": "average"}),
    "dtypes": ((floats(3, 4), floats(5, 4, dtype=torch.float64), classes(3)), {}),
    "bias of another dtype": (
        (floats(3, 4), floats(5, 4), classes(3)),
        {"linear_bias": floats(5, dtype=torch.float16)},
    ),
    "target on meta": ((floats(3, 4), floats(5, 4), classes(3).to("meta")), {}),
    "int16 classes": ((floats(3, 4), floats(5, 4), classes(3, dtype=torch.int16)), {}),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_cross_entropy_raises_what_torch_raises(case: str) -> None:
    args, options = LINEAR[case]
    want = said(F.linear_cross_entropy, *args, **options)
    assert said(ours.linear_cross_entropy, *args, **options) == want
    leaves = [args[0].clone().requires_grad_(), args[1].clone().requires_grad_(), args[2]]
    assert said(ours.linear_cross_entropy, *leaves, **options) == want


# -- what only we refuse ------------------------------------------------------------------------


def test_dtypes_that_only_torch_takes() -> None:
    """Are named, and so is torch's function."""
    args = (floats(3, 5), floats(3, 5), floats(5, dtype=torch.float64))
    assert F.cross_entropy(*args).dtype == torch.float64
    kind, text = said(ours.cross_entropy, *args)
    assert kind is NotImplementedError
    assert "torch.nn.functional.cross_entropy" in text and "weight" in text


@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_weights_that_want_a_gradient(row: Row) -> None:
    """torch refuses them for classes; for probabilities it has one."""
    args = (floats(3, 5), classes(3)) if row.name == "cross_entropy" else ()
    args = args or (floats(3, 4), floats(5, 4), classes(3))
    kind, text = said(row.ours, *args, weight=floats(5).requires_grad_())
    assert kind is RuntimeError and "weight" in text and row.name in text
    with torch.no_grad():
        row.ours(*args, weight=floats(5).requires_grad_())


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size(chunk_size: int) -> None:
    args = (floats(3, 4), floats(5, 4), classes(3))
    kind, text = said(ours.linear_cross_entropy, *args, chunk_size=chunk_size)
    assert kind is ValueError and f"chunk_size is {chunk_size}" in text


@pytest.mark.parametrize("row", OVER_CLASSES, ids=lambda row: row.name)
def test_options_are_given_by_name(row: Row) -> None:
    args = (floats(3, 4), floats(5, 4), classes(3))
    with pytest.raises(TypeError):
        row.ours(*args, None, None, -100, None, "mean", 0.0, True)


def test_what_is_no_tensor() -> None:
    for function in (ours.cross_entropy, ours.mse_loss):
        kind, _ = said(function, [[1.0, 2.0]], classes(1))
        assert kind in (TypeError, RuntimeError, AttributeError)


def test_on_meta_there_are_shapes_only() -> None:
    logits = torch.empty(3, 5, device="meta", requires_grad=True)
    loss = ours.cross_entropy(logits, classes(3).to("meta"))
    loss.backward()
    assert loss.is_meta and loss.shape == () and logits.grad is not None
    assert logits.grad.shape == (3, 5)
    values = torch.empty(3, 5, device="meta", requires_grad=True)
    ours.mse_loss(values, values.detach()).backward()
    assert values.grad is not None and values.grad.is_meta
