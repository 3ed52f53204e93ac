"""The norm of gradients that are cut among processes."""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._sharded import groups_of, local_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Cut = tuple["ProcessGroup", ...]
"""The process groups that a parameter is cut among."""

MEASURED_COLUMNS: Final = _C.sums + 3
"""Sums of a parameter, the elements that they are of, who has measured it, and who has not."""


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


def check_measured(optimizer: str, params: Iterable[Tensor], given: bool) -> None:
    """Raise ValueError for parameters that cannot be measured, as others have cut or joined them.

    Args:
        given: whether the group is known that cuts them.
    """
    for param in params:
        whose = ""
        if hasattr(param, "ds_id"):
            whose = "DeepSpeed's ZeRO stage 3 has cut, and which are not stepped all at once"
        elif getattr(param, "_is_flat_param", False):
            whose = "FullyShardedDataParallel has joined; give it use_orig_params=True"
        elif getattr(param, "_fsdp_flattened", False) and not given:
            whose = (
                "FullyShardedDataParallel has flattened; give norm_group= the process group that "
                "shards them"
            )
        if whose:
            raise ValueError(
                f"{optimizer} measures each parameter as a whole, which it cannot with parameters "
                f"that {whose}"
            )


class SkippedElsewhere(Exception):
    """Another process has found an Inf, and takes no step."""


def note_untold(error: Exception, other: Exception) -> None:
    """Add to an error that the other processes do not know of it."""
    note = f"The other processes could not be told: {other}"
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        warnings.warn(note, stacklevel=2)


class CutNorm:
    """Adds up, over the processes that have parts of the parameters, what each of them has found:
    sums of the squares of gradients, and what is measured of whole parameters.

    Each group gathers once a step, in the order in which parameters name them, which is that of all
    processes, and once more where parameters are measured; what it gathers is added in the order of
    its ranks. So all processes have the same bits. A process takes part whether or not it has a
    gradient, and also where it cannot step: then all of them learn of it.

    Attributes:
        cuts: the different cuts of the parameters, the first one that of those which are not cut.
        gathered: whether the others know of this process, in this step.
        waits: whether they wait for what it measures.
    """

    def __init__(self, optimizer: str, params: Iterable[Tensor], group: "ProcessGroup | None"):
        """Group: among which parameters are cut that do not say so themselves."""
        self.optimizer = optimizer
        self.cuts: list[Cut] = [()]
        self._numbers: list[int] = []
        # Of each parameter, the cut of what is measured: of plain tensors, only FSDP1's are parts.
        self._measured: list[Cut] = []
        given = (group,) if group is not None and group.size() > 1 else ()
        numbers: dict[Cut, int] = {(): 0}
        for param in params:
            own = groups_of(param)
            cut = own or given
            if cut not in numbers:
                numbers[cut] = len(self.cuts)
                self.cuts.append(cut)
            self._numbers.append(numbers[cut])
            self._measured.append(cut if own or getattr(param, "_fsdp_flattened", False) else ())
        self.groups = [*dict.fromkeys(each for cut in self.cuts for each in cut)]
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.gathered = self.waits = False

    def number_of(self, position: int) -> int:
        """The number of a parameter's cut."""
        return self._numbers[position]

    def add_up(self, sums: Sequence[float]) -> float:
        """The sum over all processes of what each one has for each cut.

        Raises:
            RuntimeError: on all processes, where one of them cannot step.
            SkippedElsewhere: where one of them has found an Inf and takes no step.
        """
        total = self._gather([*sums, *([0.0] * (len(self.cuts) - len(sums)))])
        self.waits = True
        return total

    def add_up_measured(
        self, params: Iterable[Tensor], name_of: Callable[[int], str], sums: Tensor
    ) -> None:
        """Add up what all processes have measured, in place, after all of them agreed to step.

        Args:
            name_of: the name of a parameter, by its place among all.
            sums: a row for each parameter, in float64 on the CPU, of which the last column is 1
                where it has been measured here.

        Raises:
            RuntimeError: on all processes, where one of them cannot step, or lacks the gradient of
                a part that it has.
        """
        self.waits = False
        # A part without elements has no gradient with FSDP1.
        lacks = [
            float(local_of(param).numel() > 0 and not measured)
            for param, measured in zip(params, sums[:, -1].tolist(), strict=True)
        ]
        rows = torch.column_stack([sums, torch.tensor(lacks, dtype=sums.dtype)])
        self._add_up_rows(rows, failed=False)
        both = (rows[:, -2] > 0) & (rows[:, -1] > 0)
        for place in both.nonzero().flatten().tolist():
            if self._measured[place]:
                raise RuntimeError(
                    f"{self.optimizer}: {name_of(place)} has a gradient on some of the processes "
                    "that share it and none on others; expected one on all of them, as it is "
                    "measured as a whole; nothing was stepped"
                )
        sums.copy_(rows[:, :-1])

    def fail(self) -> None:
        """Take part without a sum, so that no process waits for this one."""
        if self.gathered:
            self.waits = False
            rows = torch.zeros(len(self._measured), MEASURED_COLUMNS, dtype=torch.float64)
            self._add_up_rows(rows, failed=True)
        else:
            self._gather([0.0] * len(self.cuts), failed=True)

    def skip(self) -> None:
        """Likewise where this one takes no step: then none of them does."""
        self._gather([0.0] * len(self.cuts), skipped=True)

    def _add_up_rows(self, rows: Tensor, failed: bool) -> None:
        """Add up the rows of parameters over the groups that these are cut among, in place.

        Raises:
            RuntimeError: where another process has failed, unless this one has.
        """
        other = ""
        for group in self.groups:
            at = [place for place, cut in enumerate(self._measured) if group in cut]
            flag = rows.new_full((1, rows.shape[1]), float(failed or bool(other)))
            total = torch.zeros(len(at), rows.shape[1], dtype=rows.dtype)
            for rank, each in enumerate(gather_tensors(torch.cat([rows[at], flag]), group)):
                if each[-1, 0]:
                    other = other or f"rank {rank} of the process group '{group.group_name}'"
                total += each[:-1]
            rows[at] = total
        if other and not failed:
            raise RuntimeError(
                f"{self.optimizer}: nothing was stepped, as {other} cannot step; see what it raises"
            )

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
    rows: list[list[float]] = [
        row.tolist() for row in gather_tensors(torch.tensor(values, dtype=torch.float64), group)
    ]
    return rows


def gather_tensors(sent: Tensor, group: "ProcessGroup") -> list[Tensor]:
    """Likewise, tensors of one shape, on the CPU."""
    from torch import distributed

    sent = sent.to(device_of(group, torch.device("cpu")))
    received = sent.new_empty(group.size(), *sent.shape)
    distributed.all_gather([*received.unbind()], sent, group=group)
    return [*received.cpu().unbind()]


def device_of(group: "ProcessGroup", wanted: torch.device) -> torch.device:
    """Where what a group sends has to be: on a device of the kind that is wanted, if it can."""
    types = {device.type for device in group._device_types}
    if wanted.type in types:
        return wanted
    if "cpu" in types:
        return torch.device("cpu")
    return group.bound_device_id or torch.device("cuda", torch.cuda.current_device())
