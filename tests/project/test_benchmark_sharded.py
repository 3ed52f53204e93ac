"""The benchmark of sharded parameters: every part of it, once, and its tables."""

import json
from pathlib import Path

import pytest

from benchmarks import sharded


def test_tables_and_plot(tmp_path: Path) -> None:
    """Of results as a run writes them."""
    results = json.loads(sharded.RESULTS.read_text())
    text = sharded.tables(results)
    for subjects in sharded.KINDS.values():
        for name in subjects:
            assert f"| {name} |" in text
    sharded.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sharded.json"
    few = ["--tensors", "3", "--rounds", "1", "--iterations", "1"]
    assert sharded.main([*few, "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert {case["kind"] for case in results["steps"]} == sharded.KINDS.keys()
    assert all(case["allocated"] == 0 for case in results["steps"])
    losses = [one["loss"] for one in results["training"].values()]
    assert max(losses) - min(losses) < 1e-3
    assert "of fusedopt's time" in capsys.readouterr().out
