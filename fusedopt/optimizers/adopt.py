"""ADOPT."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._optimizer import FusedOptimizer
from fusedopt.optimizers._checks import check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ADOPT(FusedOptimizer):
    r"""ADOPT, which converges with any :math:`\beta_2`, in one fused pass.

    For a parameter :math:`\theta` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) \operatorname{clip}\left(
            \frac{g}{\max(\sqrt{v}, \epsilon)}, \sqrt[4]{t - 1}\right), \quad
        \theta \leftarrow \theta - lr \cdot m

        v \leftarrow \beta_2 v + (1 - \beta_2) g^2

    but that the first step only sets :math:`v = g^2`. :math:`\operatorname{clip}(x, c)` is
    :math:`x`, but from :math:`-c` to :math:`c`. Weight decay :math:`\lambda` adds
    :math:`\lambda \theta` to :math:`g` or, with ``decouple``, takes :math:`lr \lambda \theta` off
    :math:`\theta` besides. Taniguchi et al., ADOPT: Modified Adam Can Converge with Any
    :math:`\beta_2` with the Optimal Rate, NeurIPS 2024 (arXiv:2411.02853). Arguments, their
    defaults, and states are those of the authors' code (iShohei220/adopt) since it clips.

    Args:
        params, lr, betas, maximize: as in torch.optim.Adam. lr, betas and weight_decay may be
            tensors of one element.
        eps: the least that a gradient is divided by.
        clip: whether gradients are clipped after the division, which is clip_lambda in the authors'
            code, and there a function; False (or None) is the form of the paper's first version.
        weight_decay, decouple: :math:`\lambda`, and whether it is decoupled from the gradient.
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
    _rule = "adopt"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip: bool | None = True,
        weight_decay: float | Tensor = 0.0,
        decouple: bool = False,
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
            "eps": eps,
            "clip": clip,
            "weight_decay": weight_decay,
            "decouple": decouple,
        }
        check_options(type(self).__name__, defaults, betas=2)
        defaults |= {"maximize": maximize, "capturable": capturable}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)
