"""The options that every kernel of a rule is tried with: those of the table of optimizers."""

from dataclasses import dataclass, field

from support.optimizers import ROWS
from support.reference import Options, Step


@dataclass
class Rule:
    update: Step
    defaults: Options
    all_options: list[Options] = field(default_factory=list)


# Large, so that whatever goes wrong with them is far above rounding.
LARGE = {"lr": 0.1, "eps": 0.05}

NEVER_NEGATIVE: frozenset[str] = frozenset().union(*(row.never_negative for row in ROWS))
"""The keys of states that are no less than zero."""

RULES: dict[str, Rule] = {}
for row in ROWS:
    large = {key: value for key, value in LARGE.items() if key in row.defaults}
    rule = RULES.setdefault(row.ours._rule, Rule(row.step, row.defaults | large))
    rule.all_options += [row.defaults | options | large for options in row.option_sets.values()]
