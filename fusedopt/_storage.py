"""How a parameter and its states are stored: dtypes, codes of one byte, master weights."""

from collections.abc import Container, Iterable, Mapping
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


# -- checks -------------------------------------------------------------------------------------


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


def check_part(key: str, value: Tensor, param: Tensor, where: str) -> None:
    """Raise ValueError where a tensor cannot be that of the parameter."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    shape = shape_of(key, param)
    if key == ORDER:
        dtypes = (torch.int64,)
    elif key == REMAINDER:
        dtypes = (torch.int16, torch.int8)
    elif key.endswith(CODE):
        dtypes = (torch.uint8,)
    if value.dtype not in dtypes or tuple(value.shape) != shape:
        raise ValueError(
            f"{where} is of dtype {value.dtype} and shape {tuple(value.shape)}; expected "
            f"{' or '.join(map(str, dtypes))} and {shape}"
        )
    if key == ORDER:
        strides = value.tolist()
        sizes = tuple(param.shape)
        reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if param.numel() > 0 and (min(strides, default=0) < 0 or reach != param.numel() - 1):
            raise ValueError(f"{where} is {strides}, which are no strides of a dense {sizes}")


def check_scales(values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where a scale is no number."""
    for key, value in values.items():
        if key.endswith(SCALE) and not bool(value.isfinite().all()):
            raise ValueError(f"{where} has a {key} that is not finite; is the checkpoint damaged?")


def lacking_in(values: Mapping[str, Any], needed: Iterable[str]) -> list[str]:
    """What a state with any of its rule's keys has to have besides."""
    lacking = []
    for key in values:
        for one, other in ((CODE, SCALE), (SCALE, CODE)):
            if key.endswith(one) and key.removesuffix(one) + other not in values:
                lacking.append(key.removesuffix(one) + other)
    if not values.keys() - MASTERS - {ORDER}:
        return lacking
    stored = values.keys() | {key.removesuffix(CODE) for key in values}
    return sorted({*lacking, *(set(needed) - stored)})


# -- conversions --------------------------------------------------------------------------------


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor one behind the other as they lie in memory."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return tensor.permute(order).reshape(-1)


def order_of(param: Tensor) -> Tensor | None:
    """The strides that the codes of a parameter are in the order of; None: the usual ones."""
    layout = layout_of(param)
    return None if layout.is_contiguous() else torch.tensor(layout.stride())


def encode(value: Tensor, param: Tensor, square: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a state, on the CPU."""
    laid = torch.empty_strided(param.shape, layout_of(param).stride(), dtype=torch.float32)
    laid.copy_(value.detach())
    return _C.encode(in_memory_order(laid).contiguous(), square)


def decode(
    codes: Tensor, scales: Tensor, order: Tensor | None, param: Tensor, square: bool
) -> Tensor:
    """A state in float32, on the CPU."""
    flat = _C.decode(codes.cpu().contiguous(), scales.cpu().contiguous(), param.numel(), square)
    if order is None:
        return flat.view(param.shape)
    return flat.as_strided(param.shape, order.tolist())


def bits_of(values: Tensor) -> Tensor:
    """Those of a float32 or bfloat16, the latter's as the upper half, as int64."""
    if values.dtype == torch.bfloat16:
        return (values.view(torch.int16).long() & 0xFFFF) << 16
    return values.view(torch.int32).long() & 0xFFFFFFFF


def floats_of(bits: Tensor) -> Tensor:
    """The float32 of these bits."""
    bits = bits & 0xFFFFFFFF
    return torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)


def master_of(param: Tensor, values: Mapping[str, Any]) -> Tensor | None:
    """The master weights in a state, as float32; None where it has none."""
    if values.get(MASTER) is not None:
        exact = values[MASTER].detach().to(param.device, torch.float32)
        changed = exact.to(torch.float16).view(torch.int16) != param.detach().view(torch.int16)
        return torch.where(changed, param.detach().float(), exact)
    if values.get(REMAINDER) is None:
        return None
    remainder = values[REMAINDER].to(param.device)
    unit = 1 if remainder.dtype == torch.int16 else 256
    return floats_of(bits_of(param.detach()) + remainder.long() * unit)


def split(master: Tensor, master_bits: int) -> tuple[Tensor, Tensor]:
    """Master weights as bfloat16 and remainder, ties away from zero."""
    bits = bits_of(torch.where(master.isnan(), torch.nan, master))
    if master_bits == 24:
        bits = (bits + 0x80) & 0xFFFFFF00
    high = (bits + 0x8000) >> 16
    remainder = bits - (high << 16)
    if master_bits == 24:
        remainder >>= 8
    high = torch.where(high >= 2**15, high - 2**16, high).to(torch.int16)
    return high.view(torch.bfloat16), remainder.to(REMAINDERS[master_bits])


def remainder_of(master: Tensor, param: Tensor, master_bits: int) -> Tensor:
    """What makes a parameter as nearly the master as it can; zero where it is another number."""
    difference = bits_of(master) - bits_of(param.detach())
    unit = 1 if master_bits == 32 else 256
    remainder = (difference + unit // 2) // unit
    limits = torch.iinfo(REMAINDERS[master_bits])
    near = difference.abs() <= 2**15
    remainder = torch.where(near, remainder.clamp(limits.min, limits.max), 0)
    return remainder.to(REMAINDERS[master_bits])


def convert(
    values: Mapping[str, Any], param: Tensor, storage: Storage, squares: Container[str]
) -> dict[str, Any]:
    """A state in the form that a storage wants, of whatever storage it was.

    What has that form already is passed on as it is. States are decoded, or encoded with each
    element rounded to nearest; a remainder is rounded to the bits that there are, and one that is
    not wanted is dropped, so that the parameter is the master rounded as it was.

    Args:
        squares: the names of states that are never negative.
    """
    result = {k: v for k, v in values.items() if not is_part(k)}
    order = order_of(param)
    old_order = values.get(ORDER)
    same_order = (order is None) == (old_order is None) and (
        order is None or bool((order == old_order.cpu()).all())  # type: ignore[union-attr]
    )
    codes = storage.state == torch.uint8
    for name in dict.fromkeys(k.removesuffix(CODE) for k in values if k.endswith(CODE)):
        code, scale = values[name + CODE], values.get(name + SCALE)
        if scale is None or name in result and not codes:
            continue
        if codes and same_order:
            result |= {name + CODE: code, name + SCALE: scale}
            result.pop(name, None)
        elif name not in result:
            result[name] = decode(code, scale, old_order, param, name in squares)
    if codes:
        for name in [k for k in result if not is_part(k) and k != "step"]:
            code, scale = encode(result.pop(name), param, name in squares)
            result |= {name + CODE: code, name + SCALE: scale}
        if order is not None and any(k.endswith(CODE) for k in result):
            result[ORDER] = order
    return result | _convert_master(values, param, storage)


def _convert_master(
    values: Mapping[str, Any], param: Tensor, storage: Storage
) -> dict[str, Tensor]:
    if not storage.master_bits:
        return {}
    key = REMAINDER if param.dtype == torch.bfloat16 else MASTER
    value = values.get(key)
    if value is not None and value.dtype == storage.spec(key, param).dtype:
        return {key: value}
    if not values:
        return {}
    if key == MASTER:  # a remainder says nothing of a float16
        return {key: param.detach().float()}
    # The parameter is its own master, unless there is another one.
    master = param.detach().float() if value is None else master_of(param, {REMAINDER: value})
    if values.get(MASTER) is not None:
        master = values[MASTER].to(param.device)
    assert master is not None
    return {key: remainder_of(master, param, storage.master_bits)}
