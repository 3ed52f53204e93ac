"""The norm of gradients that are cut among processes."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedopt._sharded import groups_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Cut = tuple["ProcessGroup", ...]
"""The process groups that a parameter is cut among."""


class NormGroup:
    """A process group that an optimizer has for its norm: copies have the same one."""

    def __init__(self, group: "ProcessGroup") -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> "NormGroup":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "an optimizer with norm_group= cannot be pickled, as a process group belongs to its "
            "process; save the state_dict"
        )


def check_norm_group(optimizer: str, params: Iterable[Tensor], given: bool) -> None:
    """Raise ValueError for parameters that others have cut, and that do not say how.

    Args:
        given: whether the group is known that cuts them.
    """
    for param in params:
        if hasattr(param, "ds_id"):
            raise ValueError(
                f"{optimizer}: max_grad_norm with parameters of DeepSpeed's ZeRO stage 3, which "
                "are not stepped all at once; give gradient_clipping in DeepSpeed's configuration "
                "instead"
            )
        if not given and getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"{optimizer}: max_grad_norm with parameters that FullyShardedDataParallel has "
                "flattened: each process would clip by the norm of its own part; give norm_group= "
                "the process group that shards them"
            )


class SkippedElsewhere(Exception):
    """Another process has found an Inf, and takes no step."""


class CutNorm:
    """Adds up sums of squares over the processes that have parts of the gradients.

    Each group gathers once a step, in the order in which parameters name them, which is that of all
    processes; what it gathers is added in the order of its ranks. So all processes have the same
    bits. A process takes part whether or not it has a gradient, and also where it cannot step: then
    all of them learn of it.

    Attributes:
        cuts: the different cuts of the parameters, the first one that of those which are not cut.
    """

    def __init__(self, optimizer: str, params: Iterable[Tensor], group: "ProcessGroup | None"):
        """Group: among which parameters are cut that do not say so themselves."""
        self.optimizer = optimizer
        self.cuts: list[Cut] = [()]
        self._numbers: list[int] = []
        given = (group,) if group is not None and group.size() > 1 else ()
        numbers: dict[Cut, int] = {(): 0}
        for param in params:
            cut = groups_of(param) or given
            if cut not in numbers:
                numbers[cut] = len(self.cuts)
                self.cuts.append(cut)
            self._numbers.append(numbers[cut])
        self.groups = [*dict.fromkeys(each for cut in self.cuts for each in cut)]
        self.gathered = False

    def number_of(self, position: int) -> int:
        """The number of a parameter's cut."""
        return self._numbers[position]

    def add_up(self, sums: Sequence[float]) -> float:
        """The sum over all processes of what each one has for each cut.

        Raises:
            RuntimeError: on all processes, where one of them cannot step.
            SkippedElsewhere: where one of them has found an Inf and takes no step.
        """
        return self._gather([*sums, *([0.0] * (len(self.cuts) - len(sums)))])

    def fail(self) -> None:
        """Take part without a sum, so that no process waits for this one."""
        self._gather([0.0] * len(self.cuts), failed=True)

    def skip(self) -> None:
        """Likewise where this one takes no step: then none of them does."""
        self._gather([0.0] * len(self.cuts), skipped=True)

    def _gather(self, sums: list[float], failed: bool = False, skipped: bool = False) -> float:
        self.gathered = True
        failures: list[str] = []
        skips = skipped
        for group in self.groups:
            mine = [number for number, cut in enumerate(self.cuts) if group in cut]
            flags = float(failed or bool(failures)), float(skips)
            values = [*(sums[number] for number in mine), *flags]
            rows = gather_values(values, group)
            for rank, row in enumerate(rows):
                skips = skips or bool(row[-1])
                if row[-2] and not failed:
                    failures.append(f"rank {rank} of the process group '{group.group_name}'")
            for place, number in enumerate(mine):
                sums[number] = 0.0
                for row in rows:
                    sums[number] += row[place]
        if failures:
            raise RuntimeError(
                f"{self.optimizer}: nothing was stepped, as {failures[0]} cannot step; see what it "
                "raises"
            )
        if skips and not (failed or skipped):
            raise SkippedElsewhere
        total = 0.0
        for each in sums:
            total += each
        return total


def gather_values(values: Sequence[float], group: "ProcessGroup") -> list[list[float]]:
    """What each process of a group has, in the order of its ranks."""
    from torch import distributed

    device = device_of(group, torch.device("cpu"))
    sent = torch.tensor(values, dtype=torch.float64, device=device)
    received = torch.empty(group.size(), len(values), dtype=torch.float64, device=device)
    distributed.all_gather([*received.unbind()], sent, group=group)
    rows: list[list[float]] = received.tolist()
    return rows


def device_of(group: "ProcessGroup", wanted: torch.device) -> torch.device:
    """Where what a group sends has to be: on a device of the kind that is wanted, if it can."""
    types = {device.type for device in group._device_types}
    if wanted.type in types:
        return wanted
    if "cpu" in types:
        return torch.device("cpu")
    return group.bound_device_id or torch.device("cuda", torch.cuda.current_device())
