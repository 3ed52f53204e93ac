"""RAdam."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""RAdam, as :class:`torch.optim.RAdam`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2

        \theta \leftarrow \theta - lr \cdot \frac{m}{1 - \beta_1^t} \cdot
            r_t \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v} + \epsilon}, \quad
        r_t = \sqrt{\frac{(\rho_t - 4) (\rho_t - 2) \rho_\infty}
            {(\rho_\infty - 4) (\rho_\infty - 2) \rho_t}}

    where :math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and
    :math:`\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)`; the last factor is left out as
    long as :math:`\rho_t \le 5`. Weight decay :math:`\lambda` is that of :class:`fusedopt.Adam`:
    :math:`g + \lambda \theta` in place of :math:`g` or, with ``decoupled_weight_decay``,
    :math:`lr \lambda \theta` taken off :math:`\theta` besides. Liu et al., On the Variance of the
    Adaptive Learning Rate and Beyond, ICLR 2020 (arXiv:1908.03265).

    Args:
        params, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize: as in
            torch.optim.RAdam. lr may be a tensor of one element.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr, betas and weight_decay where
            these are tensors on that device; any other option stays as it was.
        foreach: accepted; the step is always the fused one.
        differentiable: must be False.
        state_dtype: dtype of the states, as in :class:`fusedopt.Adam`.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat: as
            in :class:`fusedopt.Adam`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable), exp_avg and
    exp_avg_sq, in the parameter's shape.

    Raises:
        ValueError: as torch.optim.RAdam; for differentiable=True, NaN options, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "radam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        min_8bit_size: int = 4096,
        master_bits: int | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        ema_decay: float | None = None,
        max_grad_norm: float | None = None,
        norm_group: "ProcessGroup | None" = None,
        flat: bool = False,
    ) -> None:
        args: dict[str, Any] = {
            "params": params,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
