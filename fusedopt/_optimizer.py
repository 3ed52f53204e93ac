"""What all optimizers share: the step, the home of their state, and its way into checkpoints."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusedopt._checkpoint import check_scales, lacking_in
from fusedopt._codes import order_of
from fusedopt._extension import _C
from fusedopt._flat import FlatGradients, FlatParameters, are_flat, find_buffer
from fusedopt._masters import master_of, split
from fusedopt._overlap import check_overlap
from fusedopt._states import check_part, convert
from fusedopt._storage import (
    CODE,
    MASTER,
    MASTERS,
    ORDER,
    REMAINDER,
    Storage,
    is_part,
    layout_of,
    related,
    storage_of,
)
from fusedopt._watched_state import OptimizerState, plain

_COMBINATIONS = _C.combinations()


class FusedOptimizer(Optimizer):
    """Mixed into an optimizer of torch: constructor, defaults and checks stay torch's.

    A subclass names its rule, by which the compiled module knows its maths.
    """

    _rule: str
    # How an instance stores things is its own choice: a checkpoint never changes it.
    _storage_options: Mapping[str, Any] = {
        "state_dtype": None,
        "min_8bit_size": 4096,
        "master_bits": None,
        "rounding": "nearest",
    }
    # Options with which states must not be codes, and why.
    _unsafe_in_int8: Mapping[str, str] = {}

    # Class-level, as unpickling calls no constructor.
    _plan: _C.Plan | None = None
    _plan_state: OptimizerState | None = None  # the state, and its count of changes, of the plan
    _plan_changes = -1
    _flats: tuple[FlatParameters, ...] = ()
    _flat_gradients: FlatGradients | None = None  # None: not known yet
    _warned_detached = False
    _loading: Mapping[Any, Any] | None = None  # the states that load_state_dict is about to set
    _own_defaults: Mapping[str, Any] = {}
    _flat = False
    _max_grad_norm: float | None = None
    _scales_in_step: bool | None = None  # None: not known yet
    _workspace: _C.Workspace
    # Of parameters whose state names no count, the steps taken on the device since it was made.
    _first_counts: dict[Tensor, Tensor]

    def _init(
        self,
        options: Mapping[str, Any],
        flat: bool,
        max_grad_norm: float | None,
        differentiable: bool,
        args: dict[str, Any],
    ) -> None:
        """Construct torch's part with args; options are those of a group that torch has not."""
        if differentiable:
            raise ValueError(
                f"{type(self).__name__}: differentiable=True is not supported: fused kernels have "
                f"no autograd formula; use torch.optim.{type(self).__name__} for it"
            )
        self._own_defaults = dict(options)
        self._flat = flat
        self._workspace = _C.Workspace()
        self._first_counts = {}
        self.max_grad_norm = max_grad_norm
        super().__init__(**args)
        self.defaults.update(options)
        self.state = OptimizerState(self.state)

    # -- parameter groups ---------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = len(self.param_groups)
        if isinstance(param_group, dict):
            for key, default in self._own_defaults.items():
                param_group.setdefault(key, default)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            if not added["params"]:
                raise ValueError(
                    f"{type(self).__name__}: group {group} has no parameters; expected at least one"
                )
            _C.state_names(type(self).__name__, self._rule, added, group)  # reads all options
            self._check_params([group])
            if self._flat and not are_flat(added["params"], type(self).__name__):
                self._flats += (FlatParameters(added["params"], gradients=True),)
        except Exception:
            self.param_groups.pop()
            raise
        self._plan = None

    def _check_params(self, groups: Iterable[int]) -> None:
        params: dict[int, tuple[Tensor, str]] = {}
        for g in groups:
            for param, name in self._named_in(g):
                if id(param) not in params:
                    params[id(param)] = param, name
                    self._check_param(param, name)
                    self._storage(self.param_groups[g], param, name)
        tensors = [param for param, _ in params.values()]
        check_overlap(tensors, type(self).__name__, lambda p: params[id(p)][1])

    def _check_param(self, param: Tensor, name: str) -> None:
        def fail(got: str, expected: str) -> NoReturn:
            raise TypeError(f"{type(self).__name__}: {name} is {got}; expected {expected}")

        if param.layout != torch.strided:
            fail(f"a tensor of layout {param.layout}", "a dense tensor")
        if param.data_ptr() == 0 and param.numel() > 0:
            fail(
                f"a {type(param).__name__} on {param.device} without memory of its own",
                "an ordinary tensor (for a DTensor: its to_local())",
            )
        if param.device.type not in ("cpu", "cuda"):
            fail(f"on {param.device}", "a tensor on a CPU or a CUDA device")
        if param.device.type == "cuda" and not _C.has_cuda:
            fail(
                f"on {param.device}, but fusedopt was built for the CPU only",
                "a build with CUDA: install the CUDA toolkit (nvcc) that torch was built with, "
                "set CUDA_HOME, and install fusedopt again",
            )
        real = param.dtype.to_real() if param.is_complex() else param.dtype
        accepted = dict.fromkeys(p for p, _, _ in _COMBINATIONS)
        if real not in accepted:
            fail(f"of dtype {param.dtype}", f"one of {_list(accepted)}, or complex")

    def _named_params(self) -> Iterator[tuple[dict[str, Any], Tensor, str]]:
        for g, group in enumerate(self.param_groups):
            for param, name in self._named_in(g):
                yield group, param, name

    def _named_in(self, g: int) -> Iterator[tuple[Tensor, str]]:
        group = self.param_groups[g]
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            yield param, f"parameter '{names[i]}'" if names else f"parameter {i} of group {g}"

    def _storage(self, group: Mapping[str, Any], param: Tensor, name: str) -> Storage:
        """How a parameter is stored; TypeError or ValueError where its group makes no sense."""
        return storage_of(group, param, f"{type(self).__name__}: {name}", self._unsafe_in_int8)

    def _stored(
        self, choice: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], Tensor, str, Storage, tuple[str, ...]]]:
        """All parameters with their groups and names, how they are stored, and the keys of that.

        A choice takes the place of what the groups say of storage.
        """
        for g, own in enumerate(self.param_groups):
            group = {**own, **(choice or {})}
            names = _C.state_names(type(self).__name__, self._rule, group, g)
            for param, name in self._named_in(g):
                storage = self._storage(group, param, name)
                yield group, param, name, storage, storage.keys(names, param)

    def _specs(
        self, choice: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, list[tuple[int, torch.dtype]]]]:
        """All parameters, and sizes and dtypes of what a choice of storage keeps beside each."""
        for _, param, _, storage, keys in self._stored(choice):
            specs = []
            for key in keys:
                spec = storage.spec(key, param)
                elements = param.numel() if spec.shape is None else prod(spec.shape)
                specs.append((1, torch.float32) if key == "step" else (elements, spec.dtype))
            yield param, specs

    def _counts_on_device(self, group: Mapping[str, Any], param: Tensor) -> bool:
        """Whether the device counts a parameter's steps, so that the host need not know of them."""
        wanted = group.get("capturable") or group.get("fused")
        return bool(wanted) and param.device.type == _C.accelerator

    # -- the step -----------------------------------------------------------------------------

    @property
    def max_grad_norm(self) -> float | None:
        """What the norm of all gradients is clipped to in a step; None: it is not clipped."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None:
            if not isinstance(value, int | float):
                raise TypeError(
                    f"{type(self).__name__}: max_grad_norm is {value!r}; expected a number or None"
                )
            if not value >= 0:
                raise ValueError(
                    f"{type(self).__name__}: max_grad_norm is {value}; expected at least 0, or None"
                )
        self._max_grad_norm = value

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step with max_grad_norm, before it was clipped.

        A float32 tensor of no dimension, on the parameters' device (on the CPU where they are on
        several); None before the first such step. Reading it does not wait for the device.
        """
        return self._workspace.grad_norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks: may it leave unscaling and skipping to step()? Where one device counts
        # the steps, the host need not know; on a CPU it can look for nothing. Else it would wait
        # for the device, which GradScaler does once for all optimizers by itself.
        if self._scales_in_step is None or self._plan is None:
            params = [(group, p) for group in self.param_groups for p in group["params"]]
            self._scales_in_step = len({p.device for _, p in params}) == 1 and all(
                p.device.type == "cpu" or self._counts_on_device(group, p) for group, p in params
            )
        return self._scales_in_step

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it where fused=True; here it follows from the devices."""

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a class's step, which torch's constructor does once for each class.

        torch's own wrapper names the step to profilers and calls hooks. It takes several times as
        long as a small step, so it is left out where nobody listens.
        """
        recorded = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                _C.is_recorded()
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            ):
                return recorded(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return wrapper

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in one pass.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: for a sparse gradient.
            TypeError, ValueError: for a gradient, parameter, state or option that cannot be taken;
                the message names it. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        plan = self._plan
        state = self.state
        if plan is None or state is not self._plan_state or state.changes != self._plan_changes:
            plan = self._make_plan()
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        missing = plan.step(self.param_groups, grad_scale, found_inf, self._max_grad_norm)
        # A new plan for what changed outside, then one with the state that is missing.
        for _ in range(2):
            if missing is None:
                return loss
            missing = self._step_anew(missing, grad_scale, found_inf)
        assert missing is None, "a plan that was just made must fit"
        return loss

    def _step_anew(self, missing: list[int], grad_scale: Any, found_inf: Any) -> list[int] | None:
        """Step with a new plan, in which the parameters at these positions get their state."""
        params = [param for _, param, _ in self._named_params()]
        new = {id(params[i]): params[i] for i in missing}
        for param in new.values():
            if _C.is_capturing(param.device):
                raise RuntimeError(
                    f"{type(self).__name__}: the first step, which makes the state, cannot be "
                    "captured into a CUDA graph; take a step before capture begins"
                )
        before = [(p, dict(self.state[p]) if p in self.state else None) for p in new.values()]
        try:
            plan = self._make_plan(new)
            return plan.step(self.param_groups, grad_scale, found_inf, self._max_grad_norm)
        except BaseException:
            for param, values in before:
                if values is None:
                    self.state.pop(param, None)
                else:
                    self.state[param] = values
            raise

    def _make_plan(self, new: Mapping[int, Tensor] | None = None) -> _C.Plan:
        """Look up everything that steps walk over; make state for the parameters in new."""
        new = new or {}
        if not isinstance(self.state, OptimizerState):
            self.state = OptimizerState(self.state)
        self._check_params(range(len(self.param_groups)))
        self._check_first_counts()
        self._complete_state(new)
        lineages = self._lineages()

        plan = _C.Plan(type(self).__name__, self._rule, self._workspace)
        seen: set[int] = set()
        everything = enumerate(self._stored())
        for group in self.param_groups:
            plan.add_group(group, bool(group.get("capturable")))
            for _ in group["params"]:
                ordinal, (_, param, param_name, storage, keys) = next(everything)
                values = self.state.get(param, {})
                states = None
                if all(values.get(key) is not None for key in keys):
                    states = tuple(values[key] for key in keys)
                plan.add(
                    param,
                    param_name,
                    id(param) in seen,
                    states,
                    id(param) in new,
                    self._flat_grad(param, param_name),
                    _C.Storage(
                        storage.state,
                        storage.master_bits,
                        storage.stochastic,
                        "step" in keys,
                        group.get("seed", 0),
                        ordinal,
                    ),
                    self._counts_on_device(group, param),
                    self._first_counts.get(param),
                    lineages.get(id(param), 0),
                )
                seen.add(id(param))
        self._plan = plan
        self._scales_in_step = None
        self._plan_state = self.state
        self._plan_changes = self.state.changes
        self._flat_gradients = None
        return plan

    def _lineages(self) -> dict[int, int]:
        """Numbers the parameters whose steps the device counts, by their counts."""
        counts: dict[int, Tensor] = {}
        for group, param, _ in self._named_params():
            if self._counts_on_device(group, param):
                count = self.state.get(param, {}).get("step", self._first_counts.get(param))
                if count is not None:
                    counts[id(param)] = count
        # What a graph does to the counts when it is replayed, nobody tells.
        captured = self._workspace.captured
        if captured or any(_C.is_capturing(count.device) for count in counts.values()):
            return {key: number for number, key in enumerate(counts, start=1)}
        values = _values(counts)
        numbers = {value: number for number, value in enumerate(sorted(set(values.values())), 1)}
        return {key: numbers[value] for key, value in values.items()}

    def _flat_grad(self, param: Tensor, name: str) -> int:
        """The address of a parameter's flat gradient; 0 for none. Warns of a lost parameter."""
        buffer = find_buffer(param)
        if buffer is None:
            return 0
        if buffer.holds(param):
            return buffer.slots[id(param)].grad_address
        if not self._warned_detached:
            self._warned_detached = True
            warnings.warn(
                f"{type(self).__name__}: {name} was moved into a flat buffer and is no longer "
                "there (module.to(), param.data = ...); it is stepped where it is now, on its own. "
                "Make FlatParameters anew to have it flat again.",
                stacklevel=2,
            )
        return 0

    # -- state --------------------------------------------------------------------------------

    def _complete_state(self, new: Mapping[int, Tensor]) -> None:
        """Make what the parameters in new lack, and convert what does not fit its parameter.

        Tensors that somebody put there are used as they are where that is possible; one of another
        dtype, device or stride is replaced by a converted copy.
        """
        wanted: dict[Tensor, dict[str, Any]] = {}
        for group, param, name, storage, keys in self._stored():
            if param in wanted:
                continue
            before = self.state.get(param, {})
            values = {k: before[k] for k in related(keys) if before.get(k) is not None}
            if "step" in keys and values.keys() - {"step", *MASTERS}:
                values.setdefault("step", None if self._rule_info["counts_steps"] else 0.0)
            self._check_state(param, name, values)
            values = convert(values, param, storage, self._never_negative)
            if any(values.get(k) is not before.get(k) for k in related(keys) - {"step"}):
                rest = {k: v for k, v in before.items() if k not in related(keys)}
                self.state[param] = rest | values
            present = {k: values[k] for k in keys if k in values}
            fits = self._fit(group, param, storage)
            wanted[param] = {k: v for k, v in present.items() if not fits(k, v)}
            if id(param) in new:
                wanted[param].update({k: None for k in keys if k not in present})
                has_codes = any(key.endswith(CODE) for key in keys)
                if has_codes and (order := order_of(param)) is not None:
                    wanted[param][ORDER] = order
        for param, values in self._allocate(wanted).items():
            if values:
                self.state[param] = {**self.state.get(param, {}), **values}
        self._make_first_counts(new)

    def _check_first_counts(self) -> None:
        """Forget the first counts of parameters whose steps the host counts now."""
        if not self._first_counts:
            return
        groups = {id(param): group for group, param, _ in self._named_params()}
        for param, count in list(self._first_counts.items()):
            group = groups.get(id(param))
            if group is None or not (
                self._counts_on_device(group, param) and count.device == param.device
            ):
                if float(count) == 0:
                    for key in self._state_names() - MASTERS:
                        self.state.get(param, {}).pop(key, None)
                del self._first_counts[param]

    def _make_first_counts(self, new: Mapping[int, Tensor]) -> None:
        """Let the device tell a first step from later ones, where it may skip one."""
        together: dict[torch.device, list[Tensor]] = {}
        for group, param, _, _, keys in self._stored():
            on_device = self._counts_on_device(group, param)
            if id(param) in new and on_device and keys and "step" not in keys:
                together.setdefault(param.device, []).append(param)
        for device, params in together.items():
            counts = _C.flat_steps([0.0] * len(params), device)
            self._first_counts.update(zip(params, counts, strict=True))

    def _allocate(self, wanted: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """State tensors for these parameters and keys, with the values given (None: zero).

        Those of one key lie in one buffer per device and dtype, in the order of the parameters.
        """
        made: dict[Tensor, dict[str, Any]] = {param: dict(keys) for param, keys in wanted.items()}
        together: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        seen: set[int] = set()
        for group, param, name in self._named_params():
            if id(param) in seen:
                continue
            seen.add(id(param))
            storage = self._storage(group, param, name)
            for key in wanted.get(param, ()):
                if key == ORDER:
                    continue
                spec = storage.spec(key, param)
                device = param.device
                if key == "step" and not self._counts_on_device(group, param):
                    device = torch.device("cpu")
                # One buffer per dtype of the parameters, so that it has the layout of theirs.
                kind = (key, spec.dtype, param.dtype, device)
                laid = param.detach()
                if spec.shape is not None:
                    laid = laid.new_empty(1).expand(spec.shape)
                together.setdefault(kind, []).append((param, laid))
        for (key, dtype, _, device), members in together.items():
            if key == "step":
                numbers = [
                    0.0 if wanted[p][key] is None else float(wanted[p][key]) for p, _ in members
                ]
                tensors = _C.flat_steps(numbers, device)
            else:
                _, tensors = _C.flat_tensors([laid for _, laid in members], dtype)
            for (param, _), tensor in zip(members, tensors, strict=True):
                value = wanted[param][key]
                if value is not None and key != "step":
                    tensor.copy_(value.detach())
                made[param][key] = tensor
        return made

    def _fit(
        self, group: Mapping[str, Any], param: Tensor, storage: Storage
    ) -> Callable[[str, Any], bool]:
        """Tells whether a step can walk over a value of a parameter's state as it is."""
        like = layout_of(param)

        def fits(key: str, value: Any) -> bool:
            if not isinstance(value, Tensor) or value.requires_grad:
                return False
            if key == "step":
                on_device = self._counts_on_device(group, param)
                home = param.device if on_device else torch.device("cpu")
                return value.dtype == torch.float32 and value.device == home and value.dim() == 0
            spec = storage.spec(key, param)
            if value.dtype != spec.dtype or value.device != param.device:
                return False
            if spec.shape is not None:
                # Codes are read as words.
                return value.is_contiguous() and value.data_ptr() % 8 == 0
            return not (value.is_conj() or value.is_neg()) and all(
                size == 1 or a == b
                for size, a, b in zip(param.shape, value.stride(), like.stride(), strict=True)
            )

        return fits

    def _check_state(self, param: Tensor, name: str, values: Mapping[str, Any]) -> None:
        """Raise where a state cannot be that of the parameter."""
        for key, value in values.items():
            where = f"{type(self).__name__}: state '{key}' of {name}"
            if key == "step":
                if not isinstance(value, Tensor | int | float):
                    raise TypeError(f"{where} is a {type(value).__name__}; expected a number")
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise ValueError(f"{where} has {value.numel()} elements; expected one")
                # Reading it elsewhere would wait for the device; a checkpoint is read in any case.
                known = not isinstance(value, Tensor) or value.device.type == "cpu"
                if known and not float(value) >= 0:
                    raise ValueError(f"{where} is {float(value)}; expected a count of steps")
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{where} is a {type(value).__name__}; expected a tensor")
            if value.layout != torch.strided or value.device.type == "meta":
                raise TypeError(
                    f"{where} is of layout {value.layout} on {value.device}; expected a dense "
                    f"tensor on {param.device}"
                )
            if is_part(key):
                check_part(key, value, param, where)
                continue
            if value.shape != param.shape:
                raise ValueError(
                    f"{where} has shape {tuple(value.shape)}; expected that of the parameter, "
                    f"{tuple(param.shape)}"
                )
            real = value.is_floating_point() and not param.is_complex()
            if not (real or (value.is_complex() and param.is_complex())):
                raise TypeError(
                    f"{where} has dtype {value.dtype}; expected a "
                    f"{'complex' if param.is_complex() else 'floating-point'} one"
                )

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's: plain dictionaries, the tensors themselves (not copies of them)."""

        def to_plain_state(_: Optimizer, state_dict: dict[str, Any]) -> None:
            state_dict["state"] = self._without_skipped_first(plain(state_dict["state"]))

        self._forget_outdated_masters()
        handle = self.register_state_dict_post_hook(to_plain_state, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _without_skipped_first(self, packed: dict[Any, Any]) -> dict[Any, Any]:
        """Without the buffers of parameters whose first step the device has skipped so far.

        By parameter or, as in a state_dict, by its number.
        """
        values = _values({id(param): count for param, count in self._first_counts.items()})
        for number, (_, param, _) in enumerate(self._named_params()):
            if values.get(id(param)) == 0:
                for key in {number, param} & packed.keys():
                    names = self._state_names() - MASTERS
                    packed[key] = {k: v for k, v in packed[key].items() if k not in names}
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's class of the same name.

        States are copied and keep this optimizer's dtypes (torch would round them to the
        parameter's); hyper-parameters are taken from the state_dict.

        Raises:
            TypeError, ValueError: for a state that does not belong to its parameter. Nothing has
                been changed then.
        """

        # torch casts what is in "state" in a way that no subclass can change, so it gets none. The
        # hook is the last one, and sees what the user's hooks made of the state_dict.
        def take_state(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            self._loading = self._check_loaded(loaded)
            return {**loaded, "state": {}}

        handle = self.register_load_state_dict_pre_hook(take_state)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
            self._loading = None

    def _check_loaded(self, loaded: Mapping[str, Any]) -> dict[Any, Any]:
        """The states in a state_dict by parameter."""
        ours = [[*self._named_in(g)] for g in range(len(self.param_groups))]
        theirs = [group["params"] for group in loaded["param_groups"]]
        if [len(group) for group in ours] != [len(group) for group in theirs]:
            return {}  # torch's own check comes next, and says so
        names = self._state_names()
        params: dict[Any, tuple[Tensor, str, set[str]]] = {}
        for g, (named, ids) in enumerate(zip(ours, theirs, strict=True)):
            own = {k: self.param_groups[g][k] for k in self._storage_options}
            options = {**self.defaults, **loaded["param_groups"][g], **own}
            for param, name in named:
                self._storage(options, param, name)  # refuses what does not go together
            keys = _C.state_names(type(self).__name__, self._rule, options, g)
            # Without a momentum buffer, SGD's first step is still to come.
            needed = set(keys) if "step" in keys else set()
            params.update({key: (*of, needed) for key, of in zip(ids, named, strict=True)})
        states: dict[Any, Any] = {}
        for key, values in loaded["state"].items():
            if key not in params:
                states[key] = values
                continue
            param, name, needed = params[key]
            where = f"{type(self).__name__}: the state of {name}"
            if not isinstance(values, Mapping):
                raise TypeError(f"{where} is a {type(values).__name__}; expected a dictionary")
            known = {k: v for k, v in values.items() if k in names and v is not None}
            if lacking := lacking_in(known, needed):
                raise ValueError(f"{where} lacks {', '.join(lacking)}")
            if isinstance(step := known.get("step"), Tensor):
                known["step"] = step.detach().cpu()
            self._check_state(param, name, known)
            check_scales(known, where)
            states[param] = values
        return states

    def _state_names(self) -> set[str]:
        variants = self._rule_info["variants"]
        return {"step"} | related(name for names in variants for name in names)

    @property
    def _rule_info(self) -> "_C.RuleInfo":
        return _C.rules()[self._rule]

    @property
    def _never_negative(self) -> set[str]:
        return self._rule_info["never_negative"]

    def __getstate__(self) -> dict[str, Any]:
        self._forget_outdated_masters()
        state = {**super().__getstate__(), "_max_grad_norm": self._max_grad_norm}
        if self._first_counts:
            state["state"] = self._without_skipped_first(plain(self.state))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_workspace" not in self.__dict__:
            self._workspace = _C.Workspace()
        self._workspace.forget_weights()
        self._first_counts = {}
        groups = self.__dict__.get("param_groups", [])
        kept = [{k: group[k] for k in self._storage_options} for group in groups]
        super().__setstate__(state)
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)
        if self._loading is not None:
            for group, storage in zip(self.param_groups, kept, strict=True):
                group.update(storage)
        self.state = self._own(self.state if self._loading is None else self._loading)
        self._plan = None

    def _own(self, states: Mapping[Any, Any]) -> OptimizerState:
        """Copies of these states, those of parameters in flat buffers."""
        names = self._state_names()
        storages = {p: self._storage(group, p, name) for group, p, name in self._named_params()}
        known, rest = {}, {}
        for param, values in states.items():
            is_state = isinstance(param, Tensor) and isinstance(values, Mapping)
            rest[param] = copy.deepcopy(
                {k: v for k, v in values.items() if k not in names or v is None}
                if is_state
                else values
            )
            if is_state:
                known[param] = {k: v for k, v in values.items() if k in names and v is not None}
                if param in storages:
                    known[param] = convert(
                        known[param], param, storages[param], self._never_negative
                    )
        for param, values in self._allocate(known).items():
            # In the order in which they were.
            values |= rest[param]
            kept = {k: values[k] for k in states[param] if k in values}
            rest[param] = kept | values
        return OptimizerState(rest)

    # -- master weights -----------------------------------------------------------------------

    def _forget_outdated_masters(self) -> None:
        """Make weights that somebody has changed their own masters, as the next step would."""
        for _, param, _ in self._named_params():
            if self._workspace.are_outdated(param):
                if (remainder := self.state.get(param, {}).get(REMAINDER)) is not None:
                    remainder.zero_()
                self._workspace.forget_weights_of(param)

    def master_params(self) -> Iterator[Tensor]:
        """The weights that the optimizer works on, as float32 copies, in the order of the groups.

        Where a parameter has no master they are the parameter itself (float64 stays float64).
        """
        self._forget_outdated_masters()
        for _, param, _ in self._named_params():
            master = master_of(param, self.state.get(param, {}))
            if master is None:
                wide = param.dtype in (torch.bfloat16, torch.float16)
                master = param.detach().to(torch.float32 if wide else param.dtype, copy=True)
            yield master

    @torch.no_grad()
    def load_master_params(self, masters: Iterable[Tensor]) -> None:
        """Set parameters, and what is stored beside them, from what master_params() yields.

        Raises:
            ValueError: for another number of tensors or other shapes. Nothing has been changed
                then.
        """
        stored = [(param, name, storage) for _, param, name, storage, _ in self._stored()]
        tensors = [*masters]
        optimizer = type(self).__name__
        if len(tensors) != len(stored):
            raise ValueError(
                f"{optimizer}: load_master_params got {len(tensors)} tensors; expected one for "
                f"each of {len(stored)} parameters"
            )
        for (param, name, _), master in zip(stored, tensors, strict=True):
            if not isinstance(master, Tensor) or master.shape != param.shape:
                got = tuple(master.shape) if isinstance(master, Tensor) else type(master).__name__
                raise ValueError(
                    f"{optimizer}: load_master_params got {got} for {name}; expected a tensor of "
                    f"shape {tuple(param.shape)}"
                )
        for (param, _, storage), master in zip(stored, tensors, strict=True):
            if storage.master_bits and param.dtype == torch.bfloat16:
                exact = master.to(param.device, torch.float32)
                high, remainder = split(exact, storage.master_bits)
                param.copy_(high)
                self.state[param][REMAINDER] = remainder
            else:
                param.copy_(master)
                if storage.master_bits:
                    self.state[param][MASTER] = master.to(param.device, torch.float32, copy=True)
            self._workspace.note_weights_of(param)
        self._plan = None

    # -- gradients ----------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; flat ones are filled with zero and stay, whatever set_to_none."""
        if self._flat_gradients is None:
            self._flat_gradients = FlatGradients.of(p for _, p, _ in self._named_params())
        flat = self._flat_gradients
        if not flat.are_all:
            super().zero_grad(set_to_none)
        if not flat.buffers and not flat.shared:
            return
        with torch.autograd.profiler.record_function(self._zero_grad_profile_name):
            intact = flat.zero()
        if not intact:
            self._flat_gradients = None
            self.zero_grad(set_to_none)


def _values(counts: Mapping[int, Tensor]) -> dict[int, float]:
    """The values of these tensors of one element, in one go for each device."""
    devices = {count.device for count in counts.values()}
    result: dict[int, float] = {}
    for device in devices:
        here = {key: count for key, count in counts.items() if count.device == device}
        result.update(zip(here, torch.stack([*here.values()]).tolist(), strict=True))
    return result


def _list(dtypes: Any) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
