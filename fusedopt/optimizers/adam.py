"""Adam and AdamW."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import cautious_options, check_cautious

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam, as :class:`torch.optim.Adam`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2

        \theta \leftarrow \theta - lr \cdot \frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with :math:`g + \lambda \theta` in place of :math:`g` for weight decay :math:`\lambda` or, with
    ``decoupled_weight_decay``, :math:`lr \lambda \theta` taken off :math:`\theta` besides. With
    ``amsgrad``, :math:`v` in the quotient is the largest so far. Kingma and Ba, Adam, ICLR 2015
    (arXiv:1412.6980); Reddi et al., On the Convergence of Adam and Beyond, ICLR 2018; Loshchilov
    and Hutter, Decoupled Weight Decay Regularization, ICLR 2019 (arXiv:1711.05101).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in
            torch.optim.Adam. lr and betas may be tensors of one element.
        foreach, fused: accepted; the step is always the fused one. With fused=True, step counts are
            on a CUDA device, as with capturable.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr, betas and weight_decay where
            these are tensors on that device; any other option stays as it was.
        differentiable: must be False.
        cautious: leave out the change of each element that the step would move against its
            gradient :math:`g`, and make the others longer, by the share of the parameter's elements
            that they are (at least 0.001), as in Liang et al., Cautious Optimizers
            (arXiv:2411.16085). It takes another pass over :math:`g` and :math:`m`.
        cautious_weight_decay: decoupled decay only of elements that the step does not move away
            from zero, as in Chen et al., Cautious Weight Decay (arXiv:2510.12402).
        first_moment: False keeps no exp_avg: :math:`g` stands for :math:`m / (1 - \beta_1^t)`, as
            with a beta of 0, and the first of betas is not looked at. What is saved then is no
            state of torch.optim.Adam.
        state_dtype: dtype of exp_avg, exp_avg_sq and max_exp_avg_sq: by default torch.float32
            (float64 for float64 parameters); torch.bfloat16 for bfloat16 and float32 parameters,
            torch.float16 for float16 ones, or "int8": a byte each and a scale for every 256.
        min_8bit_size: parameters with fewer elements keep float32 states where others have "int8".
        master_bits: 32 keeps exact float32 weights beside bfloat16 parameters, in 2 bytes each
            (beside float16 ones, in 4), 24 keeps 16 bits of precision in 1 byte; None: none.
        rounding: of bfloat16 parameters without masters: "nearest", or "stochastic", which is right
            in the mean.
        seed: of stochastic rounding, from 0 to 2**64 - 1; saved in the state_dict.
        ema_decay: keep a moving average of the weights, :math:`a \leftarrow d a + (1 - d) \theta`
            after each step, from the weights after the first one, as the key ema of the state: in
            float32 or, where it is no "int8", in state_dtype. :meth:`ema_params` yields the
            averages, within :meth:`swap_ema` they are the parameters. None: there are none.
        max_grad_norm: clip the gradients to this norm of all of them together, as
            torch.nn.utils.clip_grad_norm_ does, but only within the step: gradients are read, not
            written. The norm is :attr:`grad_norm`. None: no clipping. With a norm that is not
            finite, gradients become zero or NaN, as with error_if_nonfinite=False. Gradients of
            DTensors are those of all processes that these are cut among.
        norm_group: the process group among which parameters that are plain tensors are cut, as with
            FSDP1, ZeroRedundancyOptimizer and DeepSpeed's ZeRO; None: they are whole.
        flat: move the parameters and their gradients into flat buffers first, see
            :class:`fusedopt.FlatParameters`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable or fused) and
    exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq, in the parameter's shape.

    Raises:
        ValueError: as torch.optim.Adam; for cautious_weight_decay of decay that is not decoupled,
            cautious without a first moment, differentiable=True, NaN options, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        first_moment: bool = True,
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
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        options |= cautious_options(cautious, cautious_weight_decay)
        if not first_moment:
            options["first_moment"] = False
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)

    def _check_group(self, index: int, group: Mapping[str, Any]) -> None:
        check_cautious(type(self).__name__, index, group)


class AdamW(FusedOptimizer, torch.optim.AdamW):
    r"""AdamW, as :class:`torch.optim.AdamW`, in one fused pass.

    Adam with decoupled weight decay :math:`\lambda`, see :class:`fusedopt.Adam` for its averages:

    .. math::
        \theta \leftarrow \theta - lr \left(\frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda \theta\right)

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019 (arXiv:1711.05101).
    Arguments, state and errors are those of :class:`fusedopt.Adam`, with weight_decay 0.01 by
    default.
    """

    __module__ = "fusedopt"
    _rule = "adam"

    _check_group = Adam._check_group

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        first_moment: bool = True,
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
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        options |= cautious_options(cautious, cautious_weight_decay)
        if not first_moment:
            options["first_moment"] = False
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
