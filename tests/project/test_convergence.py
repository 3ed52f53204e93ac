"""The study of trainings with each optimizer, and its published results."""

import json
from pathlib import Path

import torch

import fusedopt
from benchmarks.studies import convergence


def test_every_optimizer_was_trained_and_learns() -> None:
    results = json.loads(convergence.RESULTS.read_text())
    made = {
        name
        for name in fusedopt.__all__
        if isinstance(getattr(fusedopt, name), type)
        and issubclass(getattr(fusedopt, name), torch.optim.Optimizer)
    }
    names = set(convergence.names_of(results))
    assert names == set(convergence.SETUPS)
    assert {name.split(",")[0] for name in names} == made  # behind it, what is special
    for name in names:
        trained = [one for one in results["trainings"] if one["optimizer"] == name]
        assert len(trained) == len(convergence.SETUPS[name].rates) == 3
        best = convergence.best_of(results, name)
        assert best["unseen"] < 0.8 * best["losses"][0]


def test_the_page_shows_the_results() -> None:
    assert convergence.main(["--check"]) == 0


def test_a_run(tmp_path: Path) -> None:
    output = tmp_path / "convergence.json"
    threads = torch.get_num_threads()
    try:
        for name in ("Lion", "AdamW"):
            given = ["--output", str(output), "--steps", "2", "--only", name]
            assert convergence.main(given) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads(output.read_text())
    assert convergence.names_of(results) == ["AdamW", "Lion"]
    convergence.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
