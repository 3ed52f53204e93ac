"""What a group's options mean for how a parameter and its states are stored."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._overlap import is_dense
from fusedopt._sharded import SHORTEST_ROW

BLOCK: int = _C.block
"""The most elements that share a scale."""

# What the keys of a state are made of, besides the names that a rule gives its states.
CODE = "_code"  # behind a name: that state in codes
SCALE = "_scale"  # behind a name: the scales of the codes
EMA = "ema"  # the average of the weights
ORDER = (
    "code_stride"  # the strides whose order the codes are in, where these are not the usual ones
)


class ParamFormat(NamedTuple):
    """A way of storing parameters, as the compiled module declares it."""

    dtype: torch.dtype  # of the parameter
    master_bits: int  # 0: there is no master
    stochastic: bool  # whether the parameter is rounded at random
    master_key: str  # of what is stored of the master; "" where there is none
    master_dtype: torch.dtype  # of that; the parameter's where there is none


PARAM_FORMATS = [ParamFormat(*declared) for declared in _C.param_formats()]
WITH_MASTER = {(f.dtype, f.master_bits): f for f in PARAM_FORMATS if f.master_bits}
MASTERS = frozenset(f.master_key for f in WITH_MASTER.values())
# A master is stored as a whole, or as what the parameter lacks of it.
(WHOLE_MASTER,) = {f.master_key for f in WITH_MASTER.values() if f.master_dtype == torch.float32}
(REMAINDER,) = MASTERS - {WHOLE_MASTER}

NUMBERS = frozenset({"step"}.union(*(rule["numbers"] for rule in _C.rules().values())))
"""The keys under which a state has a number of the whole parameter, as its count of steps is."""

# What a format puts in place of a rule's states, or beside them, and the dtypes that it may have.
PARTS: Mapping[str, tuple[torch.dtype, ...]] = {
    CODE: (torch.uint8,),
    SCALE: (torch.float32,),
    ORDER: (torch.int64,),
    **{
        key: tuple(f.master_dtype for f in WITH_MASTER.values() if f.master_key == key)
        for key in MASTERS
    },
}

# What a remainder of 16 bits was called before it was bfloat16, with the same bits.
OLD_REMAINDER = torch.int16

COMBINATIONS = _C.combinations()
"""The dtypes of parameter, gradient and states that there are kernels for."""

# A checkpoint changes none of these: how an optimizer stores things is its own choice.
OWN_OPTIONS = ("state_dtype", "min_8bit_size", "master_bits", "rounding", "ema_decay")


# What a group says of storage that says nothing of it.
DEFAULTS: Mapping[str, Any] = {
    "state_dtype": None,
    "min_8bit_size": 4096,
    "master_bits": None,
    "rounding": "nearest",
    "seed": 0,
    "ema_decay": None,
}


def storage_options(
    state_dtype: torch.dtype | str | None,
    min_8bit_size: int,
    master_bits: int | None,
    rounding: str,
    seed: int,
    ema_decay: float | None = None,
) -> dict[str, Any]:
    """What a parameter group says of storage, as a JSON file could.

    torch's checkpoints insist on every key that a group has, so that a key that torch's own
    optimizers lack is there only where somebody wants it.
    """
    options = {
        "state_dtype": name_of(state_dtype),
        "min_8bit_size": min_8bit_size,
        "master_bits": master_bits,
        "rounding": rounding,
        "seed": seed,
        "ema_decay": ema_decay,
    }
    return {key: value for key, value in options.items() if value != DEFAULTS[key]}


def name_of(dtype: Any) -> Any:
    """A floating-point dtype by its name, such as "bfloat16"; anything else as it is."""
    # "int8" stands for codes, which torch.int8 does not.
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return str(dtype).removeprefix("torch.")
    return dtype


@dataclass(frozen=True)
class Spec:
    """A tensor of a state: its dtype and shape; shape None: the parameter's, and its strides."""

    dtype: torch.dtype
    shape: tuple[int, ...] | None = None

    def bytes_for(self, param: Tensor) -> int:
        elements = param.numel() if self.shape is None else prod(self.shape)
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class Format:
    """What a group's options mean for one parameter.

    Attributes:
        state: the dtype of its states, in reals; torch.uint8: codes and scales.
        master_bits: of the master weights; 0: there are none.
        stochastic: whether the parameter is rounded at random.
    """

    state: torch.dtype
    master_bits: int
    stochastic: bool

    @property
    def codes(self) -> bool:
        return self.state == torch.uint8

    def keys(self, names: tuple[str, ...], param: Tensor) -> tuple[str, ...]:
        """The keys of a state, of which ``names`` are the rule's, in the order of a plan."""
        return self._keys(names, master_key(param) if self.master_bits else None)

    @functools.cache  # noqa: B019 - there are few formats, and each member asks several times
    def _keys(self, names: tuple[str, ...], master: str | None) -> tuple[str, ...]:
        keys: list[str] = ["step"] if self.stochastic or "step" in names else []
        for name in names:
            if name in NUMBERS:
                keys += [name] if name not in keys else []
            else:
                keys += [name + CODE, name + SCALE] if self.codes else [name]
        if master is not None:
            keys.append(master)
        return tuple(keys)

    def spec(self, key: str, param: Tensor) -> Spec:
        """What the tensor of a key has to be."""
        part = part_of(key)
        if key in NUMBERS:
            return Spec(torch.float32, ())
        if part is None:
            return Spec(self.state.to_complex() if param.is_complex() else self.state)
        if part in MASTERS:
            return Spec(WITH_MASTER[param.dtype, self.master_bits].master_dtype)
        return Spec(PARTS[part][0], shape_of(key, param))


def master_key(param: Tensor) -> str:
    """The key of what is stored for a parameter's master weights."""
    return next(f.master_key for f in WITH_MASTER.values() if f.dtype == param.dtype)


@functools.cache
def part_of(key: str) -> str | None:
    """Which of a format's own parts a key names; None for the name of a rule's state."""
    if key in PARTS:
        return key
    return next((part for part in (CODE, SCALE) if key.endswith(part)), None)


def shape_of(key: str, param: Tensor) -> tuple[int, ...]:
    """The shape of the tensor of a key, which for most is the parameter's."""
    part = part_of(key)
    if part == SCALE:
        return shape_of_scales(tuple(param.shape), layout_of(param).stride())
    return (param.dim(),) if part == ORDER else tuple(param.shape)


def shape_of_scales(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a dense tensor in codes.

    Blocks end with the rows of dimension 0, so that these can be shared out with their scales,
    where rows lie one behind the other and are long enough; else they run over all of it.
    """
    row = prod(shape[1:])
    if row >= SHORTEST_ROW and shape and (shape[0] <= 1 or strides[0] == row):
        return shape[0], -(-row // BLOCK)
    return (-(-prod(shape) // BLOCK),)


def layout_of(param: Tensor) -> Tensor:
    """A tensor with the strides that states have."""
    return param if is_dense(param) else torch.empty_like(param, device="meta")


def format_of(
    group: Mapping[str, Any],
    param: Tensor,
    has_same_blocks: bool,
    what: str,
    unsafe: Mapping[str, str],
    weight_like: Callable[[], Iterable[str]],
) -> Format:
    """What a group's options mean for a parameter.

    Args:
        has_same_blocks: whether the blocks of its codes are the same ones, however it is sharded.
        what: optimizer and parameter, for errors.
        unsafe: options with which states must not be codes, and why.
        weight_like: the keys of states that must not be codes whatever the options.

    Raises:
        TypeError, ValueError: where a choice is unknown or makes no sense for the parameter.
    """
    real = param.dtype.to_real() if param.is_complex() else param.dtype
    group = {**DEFAULTS, **group}
    master_bits = _master_bits(group["master_bits"], param, real, what)
    stochastic = _stochastic(group["rounding"], master_bits, param, what)
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"{what}: seed={seed!r}; expected an integer from 0 to 2**64 - 1")
    smallest = group["min_8bit_size"]
    if isinstance(smallest, bool) or not isinstance(smallest, int) or smallest < 0:
        raise ValueError(f"{what}: min_8bit_size={smallest!r}; expected a number of elements")
    wanted = group["state_dtype"]
    if isinstance(wanted, str) and wanted == "int8":
        _check_codes(group, param, real, what, unsafe, weight_like)
        # Of the whole, as the number of processes is to make no difference.
        in_codes = param.numel() >= smallest and has_same_blocks
        state = torch.uint8 if in_codes else torch.float32
    else:
        state = _float(wanted, param, real, what)
        if master_bits and state == torch.float16:
            raise ValueError(
                f"{what}: state_dtype=torch.float16 with master_bits={master_bits}: squares of "
                'gradients below 2e-4 are zero in float16; use torch.float32 or "int8"'
            )
    return Format(state, master_bits, stochastic)


def _master_bits(wanted: Any, param: Tensor, real: torch.dtype, what: str) -> int:
    if wanted is None:
        return 0
    if not isinstance(wanted, int) or wanted not in {bits for _, bits in WITH_MASTER}:
        raise ValueError(f"{what}: master_bits={wanted!r}; expected None, 32 or 24")
    if param.is_complex() or real not in {dtype for dtype, _ in WITH_MASTER}:
        raise ValueError(
            f"{what}: master_bits={wanted} for a parameter of dtype {param.dtype}, which is as "
            "exact as its master would be; put it into a group with master_bits=None"
        )
    if (real, wanted) not in WITH_MASTER:
        raise ValueError(
            f"{what}: master_bits={wanted} for a float16 parameter, whose bits are not those of a "
            "float32; use master_bits=32"
        )
    return int(wanted)


def _stochastic(wanted: Any, master_bits: int, param: Tensor, what: str) -> bool:
    if not isinstance(wanted, str) or wanted not in ("nearest", "stochastic"):
        raise ValueError(f'{what}: rounding={wanted!r}; expected "nearest" or "stochastic"')
    if wanted == "nearest":
        return False
    if master_bits:
        raise ValueError(
            f'{what}: rounding="stochastic" with master_bits={master_bits}: the master keeps what '
            "rounding cuts off; use one of the two"
        )
    if param.dtype not in {f.dtype for f in PARAM_FORMATS if f.stochastic}:
        raise ValueError(
            f'{what}: rounding="stochastic" for a parameter of dtype {param.dtype}; it is for '
            'bfloat16 ones: put this one into a group with rounding="nearest"'
        )
    return True


def _check_codes(
    group: Mapping[str, Any],
    param: Tensor,
    real: torch.dtype,
    what: str,
    unsafe: Mapping[str, str],
    weight_like: Callable[[], Iterable[str]],
) -> None:
    if param.is_complex() or real == torch.float64:
        raise TypeError(
            f'{what} of dtype {param.dtype} cannot have state_dtype="int8": codes have 5 bits of '
            "precision at most, and no complex numbers; put it into a group with state_dtype=None"
        )
    for option, reason in unsafe.items():
        if group.get(option):
            raise ValueError(
                f'{what}: state_dtype="int8" with {option}={group[option]}: {reason}; use '
                "torch.float32"
            )
    for key in weight_like():
        raise ValueError(
            f"{what}: state_dtype=\"int8\": its state '{key}' is like a weight, or grows for ever, "
            "and errors of codes would add up in it; use "
            f"{' or '.join(map(str, _floats(param, real)))}"
        )


def _float(wanted: Any, param: Tensor, real: torch.dtype, what: str) -> torch.dtype:
    default = torch.float64 if real == torch.float64 else torch.float32
    accepted = {str(dtype).removeprefix("torch."): dtype for dtype in _floats(param, real)}
    name = name_of(default if wanted is None else wanted)
    if not isinstance(name, str) or name not in accepted:
        also = ' or "int8"' if default == torch.float32 and not param.is_complex() else ""
        raise TypeError(
            f"{what} of dtype {param.dtype} cannot have state_dtype={wanted!r}; expected one of "
            f"{', '.join(map(str, accepted.values()))}{also}"
        )
    return accepted[name]


def _floats(param: Tensor, real: torch.dtype) -> list[torch.dtype]:
    """The dtypes that states may have, in reals, besides codes."""
    accepted = dict.fromkeys(s for p, _, s in COMBINATIONS if p == real)
    if real == torch.float32 and not param.is_complex():
        accepted[torch.bfloat16] = None
    return [*accepted]


def related(keys: Iterable[str]) -> set[str]:
    """These keys of a state, and all that a state of another format would have in their place."""
    result = {*MASTERS, ORDER}
    for key in keys:
        result.add(key)
        if key not in NUMBERS and key not in PARTS:
            name = key.removesuffix(CODE).removesuffix(SCALE)
            result |= {name, name + CODE, name + SCALE}
    return result
