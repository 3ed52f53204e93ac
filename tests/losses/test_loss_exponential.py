"""exp and log, as losses need them, beside the host's with more digits: exponential.cpp."""

import platform
from dataclasses import dataclass
from pathlib import Path

import pytest
from core.build import build_alone, host_flags, run

SOURCE = Path(__file__).with_name("exponential.cpp")
FLAGS = [*(flag for flag in host_flags() if flag != "-O3"), "-O2"]
# Where the processor has an instruction, fma() is one; elsewhere a call of libm's, which is right,
# too; and emulated. It is the same arithmetic.
WAYS = {
    "fma": [*FLAGS, "-march=native"],
    "call": FLAGS,
    "emulated": [*FLAGS, "-DFUSEDOPT_EMULATE_FMA"],
}
LARGEST = {"float-exp": 0.9, "exp": 1.0, "one-minus-exp": 1.2, "log": 1.0}
"""Units of the last place. That of float32's exp is what arithmetic.h says."""


@dataclass(frozen=True)
class Found:
    error: float
    seen: int
    odd: int
    digest: str


def find(way: str, step: int, count: int) -> dict[str, Found]:
    program = build_alone(f"exponential-{way}", SOURCE, WAYS[way])
    found = {}
    for line in run([program, str(step), str(count)]).splitlines():
        what, error, _, seen, odd, digest = line.split()
        found[what] = Found(float(error), int(seen), int(odd), digest)
    assert found.keys() == LARGEST.keys()
    return found


def assert_exact(found: dict[str, Found]) -> None:
    for what, largest in LARGEST.items():
        assert found[what].error <= largest, (what, found[what])
        assert found[what].odd == 0, (what, found[what])


def test_some() -> None:
    """Every 2003rd float32; in all ways the same bits."""
    found = find("fma", 2003, 200_000)
    assert found["float-exp"].seen > 1_000_000 and found["exp"].seen == found["log"].seen == 200_000
    assert_exact(found)
    if platform.machine() == "x86_64":
        assert find("emulated", 2003, 200_000) == found
    assert find("call", 2003, 200_000) == found


@pytest.mark.slow
def test_all() -> None:
    """Every float32 that is no greater than zero."""
    found = find("fma", 1, 20_000_000)
    assert found["float-exp"].seen == (255 << 23) + 1
    assert_exact(found)
