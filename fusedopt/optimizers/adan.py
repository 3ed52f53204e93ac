"""Adan."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Adan(FusedOptimizer):
    r"""Adan, adaptive Nesterov momentum, in one fused pass.

    For a parameter :math:`\theta` with gradients :math:`g_t` in steps :math:`t`, element by
    element, with :math:`d = g_t - g_{t-1}`, in the first step 0:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g_t, \quad
        n \leftarrow \beta_2 n + (1 - \beta_2) d, \quad
        v \leftarrow \beta_3 v + (1 - \beta_3) (g_t + \beta_2 d)^2

        \theta \leftarrow \frac{1}{1 + lr \lambda} \left(\theta - lr
            \frac{m / (1 - \beta_1^t) + \beta_2 n / (1 - \beta_2^t)}
            {\sqrt{v / (1 - \beta_3^t)} + \epsilon}\right)

    With ``no_prox``, :math:`(1 - lr \lambda) \theta` takes a step, which is not divided. Xie et
    al., Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models, 2022
    (arXiv:2208.06677), where betas are 1 minus these. Arguments, their defaults, and states are
    those of the authors' code (sail-sg/Adan), but that each parameter has a count of its steps,
    and that max_grad_norm is None where there is no clipping, not 0.

    Args:
        params, lr, eps, maximize: as in torch.optim.Adam. lr, betas and weight_decay may be
            tensors of one element.
        betas: :math:`\beta_1, \beta_2, \beta_3`.
        weight_decay: :math:`\lambda`, decoupled from the gradient.
        no_prox: whether weights decay as in AdamW, rather than by a proximal step.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr, betas and weight_decay where
            these are tensors on that device; any other option stays as it was.
        state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm,
            norm_group, flat: as in :class:`fusedopt.Adam`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable) and exp_avg,
    exp_avg_sq, exp_avg_diff and neg_pre_grad, which is minus the last gradient (clipped, where
    gradients are), in the parameter's shape.

    Raises:
        ValueError: for options that are negative or NaN, betas that are not three numbers below 1,
            a negative max_grad_norm, parameters that overlap in memory, and choices of storage that
            make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "adan"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        *,
        no_prox: bool = False,
        maximize: bool = False,
        capturable: bool = False,
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
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        check_options(type(self).__name__, defaults, betas=3)
        defaults |= {"no_prox": no_prox, "maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)
