"""Adagrad."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _WithoutStates(torch.optim.Adagrad):
    """torch's class, whose constructor makes no states: ours are others."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__([{"params": []}], **options)  # checks the options, and makes the defaults
        Optimizer.__init__(self, params, self.defaults)


class Adagrad(FusedOptimizer, _WithoutStates):
    r"""Adagrad, as :class:`torch.optim.Adagrad`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        s \leftarrow s + g^2, \quad
        \theta \leftarrow \theta - \frac{lr}{1 + \delta (t - 1)} \cdot \frac{g}{\sqrt{s} + \epsilon}

    where :math:`s` begins as initial_accumulator_value and :math:`\delta` is lr_decay, with
    :math:`g + \lambda \theta` in place of :math:`g` for weight decay :math:`\lambda`. Duchi, Hazan
    and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, JMLR
    12, 2011.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in
            torch.optim.Adagrad. lr may be a tensor of one element. A group may have an
            initial_accumulator_value of its own, which torch ignores.
        foreach, fused: accepted; the step is always the fused one. With fused=True, step counts are
            on a CUDA device, as with capturable.
        differentiable: must be False.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. A replay follows lr and weight_decay where
            these are tensors on that device; any other option stays as it was.
        state_dtype: dtype of the states, as in :class:`fusedopt.Adam`, but not "int8": errors
            of codes would add up in the sum.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat: as
            in :class:`fusedopt.Adam`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable or fused)
    and sum, in the parameter's shape. As in torch, the constructor makes it; but the first step
    that of a parameter that had no memory then (uninitialised, or on the meta device).

    Raises:
        ValueError: as torch.optim.Adagrad; for differentiable=True, NaN options, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "adagrad"
    _states_at_once = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
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
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
            "fused": fused,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        if capturable:
            options["capturable"] = True
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
