"""Adamax."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Adamax(FusedOptimizer, torch.optim.Adamax):
    r"""Adamax, as :class:`torch.optim.Adamax`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        u \leftarrow \max(\beta_2 u, |g| + \epsilon), \quad
        \theta \leftarrow \theta - \frac{lr}{1 - \beta_1^t} \cdot \frac{m}{u}

    with :math:`g + \lambda \theta` in place of :math:`g` for weight decay :math:`\lambda`. Kingma
    and Ba, Adam, ICLR 2015 (arXiv:1412.6980), section 7.1.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.Adamax. lr may be a tensor
            of one element.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr, betas and weight_decay where
            these are tensors on that device; any other option stays as it was.
        foreach: accepted; the step is always the fused one.
        differentiable: must be False.
        state_dtype: dtype of the states, as in :class:`fusedopt.Adam`.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat: as
            in :class:`fusedopt.Adam`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable), exp_avg and
    exp_inf, in the parameter's shape.

    Raises:
        ValueError: as torch.optim.Adamax; for differentiable=True, NaN options, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "adamax"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
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
        args: dict[str, Any] = {
            "params": params,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
