"""The options that every kernel of a rule is tried with: those of the table of optimizers."""

from dataclasses import dataclass, field

import numpy as np
from support.optimizers import MUON, ROWS, Row
from support.reference import Array, Options, State, Step


@dataclass
class Rule:
    update: Step
    whole: Step  # the formula for a parameter that is measured as a whole
    defaults: Options
    all_options: list[Options] = field(default_factory=list)


# Large, so that whatever goes wrong with them is far above rounding.
LARGE = {"lr": 0.1, "eps": 0.05}

NEVER_NEGATIVE: frozenset[str] = frozenset().union(*(row.never_negative for row in ROWS))
"""The keys of states that are no less than zero."""


def update_of(row: Row) -> Step:
    """One step by a formula that is given a state's numbers among the options, as kernels are."""

    def update(
        o: Options, step: int, first: bool, p: Array, g: Array, s: State
    ) -> tuple[Array, State]:
        numbers = {key: np.asarray(o[key], p.dtype) for key in row.numbers}
        unmeasured = {**o, "unmeasured": True}  # as spans are that name no parameter
        p, after = row.step(unmeasured, step, first, p, g, {**s, **numbers})
        return p, {key: value for key, value in after.items() if key not in numbers}

    return update


def numbers_of(row: Row, options: Options) -> list[Options]:
    """What the numbers of a state begin with, and others."""
    if not row.numbers:
        return [{}]
    first = {key: row.begins.get(key, 0.0) for key in row.numbers}
    first = {key: options[v] if isinstance(v, str) else v for key, v in first.items()}
    return [first, dict(row.numbers)]


RULES: dict[str, Rule] = {}
for row in [*ROWS, MUON]:
    large = {key: value for key, value in LARGE.items() if key in row.defaults}
    first = (row.defaults | large, *numbers_of(row, row.defaults | large))
    rule = RULES.setdefault(row.ours._rule, Rule(update_of(row), row.step, first[0] | first[1]))
    for options in row.option_sets.values():
        together = row.defaults | options | large
        rule.all_options += [together | numbers for numbers in numbers_of(row, together)]
