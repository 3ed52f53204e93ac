"""States of members: made, checked, and brought into the form in which a step walks over them."""

import functools
from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt._codes import (
    are_strides_of,
    decode,
    encode,
    in_blocks_of,
    is_in_order,
    order_of,
    shapes_of,
)
from fusedopt._extension import _C
from fusedopt._flat import find_buffer
from fusedopt._formats import (
    CODE,
    EMA,
    MASTERS,
    NUMBERS,
    OLD_REMAINDER,
    ORDER,
    PARTS,
    REMAINDER,
    SCALE,
    layout_of,
    part_of,
    related,
    shape_of,
)
from fusedopt._masters import convert_master, exact_weights
from fusedopt._members import Member
from fusedopt._overlap import has_own_elements
from fusedopt._rules import is_never_negative, rule_info
from fusedopt._sharded import is_sharded, local_of, mesh_of, placements_of, wrap
from fusedopt._watched_state import ParameterState, values_of

# Bytes of a state tensor that has a buffer of its own.
LARGE = 2**18


def lacks_state(state: Mapping[Tensor, Any], member: Member) -> bool:
    """Whether there is not all of a member's state."""
    values = values_of(state, member.param)
    return any(values.get(key) is None for key in member.keys)


def complete_states(
    state: MutableMapping[Tensor, Any], members: Sequence[Member], new: Container[int]
) -> list[Tensor]:
    """Make what the parameters in new lack, and convert what does not fit its parameter.

    Tensors that somebody put there are used as they are where that is possible. One of another
    dtype or device is replaced by a converted copy, in the dictionary in which it is.

    Returns:
        The parameters that had none of their rule's states.
    """
    begun: list[Tensor] = []
    changed: dict[Tensor, dict[str, Any]] = {}
    wanted: dict[Tensor, dict[str, Any]] = {}
    for member in members:
        if member.duplicate:
            continue
        param, keys = member.param, member.keys
        those = related(keys) - member.group.others
        there = state.get(param, {})
        _check_values(member, there)
        before = local_values(member, there, those)
        values = {k: before[k] for k in those if before.get(k) is not None}
        if values.keys() - NUMBERS - MASTERS:
            for key in NUMBERS.intersection(keys):
                values.setdefault(key, None if rule_info(member.rule)["counts_steps"] else 0.0)
        check_state(member, values)
        values = convert(values, member)
        if any(values.get(k) is not before.get(k) for k in those - NUMBERS):
            changed[param] = {k: v for k, v in there.items() if k not in those} | {
                k: there[k] if v is before.get(k) else as_stored(member, k, v)
                for k, v in values.items()
            }
        present = {k: values[k] for k in keys if k in values}
        wanted[param] = {k: v for k, v in present.items() if not fits(member, k, v)}
        if id(param) in new:
            if not present.keys() - NUMBERS - MASTERS:
                begun.append(param)
            made = convert_states(initial_state(member, values), member)
            wanted[param].update({k: made.get(k) for k in keys if k not in present})
            has_codes = any(part_of(key) == CODE for key in keys)
            if has_codes and (order := order_of(member.local)) is not None:
                wanted[param][ORDER] = order
    for param, values in allocate(members, wanted).items():
        if values:
            changed[param] = {**changed.get(param, state.get(param, {})), **values}
    for param, values in changed.items():
        replace_values(state, param, values)
    return begun


def note_begun(
    params: Iterable[Tensor], state: Mapping[Tensor, Any], workspace: _C.Workspace
) -> None:
    """Note that the states of these parameters were made for a step that is still to come."""
    for param in params:
        if (made := _rule_state(state, param)) is not None:
            workspace.begin(param, made)


def is_begun(param: Tensor, state: Mapping[Tensor, Any], workspace: _C.Workspace) -> bool:
    """Whether a parameter's state is one that was made for a step that is still to come."""
    made = _rule_state(state, param)
    return made is not None and workspace.is_begun(param, made)


def _rule_state(state: Mapping[Tensor, Any], param: Tensor) -> Tensor | None:
    """The first of the rule's states, or the average of the weights; None: there is neither."""
    average = None
    for key, value in values_of(state, param).items():
        if key in NUMBERS | MASTERS or not isinstance(value, Tensor):
            continue
        if key != EMA:
            return value
        average = value
    return average


def replace_values(state: MutableMapping[Tensor, Any], param: Tensor, values: Any) -> None:
    """Give a parameter this state, in the dictionary that it has; None: it has none."""
    if values is None:
        state.pop(param, None)
        return
    if param not in state:
        state[param] = ParameterState()
    there = state[param]
    if list(there) == [k for k in values if k in there]:  # the rest comes behind
        there.update({k: v for k, v in values.items() if there.get(k) is not v})
    else:
        there.clear()
        there.update(values)


def _check_values(member: Member, values: Any) -> None:
    if not isinstance(values, dict):
        raise TypeError(
            f"{member.group.optimizer}: the state of {member.name} is a {type(values).__name__}; "
            "expected a dictionary"
        )


def initial_state(member: Member, values: Mapping[str, Any]) -> dict[str, Any]:
    """The states, by the rule's names, that begin with something other than zero.

    They are no copies: numbers, the weights themselves, or views of one number.

    Args:
        values: what there is of its state.
    """
    local, codes = member.local.detach(), member.format.codes
    beginnings = rule_info(member.rule)["beginnings"]
    made: dict[str, Any] = {}
    for name, number in rule_info(member.rule)["numbers"].items():
        made[name] = float(member.group.options[number]) if isinstance(number, str) else number
    for name in member.names:
        beginning = beginnings.get(name, "zero")
        if beginning == "parameter":
            made[name] = exact_weights(member, values)
        elif beginning != "zero":
            number = float(member.group.options[beginning])
            # For a rule, a complex number is two reals.
            value = complex(number, number) if local.is_complex() else number
            dtype = torch.float32 if codes else member.spec(name).dtype
            made[name] = local.new_full((), value, dtype=dtype).expand(local.shape)
    return made


def allocate(
    members: Sequence[Member], wanted: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """State tensors for these parameters and keys, with the values given (None: zero).

    Those of one key lie in one buffer per device and dtype, in the order of the parameters.
    """
    made: dict[Tensor, dict[str, Any]] = {param: dict(values) for param, values in wanted.items()}
    together: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        if member.duplicate:
            continue
        for key in wanted.get(member.param, {}):
            if key == ORDER:
                order = wanted[member.param][key].clone()
                made[member.param][key] = as_stored(member, key, order)
                continue
            # One buffer per dtype of the parameters, so that it has the layout of theirs. A large
            # tensor has one of its own: nothing is gained, and all of a buffer stays as long as
            # any of it is in use.
            spec, alone = member.spec(key), 0
            if spec.bytes_for(member.local) >= LARGE and find_buffer(member.param) is None:
                alone = id(member.param)
            kind = key, home_of(member, key), spec.dtype, member.local.dtype, alone
            together.setdefault(kind, []).append(member)
    for (key, device, dtype, _, _), alike in together.items():
        values = [made[member.param][key] for member in alike]
        if key in NUMBERS:
            tensors = _C.flat_steps([float(value or 0) for value in values], device)
        else:
            _, tensors = _C.flat_tensors([_like(member, key) for member in alike], dtype)
        for member, value, tensor in zip(alike, values, tensors, strict=True):
            if key not in NUMBERS and value is not None:
                tensor.copy_(value.detach())
            made[member.param][key] = as_stored(member, key, tensor)
    return made


def as_stored(member: Member, key: str, value: Any) -> Any:
    """A value of a member's state as it stands in the dictionary: sharded, as the parameter is."""
    if not member.is_sharded or key in NUMBERS or not isinstance(value, Tensor):
        return value
    if key == ORDER:
        return order_of(member.param)
    return wrap(value, member.param, shape_of(key, member.param) if part_of(key) == SCALE else None)


def local_values(member: Member, values: Mapping[str, Any], keys: Container[str]) -> dict[str, Any]:
    """The values of a member's state as this process has them.

    Args:
        keys: those that are not the user's.

    Raises:
        TypeError, ValueError: for one that is sharded in another way than the parameter.
    """
    result = dict(values)
    for key, value in values.items():
        if key not in keys or key in NUMBERS or not isinstance(value, Tensor):
            continue
        if key == ORDER:
            # Strides of the whole; those of the shard may be others.
            if member.is_sharded and are_strides_of(value, member.param):
                in_order = is_in_order(value, member.param)
                result[key] = order_of(member.local) if in_order else value
            continue
        _check_placed(member, key, value)
        result[key] = local_of(value)
    return result


def _check_placed(member: Member, key: str, value: Tensor) -> None:
    """Raise where a state is sharded in another way than its parameter."""
    param, where = member.param, member.where(key)
    if not is_sharded(value):
        # What fits a shard is that of this process.
        if member.is_sharded and value.shape == param.shape != local_of(param).shape:
            raise ValueError(
                f"{where} is a plain tensor of the whole parameter's shape, {tuple(value.shape)}, "
                f"but the parameter is sharded: {placements_of(param)} among {mesh_of(param)}; "
                "load it with set_optimizer_state_dict of torch.distributed.checkpoint.state_dict "
                "(full_state_dict=True)"
            )
        return
    if not member.is_sharded:
        raise TypeError(
            f"{where} is sharded, {placements_of(value)} among {mesh_of(value)}, but the parameter "
            "is a plain tensor; pass its full_tensor()"
        )
    if mesh_of(value) != mesh_of(param) or placements_of(value) != placements_of(param):
        raise ValueError(
            f"{where} is sharded as {placements_of(value)} among {mesh_of(value)}; expected it as "
            f"the parameter, {placements_of(param)} among {mesh_of(param)}: load it with "
            "torch.distributed.checkpoint, which brings it there"
        )
    # Codes of an old form are never sharded.
    expected = shape_of(key, param)
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{where} has the whole shape {tuple(value.shape)}; expected {expected}, as the "
            f"parameter has {tuple(param.shape)}"
        )


def home_of(member: Member, key: str) -> torch.device:
    """The device of a tensor of a member's state."""
    on_host = key in NUMBERS and not member.counts_on_device
    return torch.device("cpu") if on_host else member.local.device


def _like(member: Member, key: str) -> Tensor:
    """A tensor with the device, shape and strides that one of a member's state has."""
    local = member.local.detach()
    shape = member.spec(key).shape
    return local if shape is None else local.new_empty((1,) * len(shape)).expand(shape)


def fits(member: Member, key: str, value: Any) -> bool:
    """Whether a step can walk over a value of a member's state as it is."""
    if not isinstance(value, Tensor) or value.requires_grad:
        return False
    spec = member.spec(key)
    if value.dtype != spec.dtype or value.device != home_of(member, key):
        return False
    if key in NUMBERS:
        return tuple(value.shape) in ((), (1,))
    if spec.shape is not None:
        return value.is_contiguous()
    # A state in other strides is gathered in each step. A master is not.
    if part_of(key) is None:
        return has_own_elements(value)
    return is_same_layout(value, layout_of(member.local))


def is_same_layout(value: Tensor, like: Tensor) -> bool:
    return all(
        size == 1 or a == b
        for size, a, b in zip(value.shape, value.stride(), like.stride(), strict=True)
    )


def check_state(member: Member, values: Mapping[str, Any]) -> None:
    """Raise where a state cannot be that of its parameter."""
    param = member.local
    for key, value in values.items():
        where = member.where(key)
        if key in NUMBERS:
            _check_number(key, value, where)
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{where} is a {type(value).__name__}; expected a tensor")
        if value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(
                f"{where} is of layout {value.layout} on {value.device}; expected a dense "
                f"tensor on {param.device}"
            )
        if part_of(key) is not None:
            _check_part(key, value, values, param, where)
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


def _check_number(key: str, value: Any, where: str) -> None:
    if not isinstance(value, Tensor | int | float):
        raise TypeError(f"{where} is a {type(value).__name__}; expected a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{where} has {value.numel()} elements; expected one")
    # Reading it elsewhere would wait for the device; a checkpoint is read in any case.
    known = not isinstance(value, Tensor) or value.device.type == "cpu"
    if known and key == "step" and not float(value) >= 0:
        raise ValueError(f"{where} is {float(value)}; expected a count of steps")


def _check_part(
    key: str, value: Tensor, values: Mapping[str, Any], param: Tensor, where: str
) -> None:
    part = part_of(key)
    assert part is not None
    dtypes, shapes = PARTS[part], shapes_of(key, values, param)
    old = part == REMAINDER and value.dtype == OLD_REMAINDER
    if not (old or value.dtype in dtypes) or tuple(value.shape) not in shapes:
        raise ValueError(
            f"{where} is of dtype {value.dtype} and shape {tuple(value.shape)}; expected "
            f"{' or '.join(map(str, dtypes))} and {shapes[0]}"
        )
    if part == ORDER and not are_strides_of(value, param):
        raise ValueError(
            f"{where} is {value.tolist()}, which are no strides of a dense {tuple(param.shape)}"
        )


def convert(values: Mapping[str, Any], member: Member) -> dict[str, Any]:
    """A state in the form that a member's format wants, of whatever format it was.

    What has that form already is passed on as it is. States are decoded, or encoded with each
    element rounded to nearest; a remainder is rounded to the bits that there are, and one that is
    not wanted is dropped, so that the parameter is the master rounded as it was.
    """
    return convert_states(values, member) | convert_master(values, member)


def convert_states(values: Mapping[str, Any], member: Member) -> dict[str, Any]:
    """The same without the master."""
    local, codes = member.local, member.format.codes
    squares = functools.partial(is_never_negative, member.rule)
    result = {k: v for k, v in values.items() if part_of(k) is None}
    old_order = values.get(ORDER)
    for name in dict.fromkeys(k.removesuffix(CODE) for k in values if part_of(k) == CODE):
        code, scale = values[name + CODE], values.get(name + SCALE)
        if scale is None or name in result and not codes:
            continue
        if codes and is_in_order(old_order, local):
            code, scale = in_blocks_of(local, code, scale, squares(name))
            result |= {name + CODE: code, name + SCALE: scale}
            result.pop(name, None)
        elif name not in result:
            result[name] = decode(code, scale, old_order, local, squares(name))
    if codes:
        for name in [k for k in result if part_of(k) is None and k not in NUMBERS]:
            code, scale = encode(result.pop(name), local, squares(name))
            result |= {name + CODE: code, name + SCALE: scale}
    if any(part_of(k) == CODE for k in result):
        there = old_order is not None and is_in_order(old_order, local)
        order = old_order if there else order_of(local)
        if order is not None:
            result[ORDER] = order
    return result
