"""GradientRelease: steps parameters within the backward pass, and lets go of their gradients."""

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils.weak import WeakTensorKeyDictionary

from fusedopt._compiling import uncompiled
from fusedopt._extension import _C
from fusedopt._flat import find_buffer
from fusedopt._formats import MASTERS
from fusedopt._optimizer import FusedOptimizer
from fusedopt._sharded import is_sharded, local_of, mesh_of
from fusedopt._states import is_begun, replace_values

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

# The release that has a hook on a parameter.
_RELEASES: MutableMapping[Tensor, "weakref.ref[GradientRelease]"] = WeakTensorKeyDictionary()
# From this torch on, hooks run when a gradient that FSDP2 offloads has arrived on the CPU.
OFFLOADS = "2.13"

Hooks = dict[int, tuple["weakref.ref[Tensor]", "RemovableHandle"]]
"""By id of a parameter."""


class GradientRelease:
    """Steps each parameter in the backward pass, as soon as its gradient is complete.

    The gradient is freed then, so that only few of them exist at a time. ``optimizer.step()`` still
    ends each iteration: it steps what has a gradient left, averages weights and calls hooks, once.
    All bits are those of ordinary steps.

    A parameter waits for ``optimizer.step()``, with its gradient, where its step has to do with
    others: all of them with ``max_grad_norm``, Muon's matrices, shards that their rule measures as
    a whole (LAMB, LARS, StableAdamW, ``cautious=True``), and in its first step with ``ema_decay``.

    What a step reads has to be as it should be when the backward pass begins, such as the learning
    rate. Functions that work on gradients between ``backward()`` and ``step()``, as
    ``clip_grad_norm_`` and hooks before a step do, find none; give ``max_grad_norm`` to the
    optimizer instead.

    With FSDP2 gradients are stepped after they were reduced.

    It lives as long as its optimizer, which keeps it.

    Args:
        optimizer: one of fusedopt's.

    Raises:
        TypeError: for another optimizer.
        ValueError: for an optimizer that has a GradientRelease, parameters that another one steps,
            flat parameters, those that FullyShardedDataParallel (FSDP1) or DeepSpeed's ZeRO stage 3
            have cut, and those that FSDP2 offloads with a torch before 2.13.

    The backward pass raises what a step would raise, and RuntimeError for a second gradient of a
    parameter in an iteration, with DistributedDataParallel, whose gradients are complete only after
    it, and with torch.amp.GradScaler, which divides gradients after it.
    """

    __module__ = "fusedopt"

    def __init__(self, optimizer: FusedOptimizer) -> None:
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"GradientRelease: the optimizer is a {type(optimizer).__module__}."
                f"{type(optimizer).__name__}; expected one of fusedopt's"
            )
        self._name = type(optimizer).__name__
        # The optimizer keeps the release, not the reverse: an optimizer that nobody has any longer
        # must not go on stepping.
        self._reference = weakref.ref(optimizer)
        self._hooks: Hooks = {}
        self._listed: list[weakref.ref[Tensor]] = []  # the parameters that have hooks
        self._stepped: set[int] = set()  # ids, in this iteration
        self._made: set[int] = set()  # ids of those whose states were made along with another's
        self._has_made = self._accumulates = self._checked = False
        self._streams: dict[torch.device, Any] = {}
        self._lock = threading.RLock()  # autograd has a thread for each device
        this = weakref.ref(self)

        @uncompiled
        def release(param: Tensor) -> None:
            if (found := this()) is not None:
                found._take(param)

        self._hook = release
        if optimizer._release is not None:
            raise ValueError(f"{self._what}: the optimizer has one already; remove() it first")
        for group in optimizer._groups():
            for name, param in group.named():
                self._check_param(name, param)
        self._watch(optimizer)
        weakref.finalize(self, _remove, self._hooks).atexit = False
        optimizer._release = self

    @property
    def _what(self) -> str:
        return f"GradientRelease of {self._name}"

    def _check_param(self, name: str, param: Tensor) -> None:
        if find_buffer(param) is not None:
            raise ValueError(
                f"{self._what}: {name} is flat, and flat gradients stay where they are, so that no "
                "memory would be saved; use flat=False"
            )
        whose = ""
        if getattr(param, "_fsdp_flattened", False):
            whose = "FullyShardedDataParallel has flattened; use fully_shard (FSDP2)"
        elif hasattr(param, "ds_id"):
            whose = "DeepSpeed's ZeRO stage 3 has cut; it frees gradients by itself"
        elif is_sharded(param) and TorchVersion(torch.__version__) < OFFLOADS:
            on_cpu = local_of(param).device.type == "cpu"
            if on_cpu and mesh_of(param).device_type != "cpu":
                whose = (
                    "FSDP2 offloads, of which this torch calls hooks before its gradient has "
                    f"arrived; use torch {OFFLOADS} or newer"
                )
        if whose:
            raise ValueError(f"{self._what}: {name} is a parameter that {whose}")

    def _watch(self, optimizer: FusedOptimizer) -> None:
        """Have hooks on all parameters that require a gradient, and on no others."""
        params = [param for param in optimizer._params() if param.requires_grad]
        if len(params) == len(self._listed) and all(
            reference() is param for reference, param in zip(self._listed, params, strict=True)
        ):
            return
        for param in params:
            known = _RELEASES.get(param)
            other = None if known is None else known()
            if other is not None and other is not self and other._reference() is not None:
                raise ValueError(
                    f"{self._what}: a parameter of shape {tuple(param.shape)} has another "
                    "GradientRelease, which frees its gradient; remove() that one first"
                )
        listed = {id(param): param for param in params}
        for key, (reference, handle) in [*self._hooks.items()]:
            if reference() is not listed.get(key):
                handle.remove()
                del self._hooks[key]
        for key, param in listed.items():
            if key not in self._hooks:
                handle = param.register_post_accumulate_grad_hook(self._hook)
                self._hooks[key] = weakref.ref(param), handle
                _RELEASES[param] = weakref.ref(self)
        self._listed = [*map(weakref.ref, params)]
        self._has_made = False

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it gradients are kept: for the backward passes of all but the last microbatch."""
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    def remove(self) -> None:
        """End it: from now on the optimizer steps as usual."""
        for reference, _ in self._hooks.values():
            if (param := reference()) is not None:
                _RELEASES.pop(param, None)
        _remove(self._hooks)
        self._listed.clear()
        self.forget()
        optimizer = self._reference()
        if optimizer is not None and optimizer._release is self:
            optimizer._release = None

    # -- in the backward pass -----------------------------------------------------------------

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """Step a parameter that has got a gradient, unless it has to wait for step()."""
        optimizer, key = self._reference(), id(param)
        if optimizer is None:
            return
        with self._lock:
            if key in self._stepped:
                self._raise_second(optimizer, param)
            if self._accumulates or param.grad is None or optimizer._max_grad_norm is not None:
                return
            if not self._checked:
                self._check_surroundings()
            self._check_scaler(optimizer)
            if param.is_cuda:
                self._follow(param.device)
            if optimizer._step_alone(param, lambda: self._others(optimizer)):
                self._stepped.add(key)
                param.grad = None

    def _others(self, optimizer: FusedOptimizer) -> list[Tensor]:
        """Parameters that are likely to be stepped in this backward pass, too: in the first one
        all, later those that need no states."""
        found = optimizer._without_state()
        if self._has_made:
            return [param for param in found if id(param) in self._made]
        self._made |= set(map(id, found))
        return found

    def _follow(self, device: torch.device) -> None:
        """Let this stream wait for the steps before, which share memory with this one."""
        stream = torch.cuda.current_stream(device)
        last = self._streams.get(device)
        if last is not None and last != stream:
            stream.wait_stream(last)
        self._streams[device] = stream

    def _check_surroundings(self) -> None:
        """Raise for others that change gradients after the backward pass."""
        if self._find_others():
            gc.collect()  # they may be garbage
            if problem := self._find_others():
                raise RuntimeError(problem)
        self._checked = True

    def _find_others(self) -> str:
        """What is wrong with one of them, if there is one.

        A parameter knows nothing of them, so they are looked for among all that lives.
        """
        for each in gc.get_objects():
            kind = type(each)
            if issubclass(kind, torch.nn.parallel.DistributedDataParallel):
                if any(id(param) in self._hooks for param in each.parameters()):
                    return (
                        f"{self._what}: a parameter is one of DistributedDataParallel, which adds "
                        "up gradients among processes after the hooks of parameters; use "
                        "fully_shard (FSDP2), or DistributedDataParallel without GradientRelease"
                    )
            elif issubclass(kind, torch.amp.GradScaler) and _scales(each):
                return self._of_scaler()
        return ""

    def _check_scaler(self, optimizer: FusedOptimizer) -> None:
        given = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if any(value is not None for value in given):
            raise RuntimeError(self._of_scaler())

    def _of_scaler(self) -> str:
        return (
            f"{self._what}: torch.amp.GradScaler divides gradients by its scale, and looks for Inf "
            "in them, after the backward pass, when parameters have been stepped; train in "
            "bfloat16, which needs no scale, or without GradientRelease"
        )

    def _raise_second(self, optimizer: FusedOptimizer, param: Tensor) -> None:
        named = (pair for group in optimizer._groups() for pair in group.named())
        name = next((name for name, each in named if each is param), "a parameter")
        raise RuntimeError(
            f"{self._what}: {name} gets a second gradient in an iteration, and was stepped with "
            "its first one. With several backward passes put all but the last into `with "
            "release.accumulate():`, and call optimizer.step() after the last. Where one backward "
            "pass gives a parameter several gradients, as with checkpoint(use_reentrant=True) and "
            "DistributedDataParallel, train without GradientRelease. After a backward pass that "
            "has failed, call optimizer.zero_grad() and optimizer.step()"
        )

    # -- in optimizer.step() ------------------------------------------------------------------

    def before_step(self) -> None:
        """Raise RuntimeError for what comes too late for parameters that were stepped."""
        optimizer = self._reference()
        if optimizer is None or not self._stepped:
            return
        self._check_scaler(optimizer)
        if optimizer._max_grad_norm is not None:
            raise RuntimeError(
                f"{self._what}: max_grad_norm was set after the backward pass, in which parameters "
                "were stepped without clipping; set it before"
            )
        for param in optimizer._params():
            if id(param) in self._stepped and _C.has_gradient(param):
                self._raise_second(optimizer, param)

    def after_step(self) -> None:
        """End the iteration."""
        optimizer = self._reference()
        if optimizer is None:
            return
        if self._stepped and not self._has_made:
            self._has_made = True
            self._drop_unused(optimizer)
        self._stepped.clear()
        self._watch(optimizer)
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._streams.clear()

    def forget(self) -> None:
        """Take it that no parameter was stepped in this iteration, and that states are others."""
        self._stepped.clear()
        self._has_made = False

    def _drop_unused(self, optimizer: FusedOptimizer) -> None:
        """Drop states of parameters that had no gradient: ordinary steps make none for them. A
        dictionary to which the user has added something meanwhile stays."""
        kept: set[int] = set()
        ours = optimizer._state_keys() | MASTERS
        for param in optimizer._params():
            if id(param) not in self._made:
                continue
            is_ours = optimizer.state.get(param, {}).keys() <= ours
            if is_ours and is_begun(param, optimizer.state, optimizer._workspace):
                replace_values(optimizer.state, param, None)
                optimizer._workspace.forget_begun(param)
                optimizer._plan = None
            else:
                kept.add(id(param))
        self._made = kept


def _remove(hooks: Hooks) -> None:
    for _, handle in hooks.values():
        handle.remove()
    hooks.clear()


def _scales(scaler: torch.amp.GradScaler) -> bool:
    """Whether it has scaled a loss."""
    return scaler.is_enabled() and scaler._scale is not None
