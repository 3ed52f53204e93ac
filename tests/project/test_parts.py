"""The parts of large tests: together they are the whole, and each has some of every test."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGE = ["tests/core/test_mutation.py", "tests/steps/test_bitwise.py"]


def collected(part: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--part={part}", *LARGE]
    output = subprocess.check_output(command, text=True, cwd=ROOT)
    return [line for line in output.splitlines() if "::" in line]


@pytest.mark.slow
def test_parts_are_the_whole() -> None:
    whole, *parts = (set(collected(part)) for part in ("all", "0", "1", "2"))
    assert set.union(*parts) == whole
    for part in parts:
        assert len(part) < 0.6 * len(whole)
        assert {name.split("[")[0] for name in part} == {name.split("[")[0] for name in whole}
    faults = [{name for name in part if "fault_is_caught" in name} for part in parts]
    assert sum(map(len, faults)) == len(set.union(*faults)), "a fault is in two parts"
