"""Fused losses as modules: those of torch.nn, whose functions are fused ones."""

from typing import Any

import torch
from torch import Tensor

from fusedopt.nn import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, with its gradient worked out in the same pass.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch's.
        inplace, z_loss, return_lse: see fusedopt.nn.functional.cross_entropy, which has the
            formula, shapes, dtypes and errors.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace: bool = False,
        z_loss: float = 0.0,
        return_lse: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace = inplace
        self.z_loss = z_loss
        self.return_lse = return_lse

    # A tuple with return_lse, which torch's class has not.
    def forward(self, input: Tensor, target: Tensor) -> Any:  # noqa: ANN401
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace=self.inplace,
            z_loss=self.z_loss,
            return_lse=self.return_lse,
        )


class MSELoss(torch.nn.MSELoss):
    """torch.nn.MSELoss, with its gradient worked out in the same pass.

    Args:
        size_average, reduce, reduction: as torch's; see fusedopt.nn.functional.mse_loss.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class _Missing(torch.nn.Module):
    def __init__(self, *args: object, **others: object) -> None:
        raise NotImplementedError(
            "fusedopt: LinearCrossEntropyLoss needs torch 2.13 or newer, which has the class that "
            f"it is made of, got {torch.__version__}; expected one, or "
            "fusedopt.nn.functional.linear_cross_entropy, which goes with any"
        )


_LinearCrossEntropyLoss: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _Missing)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):  # type: ignore[misc]
    """torch.nn.LinearCrossEntropyLoss, a linear layer and its loss, without all logits at once.

    Args:
        in_features, num_classes, out_features, bias, device, dtype, reduction, weight,
            ignore_index, label_smoothing, options: as torch's.
        chunk_size, z_loss, return_lse: see fusedopt.nn.functional.linear_cross_entropy, which has
            shapes, dtypes and errors.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        chunk_size: int | None = None,
        z_loss: float = 0.0,
        return_lse: bool = False,
        **others: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(in_features, num_classes, **others)
        self.chunk_size = chunk_size
        self.z_loss = z_loss
        self.return_lse = return_lse

    # A tuple with return_lse, which torch's class has not.
    def forward(self, input: Tensor, target: Tensor) -> Any:  # noqa: ANN401
        shape = (self.num_classes, *self.out_features)
        weight, bias = self.linear.weight, self.linear.bias
        return functional.linear_cross_entropy(
            input,
            weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            chunk_size=self.chunk_size,
            z_loss=self.z_loss,
            return_lse=self.return_lse,
        )
