"""The benchmark of losses: everybody does the same work, and what the tables and the plot show."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.losses.__main__ as program
from benchmarks.losses import cases, child, training
from benchmarks.losses.cases import (
    BEST_CHUNKED,
    CHUNKED,
    CROSS_ENTROPY,
    FLOORS,
    FRESH,
    IN_PLACE,
    LINEAR,
    MSE,
    REUSED,
    TORCH,
    Case,
)
from benchmarks.losses.implementations import CHUNKS, Inputs, floors, makers
from benchmarks.losses.tables import draw, names_of, short_table, tables
from benchmarks.losses.training import Model
from benchmarks.models.networks import GPT
from benchmarks.models.text import load_text
from benchmarks.report.case import OURS, WALL, Json

CPU = torch.device("cpu")
TINY = (
    Case(CROSS_ENTROPY, (16, 50)),
    Case(CROSS_ENTROPY, (16, 50), torch.bfloat16),
    Case(LINEAR, (2 * min(CHUNKS), 50), features=8, rounds=2),
    Case(MSE, (64,)),
)


def tiny_model() -> Model:
    vocabulary = len(load_text().vocabulary)
    return Model(
        lambda: GPT(vocabulary, width=8, heads=2, blocks=1),
        training.characters,
        "8 x 64 characters",
        rounds=2,
    )


@pytest.fixture(scope="module")
def measured() -> dict[str, Json]:
    """By case; without what has to be compiled."""
    return {case.name: child.measure_case(case, CPU, 2, 0.01, compiled=False) for case in TINY}


# -- what is measured ---------------------------------------------------------------------------


def test_names_tell_cases_apart() -> None:
    assert cases.CASES.keys() >= set(cases.QUICK)
    assert not cases.CASES.keys() & training.MODELS.keys()
    assert [case.name for case in TINY] == [
        *("cross_entropy 16x50", "cross_entropy 16x50 bfloat16"),
        *("linear_cross_entropy 256x8x50", "mse_loss 64"),
    ]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_everybody_is_measured(case: Case, measured: dict[str, Json]) -> None:
    found = measured[case.name]
    assert found["skipped"] == {}
    wanted = {TORCH, OURS}
    if case.loss != MSE:
        wanted.add(IN_PLACE)
    if case.loss == LINEAR and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        wanted |= {CHUNKED, BEST_CHUNKED}
    assert found["peak"].keys() == wanted
    assert found[WALL].keys() - wanted <= set(FLOORS)
    assert found[WALL].keys() == found["faults"].keys()
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found[WALL].values())


def test_peaks_are_those_beside_inputs_and_gradients(measured: dict[str, Json]) -> None:
    case = Case(CROSS_ENTROPY, (16, 50))
    peaks = measured[case.name]["peak"]
    assert peaks[IN_PLACE] < case.bytes // 8
    assert case.bytes <= peaks[OURS] < 1.25 * case.bytes
    assert peaks[TORCH] >= 2 * case.bytes


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_gradients_are_those_of_torch(case: Case) -> None:
    """Each is checked as a run checks it; and one that is wrong is found."""
    inputs = Inputs.of(case, CPU)
    found = {name: make() for name, make in makers(case, inputs, compiled=False).items()}
    loss, gradients = found[TORCH].call()
    for name, subject in found.items():
        got = subject.call()
        child.check(name, (got[0], *got[1]), (loss, *gradients))
    with pytest.raises(RuntimeError, match="wrong: .* off torch's"):
        child.check("wrong", (loss, *gradients[:-1], 1.1 * gradients[-1]), (loss, *gradients))
    for call in floors(case, inputs).values():
        call()


def test_a_failure_of_fusedopt_is_no_omission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(child, "check", refuse)
    with pytest.raises(RuntimeError, match="no"):
        child.measure_case(TINY[0], CPU, 2, 0.01, compiled=False)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_is_kept_where_it_is_said_to_be() -> None:
    """By the page faults of a copy that is freed each time."""
    code = (
        "import torch; from benchmarks.losses.child import have_once, page_faults\n"
        "x = torch.ones(1 << 24); have_once(8 * x.nbytes); x.clone(); print(page_faults(x.clone))"
    )
    faults = {}
    for setting, environment in cases.SETTINGS["cpu"].items():
        answer = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            cwd=program.ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        faults[setting] = int(answer.stdout)
    assert faults[REUSED] < 100
    assert faults[FRESH] >= faults[REUSED]


def test_whole_iterations() -> None:
    found = training.measure_model(tiny_model(), rounds=2)
    assert found[WALL].keys() == found["peak"].keys() == training.WAYS.keys()
    assert all(len(seconds) == 2 for seconds in found[WALL].values())
    assert found["peak"][IN_PLACE] < found["peak"][TORCH]


def test_losses_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, optimizer = training.WAYS[OURS]
    ways = {**training.WAYS, OURS: (lambda *given: 1.01 * loss(*given), optimizer)}
    monkeypatch.setattr(training, "WAYS", ways)
    with pytest.raises(RuntimeError, match=f"{OURS}: a loss of"):
        training.measure_model(tiny_model(), rounds=2)


# -- what is shown of it ------------------------------------------------------------------------


def test_tables_and_plot(tmp_path: Path) -> None:
    """Of results as a run writes them."""
    results = json.loads(program.RESULTS.read_text())
    text = tables(results)
    for case in (*results["cases"], *results["training"]):
        for name in names_of(case):
            assert f"| {name} |" in text
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_ratios_are_to_the_time_of_fusedopt() -> None:
    seconds = {TORCH: [0.4, 0.9, 0.8], OURS: [0.2, 0.3, 0.2], "copy": [0.1, 0.1, 0.1]}
    one = {WALL: seconds, "peak": {TORCH: 300, OURS: 100}, "notes": {}, "skipped": {}}
    case = {
        **{"name": "cross_entropy 5x5", "loss": CROSS_ENTROPY, "size": "5x5", "dtype": "float32"},
        **{"bytes": 100, "settings": {FRESH: one}},
    }
    source = json.loads(program.RESULTS.read_text())["provenance"]
    text = tables({"provenance": source, "cases": [case], "training": []})
    rows = [line for line in text.splitlines() if line.startswith("| cross_entropy")]
    assert rows == [
        "| cross_entropy | 5x5 | fusedopt | 200 ms | 200 ms to 250 ms | 1.00x | 100% |",
        "| cross_entropy | 5x5 | torch | 800 ms | 600 ms to 850 ms | 3.00x | 300% |",
        "| cross_entropy | 5x5 | copy | 100 ms | 100 ms to 100 ms | 0.50x | - |",
    ]
    text = short_table({"provenance": source, "cases": [case], "training": []})
    (row,) = (line for line in text.splitlines() if line.startswith("| cross_entropy"))
    assert row == "| cross_entropy | 5x5 | 200 ms | 3.00x | - | 100% | - | 300% |"


def test_what_is_measured_again_says_so() -> None:
    of_old, of_new = ({"commit": sign * 40, "date": "2027-01-01T00:00"} for sign in "ab")
    names = list(cases.CASES)[:2]
    old: Json = {"provenance": of_old, "cases": [{"name": names[1]}], "training": []}
    new: Json = {"provenance": of_new, "cases": [{"name": name} for name in names], "training": []}
    merged = program.updated(old, {**new, "cases": new["cases"][:1]})
    assert [case["name"] for case in merged["cases"]] == names
    assert [case.get("again") for case in merged["cases"]] == [of_new, None]
    assert merged["provenance"] == of_old


# -- the program --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "losses.json"
    given = ["--quick", "--rounds", "2", "--seconds", "0.01", "--output", str(output)]
    assert program.main([*given, "--only", "cross_entropy 8x10"]) == 0
    (case,) = json.loads(output.read_text())["cases"]
    assert case["settings"].keys() == {FRESH, REUSED}
    assert program.main([*given, "--only", "mse_loss 1,000"]) == 0
    results = json.loads(output.read_text())
    assert [one["name"] for one in results["cases"]] == ["cross_entropy 8x10", "mse_loss 1,000"]
    assert "of fusedopt's" in capsys.readouterr().out
