"""The candidates: all codes that are compared, and the sizes of blocks."""

from __future__ import annotations

from benchmarks.studies.codes.code import Code
from benchmarks.studies.codes.companded import Linear, Root, Softsign
from benchmarks.studies.codes.dynamic import Dynamic
from benchmarks.studies.codes.floats import Minifloat, Tapered
from benchmarks.studies.codes.rounded import Rounded

BLOCKS = (128, 256)
SIGNED = (
    Linear(signed=True),
    Root(signed=True),
    Softsign(),
    Minifloat(3, 4, signed=True),
    Minifloat(4, 3, signed=True),
    Tapered(signed=True, shift=1),
    Tapered(signed=True, shift=2),
    Dynamic(signed=True),
)
UNSIGNED = (
    Linear(signed=False),
    Root(signed=False),
    Root(signed=False, zero=False),
    Root(signed=False, power=4),
    Root(signed=False, power=4, zero=False),
    Minifloat(4, 4, signed=False),
    Minifloat(4, 4, signed=False, zero=False),
    Minifloat(5, 3, signed=False),
    Minifloat(5, 3, signed=False, zero=False),
    Rounded(Root(signed=False, power=4), "up"),
    Rounded(Root(signed=False, zero=False), "dithered"),
    Rounded(Root(signed=False, power=4, zero=False), "dithered"),
    Rounded(Root(signed=False, power=4, zero=False), "dithered roots"),
    Rounded(Minifloat(4, 4, signed=False, zero=False), "dithered"),
    Tapered(signed=False, shift=2),
    Rounded(Tapered(signed=False, shift=2), "dithered"),
    Dynamic(signed=False),
)


def named(codes: tuple[Code, ...], name: str) -> Code:
    """The code of that name."""
    return next(code for code in codes if code.name == name)
