"""States in checkpoints: what a state that is loaded has to have."""

from collections.abc import Iterable, Mapping
from typing import Any

from fusedopt._storage import CODE, MASTERS, ORDER, SCALE


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
