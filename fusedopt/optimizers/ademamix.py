"""AdEMAMix."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdEMAMix(FusedOptimizer):
    r"""AdEMAMix, Adam with a second, much slower average of gradients, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        s \leftarrow \beta_3 s + (1 - \beta_3) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2

        \theta \leftarrow \theta - lr \left(\frac{m / (1 - \beta_1^t) + \alpha s}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda \theta\right)

    Over the first alpha_warmup steps :math:`\alpha` grows linearly from 0, and over the first
    beta3_warmup steps the half-life of :math:`s` does from that of :math:`m`:

    .. math::
        \beta_3(t) = \min\left(\beta_3, \exp\left(\frac{\ln \beta_1 \ln \beta_3}
            {(1 - t / T) \ln \beta_3 + (t / T) \ln \beta_1}\right)\right)

    Pagliardini, Ablin and Grangier, The AdEMAMix Optimizer: Better, Faster, Older, 2024
    (arXiv:2409.03137). Arguments, their defaults, and states are those of the authors' code
    (apple/ml-ademamix).

    Args:
        params, lr, eps, maximize: as in torch.optim.Adam. lr, betas and weight_decay may be
            tensors of one element.
        betas: :math:`\beta_1, \beta_2, \beta_3`.
        alpha: the share of the slow average; the authors use 4 to 10 for language models.
        beta3_warmup, alpha_warmup: of how many steps; the authors use all of a training. None:
            no warm-up.
        weight_decay: :math:`\lambda`, decoupled from the gradient.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr, betas and weight_decay where
            these are tensors on that device; any other option stays as it was.
        state_dtype: dtype of the states, as in :class:`fusedopt.Adam`, but not "int8": a step
            changes the slow average by less than codes can tell apart. So it does with
            torch.bfloat16 where gradients are nearly constant.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat:
            as in :class:`fusedopt.Adam`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable) and
    exp_avg_fast, exp_avg_slow and exp_avg_sq, in the parameter's shape.

    Raises:
        ValueError: for options that are negative or NaN, betas that are not three numbers below 1,
            a negative max_grad_norm, parameters that overlap in memory, and choices of storage that
            make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "ademamix"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
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
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "beta3_warmup": beta3_warmup,
            "alpha_warmup": alpha_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        check_options(type(self).__name__, defaults, betas=3)
        defaults |= {"maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)
