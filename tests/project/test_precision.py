"""The benchmark of storage choices and its published results."""

import json
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from benchmarks.studies import precision
from benchmarks.studies.codes import __main__ as codes
from benchmarks.studies.codes.candidates import BLOCKS
from benchmarks.studies.codes.results import error_of, score
from benchmarks.studies.precision import CHOICES, FLOAT32, RESULTS

TASKS = ("GPT", "digits")


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads(RESULTS.read_text())


def row(results: Any, task: str, choice: str) -> Any:
    (found,) = [r for r in results["training"] if (r["task"], r["choice"]) == (task, choice)]
    return found


def test_the_results_are_of_all_choices(results: Any) -> None:
    assert set(results["memory"]) == set(CHOICES)
    assert {(r["task"], r["choice"]) for r in results["training"]} == {
        (task, choice) for task in TASKS for choice in CHOICES
    }
    assert all(len(r["losses"]["unseen"]) == 5 for r in results["training"])


def test_the_page_shows_the_results() -> None:
    assert precision.main(["--check"]) == 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("choice", [c for c in CHOICES if c != FLOAT32])
def test_losses_differ_by_less_than_seeds_do(results: Any, task: str, choice: str) -> None:
    spread = stdev(row(results, task, FLOAT32)["losses"]["unseen"])
    apart = precision.differences(results, row(results, task, choice), "unseen")
    assert abs(fmean(apart)) < spread


def test_bytes_per_parameter(results: Any) -> None:
    assert results["memory"]["bfloat16 + 32, int8 states"] <= 8.1
    assert results["memory"]["bfloat16 stochastic, int8 states"] <= 6.1
    assert 16 <= results["memory"][FLOAT32] <= 16.1


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_is_no_worse_than_the_dynamic_map(block: int) -> None:
    found = json.loads(codes.RESULTS.read_text())
    m, v = "tapered 4", "tapered 4, no zero, dithered"
    for kind in ("once", "always"):
        ours, theirs = (score(found, *pair, block, kind) for pair in ((m, v), ("dynamic map",) * 2))
        assert ours <= theirs
    for task in TASKS:
        for signed, code in ((True, m), (False, v)):
            p99 = [
                error_of(found, task, signed, name, block, "p99") for name in (code, "dynamic map")
            ]
            assert p99[0] <= p99[1]


# The larger task takes its time: two choices, one of each dtype, tell whether it trains.
SLOW = {("GPT", choice) for choice in CHOICES} - {
    ("GPT", FLOAT32),
    ("GPT", "bfloat16 stochastic, int8 states"),
}


@pytest.mark.parametrize(
    ("task", "choice"),
    [
        pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.slow] if pair in SLOW else [])
        for pair in product(TASKS, CHOICES)
    ],
)
def test_every_choice_trains(task: str, choice: str) -> None:
    losses = precision.train(task, 0, choice, 3)
    assert all(0 < loss < 10 for loss in losses.values())


def test_a_run_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [FLOAT32, "float32, int8 states"]
    monkeypatch.setattr(precision, "CHOICES", {name: CHOICES[name] for name in names})
    monkeypatch.setattr(precision, "memory_of_all", lambda: dict.fromkeys(names, 16.0))
    output = tmp_path / "results.json"
    assert precision.main(["--output", str(output), "--steps", "2", "--seeds", "2"]) == 0
    written = json.loads(output.read_text())
    assert capsys.readouterr().out == precision.table(written) + "\n"
    precision.draw(written, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
