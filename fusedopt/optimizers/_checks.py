"""Checks of options, for the constructors of optimizers that torch.optim has no class for."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy


def check_options(optimizer: str, options: Mapping[str, Any], betas: int) -> None:
    """None may be negative, and there are as many betas, all of them below 1.

    What is no number, or NaN, is found when a parameter group is read, whoever has made it.

    Raises:
        ValueError: says which option is wrong.
    """
    for name, value in options.items():
        if name == "betas":
            check_betas(optimizer, value, betas)
        elif (number := number_in(value)) is not None and number < 0:
            raise ValueError(f"{optimizer}: {name} is {value}; expected at least 0")


def check_betas(optimizer: str, betas: Any, count: int) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != count:
        raise ValueError(f"{optimizer}: betas is {betas!r}; expected {count} numbers")
    for index, beta in enumerate(betas):
        number = number_in(beta)
        if number is not None and not 0 <= number < 1:
            raise ValueError(
                f"{optimizer}: betas[{index}] is {beta}; expected at least 0 and less than 1"
            )


def cautious_options(cautious: bool, cautious_weight_decay: bool) -> dict[str, Any]:
    """Options of a group that torch's classes do not have, where they are asked for."""
    options = {"cautious": cautious, "cautious_weight_decay": cautious_weight_decay}
    return {key: True for key, value in options.items() if value}


def check_cautious(optimizer: str, index: int, group: Mapping[str, Any]) -> None:
    """Raise ValueError where decay that is part of the gradient is to be cautious, or changes that
    never go against it."""
    if group.get("cautious") and not group.get("first_moment", True):
        raise ValueError(
            f"{optimizer}: group {index}: cautious=True leaves out where an average of gradients "
            "goes against the gradient, but first_moment=False keeps no such average; leave out one"
        )
    if group.get("cautious_weight_decay") and not group.get("decoupled_weight_decay", True):
        raise ValueError(
            f"{optimizer}: group {index}: cautious_weight_decay=True is for decoupled decay only; "
            "give decoupled_weight_decay=True"
        )


def number_in(value: Any) -> float | None:
    """The number that a value is; None where it is none, or lies on a device."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.device.type == "cpu" else None
    return float(value) if isinstance(value, int | float) else None


def check_matrix(what: str, param: Tensor, has_adamw: bool) -> None:
    """Raise for a parameter that Muon cannot step as a matrix."""
    if is_lazy(param):
        return
    if param.dim() < 2:
        given = "" if has_adamw else " and give adamw= options for it"
        raise ValueError(
            f"{what} has shape {tuple(param.shape)}; Muon orthogonalises matrices, so put it into "
            f"a group of its own with use_muon=False{given}"
        )
    if param.is_complex():
        raise TypeError(f"{what} is of dtype {param.dtype}; Muon takes real matrices only")
