"""Quartet."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import check_options


class Quartet(FusedOptimizer):
    r"""Quartet, which nobody has published, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad s \leftarrow s + g^2

        \theta \leftarrow \theta - \frac{lr}{1 + \delta (t - 1)} \left(
            \frac{m}{\sqrt{v} + \epsilon} + \sigma \frac{g}{\sqrt{s} + \epsilon}
            + \lambda (\theta - a)\right), \quad a \leftarrow a + \phi (\theta - a)

    where :math:`s` begins as initial_total and :math:`a` as the parameter.

    Args:
        params, lr, betas, eps, maximize: as in torch.optim.Adam. lr, betas and weight_decay may be
            tensors of one element.
        weight_decay: :math:`\lambda`, by which weights go back to where they have been.
        lr_decay: :math:`\delta`, as in torch.optim.Adagrad.
        initial_total: what the sum of squares begins with.
        share: :math:`\sigma`, of Adagrad's step.
        follow: :math:`\phi`, from 0 to 1, of the way to the weights that the anchor goes in a step.
        capturable, min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, flat: as
            in :class:`fusedopt.Adam`.
        state_dtype: dtype of the states, as in :class:`fusedopt.Adam`, but not "int8".

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable) and exp_avg,
    exp_avg_sq, anchor and total, in the parameter's shape.

    Raises:
        ValueError: for options that are negative or NaN, a negative max_grad_norm, a group without
            parameters, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a parameter or state_dtype that is not supported.
    """

    __module__ = "fusedopt"
    _rule = "quartet"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        lr_decay: float = 0,
        initial_total: float = 0.1,
        share: float = 0.5,
        follow: float = 0.01,
        *,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        min_8bit_size: int = 4096,
        master_bits: int | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        ema_decay: float | None = None,
        max_grad_norm: float | None = None,
        flat: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lr_decay": lr_decay,
            "initial_total": initial_total,
            "share": share,
            "follow": follow,
        }
        check_options(type(self).__name__, defaults, betas=2)
        defaults |= {"maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        self._init(options, flat, max_grad_norm, {"params": params, "defaults": defaults})
