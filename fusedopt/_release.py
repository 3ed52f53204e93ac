"""GradientRelease: steps parameters within the backward pass, and lets go of their gradients."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._compiling import uncompiled
from fusedopt._extension import _C
from fusedopt._flat import find_buffer
from fusedopt._optimizer import FusedOptimizer

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

INSTEAD = "; call optimizer.step() as usual, without GradientRelease"


class GradientRelease:
    """Steps each parameter in the backward pass, as soon as its gradient is complete.

    The gradient is freed then, so that only few of them exist at a time. ``optimizer.step()`` still
    ends each iteration: it steps what has a gradient left, averages weights and calls hooks, once.
    All bits are those of ordinary steps.

    A parameter waits for ``optimizer.step()``, with its gradient, where its step has to do with
    others: all of them with ``max_grad_norm``, Muon's matrices, shards that their rule measures as
    a whole (LAMB, LARS, StableAdamW, ``cautious=True``), and in its first step with ``ema_decay``.
    The first backward pass makes the states of all parameters that require a gradient.

    What a step reads has to be as it should be when the backward pass begins, such as the learning
    rate. Functions that work on gradients between ``backward()`` and ``step()``, as
    ``clip_grad_norm_`` and hooks before a step do, find none; give ``max_grad_norm`` to the
    optimizer instead.

    With FSDP2 gradients are stepped after they were reduced.

    Args:
        optimizer: one of fusedopt's.

    Raises:
        TypeError: for another optimizer.
        ValueError: for an optimizer that has a GradientRelease, flat parameters, and those that
            FullyShardedDataParallel (FSDP1) or DeepSpeed's ZeRO stage 3 have cut.

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
        self._optimizer = optimizer
        self._handles: dict[int, RemovableHandle] = {}
        # By id of a parameter: its position, and its group's.
        self._places: dict[int, tuple[int, int]] = {}
        self._plan: _C.Plan | None = None  # for which places are known
        self._stepped: set[int] = set()  # ids, in this iteration
        self._accumulates = self._checked = False
        self._streams: dict[torch.device, Any] = {}
        if optimizer._release is not None:
            raise ValueError(f"{self._what}: the optimizer has one already; remove() it first")
        for group in optimizer._groups():
            for name, param in group.named():
                self._check_param(name, param)
        self._watch()
        optimizer._release = self

    @property
    def _what(self) -> str:
        return f"GradientRelease of {type(self._optimizer).__name__}"

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
        if whose:
            raise ValueError(f"{self._what}: {name} is a parameter that {whose}")

    def _watch(self) -> None:
        """Have hooks on all parameters that require a gradient."""
        this = weakref.ref(self)

        @uncompiled
        def release(param: Tensor) -> None:
            if (found := this()) is not None:
                found._take(param)

        for param in self._optimizer._params():
            if param.requires_grad and id(param) not in self._handles:
                handle = param.register_post_accumulate_grad_hook(release)
                self._handles[id(param)] = handle

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
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._stepped.clear()
        if self._optimizer._release is self:
            self._optimizer._release = None

    # -- in the backward pass -----------------------------------------------------------------

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """Step a parameter that has got a gradient, unless it has to wait for step()."""
        optimizer, key = self._optimizer, id(param)
        if key in self._stepped:
            self._raise_second(param)
        if self._accumulates or param.grad is None or optimizer._max_grad_norm is not None:
            return
        if not self._checked:
            self._check_surroundings()
        if optimizer._plan is None or optimizer._plan is not self._plan:
            self._find_places()
        place = self._places.get(key)
        if place is None or not optimizer._steps_alone(place[1], param):
            return
        if param.is_cuda:
            self._follow(param.device)
        optimizer._step_alone(*place)
        self._plan = optimizer._plan
        self._stepped.add(key)
        param.grad = None

    def _find_places(self) -> None:
        self._places = {}
        position = 0
        for index, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                self._places.setdefault(id(param), (position, index))
                position += 1

    def _follow(self, device: torch.device) -> None:
        """Let this stream wait for the steps before, which share memory with this one."""
        stream = torch.cuda.current_stream(device)
        last = self._streams.get(device)
        if last is not None and last != stream:
            stream.wait_stream(last)
        self._streams[device] = stream

    def _check_surroundings(self) -> None:
        """Raise for others that change gradients after the backward pass.

        A parameter knows nothing of them, so they are looked for among all that lives.
        """
        for each in gc.get_objects():
            kind = type(each)
            if issubclass(kind, torch.nn.parallel.DistributedDataParallel):
                if any(id(param) in self._handles for param in each.parameters()):
                    raise RuntimeError(
                        f"{self._what}: a parameter is one of DistributedDataParallel, which adds "
                        "up gradients among processes after the hooks of parameters; use "
                        "fully_shard (FSDP2), or DistributedDataParallel without GradientRelease"
                    )
            elif issubclass(kind, torch.amp.GradScaler) and _scales(each):
                raise RuntimeError(self.of_scaler())
        self._checked = True

    def of_scaler(self) -> str:
        """Why there cannot be a GradScaler."""
        return (
            f"{self._what}: torch.amp.GradScaler divides gradients by its scale, and looks for Inf "
            "in them, after the backward pass, when parameters have been stepped; train in "
            "bfloat16, which needs no scale, or without GradientRelease"
        )

    def _raise_second(self, param: Tensor) -> None:
        optimizer = self._optimizer
        position = self._places[id(param)][0]
        raise RuntimeError(
            f"{self._what}: {optimizer._param_name(position)} gets a second gradient in an "
            "iteration, and was stepped with its first one; with several backward passes put all "
            "but the last into `with release.accumulate():`, and call optimizer.step() after the "
            "last. Where one backward pass gives a parameter several gradients, as with "
            f"checkpoint(use_reentrant=True), that is not possible{INSTEAD}"
        )

    # -- in optimizer.step() ------------------------------------------------------------------

    def before_step(self) -> None:
        """Raise RuntimeError for a parameter that was stepped and has a gradient again."""
        if not self._stepped:
            return
        for param in self._optimizer._params():
            if id(param) in self._stepped and _C.has_gradient(param):
                self._raise_second(param)

    def after_step(self) -> None:
        """End the iteration."""
        self._stepped.clear()
        self._watch()
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._streams.clear()


def _scales(scaler: torch.amp.GradScaler) -> bool:
    """Whether it has scaled a loss."""
    return scaler.is_enabled() and scaler._scale is not None
