"""Schedule-free AdamW and SGD."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt._formats import storage_options
from fusedopt._masters import exact_weights, load_masters
from fusedopt._members import Member, list_members
from fusedopt._optimizer import FusedOptimizer
from fusedopt._sharded import wrap
from fusedopt._states import local_values
from fusedopt.optimizers._checks import check_options, number_in

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ScheduleFree(FusedOptimizer):
    """What both optimizers share: parameters that are other ones in training and in evaluation."""

    def _momentum_of(self, group: dict[str, Any]) -> Any:
        raise NotImplementedError

    def train(self) -> None:
        """Make the parameters those to train; call it before training and after evaluation."""
        self._move(training=True)

    def eval(self) -> None:
        """Make the parameters the averages; call it before evaluation, and before saving a model.

        Raises:
            RuntimeError: where train() was never called.
        """
        for index, group in enumerate(self.param_groups):
            if group["train_mode"] is None:
                raise RuntimeError(
                    f"{type(self).__name__}: eval() before train(): group {index} was never in "
                    "training mode; call train() before training and eval() before evaluation"
                )
        self._move(training=False)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in one pass; see torch.optim.Adam.step.

        Raises:
            RuntimeError: in evaluation mode, and for a sparse gradient.
            TypeError, ValueError: for a gradient, parameter, state or option that cannot be taken;
                the message names it. Nothing has been changed then.
        """
        for index in range(len(self.param_groups)):
            self._check_trains(index)
        return super().step(closure)

    def _steps_alone(self, index: int, param: Tensor) -> bool:
        self._check_trains(index)
        return super()._steps_alone(index, param)

    def _check_trains(self, index: int) -> None:
        if self.param_groups[index]["train_mode"] is False:
            raise RuntimeError(
                f"{type(self).__name__}: step() in evaluation mode, in which the parameters of "
                f"group {index} are averages; call train() first"
            )

    @torch.no_grad()
    def _move(self, training: bool) -> None:
        self._check_not_swapped("train()" if training else "eval()")
        self._forget_outdated_masters()
        alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        others: dict[Member, Tensor] = {}
        for member in list_members(self._groups()):
            group = member.group.options
            mode = group["train_mode"]
            if member.duplicate or mode is training or (mode is None and training):
                continue
            values = local_values(member, self.state.get(member.param, {}), member.keys)
            if values.get("z") is None:
                continue  # it was never stepped: all three are the same
            momentum = float(self._momentum_of(group))
            share = 1 - momentum if training else 1 - 1 / momentum
            param, z = member.local.detach(), values["z"]
            if z.dtype == param.dtype and not member.format.master_bits:
                params, those = alike.setdefault(share, ([], []))
                params.append(param)
                those.append(z)
                continue
            weights = exact_weights(member, values)
            wide = torch.promote_types(weights.dtype, torch.promote_types(z.dtype, torch.float32))
            weights = weights.to(wide).lerp(z.to(wide), share)
            others[member] = wrap(weights, member.param) if member.is_sharded else weights
        for share, (params, those) in alike.items():
            torch._foreach_lerp_(params, those, share)
        load_masters(
            type(self).__name__, [*others.values()], [*others], self.state, self._workspace
        )
        for group in self.param_groups:
            group["train_mode"] = training


class ScheduleFreeAdamW(ScheduleFree):
    r"""AdamW without a schedule of the learning rate, in one fused pass.

    For a parameter :math:`y` with gradient :math:`g` in step :math:`t`, element by element:

    .. math::
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        d = \frac{g}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda y

        y \leftarrow (1 - c_t) y + c_t z - lr_t (1 - \beta_1 (1 - c_t)) d, \quad
        z \leftarrow z - lr_t d

        lr_t = lr \min(1, t / warmup), \quad w_t = t^r \max_{s \le t} lr_s^{p}, \quad
        c_t = w_t / \sum_{s \le t} w_s

    While training, the parameters are :math:`y`. After :meth:`eval` they are the average :math:`x`
    of all :math:`z`, with :math:`y = (1 - \beta_1) z + \beta_1 x`, which are the weights to
    evaluate and to keep; :meth:`train` makes them :math:`y` again. Defazio et al., The Road Less
    Scheduled, NeurIPS 2024 (arXiv:2405.15682). Arguments and their defaults are those of the
    authors' package, schedulefree.

    Call ``train()`` where the model's is called, and ``eval()`` likewise. There is no schedule to
    be set; warm-up is part of the rule.

    Args:
        params, maximize: as in torch.optim.Adam.
        lr: the learning rate, which may be a tensor of one element, as may betas and weight_decay.
        betas: the weight of :math:`x` in :math:`y`, more than 0, and of the average of squares.
        eps: added to the root of the average of squares.
        weight_decay: :math:`\lambda`, of :math:`y`.
        warmup_steps: steps in which the learning rate rises to lr.
        r: the power of the step's number in its weight.
        weight_lr_power: :math:`p`, that of the largest learning rate so far.
        capturable: a step can be captured into a CUDA graph. A replay follows lr, betas and
            weight_decay where these are tensors on that device; any other option stays as it was.
        state_dtype: dtype of the states: by default torch.float32 (float64 for float64 parameters).
            It cannot be "int8", as errors of codes would add up in :math:`z`.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat: as
            in :class:`fusedopt.Adam`.

    The state of a parameter is step, lr_max and weight_sum (float32, 0-dim, on the CPU unless
    capturable) and z and exp_avg_sq, in the parameter's shape. A group has the key train_mode,
    which is saved.

    Raises:
        ValueError: for options that are negative or NaN, a momentum of 0, betas that are not two
            numbers below 1, state_dtype="int8", a negative max_grad_norm, parameters that overlap
            in memory, and choices of storage that make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "schedule_free_adamw"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
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
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
        }
        check_options(type(self).__name__, defaults, betas=2)
        check_momentum(type(self).__name__, "betas[0]", betas[0])
        defaults |= {"r": r, "weight_lr_power": weight_lr_power}
        defaults |= {"maximize": maximize, "capturable": capturable, "train_mode": None}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)

    def _momentum_of(self, group: dict[str, Any]) -> Any:
        return group["betas"][0]


class ScheduleFreeSGD(ScheduleFree):
    r"""SGD with momentum but without a schedule of the learning rate, in one fused pass.

    As :class:`fusedopt.ScheduleFreeAdamW`, with momentum for :math:`\beta_1` and

    .. math::
        d = g + \lambda y

    Defazio et al., The Road Less Scheduled, NeurIPS 2024 (arXiv:2405.15682). Arguments and their
    defaults are those of the authors' package, schedulefree.

    Args:
        params, maximize: as in torch.optim.SGD.
        lr: the learning rate, which may be a tensor of one element, as may momentum and
            weight_decay.
        momentum: the weight of :math:`x` in :math:`y`, more than 0 and less than 1.
        weight_decay: :math:`\lambda`, of :math:`y`.
        warmup_steps, r, weight_lr_power: as in :class:`fusedopt.ScheduleFreeAdamW`.
        capturable: a step can be captured into a CUDA graph. A replay follows lr, momentum and
            weight_decay where these are tensors on that device; any other option stays as it was.
        state_dtype: dtype of the states: by default torch.float32 (float64 for float64 parameters).
            It cannot be "int8", as errors of codes would add up in :math:`z`.
        min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm, norm_group, flat: as
            in :class:`fusedopt.Adam`.

    The state of a parameter is step, lr_max and weight_sum (float32, 0-dim, on the CPU unless
    capturable) and z, in the parameter's shape. A group has the key train_mode, which is saved.

    Raises:
        ValueError: for options that are negative or NaN, a momentum that is not between 0 and 1,
            state_dtype="int8", a negative max_grad_norm, parameters that overlap in memory, and
            choices of storage that make no sense together.
        TypeError: for a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient.

    See docs/precision.md for master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "schedule_free_sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float | Tensor = 0.9,
        weight_decay: float | Tensor = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
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
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
        }
        check_options(type(self).__name__, defaults, betas=0)
        check_momentum(type(self).__name__, "momentum", momentum)
        defaults |= {"r": r, "weight_lr_power": weight_lr_power}
        defaults |= {"maximize": maximize, "capturable": capturable, "train_mode": None}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)

    def _momentum_of(self, group: dict[str, Any]) -> Any:
        return group["momentum"]


def check_momentum(optimizer: str, name: str, value: Any) -> None:
    """Raise ValueError where the average cannot be told from the weights in training."""
    number = number_in(value)
    if number is not None and not 0 < number < 1:
        raise ValueError(
            f"{optimizer}: {name} is {value}; expected more than 0 and less than 1: it is the "
            "share of the average in the weights"
        )
