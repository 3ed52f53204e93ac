"""How a parameter and its states are stored: dtypes, codes of one byte, master weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedopt._extension import _C
from fusedopt._overlap import is_dense

BLOCK: int = _C.block
"""Elements that share a scale."""

CODE, SCALE, REMAINDER, MASTER, ORDER = (
    "_code",
    "_scale",
    "master_remainder",
    "master",
    "code_stride",
)
MASTERS = frozenset({REMAINDER, MASTER})
_COMBINATIONS = _C.combinations()
REMAINDERS = {32: torch.int16, 24: torch.int8}


def storage_options(
    state_dtype: torch.dtype | str | None,
    min_8bit_size: int,
    master_bits: int | None,
    rounding: str,
    seed: int,
) -> dict[str, Any]:
    """What a parameter group says of storage. A checkpoint changes none of it but the seed."""
    return {
        "state_dtype": state_dtype,
        "min_8bit_size": min_8bit_size,
        "master_bits": master_bits,
        "rounding": rounding,
        "seed": seed,
    }


@dataclass(frozen=True)
class Spec:
    """A tensor of a state: its dtype and shape; shape None: the parameter's, and its strides."""

    dtype: torch.dtype
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Storage:
    """What a group's options mean for one parameter.

    Attributes:
        state: the dtype of its states, in reals; torch.uint8: codes and scales.
        master_bits: of the master weights; 0: there are none.
        stochastic: whether the parameter is rounded at random.
    """

    state: torch.dtype
    master_bits: int
    stochastic: bool

    def keys(self, names: tuple[str, ...], param: Tensor) -> tuple[str, ...]:
        """The keys of a state, of which ``names`` are the rule's, in the order of a plan."""
        keys: list[str] = ["step"] if self.stochastic or "step" in names else []
        for name in names:
            if name != "step":
                keys += [name] if self.state != torch.uint8 else [name + CODE, name + SCALE]
        if self.master_bits:
            keys.append(REMAINDER if param.dtype == torch.bfloat16 else MASTER)
        return tuple(keys)

    def spec(self, key: str, param: Tensor) -> Spec:
        """What the tensor of a key has to be."""
        if key.endswith(CODE):
            return Spec(torch.uint8, shape_of(key, param))
        if key.endswith(SCALE):
            return Spec(torch.float32, shape_of(key, param))
        if key == REMAINDER:
            return Spec(REMAINDERS.get(self.master_bits, torch.int16))
        if key == MASTER:
            return Spec(torch.float32)
        return Spec(self.state.to_complex() if param.is_complex() else self.state)


def shape_of(key: str, param: Tensor) -> tuple[int, ...]:
    """The shape of the tensor of a key, which for most is the parameter's."""
    blocks = -(-param.numel() // BLOCK)
    if key.endswith(CODE):
        return blocks, BLOCK
    if key.endswith(SCALE):
        return (blocks,)
    return (param.dim(),) if key == ORDER else tuple(param.shape)


def layout_of(param: Tensor) -> Tensor:
    """A tensor with the strides that states have."""
    return param if is_dense(param) else torch.empty_like(param, device="meta")


def storage_of(
    group: Mapping[str, Any], param: Tensor, what: str, unsafe: Mapping[str, str]
) -> Storage:
    """What a group's options mean for a parameter.

    Args:
        what: optimizer and parameter, for errors.
        unsafe: options with which states must not be codes, and why.

    Raises:
        TypeError, ValueError: where a choice is unknown or makes no sense for the parameter.
    """
    real = param.dtype.to_real() if param.is_complex() else param.dtype
    master_bits = _master_bits(group.get("master_bits"), param, real, what)
    stochastic = _stochastic(group.get("rounding", "nearest"), master_bits, param, what)
    seed = group.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"{what}: seed={seed!r}; expected an integer from 0 to 2**64 - 1")
    smallest = group.get("min_8bit_size", 0)
    if isinstance(smallest, bool) or not isinstance(smallest, int) or smallest < 0:
        raise ValueError(f"{what}: min_8bit_size={smallest!r}; expected a number of elements")
    wanted = group.get("state_dtype")
    if isinstance(wanted, str) and wanted == "int8":
        _check_codes(group, param, real, what, unsafe)
        state = torch.float32 if param.numel() < smallest else torch.uint8
    else:
        state = _float(wanted, param, real, what)
        if master_bits and state == torch.float16:
            raise ValueError(
                f"{what}: state_dtype=torch.float16 with master_bits={master_bits}: squares of "
                'gradients below 2e-4 are zero in float16; use torch.float32 or "int8"'
            )
    return Storage(state, master_bits, stochastic)


def _master_bits(wanted: Any, param: Tensor, real: torch.dtype, what: str) -> int:
    if wanted is None:
        return 0
    if not isinstance(wanted, int) or wanted not in (24, 32):
        raise ValueError(f"{what}: master_bits={wanted!r}; expected None, 32 or 24")
    if param.is_complex() or real not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{what}: master_bits={wanted} for a parameter of dtype {param.dtype}, which is as "
            "exact as its master would be; put it into a group with master_bits=None"
        )
    if real == torch.float16 and wanted != 32:
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
    if param.dtype != torch.bfloat16:
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


def _float(wanted: Any, param: Tensor, real: torch.dtype, what: str) -> torch.dtype:
    default = torch.float64 if real == torch.float64 else torch.float32
    dtype = default if wanted is None else wanted
    accepted = dict.fromkeys(s for p, _, s in _COMBINATIONS if p == real)
    if real == torch.float32 and not param.is_complex():
        accepted[torch.bfloat16] = None
    if not isinstance(dtype, torch.dtype) or dtype not in accepted:
        also = ' or "int8"' if default == torch.float32 and not param.is_complex() else ""
        raise TypeError(
            f"{what} of dtype {param.dtype} cannot have state_dtype={wanted!r}; expected one of "
            f"{', '.join(map(str, accepted))}{also}"
        )
    return dtype


def is_part(key: str) -> bool:
    """Whether a key is one of a storage's own, and not the name of a rule's state."""
    return key in MASTERS | {ORDER} or key.endswith((CODE, SCALE))


def related(keys: Iterable[str]) -> set[str]:
    """These keys of a state, and all that a state of another storage would have in their place."""
    result = {*MASTERS, ORDER}
    for key in keys:
        result.add(key)
        if key != "step" and key not in MASTERS | {ORDER}:
            name = key.removesuffix(CODE).removesuffix(SCALE)
            result |= {name, name + CODE, name + SCALE}
    return result
