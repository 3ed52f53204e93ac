"""StableAdamW."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class StableAdamW(FusedOptimizer):
    r"""AdamW that takes shorter steps where gradients have grown, in two fused passes.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`:

    .. math::
        m \leftarrow \hat\beta_1 m + (1 - \hat\beta_1) g, \quad
        v \leftarrow \hat\beta_2 v + (1 - \hat\beta_2) g^2, \quad
        \hat\beta = \beta \cdot \frac{1 - \beta^{t - 1}}{1 - \beta^t}

        \theta \leftarrow \theta - \frac{lr}{\max(1, \mathrm{RMS})} \left(
            \frac{m}{\sqrt{v} + \epsilon} + \lambda \theta\right), \quad
        \mathrm{RMS} = \sqrt{\operatorname{mean} \frac{g^2}{\max(v, \epsilon^2)}}

    where the mean is that of the whole parameter, which the first pass measures: of a DTensor all
    processes that it is cut among. Wortsman et al., Stable and low-precision training for
    large-scale vision-language models, NeurIPS 2023 (arXiv:2304.13013). Arguments and their
    defaults are those of the package torch-optimi, as far as it has them.

    Args:
        params, maximize: as in torch.optim.AdamW.
        lr, betas, weight_decay: as there; they may be tensors of one element.
        eps: added to the root; its square is the least that a mean is made of.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr, betas and weight_decay where
            these are tensors on that device; any other option stays as it was.
        state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm,
            norm_group, flat: as in :class:`fusedopt.Adam`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable) and exp_avg and
    exp_avg_sq, in the parameter's shape.

    Raises:
        ValueError: for options that are negative or NaN, betas that are not two numbers below 1, a
            negative max_grad_norm, parameters that overlap in memory, and choices of storage that
            make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "stable_adamw"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float | Tensor = 1e-2,
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
        norm_group: "ProcessGroup | None" = None,
        flat: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay}
        check_options(type(self).__name__, defaults, betas=2)
        defaults |= {"maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)
