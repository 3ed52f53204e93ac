"""What the compiled module declares of a rule: the states that it keeps."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fusedopt._extension import _C
from fusedopt._formats import related

if TYPE_CHECKING:
    from fusedopt._C import RuleInfo


@functools.cache
def rule_info(rule: str) -> "RuleInfo":
    return _C.rules()[rule]


def is_never_negative(rule: str, name: str) -> bool:
    return rule_info(rule)["kinds"].get(name) == "average_of_squares"


def state_keys(rules: Iterable[str]) -> set[str]:
    """All keys that states have by these rules, whatever the options and the storage."""
    infos = [rule_info(rule) for rule in rules]
    numbers = {"step"}.union(*(info["numbers"] for info in infos))
    return numbers | related(k for info in infos for names in info["variants"] for k in names)
