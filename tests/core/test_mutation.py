"""Plants faults in the core and shows that the checks catch each of them."""

import pytest

from . import checks, coded, codes
from .faults import FAULTS, Builds
from .library import Core


def run(check: str, core: Core) -> None:
    if check in checks.CORE_CHECKS:
        checks.CORE_CHECKS[check](core)
    elif check in codes.CODE_CHECKS:
        codes.CODE_CHECKS[check](core)
    elif check in coded.CODED_CHECKS:
        for kernel in core.coded_kernels:
            coded.CODED_CHECKS[check](core, kernel)
    else:
        for kernel in core.kernels:
            checks.CHECKS[check](core, kernel)


@pytest.mark.parametrize("check", FAULTS)
def test_no_fault_passes(check: str, builds: Builds) -> None:
    run(check, Core(builds["", ""].result()))


@pytest.mark.parametrize(
    ("check", "name"), [(c, n) for c, faults in FAULTS.items() for n in faults]
)
def test_fault_is_caught(check: str, name: str, builds: Builds) -> None:
    library = Core(builds[check, name].result())
    with pytest.raises(AssertionError):
        run(check, library)
