"""LAMB."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LAMB(FusedOptimizer):
    r"""LAMB, whose steps are as long as its weights are large, in two fused passes.

    For a parameter :math:`\theta` with gradient :math:`g`, and :math:`m` and :math:`v` as in
    :class:`fusedopt.Adam`:

    .. math::
        r = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda \theta,
        \quad
        \theta \leftarrow \theta - lr \cdot \frac{\lVert \theta \rVert}{\lVert r \rVert} \cdot r

    with the norms of the whole parameter, which the first pass measures: of a DTensor all processes
    that it is cut among. Their quotient is 1 where one of them is zero and, unless
    ``always_adapt``, where :math:`\lambda = 0`. You et al., Large Batch Optimization for Deep
    Learning, ICLR 2020 (arXiv:1904.00962). Arguments and their defaults are those of the package
    timm, as far as it has them, but that nothing is clipped unless max_grad_norm is given.

    Args:
        params, betas, maximize: as in torch.optim.Adam.
        lr: how long a step is, as a share of the parameter's norm. It may be a tensor of one
            element, as may betas.
        eps: added to the root.
        weight_decay: :math:`\lambda`, part of the direction that is measured.
        always_adapt: whether parameters without weight decay, such as biases often are, are
            measured as well.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr and betas where these are tensors on
            that device; any other option stays as it was.
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
    _rule = "lamb"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        always_adapt: bool = False,
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
        defaults |= {"always_adapt": always_adapt, "maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)
