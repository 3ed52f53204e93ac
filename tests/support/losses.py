"""The one table of losses that drives all their tests: a row per loss.

To have a new loss tested: write its formula, plainly, together with its gradients, say how its
tensors are made, and add its row.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedopt import nn
from fusedopt._extension import _C
from fusedopt.nn import functional as ours

from .cases import bits, widened
from .reference import Array, Options

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# For tests that take long: float16 goes by the same loops as bfloat16, but for its conversions.
MOST_DTYPES = [
    pytest.param(dtype, id=short(dtype), marks=[pytest.mark.slow] * (dtype == torch.float16))
    for dtype in DTYPES
]
FEATURES = 24  # of a linear layer that no test has a shape for


@dataclass(frozen=True)
class Kind:
    """One way to call a loss: its options, and what tensors it gets."""

    options: Options = field(default_factory=dict)
    target: str = "classes"  # or "probabilities", or "values"
    weighted: bool = False  # two of the weights are zero
    ignored: bool = False  # so is a fifth of the targets
    biased: bool = False

    @property
    def is_in_torch(self) -> bool:
        return not {"z_loss", "return_lse", "chunk_size"} & self.options.keys()

    @property
    def reduction(self) -> str:
        return str(self.options.get("reduction", "mean"))


@dataclass(frozen=True)
class Problem:
    """What a loss is called with, all by name."""

    tensors: Mapping[str, Tensor]
    options: Options
    wanted: tuple[str, ...]  # the tensors that a gradient is wanted of

    def to(self, dtype: torch.dtype) -> "Problem":
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.tensors.items()}
        return replace(self, tensors=cast)

    def having(self, **tensors: Tensor) -> "Problem":
        return replace(self, tensors={**self.tensors, **tensors})

    def asking(self, **options: Any) -> "Problem":
        return replace(self, options={**self.options, **options})

    def leaves(self) -> dict[str, Tensor]:
        """The same memory, as leaves of their own."""
        return {
            name: tensor.detach().requires_grad_(name in self.wanted)
            for name, tensor in self.tensors.items()
        }


@dataclass
class Outcome:
    """A loss and its gradients; or what they have to be."""

    loss: Any
    grads: dict[str, Any]
    lse: Any = None
    # What is right to be off by some units of, even where all that there is happens to be less.
    scale: float = 0
    grad_scale: float = 0


Formula = Callable[..., Outcome]


@dataclass(frozen=True)
class Row:
    """One loss: ours, torch's, the formula, and the kinds of calls that all tests run through."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    our_module: type[torch.nn.Module]
    their_module: type[torch.nn.Module]
    formula: Formula  # of float64, or of more digits
    make: Callable[[Kind, tuple[int, ...], torch.dtype, torch.Generator], dict[str, Tensor]]
    wanted: tuple[str, ...]
    kinds: dict[str, Kind]
    shapes: tuple[tuple[int, ...], ...]  # small ones, and odd
    realistic: tuple[int, ...]  # one that errors can be averaged over
    long_rows: tuple[tuple[int, ...], ...]  # fewer than three, that threads share
    roundings: float  # half units of the largest element, that a result may be off
    with_lse: bool = True
    with_inplace: bool = False

    def problem(
        self, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
    ) -> Problem:
        random = torch.Generator().manual_seed(zlib.crc32(repr((shape, seed)).encode()))
        tensors = self.make(kind, shape, dtype, random)
        wanted = tuple(
            name for name in self.wanted if name in tensors and tensors[name].is_floating_point()
        )
        return Problem(tensors, kind.options, wanted)

    def expected(self, problem: Problem) -> Outcome:
        arrays = {
            name: widened(tensor) if tensor.is_floating_point() else tensor.numpy()
            for name, tensor in problem.tensors.items()
        }
        options = {k: v for k, v in problem.options.items() if k not in ("chunk_size", "inplace")}
        outcome = self.formula(**arrays, **options)
        grads = {name: outcome.grads[name] for name in problem.wanted}
        return replace(outcome, grads=grads)


# -- runs ---------------------------------------------------------------------------------------


def run(
    function: Callable[..., Any], problem: Problem, grad: Tensor | None = None, **more: Any
) -> Outcome:
    """Forward and backward; of "none", all rows have a gradient of one."""
    leaves = problem.leaves()
    arguments = dict(leaves)
    if more.get("inplace"):
        # Not a leaf, and laid out as the leaf is.
        memory = leaves["input"]
        arguments["input"] = memory.clone() if memory.is_contiguous() else laid_like(memory)
    results = function(**arguments, **problem.options, **more)
    loss, lse = results if isinstance(results, tuple) else (results, None)
    wanted = [leaves[name] for name in problem.wanted]
    if not wanted:
        return Outcome(loss.detach(), {}, lse)
    grad = torch.ones_like(loss) if grad is None else grad.to(loss.dtype)
    grads = torch.autograd.grad(loss, wanted, grad)
    return Outcome(loss.detach(), dict(zip(problem.wanted, grads, strict=True)), lse)


def laid_like(leaf: Tensor) -> Tensor:
    """The leaf's values, and its place in the graph, in memory with the same strides."""
    size = 1 + sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride(), strict=True))
    memory = leaf.new_zeros(size + leaf.storage_offset())
    return memory.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()).copy_(leaf)


def spread(tensor: Tensor, how: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if how == "contiguous":
        return tensor.contiguous()
    if how == "strided":  # rows with gaps between them
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), 7, dtype=tensor.dtype)
        laid = wide[..., 1 : 1 + tensor.shape[-1]]
    elif how == "gaps":  # gaps between elements
        wide = torch.full((*tensor.shape, 2), 7, dtype=tensor.dtype)
        laid = wide[..., 0]
    elif how == "transposed":  # the first two dimensions, the last two, or neither
        laid = torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(
            *range(tensor.dim() - 1, -1, -1)
        )
    elif how == "classes last":
        if tensor.dim() < 3:
            return tensor.contiguous()
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        assert how == "offset", how
        laid = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return laid.copy_(tensor)


SPREADS = ["contiguous", "strided", "gaps", "transposed", "classes last", "offset"]


def choose_isa(name: str) -> None:
    try:
        _C.set_isa(name)
    except ValueError as error:
        pytest.skip(str(error))


# -- comparisons --------------------------------------------------------------------------------


def assert_same_tensor(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """The same bits; which NaN it is does not matter."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    differ = (bits(ours.contiguous()) != bits(theirs.contiguous())).flatten().nonzero().flatten()
    assert not differ.numel(), (
        f"{what}: {differ.numel()} elements of {ours.numel()} differ, the first at {differ[0]}: "
        f"{ours.flatten()[differ[0]]!r} and {theirs.flatten()[differ[0]]!r}"
    )


def assert_same_outcome(ours: Outcome, theirs: Outcome, what: str = "") -> None:
    assert_same_tensor(ours.loss, theirs.loss, f"{what} loss")
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in ours.grads.items():
        assert_same_tensor(grad, theirs.grads[name], f"{what} gradient of {name}")
    assert (ours.lse is None) == (theirs.lse is None)
    if ours.lse is not None:
        assert_same_tensor(ours.lse, theirs.lse, f"{what} lse")


def unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the error of rounding."""
    return torch.finfo(dtype).eps / 2


def assert_near(got: Tensor, want: Array, units: float, what: str = "", scale: float = 0) -> None:
    """No element is off by more than so many units of the largest, or of the scale. NaN and Inf
    are where they have to be."""
    assert tuple(got.shape) == want.shape, f"{what}: {tuple(got.shape)}, not {want.shape}"
    wide, most = widened(got.detach()), torch.finfo(got.dtype).max
    # What rounds to the largest number is nearer to it than half a unit.
    overflows = np.abs(want) >= most * (1 + unit(got.dtype) / 2)
    want = np.where(overflows, np.copysign(np.inf, want), want)
    odd = ~np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(wide), ~odd, err_msg=what)
    np.testing.assert_array_equal(wide[odd], want[odd].astype(wide.dtype), err_msg=what)
    if odd.all():
        return
    largest = max(np.abs(want[~odd]).max(), scale)
    off = np.abs(wide[~odd] - want[~odd]).max()
    limit = units * unit(got.dtype) * largest + torch.finfo(got.dtype).smallest_normal
    assert off <= limit, f"{what}: off by {off:.3e}, more than {limit:.3e}; largest {largest:.3e}"


def assert_expected(got: Outcome, want: Outcome, units: float, what: str = "") -> None:
    assert_near(got.loss, want.loss, units, f"{what} loss", want.scale)
    assert got.grads.keys() == want.grads.keys()
    for name, grad in got.grads.items():
        scale = want.grad_scale
        assert_near(grad, want.grads[name], units, f"{what} gradient of {name}", scale)


def mean_error(got: Tensor, want: Array) -> float:
    return float(np.abs(widened(got.detach()) - want).mean())


# -- formulas -----------------------------------------------------------------------------------


@np.errstate(invalid="ignore", divide="ignore")  # a mean of nothing, or by no weight
def cross_entropy_formula(
    input: Array,
    target: Array,
    weight: Array | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Outcome:
    axis = 0 if input.ndim == 1 else 1
    x = np.moveaxis(input, axis, -1)
    classes = x.shape[-1]
    weights = np.ones(classes, x.dtype) if weight is None else weight
    if target.shape == input.shape:
        shares = np.moveaxis(target, axis, -1).astype(x.dtype)
        valid = np.ones(x.shape[:-1], bool)
        divisor: Any = valid.size
    else:
        valid = target != ignore_index
        shares = (np.arange(classes) == target[..., None]).astype(x.dtype)
        divisor = weights[np.where(valid, target, 0)][valid].sum()
    counted = valid[..., None]
    smooth = x.dtype.type(label_smoothing)
    shares = np.where(counted, (shares * (1 - smooth) + smooth / classes) * weights, 0)
    top = x.max(-1, keepdims=True)
    exponentials = np.exp(x - top)
    total = exponentials.sum(-1, keepdims=True)
    lse = top + np.log(total)
    is_mean = reduction == "mean"
    factor = np.divide(1, divisor if is_mean else 1, dtype=x.dtype)
    z_factor = np.divide(z_loss, valid.sum() if is_mean else 1, dtype=x.dtype)
    z = np.where(counted, z_factor * lse, 0) if z_loss else np.zeros_like(lse)
    # Where nothing is expected, the logit is no matter, even -Inf.
    distances = np.where(shares == 0, 0, lse - np.where(shares == 0, 0, x))
    of_rows = (shares * distances).sum(-1) * factor + (z * lse)[..., 0]
    of_rows = np.where(valid, of_rows, 0) if reduction == "none" else of_rows
    grad = exponentials / total * (shares.sum(-1, keepdims=True) * factor + 2 * z) - shares * factor
    grad = np.where(counted, grad, 0)
    of_target = weights * (1 - smooth) * (lse - x) * factor
    grads = {"input": np.moveaxis(grad, -1, axis), "target": np.moveaxis(of_target, -1, axis)}
    loss = of_rows if reduction == "none" else np.asarray(of_rows.sum())
    if is_mean and not valid.any():
        loss = np.asarray(np.nan)
    # A row's loss is a difference of numbers that are rounded; so is its gradient.
    most = float(np.abs(factor) * weights.max(initial=0))
    counts = valid.size if reduction != "none" else 1
    return Outcome(loss, grads, scale=most * counts, grad_scale=most)


def torchs_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    **options: Any,
) -> Tensor:
    """What torch before 2.13 has instead: two functions."""
    if ignore_index is not None:
        options["ignore_index"] = ignore_index
    bias = None if linear_bias is None else linear_bias.flatten()
    rows = F.linear(input, linear_weight.flatten(0, -2), bias)
    return F.cross_entropy(rows.unflatten(-1, linear_weight.shape[:-1]), target, **options)


def linear_cross_entropy_formula(
    input: Array,
    linear_weight: Array,
    target: Array,
    linear_bias: Array | None = None,
    weight: Array | None = None,
    *,
    ignore_index: int | None = None,
    **options: Any,
) -> Outcome:
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    x = input.reshape(-1, input.shape[-1])
    logits = x @ flat.T
    if linear_bias is not None:
        logits = logits + linear_bias.reshape(-1)
    shaped = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    index = -100 if ignore_index is None else ignore_index
    outcome = cross_entropy_formula(shaped, target, weight, ignore_index=index, **options)
    of_logits = outcome.grads["input"].reshape(logits.shape)
    result = {
        "input": (of_logits @ flat).reshape(input.shape),
        "linear_weight": (of_logits.T @ x).reshape(linear_weight.shape),
        "target": outcome.grads["target"],
    }
    if linear_bias is not None:
        result["linear_bias"] = of_logits.sum(0).reshape(linear_bias.shape)
    return replace(outcome, grads=result)


def mse_formula(input: Array, target: Array, *, reduction: str = "mean") -> Outcome:
    difference = input - target
    squares = difference**2
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = np.divide(1, squares.size, dtype=squares.dtype) if reduction == "mean" else 1
        loss = squares if reduction == "none" else np.asarray(squares.sum() * factor)
    gradient = 2 * difference * factor
    return Outcome(loss, {"input": gradient, "target": -gradient})


# -- tensors ------------------------------------------------------------------------------------


def _targets(
    kind: Kind, logits: tuple[int, ...], dtype: torch.dtype, random: torch.Generator
) -> dict[str, Tensor]:
    axis = 0 if len(logits) == 1 else 1
    classes = logits[axis]
    rows = logits[:axis] + logits[axis + 1 :]
    tensors = {}
    if kind.target == "probabilities":
        values = torch.randn(logits, generator=random, dtype=torch.float64)
        tensors["target"] = (2 * values).softmax(axis).to(dtype)
    else:
        target = torch.randint(max(classes, 1), rows, generator=random)
        if kind.ignored:
            index = kind.options.get("ignore_index", -100)
            at = torch.rand(rows, generator=random) < 0.2
            target[at] = index
            # Not all: what a mean is of nothing has tests of its own.
            if target.numel() and bool((target == index).all()) and classes > 1:
                target.view(-1)[0] = int(index == 0)
        tensors["target"] = target
    if kind.weighted:
        weight = torch.rand(classes, generator=random, dtype=torch.float64) + 0.5
        if classes > 8:
            weight[torch.randperm(classes, generator=random)[:2]] = 0
            # Not of all targets: a mean by no weight has tests of its own.
            if kind.target == "classes":
                index = kind.options.get("ignore_index", -100)
                valid = tensors["target"][tensors["target"] != index]
                weight[valid[:1]] = 1
        tensors["weight"] = weight.to(dtype)
    return tensors


def _make_cross_entropy(
    kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator
) -> dict[str, Tensor]:
    """Logits as a model has them that has begun to learn: a wide spread, and some are large."""
    logits = 3 * torch.randn(shape, generator=random, dtype=torch.float64)
    return {"input": logits.to(dtype), **_targets(kind, shape, dtype, random)}


def _make_linear(
    kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator
) -> dict[str, Tensor]:
    """Of the shape of its logits. One row without a batch is that of one dimension."""
    batch = shape[:1] if len(shape) > 1 else ()
    outputs = shape[1:] if len(shape) > 1 else shape
    tensors = {
        "input": torch.randn((*batch, FEATURES), generator=random, dtype=torch.float64),
        "linear_weight": torch.randn((*outputs, FEATURES), generator=random, dtype=torch.float64)
        * 0.4,
    }
    if kind.biased:
        tensors["linear_bias"] = torch.randn(outputs, generator=random, dtype=torch.float64)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return {**tensors, **_targets(kind, shape, dtype, random)}


def _make_mse(
    kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator
) -> dict[str, Tensor]:
    values = torch.randn((2, *shape), generator=random, dtype=torch.float64)
    return {"input": values[0].to(dtype), "target": (0.7 * values[0] + values[1]).to(dtype)}


# -- the table ----------------------------------------------------------------------------------


def _kinds(**more: Kind) -> dict[str, Kind]:
    """Those that all losses over classes have."""
    smooth = {"label_smoothing": 0.1}
    kinds = {
        "default": Kind(),
        "sum": Kind({"reduction": "sum"}),
        "none": Kind({"reduction": "none"}),
        "ignored": Kind(ignored=True),
        "ignored-sum": Kind({"reduction": "sum"}, ignored=True),
        "ignored-none": Kind({"reduction": "none"}, ignored=True),
        "ignored-class": Kind({"ignore_index": 0}, ignored=True),
        "weighted": Kind(weighted=True),
        "weighted-none": Kind({"reduction": "none"}, weighted=True),
        "weighted-ignored": Kind(weighted=True, ignored=True),
        "smooth": Kind(smooth),
        "smooth-only": Kind({"label_smoothing": 1.0}),
        "smooth-weighted-ignored": Kind(smooth, weighted=True, ignored=True),
        "smooth-weighted-ignored-sum": Kind(
            {**smooth, "reduction": "sum"}, weighted=True, ignored=True
        ),
        "smooth-weighted-ignored-none": Kind(
            {**smooth, "reduction": "none"}, weighted=True, ignored=True
        ),
        "probabilities": Kind(target="probabilities"),
        "probabilities-sum": Kind({"reduction": "sum"}, target="probabilities"),
        "probabilities-none": Kind({"reduction": "none"}, target="probabilities"),
        "probabilities-weighted": Kind(target="probabilities", weighted=True),
        "probabilities-smooth-weighted": Kind(smooth, target="probabilities", weighted=True),
        "probabilities-smooth-weighted-none": Kind(
            {**smooth, "reduction": "none"}, target="probabilities", weighted=True
        ),
        "z": Kind({"z_loss": 1e-2}),
        "z-none": Kind({"z_loss": 1e-2, "reduction": "none"}, ignored=True),
        "z-sum": Kind({"z_loss": 1e-2, "reduction": "sum"}, ignored=True),
        "z-weighted-ignored": Kind({"z_loss": 1e-2}, weighted=True, ignored=True),
        "z-smooth-weighted-ignored": Kind({**smooth, "z_loss": 1e-2}, weighted=True, ignored=True),
        "z-probabilities": Kind({"z_loss": 1e-2}, target="probabilities"),
    }
    return {**kinds, **more}


CROSS_ENTROPY = Row(
    name="cross_entropy",
    ours=ours.cross_entropy,
    theirs=F.cross_entropy,
    our_module=nn.CrossEntropyLoss,
    their_module=torch.nn.CrossEntropyLoss,
    formula=cross_entropy_formula,
    make=_make_cross_entropy,
    wanted=("input", "target"),
    kinds=_kinds(),
    shapes=((7,), (5, 11), (1, 9), (6, 70), (3, 1025), (4, 6, 5), (2, 70, 3), (3, 5, 2, 4))
    + ((2, 3, 2, 3, 2),),
    realistic=(128, 600),
    long_rows=((1, 32768), (2, 33793)),
    roundings=8,
    with_inplace=True,
)

LINEAR_CROSS_ENTROPY = Row(
    name="linear_cross_entropy",
    ours=ours.linear_cross_entropy,
    theirs=getattr(F, "linear_cross_entropy", torchs_linear_cross_entropy),
    our_module=nn.LinearCrossEntropyLoss,
    their_module=getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module),
    formula=linear_cross_entropy_formula,
    make=_make_linear,
    wanted=("input", "linear_weight", "linear_bias", "target"),
    kinds=_kinds(
        bias=Kind(biased=True),
        chunked=Kind({"chunk_size": 3}, biased=True),
        **{
            "chunked-weighted-ignored": Kind({"chunk_size": 4}, weighted=True, ignored=True),
            "chunked-smooth-none": Kind(
                {"chunk_size": 4, "label_smoothing": 0.1, "reduction": "none"},
                **{"weighted": True, "ignored": True, "biased": True},
            ),
            "chunked-probabilities": Kind({"chunk_size": 4}, target="probabilities"),
            "bias-smooth-none": Kind({"label_smoothing": 0.1, "reduction": "none"}, biased=True),
        },
    ),
    shapes=((7,), (5, 11), (1, 9), (37, 70), (9, 1025), (4, 6, 5), (3, 5, 2, 4)),
    realistic=(128, 300),
    long_rows=((1, 32768),),
    roundings=64,
)

MSE = Row(
    name="mse_loss",
    ours=ours.mse_loss,
    theirs=F.mse_loss,
    our_module=nn.MSELoss,
    their_module=torch.nn.MSELoss,
    formula=mse_formula,
    make=_make_mse,
    wanted=("input", "target"),
    kinds={
        "default": Kind(target="values"),
        "sum": Kind({"reduction": "sum"}, target="values"),
        "none": Kind({"reduction": "none"}, target="values"),
    },
    shapes=((), (1,), (7,), (5, 11), (129, 1025), (4, 6, 5), (3, 5, 2, 4)),
    realistic=(128, 600),
    long_rows=((200003,),),
    roundings=8,
    with_lse=False,
)

ROWS = [CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, MSE]
OVER_CLASSES = [CROSS_ENTROPY, LINEAR_CROSS_ENTROPY]

CASES = {f"{row.name}-{name}": (row, kind) for row in ROWS for name, kind in row.kinds.items()}
IN_TORCH = {case: pair for case, pair in CASES.items() if pair[1].is_in_torch}
