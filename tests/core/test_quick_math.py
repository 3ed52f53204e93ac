"""What devices divide by a root with, beside the host's own division and root: quick_math.cpp."""

from pathlib import Path

from .build import build_alone, host_flags, run
from .quick import HARDEST_DIVISORS, HARDEST_ROOTS

SOURCE = Path(__file__).with_name("quick_math.cpp")
# With approximations of reciprocals that are a unit off for every operand, which those of hardware
# are not, compilers' own divisions and roots round some of these the wrong way as well.
ROOTS_THAT_MAY_DIFFER = 3
QUOTIENTS_THAT_MAY_DIFFER = 2


def test_every_root_and_the_hardest_quotients() -> None:
    """All 2^24 roots, 2^25 quotients next to a float or to the middle of two, and any numbers."""
    found = {}
    flags = [*(flag for flag in host_flags() if flag != "-O3"), "-O2"]
    lines = run([build_alone("quick-math", SOURCE, flags)]).splitlines()
    different: set[str] = set()
    for line in lines:
        if line[0] == " ":
            different.add(line.split(":")[0].strip())
            continue
        what, units, seen, wrong = line.split()
        found[what, int(units)] = int(seen), int(wrong)
    roots, quotients, numbers = (
        {units: found[what, units] for units in (-1, 0, 1)} for what in ("root", "quotient", "any")
    )
    assert all(seen == 2**24 for seen, _ in roots.values())
    assert all(seen > 2**24 for seen, _ in quotients.values())
    assert all(seen > 1_500_000 and wrong == 0 for seen, wrong in numbers.values()), numbers
    assert roots[0][1] == quotients[0][1] == 0
    assert max(wrong for _, wrong in roots.values()) <= ROOTS_THAT_MAY_DIFFER
    assert max(wrong for _, wrong in quotients.values()) <= QUOTIENTS_THAT_MAY_DIFFER
    of_roots = {f"{root}, 0x0p+0" for root in HARDEST_ROOTS}
    of_divisors = {each for each in different if each.split(", ")[1] in HARDEST_DIVISORS}
    assert different == of_roots | of_divisors
    assert {each.split(", ")[1] for each in of_divisors} == {*HARDEST_DIVISORS}
