"""Lion."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import cautious_options, check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Lion(FusedOptimizer):
    r"""Lion, evolved sign momentum, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g`, element by element:

    .. math::
        \theta \leftarrow \theta - lr \left(
            \operatorname{sign}(\beta_1 m + (1 - \beta_1) g) + \lambda \theta\right), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    where the sign of zero is zero. Chen et al., Symbolic Discovery of Optimization Algorithms,
    NeurIPS 2023 (arXiv:2302.06675). Arguments and their defaults are those of the authors' code,
    as in the package lion-pytorch, whose states can be loaded.

    All steps are equally long, so that lr should be 3 to 10 times less than for AdamW, and
    weight_decay as many times more.

    Args:
        params, maximize: as in torch.optim.Adam.
        lr: how far each element goes in a step. It may be a tensor of one element, as may betas
            and weight_decay.
        betas: the weights of the average in the direction of a step, and in the next average.
        weight_decay: :math:`\lambda`, decoupled from the gradient.
        cautious, cautious_weight_decay: as in :class:`fusedopt.Adam`.
        capturable: a step can be captured into a CUDA graph. A replay follows lr, betas and
            weight_decay where these are tensors on that device; any other option stays as it was.
        state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm,
            norm_group, flat: as in :class:`fusedopt.Adam`.

    The state of a parameter is exp_avg, in the parameter's shape.

    Raises:
        ValueError: for options that are negative or NaN, betas that are not two numbers below 1, a
            negative max_grad_norm, parameters that overlap in memory, and choices of storage that
            make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        *,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
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
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        check_options(type(self).__name__, defaults, betas=2)
        defaults |= {"maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        options |= cautious_options(cautious, cautious_weight_decay)
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)
