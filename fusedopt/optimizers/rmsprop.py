"""RMSprop."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop, as :class:`torch.optim.RMSprop`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g`, element by element:

    .. math::
        v \leftarrow \alpha v + (1 - \alpha) g^2, \quad
        \theta \leftarrow \theta - lr \cdot \frac{g}{\sqrt{v} + \epsilon}

    With ``centered``, :math:`v - a^2` in place of the :math:`v` in the quotient, where
    :math:`a \leftarrow \alpha a + (1 - \alpha) g`; with ``momentum`` :math:`\mu`,
    :math:`b \leftarrow \mu b + g / (\sqrt{v} + \epsilon)` in place of the quotient; with
    ``eps_inside_sqrt`` the denominator is :math:`\sqrt{v + \epsilon}`, the form of most textbooks
    and of TensorFlow. Tieleman and Hinton, lecture 6.5, 2012; centered: Graves, Generating
    Sequences With Recurrent Neural Networks, 2013 (arXiv:1308.0850).

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, maximize: as in
            torch.optim.RMSprop. lr may be a tensor of one element.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr and weight_decay where
            these are tensors on that device; any other option stays as it was.
        foreach: accepted; the step is always the fused one.
        differentiable: must be False.
        eps_inside_sqrt: whether eps is added to the average itself rather than to its root.
        state_dtype: dtype of the states: by default torch.float32
            (float64 for float64 parameters); torch.bfloat16 for bfloat16 and float32 parameters,
            torch.float16 for float16 ones, or "int8": a byte each and a scale for every 256.
        min_8bit_size: parameters with fewer elements keep float32 states where others have "int8".
        master_bits: 32 keeps exact float32 weights beside bfloat16 parameters, in 2 bytes each
            (beside float16 ones, in 4), 24 keeps 16 bits of precision in 1 byte; None: none.
        rounding: of bfloat16 parameters without masters: "nearest", or "stochastic", which is right
            in the mean.
        seed: of stochastic rounding, from 0 to 2**64 - 1; saved in the state_dict.
        ema_decay: as in :class:`fusedopt.Adam`.
        max_grad_norm: clip the gradients to this norm of all of them together, as
            torch.nn.utils.clip_grad_norm_ does, but only within the step: gradients are read, not
            written. The norm is :attr:`grad_norm`. None: no clipping. With a norm that is not
            finite, gradients become zero or NaN, as with error_if_nonfinite=False. Gradients of
            DTensors are those of all processes that these are cut among.
        norm_group: the process group among which parameters that are plain tensors are cut, as with
            FSDP1, ZeroRedundancyOptimizer and DeepSpeed's ZeRO; None: they are whole.
        flat: move the parameters and their gradients into flat buffers first, see
            :class:`fusedopt.FlatParameters`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable), square_avg and,
    with momentum, momentum_buffer and, with centered, grad_avg, in the parameter's shape.

    Raises:
        ValueError: as torch.optim.RMSprop; for differentiable=True, NaN options, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "rmsprop"
    _unsafe_in_int8 = {
        "centered": "square_avg - grad_avg^2 is a small difference, of which codes leave nothing"
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_inside_sqrt: bool = False,
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
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        if eps_inside_sqrt:
            options["eps_inside_sqrt"] = True
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
