"""LARS."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LARS(FusedOptimizer):
    r"""LARS, SGD whose steps are as long as its weights are large, in two fused passes.

    For a parameter :math:`\theta` with gradient :math:`g`:

    .. math::
        b \leftarrow \mu b + \eta \cdot \frac{\lVert \theta \rVert}
            {\lVert g \rVert + \lambda \lVert \theta \rVert + \epsilon} \cdot
            (g + \lambda \theta), \quad
        \theta \leftarrow \theta - lr \cdot b

    with the norms of the whole parameter, which the first pass measures: of a DTensor all processes
    that it is cut among. In place of :math:`\eta` and the quotient is 1 where one of the norms is
    zero and, unless ``always_adapt``, where :math:`\lambda = 0`. With ``nesterov``, :math:`\mu b`
    and what was added to it last take the place of :math:`b` in the step. You et al., Large Batch
    Training of Convolutional Networks (arXiv:1708.03888). Arguments are those of the package timm,
    as far as it has them (trust_coefficient is trust_coeff there), with the paper's momentum.

    Args:
        params, maximize: as in torch.optim.SGD.
        lr: of all parameters together; it may be a tensor of one element. Where the norms are not
            looked at, it is that of SGD: the default of 1 is for weight decay or always_adapt only.
        momentum: :math:`\mu`.
        weight_decay: :math:`\lambda`, part of the gradient.
        trust_coefficient: :math:`\eta`, how long a step is, as a share of the parameter's norm.
        eps: added to the denominator.
        nesterov: as in torch.optim.SGD.
        always_adapt: whether parameters without weight decay, such as biases often are, are
            measured as well.
        capturable: a step can be captured into a CUDA graph. A replay follows lr where it is a
            tensor on that device; any other option stays as it was.
        state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm,
            norm_group, flat: as in :class:`fusedopt.Adam`.

    The state of a parameter is momentum_buffer, in the parameter's shape.

    Raises:
        ValueError: for options that are negative or NaN, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that
            make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "lars"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        nesterov: bool = False,
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
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"trust_coefficient": trust_coefficient, "eps": eps}
        check_options(type(self).__name__, defaults, betas=0)
        defaults |= {"nesterov": nesterov, "always_adapt": always_adapt}
        defaults |= {"maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)
