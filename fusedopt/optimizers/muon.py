"""Muon."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from fusedopt._directions import Parts, as_matrices, set_gradient, swapped_gradients
from fusedopt._extension import _C
from fusedopt._formats import DEFAULTS, storage_options
from fusedopt._gathered import agree, change_whole, tell_failed
from fusedopt._members import Group
from fusedopt._optimizer import FusedOptimizer
from fusedopt._orthogonal import DTYPE, NewtonSchulz
from fusedopt._sharded import groups_of, is_sharded, local_of, whole_of
from fusedopt._states import replace_values
from fusedopt.optimizers._checks import check_betas, check_matrix, check_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ADAMW: Final = {
    **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    **{"amsgrad": False, "decoupled_weight_decay": True},
}
"""Options of groups that are stepped by AdamW, and their defaults."""

OF_MATRICES: Final = 0x9E3779B97F4A7C15
"""By what seeds for matrices are others, any 64 bits."""

ADJUSTMENTS: Final = (None, "original", "match_rms_adamw")
VIEWS: Final = ("flatten", "batch")


class Muon(FusedOptimizer):
    r"""Muon, momentum made orthogonal, with AdamW for what is no matrix.

    For a matrix :math:`\theta` of :math:`A \times B` elements with gradient :math:`g`:

    .. math::
        m \leftarrow \mu m + (1 - \mu) g, \quad
        d = \mu m + (1 - \mu) g \text{ with nesterov, else } m

        \theta \leftarrow \theta - lr \left(\lambda \theta + r \operatorname{NS}(d)\right), \quad
        r = \sqrt{\max(1, A / B)} \text{ or, to match AdamW, } 0.2 \sqrt{\max(A, B)}

    where NS is a Newton-Schulz iteration, :math:`X \leftarrow aX + b(XX^T)X + c(XX^T)^2X` from
    :math:`d` over its norm, in bfloat16: all singular values come near 1. Jordan et al., Muon: An
    optimizer for hidden layers in neural networks, 2024
    (https://kellerjordan.github.io/posts/muon); Liu et al., Muon is Scalable for LLM Training, 2025
    (arXiv:2502.16982). Arguments and their defaults are those of :class:`torch.optim.Muon`, and a
    checkpoint of matrices alone goes both ways.

    What is no matrix, and embeddings and heads, belong into groups of their own with
    ``use_muon=False``, which AdamW steps::

        optimizer = fusedopt.Muon(
            [{"params": matrices}, {"params": others, "use_muon": False}],
            lr=0.02, adamw={"lr": 3e-4, "betas": (0.9, 0.95)},
        )

    Momentum, AdamW, decay and steps are fused passes over all parameters; the products are torch's,
    of matrices of one shape together, and on Gram matrices where one is oblong. Other numbers of
    matrices, other devices and other versions of torch may round products in other ways.
    Directions are stored while a step is taken, which needs the memory of the matrices once more.
    Sharded matrices (FSDP2) are brought together whole in bfloat16, each on one of the processes
    that share it.

    Args:
        params: as in torch.optim.Adam. A group may say ``use_muon``: by default it is False where
            adamw is given and all parameters of the group are vectors or scalars, else True.
        lr: how far a step goes; see adjust_lr_fn. It may be a tensor of one element.
        weight_decay: :math:`\lambda`, decoupled from the gradient.
        momentum: :math:`\mu`.
        nesterov: whether the gradient has its part in the direction once more.
        ns_coefficients: a, b and c.
        eps: the least norm that a direction is divided by.
        ns_steps: how many steps the iteration has, fewer than 100.
        adjust_lr_fn: :math:`r`: "original" (None is the same) or "match_rms_adamw".
        adamw: options of groups that AdamW steps: lr, betas, eps, weight_decay, amsgrad; see
            :class:`fusedopt.AdamW`. None: there are no such groups.
        ns_view: what a parameter with more than two dimensions is: "flatten": one matrix with a row
            for each element of the first dimension, as convolutions are; "batch": matrices in the
            last two dimensions, such as those of experts.
        maximize: as in torch.optim.Adam.
        state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay, max_grad_norm,
            norm_group, flat: as in :class:`fusedopt.Adam`. Gradients are clipped before they are
            averaged.

    The state of a matrix is momentum_buffer, in the parameter's shape, others have that of AdamW.

    Raises:
        ValueError: for a parameter without two dimensions in a group of Muon's, options that are
            negative or NaN, use_muon=False without adamw, a choice that there is not, and as
            :class:`fusedopt.Adam`.
        TypeError: for complex parameters, and a state_dtype that is not supported.

    A parameter that cannot be stepped is an error of the first step in which it has a gradient. A
    step cannot be captured into a CUDA graph.

    See docs/precision.md for state_dtype, master_bits and rounding, and the keys that they add.
    """

    __module__ = "fusedopt"
    _rule = "muon"

    # Class-level, as unpickling calls no constructor.
    _cached_parts: Parts | None = None
    _adamw: Mapping[str, Any] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw: Mapping[str, Any] | None = None,
        ns_view: str = "flatten",
        maximize: bool = False,
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
            **{"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov},
            **{"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps},
            "adjust_lr_fn": adjust_lr_fn,
        }
        if adamw is not None:
            if unknown := adamw.keys() - ADAMW.keys():
                raise ValueError(
                    f"Muon: adamw has the option {min(unknown)!r}; expected some of "
                    + ", ".join(key for key in ADAMW if key != "decoupled_weight_decay")
                )
            self._adamw = {**ADAMW, **adamw}
        options = storage_options(
            state_dtype, min_8bit_size, master_bits, rounding, seed, ema_decay
        )
        options |= {"ns_view": ns_view} if ns_view != VIEWS[0] else {}
        options |= {"maximize": True} if maximize else {}
        args = {"params": params, "defaults": defaults}
        self._init(options, flat, max_grad_norm, args, norm_group=norm_group)

    # -- parameter groups ---------------------------------------------------------------------

    def _rule_of(self, group: Mapping[str, Any]) -> str:
        return self._rule if group.get("use_muon", True) else "adam"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, Tensor | set):  # of which torch has its own opinion
                params = param_group["params"] = list(params)
            if self._adamw is not None and "use_muon" not in param_group:
                tensors = [params] if isinstance(params, Tensor) else [*params]
                tensors = [each[1] if isinstance(each, tuple) else each for each in tensors]
                if tensors and all(isinstance(p, Tensor) and _dims(p) < 2 for p in tensors):
                    param_group["use_muon"] = False
            if not param_group.get("use_muon", True):
                if self._adamw is None:
                    raise ValueError(
                        f"Muon: group {len(self.param_groups)} has use_muon=False, but Muon was "
                        "not given adamw=; give the options of AdamW for such groups, {} for its "
                        "defaults"
                    )
                for key, default in self._adamw.items():
                    param_group.setdefault(key, default)
                param_group.setdefault("maximize", self.defaults.get("maximize", False))
        super().add_param_group(param_group)
        self._cached_parts = None

    def _check_group(self, index: int, group: Mapping[str, Any]) -> None:
        self._check_options(index, group)
        self._check_matrices(index, group, group["params"])

    def _check_options(self, index: int, group: Mapping[str, Any]) -> None:
        what = f"Muon: group {index}"
        if group.get("cautious"):
            raise ValueError(f"{what} has cautious=True; give its parameters AdamW by itself")
        if not self._is_of_matrices(group):
            if missing := ADAMW.keys() - group.keys():
                raise ValueError(
                    f"{what} has use_muon=False but no {min(missing)}; give the group all options "
                    f"of AdamW: {', '.join(ADAMW)}"
                )
            check_betas(what, group["betas"], 2)
            check_options(what, {key: group[key] for key in ("lr", "eps", "weight_decay")}, 2)
            return
        check_options(what, {key: group[key] for key in ("lr", "weight_decay", "momentum")}, 0)
        Group("Muon", index, _steps_of(group), "sgd", {}).check_options()

        def check(key: str, right: bool, expected: str) -> None:
            if not right:
                raise ValueError(f"{what}: {key} is {group[key]!r}; expected {expected}")

        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        three = isinstance(coefficients, tuple | list) and len(coefficients) == 3
        check("ns_coefficients", three and all(map(_is_finite, coefficients)), "three numbers")
        check("eps", _is_finite(group["eps"]) and group["eps"] >= 0, "a number of at least 0")
        check("ns_steps", isinstance(steps, int) and 0 <= steps < 100, "a number from 0 to 99")
        for key, choices in (("adjust_lr_fn", ADJUSTMENTS), ("ns_view", VIEWS)):
            check(key, group.get(key, choices[0]) in choices, f"one of {choices}")

    def _check_matrices(
        self, index: int, group: Mapping[str, Any], those: Iterable[Tensor]
    ) -> None:
        """Raise for those parameters of a group that are no matrices, if they should be."""
        looked_at = {id(param) for param in those} if self._is_of_matrices(group) else set()
        for name, param in self._group(index, dict(group)).named() if looked_at else ():
            if id(param) in looked_at:
                check_matrix(f"Muon: {name}", param, self._adamw is not None)

    def _is_of_matrices(self, group: Mapping[str, Any]) -> bool:
        return self._rule_of(group) == self._rule

    # -- the step -----------------------------------------------------------------------------

    def _steps_alone(self, index: int, param: Tensor) -> bool:
        alone = not self._is_of_matrices(self.param_groups[index])  # which are taken in batches
        return alone and super()._steps_alone(index, param)

    def _update(self, grads: list[tuple[Tensor, Tensor]] | None) -> bool:
        new = [p for p in self._params() if _C.has_gradient(p) and not self.state.get(p)]
        parts = self._parts
        placed: list[tuple[Tensor, Tensor]] = []
        stepped = False
        try:
            try:
                skips = self._is_skipped()
                matrices = self._look(new, placed)
            except Exception as error:
                self._tell_others(error)
                raise
            sharded = [i for i, p in enumerate(self._params()) if p in matrices and is_sharded(p)]
            if agree("Muon", self._process_groups(), sharded, skips=skips):
                if self._max_grad_norm is not None:  # which then is not finite
                    parts.average.found_inf = 1.0
                    parts.average._step(placed)
                return False
            parts.average._step(placed)
            stepped = True
            self._orthogonalize(matrices)
            whole = {p: d for p, d in matrices.items() if not is_sharded(p)}
            shards = [(p, local_of(d)) for p, d in matrices.items() if p not in whole]
            with swapped_gradients(whole):
                parts.apply._step(shards)
            # No state was made for a step that is still to come any longer.
            for param in self._params():
                if _C.has_gradient(param):
                    self._workspace.forget_begun(param)
        finally:
            parts.let_go()
            if not stepped:
                for param in new:
                    replace_values(self.state, param, None)
                    self._workspace.forget_begun(param)
        return True

    def _look(
        self, new: Sequence[Tensor], placed: list[tuple[Tensor, Tensor]]
    ) -> dict[Tensor, Tensor]:
        """Get all ready for a step; raise what it would raise.

        Args:
            new: parameters whose state is to be made.
            placed: to which gradients are added that were redistributed.

        Returns:
            The matrices that have a gradient, each with its direction.
        """
        for index, group in enumerate(self.param_groups):
            self._check_options(index, group)
            if new:
                self._check_matrices(index, group, new)
        if new:
            if any(_C.is_capturing(param.device) for param in new):
                self._check_capture(new[0])
            self._make_plan(self.state, new)
        parts = self._parts
        average, apply = parts.average, parts.apply
        found = [
            p
            for group in self.param_groups
            if self._is_of_matrices(group)
            for p in group["params"]
            if _C.has_gradient(p)
        ]
        parts.directions.lend(dict.fromkeys(found))
        matrices = {param: parts.directions.of(param) for param in found}
        if any(map(_C.is_capturing, {param.device for param in found})):
            raise RuntimeError("Muon: a step cannot be captured into a CUDA graph")
        average.set_groups([*self._groups_to_average()])
        apply.set_groups([*self._groups_to_apply()])
        for param in self._params():
            if not (values := self.state.get(param)):
                continue
            direction = matrices.get(param)
            if direction is None:
                average.state[param] = values
                continue
            average.state[direction] = values
            apply.state[param] = values
            assert param.grad is not None
            if param.grad.shape != direction.shape:
                raise ValueError(
                    f"Muon: {self._name_of(param)} has shape {tuple(param.shape)} but its gradient "
                    f"has shape {tuple(param.grad.shape)}"
                )
            set_gradient(direction, param.grad)
        average._max_grad_norm, average._norm_group = self._max_grad_norm, self._norm_group
        average.grad_scale = getattr(self, "grad_scale", None)
        average._check_step(placed)
        apply._check_step([], positions=[])
        return matrices

    def _name_of(self, param: Tensor) -> str:
        named = (each for group in self._groups() for each in group.named())
        return next(name for name, each in named if each is param)

    @property
    def _parts(self) -> Parts:
        if self._cached_parts is None:
            self._cached_parts = Parts("Muon", self._workspace)
        return self._cached_parts

    def _groups_to_average(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        for index, group in enumerate(self.param_groups):
            options = dict(group)
            if self._is_of_matrices(group):
                options["params"] = [self._parts.directions.of(param) for param in group["params"]]
                # A direction is no weight.
                options |= {"master_bits": None, "rounding": "nearest"}
            yield index, self._rule_of(group), options

    def _groups_to_apply(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        for index, group in enumerate(self.param_groups):
            if not self._is_of_matrices(group):
                continue
            by_ratio: dict[float, dict[str, Tensor]] = {}
            for name, param in self._group(index, group).named():
                if not is_lazy(param):
                    by_ratio.setdefault(_ratio(param, group), {})[name] = param
            for ratio, params in by_ratio.items():
                # The direction is taken `ratio` times, the decay once.
                options = _steps_of(group)
                options |= {"params": [*params.values()], "labels": [*params]}
                # Other random bits than those of AdamW's parameters.
                options["seed"] = options.get("seed", DEFAULTS["seed"]) ^ OF_MATRICES
                options["lr"] = float(group["lr"]) * ratio
                options["weight_decay"] = float(group["weight_decay"]) / ratio
                yield index, "sgd", options

    @torch.no_grad()
    def _orthogonalize(self, matrices: Mapping[Tensor, Tensor]) -> None:
        alike: dict[tuple[NewtonSchulz, str], list[Tensor]] = {}
        for group in filter(self._is_of_matrices, self.param_groups):
            a, b, c = map(float, group["ns_coefficients"])
            iteration = NewtonSchulz((a, b, c), group["ns_steps"], float(group["eps"]))
            those = [matrices[param] for param in group["params"] if param in matrices]
            alike.setdefault((iteration, _view(group)), []).extend(dict.fromkeys(those))
        for (iteration, view), those in alike.items():

            def change(
                tensors: list[Tensor], iteration: NewtonSchulz = iteration, view: str = view
            ) -> None:
                with as_matrices(tensors, batch=view == "batch") as changed:
                    iteration.orthogonalize(changed)

            change_whole(those, DTYPE, change)

    # -- other processes ----------------------------------------------------------------------

    def _is_skipped(self) -> bool:
        found_inf = whole_of(getattr(self, "found_inf", None))
        return found_inf is not None and bool(found_inf)

    def _process_groups(self) -> "list[ProcessGroup]":
        """Those that share matrices, and all that gather a norm."""
        if self._max_grad_norm is not None:
            return [*self._make_norm().groups]
        matrices = (g["params"] for g in self.param_groups if self._is_of_matrices(g))
        return [*dict.fromkeys(group for ps in matrices for p in ps for group in groups_of(p))]

    def _tell_others(self, error: Exception) -> None:
        tell_failed(self._process_groups(), error)

    # -- copies -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cached_parts = None


def _steps_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group by which its matrices are stepped, as SGD's."""
    storage = {key: group[key] for key in DEFAULTS if key in group}
    plain = {"momentum": 0, "dampening": 0, "nesterov": False, "maximize": False}
    return {**storage, **plain, "lr": group["lr"], "weight_decay": group["weight_decay"]}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _view(group: Mapping[str, Any]) -> str:
    return str(group.get("ns_view", VIEWS[0]))


def _dims(param: Tensor) -> int:
    return 2 if is_lazy(param) else param.dim()


def _ratio(param: Tensor, group: Mapping[str, Any]) -> float:
    """How many times its direction a matrix goes."""
    shape = param.shape
    if _view(group) == "flatten":
        rows, columns = shape[0], math.prod(shape[1:])
    else:
        rows, columns = shape[-2], shape[-1]
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns, 1))
    return math.sqrt(max(1, rows / max(columns, 1)))
