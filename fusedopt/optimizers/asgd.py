"""ASGD."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ASGD(FusedOptimizer, torch.optim.ASGD):
    r"""Averaged stochastic gradient descent, as :class:`torch.optim.ASGD`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        \theta \leftarrow \theta - \eta_{t - 1} (g + \lambda \theta), \quad
        a \leftarrow a + \mu_{t - 1} (\theta - a)

        \eta_t = lr / (1 + \lambda \, lr \, t)^\alpha, \quad \mu_t = 1 / \max(1, t - t_0), \quad
        \eta_0 = lr, \quad \mu_0 = 1

    where :math:`\lambda` is lambd, and :math:`g` has weight_decay times :math:`\theta` added. The
    average :math:`a` is the state ax. Polyak and Juditsky, Acceleration of Stochastic Approximation
    by Averaging, 1992.

    Args:
        params, lr, lambd, alpha, t0, weight_decay, maximize: as in torch.optim.ASGD. lr may be a
            tensor of one element.
        capturable: keep step, eta and mu on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr and weight_decay where these are tensors
            on that device; any other option stays as it was.
        foreach: accepted; the step is always the fused one.
        differentiable: must be False.
        state_dtype: dtype of ax: by default torch.float32 (float64 for float64 parameters). It
            cannot be "int8", as errors of codes would add up in an average of weights.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat: as
            in :class:`fusedopt.Adam`.

    The state of a parameter is step, eta and mu (float32, 0-dim, on the CPU unless capturable) and
    ax, in the parameter's shape.

    Raises:
        ValueError: as torch.optim.ASGD; for differentiable=True, state_dtype="int8", NaN options, a
            negative max_grad_norm, parameters that overlap in memory, and choices of storage that
            make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "asgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
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
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
