"""Stochastic gradient descent."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent, as :class:`torch.optim.SGD`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g`, momentum :math:`\mu`, dampening
    :math:`\tau` and weight decay :math:`\lambda`, element by element:

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        b \leftarrow \mu b + (1 - \tau) g \;(\text{the first time } b \leftarrow g), \quad
        \theta \leftarrow \theta - lr \cdot b

    with :math:`g + \mu b` in place of the last :math:`b` for ``nesterov``, and :math:`g` without
    momentum. Sutskever et al., On the importance of initialization and momentum in deep learning,
    ICML 2013, in the form that torch.optim.SGD gives it.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
            lr may be a tensor of one element.
        foreach, fused: accepted; the step is always the fused one.
        differentiable: must be False.
        capturable: let a step be captured into a CUDA graph. A replay follows lr and weight_decay
            where these are tensors on the parameters' device; any other option stays as it was.
        state_dtype: dtype of momentum_buffer: by default torch.float32
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

    The state of a parameter is, with momentum, momentum_buffer, in the parameter's shape.

    Raises:
        ValueError: as torch.optim.SGD; for differentiable=True, NaN options, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        if capturable:
            options["capturable"] = True
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
