"""The comparison of two checkouts: each runs its own package, and every case has a ratio."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import pair

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_checkout_against_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pair, "TURN_SECONDS", 1e-3)
    assert pair.main([str(ROOT), "--rounds", "3", "--divisor", str(2**16), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("  ")[0].strip() for line in lines] == [*pair.CASES]
    for line in lines:
        found = re.search(r" (\d+\.\d+) \(quartiles (\d+\.\d+) to (\d+\.\d+)\)$", line)
        assert found and 0 < float(found[2]) <= float(found[1]) <= float(found[3])


@pytest.mark.slow
def test_a_checkout_that_is_not_built(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fusedopt", tmp_path / "fusedopt", ignore=shutil.ignore_patterns("*.so"))
    with pytest.raises(SystemExit, match="has no fusedopt that is built"):
        pair.main([str(tmp_path), "--threads", "1"])
