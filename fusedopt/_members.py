"""The members of an optimizer: its parameters, each as the optimizer has it."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fusedopt._extension import _C
from fusedopt._formats import COMBINATIONS, DEFAULTS, Format, Spec, format_of
from fusedopt._overlap import check_overlap
from fusedopt._rules import rule_info
from fusedopt._sharded import (
    Runs,
    check_mesh,
    has_same_blocks,
    is_sharded,
    local_of,
    mesh_of,
    runs_of,
)


@dataclass(frozen=True, eq=False)
class Group:
    """A parameter group, and what its optimizer says of it.

    Attributes:
        optimizer: the name of its class, for errors.
        index: of the group among the optimizer's.
        options: the group itself.
        rule: the rule that its parameters are updated by.
        unsafe_in_int8: options with which states must not be codes, and why.
        others: keys of states that somebody else takes care of.
    """

    optimizer: str
    index: int
    options: dict[str, Any]
    rule: str
    unsafe_in_int8: Mapping[str, str]
    others: frozenset[str] = frozenset()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The rule's keys of a state, as the options want them."""
        return _C.state_names(self.optimizer, self.rule, self.options, self.index)

    def weight_like(self) -> list[str]:
        """The keys of states that are like a weight, or grow for ever."""
        kinds = rule_info(self.rule)["kinds"]
        return [name for name in self.names if kinds.get(name) == "weight"]

    def check_options(self) -> None:
        """Raise TypeError or ValueError where an option of the rule is no number, or NaN."""
        _ = self.names  # for which all of them are read

    @property
    def params(self) -> list[Tensor]:
        params: list[Tensor] = self.options["params"]
        return params

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters by their names in errors."""
        names = self.options.get("param_names")
        for i, param in enumerate(self.params):
            name = f"parameter '{names[i]}'" if names else f"parameter {i} of group {self.index}"
            yield name, param

    def format_of(self, name: str, param: Tensor) -> Format:
        what = f"{self.optimizer}: {name}"
        same = has_same_blocks(param)
        return format_of(self.options, param, same, what, self.unsafe_in_int8, self.weight_like)

    def counts_on_device(self, param: Tensor) -> bool:
        """Whether the device counts a parameter's steps, so that the host need not know of them."""
        wanted = self.options.get("capturable") or self.options.get("fused")
        return bool(wanted) and param.device.type == _C.accelerator


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter as its optimizer has it.

    Nothing but the parameter's identity is looked at before it is asked for: a parameter that has
    had no gradient may be of any kind, or have no memory yet.

    Attributes:
        param: the user's tensor, and the key of its state.
        name: what errors call it.
        group: the parameter group that it is in.
        ordinal: its number among all parameters, by which its random bits are its own.
        duplicate: whether it has been in the list before. It is stepped once.
    """

    param: Tensor
    name: str
    group: Group
    ordinal: int
    duplicate: bool

    @property
    def local(self) -> Tensor:
        """The plain tensor that is stepped; states are laid out like it."""
        local: Tensor = local_of(self.param)
        return local

    @functools.cached_property
    def is_sharded(self) -> bool:
        """Whether the parameter is a DTensor, so that its states are."""
        return is_sharded(self.param)

    @property
    def runs(self) -> Runs:
        """Where local lies in the whole parameter."""
        return runs_of(self.param)

    @functools.cached_property
    def format(self) -> Format:
        """How it and its states are stored.

        Raises:
            TypeError, ValueError: where the group's choice makes no sense for the parameter.
        """
        return self.group.format_of(self.name, self.param)

    @property
    def counts_on_device(self) -> bool:
        """Whether the device counts its steps."""
        return self.group.counts_on_device(self.local)

    @property
    def rule(self) -> str:
        return self.group.rule

    @property
    def names(self) -> tuple[str, ...]:
        """The rule's keys of its state."""
        return self.group.names

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of its state, in the order of a plan."""
        return self.format.keys(self.names, self.local)

    def spec(self, key: str) -> Spec:
        """What the tensor of a key has to be."""
        return self.format.spec(key, self.local)

    def where(self, key: str) -> str:
        """What errors call a tensor of its state."""
        return f"{self.group.optimizer}: state '{key}' of {self.name}"


def list_members(groups: Iterable[Group]) -> list[Member]:
    """The parameters of these groups, in their order."""
    members: list[Member] = []
    seen: set[int] = set()
    for group in groups:
        for name, param in group.named():
            members.append(Member(param, name, group, len(members), id(param) in seen))
            seen.add(id(param))
    return members


def is_ready(param: Tensor) -> bool:
    """Whether a parameter is one that a step can be asked of as it is.

    Another may become so (it is frozen, uninitialised, or has no memory yet) or will never have a
    gradient.
    """
    return param.requires_grad and can_have_state(param)


def can_have_state(param: Tensor) -> bool:
    """Whether a parameter is one that a step could be asked of, were it not frozen."""
    return (
        not is_lazy(param)
        and param.layout == torch.strided
        and _real(param) in _PARAM_DTYPES
        and _has_memory(local_of(param))
    )


def _has_memory(param: Tensor) -> bool:
    if param.numel() == 0:
        return param.device.type != "meta"
    try:
        return param.data_ptr() != 0
    except RuntimeError:  # of some subclasses that have none
        return False


def check_members(members: Iterable[Member]) -> None:
    """Raise where a member cannot be stepped, or not as its group wants it.

    Raises:
        TypeError: for a parameter, or a state_dtype for it, that is not supported.
        ValueError: for parameters that overlap in memory, and choices of storage that make no sense
            together.
    """
    names: dict[int, str] = {}
    params: list[Tensor] = []
    of_meshes: dict[Any, Member] = {}
    optimizer = ""
    for member in members:
        optimizer = member.group.optimizer
        if not member.duplicate:
            _check_param(f"{optimizer}: {member.name}", member.param)
            if member.is_sharded:
                _check_device(member, of_meshes.setdefault(mesh_of(member.param), member))
            params.append(member.local)
            names[id(member.local)] = member.name
        _ = member.format  # of each group that it is in
    check_overlap(params, optimizer, lambda p: names[id(p)])


def _check_device(member: Member, other: Member) -> None:
    """Raise for parameters of one mesh on different kinds of devices, of which none could be on
    that of the other's collectives."""
    here, there = member.local.device.type, other.local.device.type
    if here != there:
        raise ValueError(
            f"{member.group.optimizer}: {member.name} is on {here} but {other.name}, of the same "
            f"mesh, on {there}; move one of them"
        )


def _real(param: Tensor) -> torch.dtype:
    return param.dtype.to_real() if param.is_complex() else param.dtype


_PARAM_DTYPES = dict.fromkeys(p for p, _, _ in COMBINATIONS)


def _check_param(what: str, param: Tensor) -> None:
    def fail(got: str, expected: str) -> NoReturn:
        raise TypeError(f"{what} is {got}; expected {expected}")

    if is_lazy(param):
        fail("uninitialised", "one whose module has run once")
    if param.layout != torch.strided:
        fail(f"a tensor of layout {param.layout}", "a dense tensor")
    if is_sharded(param):
        check_mesh(what, param)
        param = local_of(param)
    if not _has_memory(param):
        fail(
            f"a {type(param).__name__} on {param.device} without memory of its own",
            "an ordinary tensor",
        )
    if param.device.type not in ("cpu", "cuda"):
        fail(f"on {param.device}", "a tensor on a CPU or a CUDA device")
    if param.device.type == "cuda" and not _C.has_cuda:
        fail(
            f"on {param.device}, but fusedopt was built for the CPU only",
            "a build with CUDA: install the CUDA toolkit (nvcc) that torch was built with, "
            "set CUDA_HOME, and install fusedopt again",
        )
    if _real(param) not in _PARAM_DTYPES:
        accepted = ", ".join(map(str, _PARAM_DTYPES))
        fail(f"of dtype {param.dtype}", f"one of {accepted}, or complex")


def add_member(
    plan: _C.Plan,
    member: Member,
    flat_grad: int,
    first_count: Tensor | None,
    lineage: int,
    cut: int,
) -> None:
    """Add a member to the group that a plan got last.

    Args:
        flat_grad: the address of its flat gradient; 0: it has none.
        first_count: of its steps on the device, where its state has none.
        lineage: a number that it shares with those that have taken the same steps on the device.
        cut: the number of the process groups that it is cut among.
    """
    keys, options = member.keys, member.group.options
    plan.add(
        _C.Member(
            param=member.param,
            name=member.name,
            duplicate=member.duplicate,
            keys=keys,
            flat_grad=flat_grad,
            state_type=member.format.state,
            master_bits=member.format.master_bits,
            stochastic=member.format.stochastic,
            counts_steps="step" in keys,
            seed=options.get("seed", DEFAULTS["seed"]),
            ordinal=member.ordinal,
            on_device=member.counts_on_device,
            first_count=first_count,
            lineage=lineage,
            runs=member.runs,
            cut=cut,
        )
    )
