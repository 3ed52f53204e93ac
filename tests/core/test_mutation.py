"""Plants faults in the core and shows that the checks catch each of them."""

from pathlib import Path

import pytest

from . import checks, coded, codes, core_checks, measured
from .faults import FAULTS, flags_of, make, make_faultless, rule_of
from .library import Core, Kernel


def build_ahead(check: str, name: str = "", rule: str = "") -> Path:
    return make(check, name) if name else make_faultless(rule)


def some(kernels: list[Kernel], part: slice) -> list[Kernel]:
    """A part of them; all where they are too few for every part to have one."""
    return kernels[part] or kernels


def run(check: str, core: Core, part: slice = slice(None)) -> None:
    if check in core_checks.CORE_CHECKS:
        core_checks.CORE_CHECKS[check](core)
    elif check in codes.CODE_CHECKS:
        codes.CODE_CHECKS[check](core)
    elif check in coded.CODED_CHECKS:
        for kernel in some(core.coded_kernels, part):
            coded.CODED_CHECKS[check](core, kernel)
    elif check == "measured coded":
        for kernel in some(core.coded_kernels, part):
            measured.check_measured_coded(core, kernel)
    elif check == "measured":
        for kernel in some(core.kernels, part):
            measured.check_measured(core, kernel)
    else:
        for kernel in some(core.kernels, part):
            checks.CHECKS[check](core, kernel)


pytestmark = pytest.mark.slow  # each fault takes seconds to compile


def builds_of(check: str) -> list[tuple[str, tuple[str, ...]]]:
    """The rule and the flags of the builds with its faults."""
    return sorted({(rule_of(check, name), flags_of(check, name)) for name in FAULTS[check]})


@pytest.mark.parametrize(
    ("check", "rule", "flags"),
    [(check, *made) for check in FAULTS for made in builds_of(check)],
    ids=lambda each: each if isinstance(each, str) else "wide" if each else "baseline",
)
def test_no_fault_passes(check: str, rule: str, flags: tuple[str, ...], part: slice) -> None:
    run(check, Core(make_faultless(rule, flags)), part)


@pytest.mark.parametrize(
    ("check", "name"), [(check, name) for check, faults in FAULTS.items() for name in faults]
)
def test_fault_is_caught(check: str, name: str) -> None:
    library = Core(make(check, name))
    with pytest.raises(AssertionError):
        run(check, library)
