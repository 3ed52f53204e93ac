"""What parity and bitwise tests share: parameters in every layout, realistic gradients, runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt._extension import _C
from fusedopt._formats import NUMBERS

from .optimizers import Options, Row
from .reference import Array, Store, unrounded


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory; no stride: contiguous."""

    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def lay(self, values: Tensor) -> Tensor:
        """These values (1-d, in logical order) in this layout, in memory of its own."""
        if self.stride is None and self.offset == 0:
            return values.clone().view(self.shape)
        stride = self.stride or torch.empty(self.shape, device="meta").stride()
        last = sum((size - 1) * step for size, step in zip(self.shape, stride, strict=True))
        memory = values.new_full((self.offset + last + 2,), GAP)
        memory.as_strided(self.shape, stride, self.offset).copy_(values.view(self.shape))
        return memory.as_strided(self.shape, stride, self.offset)


# What fills the memory between and around the elements: a step must leave it alone.
GAP = 7.0

LARGE = Layout((100003,))
SMALL_LAYOUTS = [
    Layout((0,)),
    Layout((1,)),
    Layout((3,)),
    Layout((15,)),
    Layout((17,)),
    Layout((10, 100)),
    Layout(()),
    Layout((65,), stride=(2,)),  # gaps
    Layout((9, 11), stride=(26, 2)),  # gaps in both dimensions
    Layout((33, 20), stride=(1, 33)),  # transposed
    Layout((4, 3, 5, 6), stride=(90, 1, 18, 3)),  # channels_last
    Layout((1001,), offset=1),  # misaligned
    Layout((37, 29), stride=(1, 37), offset=3),  # misaligned and transposed
    Layout((1, 7, 1), stride=(91, 1, 13)),  # strides of size-1 dimensions mean nothing
]
LAYOUTS = [*SMALL_LAYOUTS[:6], LARGE, *SMALL_LAYOUTS[6:]]

HALF = (torch.bfloat16, torch.float16)

Storage = tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameter, gradient, states
STORAGES: list[Storage] = [
    *(tuple(combination) for combination in _C.combinations()),
    (torch.complex64, torch.complex64, torch.float32),
    (torch.complex128, torch.complex128, torch.float64),
]


def storage_id(storage: Storage) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in storage)


def real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


@dataclass(frozen=True)
class Data:
    """Initial values (total,) and gradients (steps, total) of all parameters, in logical order."""

    params: Tensor
    grads: Tensor

    def first(self, count: int) -> "Data":
        """That of so many elements."""
        return Data(self.params[:count], self.grads[:, :count])

    def to(self, param: torch.dtype, grad: torch.dtype) -> "Data":
        return Data(self.params.to(param), self.grads.to(grad))


@lru_cache(maxsize=2)
def realistic(param: torch.dtype, grad: torch.dtype, total: int, steps: int) -> Data:
    """Gradients as training has them: each element with a scale of its own, over decades; now and
    then zero, and some of them always, as those of unused embedding rows."""
    random = torch.Generator().manual_seed(0)
    reals = total * (2 if param.is_complex else 1)
    wide = torch.float64 if real(grad) == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=wide)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=wide)

    # In float16 the square of a gradient below 1e-2, weighted by 1 - beta2, would be zero.
    lowest, highest = (-1.5, 1.5) if torch.float16 in (param, grad) else (-6, 1)
    scale = 10 ** (lowest + (highest - lowest) * uniform(reals))
    scale[uniform(reals) < 0.01] = 0
    grads = normal(steps, reals).mul_(scale)
    grads[uniform(steps, reals) < 0.02] = 0
    params = normal(reals) * 10 ** (-3 * uniform(reals))
    if param.is_complex:
        params = torch.view_as_complex(params.view(total, 2))
        grads = torch.view_as_complex(grads.view(steps, total, 2))
    return Data(params.to(param), grads.to(grad))


def special_values(dtype: torch.dtype) -> tuple[float, ...]:
    info = torch.finfo(dtype)
    overflows, underflows = 10 * info.max**0.5, info.tiny**0.5 / 10  # when squared
    return torch.inf, torch.nan, info.max, overflows, underflows, info.tiny / 8, -0.0


@lru_cache(maxsize=2)
def harsh(param: torch.dtype, grad: torch.dtype, total: int, steps: int) -> Data:
    """Realistic values, and among them, in a third of the elements, what is not: infinite, NaN,
    with squares that overflow or are denormal, denormal, and negative zeros."""
    random = torch.Generator().manual_seed(1)
    calm = realistic(param, grad, total, steps)
    params, grads = real_view(calm.params).clone(), real_view(calm.grads).clone()
    # Each special value in one of 42 elements of the gradients and in one other of the parameters.
    kinds = torch.randint(42, params.shape, generator=random)
    now = torch.rand(grads.shape, generator=random) < 0.2
    for kind in range(7):
        here = kinds == kind
        value = special_values(grads.dtype)[kind]
        # Infinities in some steps only; small values in all, so that the moments get small as well.
        grads[here & now if abs(value) > 1 else here.expand_as(now)] = value
        params[kinds == 7 + kind] = special_values(params.dtype)[kind]
    signs = torch.randint(2, grads.shape, generator=random, dtype=torch.int8) * 2 - 1
    grads *= signs
    if param.is_complex:
        params = torch.view_as_complex(params.view(total, 2))
        grads = torch.view_as_complex(grads.view(steps, total, 2))
    return Data(params, grads)


@dataclass
class Result:
    """The parameter ("param") and the states of all parameters, each as one 1-d tensor of reals."""

    values: dict[str, Tensor]
    optimizer: Optimizer = field(repr=False)

    def wide(self) -> dict[str, Array]:
        """The values of all elements as numpy arrays, exactly."""
        return {k: widened(value) for k, value in self.values.items() if k not in NUMBERS}


def widened(value: Tensor) -> Array:
    value = value.float() if value.dtype in HALF else value
    return value.numpy().astype(np.longdouble if value.dtype == torch.float64 else np.float64)


def reals(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in logical order, on the CPU."""
    return real_view(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu())


def real_view(values: Tensor) -> Tensor:
    """Complex numbers as pairs of reals, in the last dimension."""
    return torch.view_as_real(values).flatten(-2) if values.is_complex() else values


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""


def bits(values: Tensor) -> Tensor:
    """As integers; all NaN alike, as which of them a processor makes is its own affair."""
    integer = INTEGERS[values.element_size()]
    return values.view(integer).masked_fill(values.isnan(), -1)


def assert_same_result(a: Result, b: Result) -> None:
    """All that they are made of has the same bits; which NaN it is does not matter."""
    assert a.values.keys() == b.values.keys()
    for key, ours in a.values.items():
        theirs = b.values[key]
        integer = INTEGERS[ours.element_size()]
        if ours.dtype == theirs.dtype and torch.equal(ours.view(integer), theirs.view(integer)):
            continue  # as nearly always, and much faster
        differ = (bits(ours) != bits(theirs)).nonzero().flatten()
        assert not differ.numel(), (
            f"{key}: {differ.numel()} elements of {ours.numel()} differ, the first at "
            f"{differ[0]}: {ours[differ[0]]!r} and {theirs[differ[0]]!r}"
        )


@dataclass(frozen=True)
class Groups:
    """Parameter groups: options, and the layouts of the parameters, of each."""

    options: Sequence[Options]
    layouts: Sequence[Sequence[Layout]]

    @property
    def sizes(self) -> list[int]:
        """Elements in each group."""
        return [sum(layout.numel for layout in layouts) for layouts in self.layouts]

    @property
    def total(self) -> int:
        return sum(self.sizes)


def train(
    constructor: Callable[..., Optimizer],
    groups: Groups,
    data: Data,
    device: str = "cpu",
    flat: bool = False,
    **common: Any,
) -> Result:
    """Step through all gradients; no value is ever put right on the way."""
    layouts = [layout for members in groups.layouts for layout in members]
    bounds = np.cumsum([0, *(layout.numel for layout in layouts)])

    def pieces(values: Tensor) -> list[Tensor]:
        return [values[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]

    params = [
        layout.lay(values.to(device)).requires_grad_()
        for layout, values in zip(layouts, pieces(data.params), strict=True)
    ]
    for param in params:
        if data.grads.dtype != param.dtype:
            param.grad_dtype = data.grads.dtype
    memory = [None if flat else param.detach() for param in params]
    members = iter(params)
    optimizer = constructor(
        [
            {"params": [next(members) for _ in group], **options}
            for group, options in zip(groups.layouts, groups.options, strict=True)
        ],
        # Also where an option is that of all groups in torch, which of Adagrad's one is.
        **{**groups.options[0], **({"flat": True} if flat else {}), **common},
    )
    for t, values in enumerate(data.grads):
        for i, (param, layout, grad) in enumerate(
            zip(params, layouts, pieces(values), strict=True)
        ):
            if flat and data.grads.dtype == param.dtype:
                param.grad.copy_(grad.view(layout.shape))
            else:
                # In turns as it comes out of a contiguous backward and in the parameter's strides.
                on_device = grad.to(device)
                lay = layout.lay if (i + t) % 2 else lambda g, s=layout.shape: g.view(s)
                param.grad = lay(on_device)
        optimizer.step()

    for layout, tensor in zip(layouts, memory, strict=True):
        assert tensor is None or gaps_are_untouched(layout, tensor), layout
    values = {"param": reals(params)}
    states = [optimizer.state.get(param, {}) for param in params]
    for key in dict.fromkeys(key for state in states for key in state):  # not all groups have all
        members = [state[key] for state in states if key in state]
        if key == "step":
            assert {float(step) for step in members} == {len(data.grads)}
        elif key in NUMBERS:
            values[key] = torch.stack([number.cpu() for number in members])
        else:
            values[key] = reals(members)
            if key == "master_remainder":  # no numbers, whatever their dtype
                values[key] = values[key].view(INTEGERS[values[key].element_size()])
    return Result(values, optimizer)


def gaps_are_untouched(layout: Layout, tensor: Tensor) -> bool:
    if layout.stride is None and layout.offset == 0:
        return True
    whole = tensor.as_strided((tensor.untyped_storage().size() // tensor.element_size(),), (1,), 0)
    mine = torch.zeros(whole.shape, dtype=torch.bool, device=tensor.device)
    mine.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return bool((whole[~mine] == GAP).all())


def expected(
    row: Row, groups: Groups, data: Data, store: Store = unrounded, piece: int = 8192
) -> dict[str, Array]:
    """The reference's results; worked out piece by piece, so that a piece stays in cache. A piece
    is a parameter where these are measured as a whole."""
    start = widened(reals([data.params]))
    grads = real_view(data.grads)
    per_element = start.size // max(data.params.numel(), 1)
    ends = np.cumsum([size * per_element for size in groups.sizes])

    def work(part: slice, options: Options) -> dict[str, Array]:
        g = grads[:, part]
        g = (g.float() if g.dtype in HALF else g).numpy().astype(start.dtype)
        return row.reference(start[part], g, store, **options)

    begins = [0, *ends[:-1]]

    def bounds(place: int) -> list[int]:
        begin, end = int(begins[place]), int(ends[place])
        if not row.measures(groups.options[place]):
            return [*range(begin, end, piece), end]
        sizes = [layout.numel * per_element for layout in groups.layouts[place]]
        return [begin, *(begin + np.cumsum(sizes)).tolist()]

    with ThreadPoolExecutor() as pool:  # numpy works without the interpreter's lock
        tasks = [
            pool.submit(work, slice(low, high), options)
            for place, options in enumerate(groups.options)
            for low, high in pairwise(bounds(place))
        ]
        results = [task.result() for task in tasks]
    return {
        key: np.concatenate([part[key] for part in results])
        for key in results[0]
        if key not in NUMBERS
    }
