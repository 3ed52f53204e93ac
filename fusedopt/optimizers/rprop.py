"""Rprop."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Rprop(FusedOptimizer, torch.optim.Rprop):
    r"""Rprop, as :class:`torch.optim.Rprop`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g`, element by element:

    .. math::
        \eta \leftarrow \begin{cases}
            \min(\eta^+ \eta, \Gamma_{max}) & \text{where } g h > 0 \\
            \max(\eta^- \eta, \Gamma_{min}) & \text{where } g h < 0 \text{, and } g \leftarrow 0 \\
            \eta & \text{elsewhere}
        \end{cases} \qquad
        \theta \leftarrow \theta - \eta \cdot \mathrm{sign}(g), \quad h \leftarrow g

    where the step size :math:`\eta` begins as lr. Riedmiller and Braun, A Direct Adaptive Method
    for Faster Backpropagation Learning: The RPROP Algorithm, ICNN 1993.

    Args:
        params, lr, etas, step_sizes, maximize: as in torch.optim.Rprop: etas are :math:`\eta^-` and
            :math:`\eta^+`, step_sizes :math:`\Gamma_{min}` and :math:`\Gamma_{max}`. lr may be a
            tensor of one element; after a parameter's first step it means nothing.
        capturable: keep the step counts on the parameters' CUDA device, so that a step can be
            captured into a CUDA graph. Options stay as they were in a replay.
        foreach: accepted; the step is always the fused one.
        differentiable: must be False.
        state_dtype: dtype of the states, as in :class:`fusedopt.Adam`, but not "int8": errors
            of codes would add up in the step sizes.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat: as
            in :class:`fusedopt.Adam`.

    The state of a parameter is step (float32, 0-dim, on the CPU unless capturable), prev and
    step_size, in the parameter's shape.

    Raises:
        ValueError: as torch.optim.Rprop; for differentiable=True, NaN options, a negative
            max_grad_norm, parameters that overlap in memory, and choices of storage that make no
            sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "rprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
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
            "etas": etas,
            "step_sizes": step_sizes,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
        }
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        self._init(options, flat, max_grad_norm, args, differentiable, norm_group)
