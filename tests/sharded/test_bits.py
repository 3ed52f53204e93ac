"""The same bits at every world size: shards of rows are stepped as the whole is."""

import functools

import pytest
from support.ranks import Trial, check
from support.sharding import LAYOUTS, Layout, Pair, choices, in_two_groups, mesh_of


def same_bits(layout: Layout, choice: str) -> None:
    case, dtype, options, codes = choices()[choice]
    mesh, placements = mesh_of(layout[0]), layout[1]
    pair = Pair(in_two_groups(case, options, codes), mesh, placements, dtype=dtype)
    pair.train(range(5))
    pair.assert_same_bits()


def trials(world: int) -> dict[str, Trial]:
    return {
        f"{layout}-{choice}": functools.partial(same_bits, LAYOUTS[world][layout], choice)
        for layout in LAYOUTS[world]
        for choice, (case, *_) in choices().items()
        # Of the many layouts of a larger world all but one are for one class.
        if layout == "shards" or case.row.name == "adamw"
    }


@pytest.mark.parametrize("world", LAYOUTS)
def test_same_bits(world: int) -> None:
    check(__file__, world)
