"""Newton-Schulz iteration, which makes matrices nearly orthogonal by products alone."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

DTYPE: Final = torch.bfloat16

# How often an error of a Gram matrix may grow before it is made anew: at first, where its trace is
# 1, and later, where its eigenvalues are about 1. What is small grows by the square of the first
# coefficient in a step.
MOST_GROWTH: Final = 150
MOST_GROWTH_LATER: Final = 12
# How much longer than wide a matrix is whose iteration pays to be one of Gram matrices.
LEAST_OBLONG: Final = 2
# Elements of matrices that are multiplied together. On a CPU larger ones fill all cores on their
# own, and their batched product is slower.
MOST_TOGETHER: Final = {"cpu": 2**20, "cuda": 2**25}
LARGEST_TOGETHER: Final = {"cpu": 256**2, "cuda": 2**24}

# Rows of symmetric matrices of which only half is computed, and in how many blocks.
LEAST_HALVED: Final = 640
ROW_BLOCKS: Final = 3


@dataclass(frozen=True)
class NewtonSchulz:
    r"""The iteration :math:`X \leftarrow aX + b(XX^T)X + c(XX^T)^2X`, from X over its norm.

    Attributes:
        coefficients: a, b and c.
        steps: how many.
        eps: the least norm that is divided by.
    """

    coefficients: tuple[float, float, float]
    steps: int
    eps: float

    @torch.no_grad()
    def orthogonalize(self, matrices: Iterable[Tensor]) -> None:
        """Orthogonalise matrices in place, those of one shape together; 3-d ones are batches."""
        alike: dict[tuple[torch.device, int, int], list[Tensor]] = {}
        for matrix in matrices:
            if matrix.numel() == 0:
                continue
            for each in matrix.unbind() if matrix.dim() == 3 else [matrix]:
                wide = each if each.shape[0] <= each.shape[1] else each.mT
                alike.setdefault((each.device, *wide.shape), []).append(wide)
        for those in alike.values():
            for batch in _batches(those):
                torch._foreach_copy_(batch, self._orthogonal(batch))

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        first = matrices[0]
        x = torch.empty((len(matrices), *first.shape), dtype=DTYPE, device=first.device)
        torch._foreach_copy_([*x.unbind()], matrices)
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        x.div_(norm.clamp_(min=self.eps).to(DTYPE))
        # One product of matrices takes less time than a batched one of a single pair.
        result = self._iterate(x[0] if len(x) == 1 else x)
        return [result] if len(x) == 1 else [*result.unbind()]

    def _iterate(self, x: Tensor) -> Tensor:
        short, long = x.shape[-2:]
        if long >= LEAST_OBLONG * short and self._most_updates(MOST_GROWTH) > 0:
            return self._iterate_gram(x)
        a, b, c = self.coefficients
        for _ in range(self.steps):
            gram = _symmetric_product(x, x.mT)
            x = _add_product(x, a, _symmetric_product(gram, gram, c, gram, b), x)
        return x

    def _most_updates(self, growth: float) -> int:
        """How often a Gram matrix may be updated."""
        each = self.coefficients[0] ** 2
        return self.steps if each <= 1 else int(math.log(growth) / math.log(each))

    def _iterate_gram(self, x: Tensor) -> Tensor:
        """The same by products of Gram matrices, which are smaller.

        All polynomials of a Gram matrix commute. With P = bG + cG^2 a step takes X to (aI + P)X and
        G to (aI + P)^2 G, so that X itself is needed only at the end, and where G is made anew:
        what G has lost to rounding grows with each step.
        """
        a, b, c = self.coefficients
        left, updates = self.steps, self._most_updates(MOST_GROWTH)
        while left > 0:
            steps = min(left, updates + 1)
            gram = _symmetric_product(x, x.mT)
            for step in range(steps):
                change = _symmetric_product(gram, gram, c, gram, b)
                if step == 0:
                    factor = change.clone()
                    factor.diagonal(dim1=-2, dim2=-1).add_(a)
                else:
                    factor = _symmetric_product(change, factor, 1, factor, a)
                if step < steps - 1:
                    gram = _symmetric_product(change, gram, 1, gram, a)
                    gram = _symmetric_product(change, gram, 1, gram, a)
            x = factor @ x
            left, updates = left - steps, self._most_updates(MOST_GROWTH_LATER)
        return x


def _batches(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, as many as are multiplied together."""
    first, device = matrices[0], matrices[0].device.type
    together = max(1, MOST_TOGETHER[device] // first.numel())
    if first.shape[0] ** 2 > LARGEST_TOGETHER[device]:
        together = 1
    for begin in range(0, len(matrices), together):
        yield matrices[begin : begin + together]


def _add_product(x: Tensor, beta: float, y: Tensor, z: Tensor, alpha: float = 1) -> Tensor:
    """beta * x + alpha * y @ z, of matrices or batches of them."""
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    return add(x, y, z, beta=beta, alpha=alpha)


def _symmetric_product(
    y: Tensor, z: Tensor, alpha: float = 1, x: Tensor | None = None, beta: float = 1
) -> Tensor:
    """beta * x + alpha * y @ z where this is symmetric but for rounding.

    Of a large matrix on a CPU, whose products take as long as they have operations, only what is on
    the diagonal and right of it is computed, in blocks of rows.
    """
    size = y.shape[-2]
    if y.dim() > 2 or y.device.type != "cpu" or size < LEAST_HALVED:
        return y @ z if x is None else _add_product(x, beta, y, z, alpha)
    result = y.new_empty(size, size)
    rows = -(-size // ROW_BLOCKS)
    for begin in range(0, size, rows):
        here, right = slice(begin, begin + rows), slice(begin, None)
        ours, theirs, into = y[here], z[:, right], result[here, right]
        if x is None:
            torch.mm(ours, theirs, out=into)
        else:
            torch.addmm(x[here, right], ours, theirs, beta=beta, alpha=alpha, out=into)
        result[here, :begin] = result[:begin, here].mT
    return result
