"""A run of the benchmark: everybody does the same work, and what goes wrong is said."""

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accelerator import HOST_RUN

from benchmarks import run
from benchmarks.measure import timing
from benchmarks.measure.cases import fit_to_memory, make_data
from benchmarks.measure.implementations import IMPLEMENTATIONS
from benchmarks.measure.memory import MemoryEvents
from benchmarks.measure.scenarios import OPTIMIZERS, SCENARIOS, Scenario
from benchmarks.measure.work import captured
from benchmarks.report import compare
from benchmarks.report.case import COPY, DEVICE, FLOOR, HOST, OURS, WALL
from benchmarks.report.pages import gpu_block, gpu_summary, scaling_block
from benchmarks.report.tables import markdown

TINY = Scenario("tiny", ((5,), (300, 4), (1,), (7, 3)), groups=2)
ALL = ["AdamW", "SGD", "RMSprop", "AdamW-bf16", "AdamW-clip", "AdamW-pipeline"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A scenario of which a run takes next to no time, without compiling, which takes longer."""
    for compiled in ("torch-compiled", "deepspeed-cpu"):
        monkeypatch.delitem(IMPLEMENTATIONS, compiled)
    monkeypatch.setitem(SCENARIOS, "tiny", TINY)
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", {"cpu": 1e-6, "cuda": 1e-6})
    monkeypatch.setattr(timing, "SETTLE_SECONDS", {"cpu": 0, "cuda": 0})
    yield
    make_data.cache_clear()


def measured(tmp_path: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    file = tmp_path / "results.json"
    common = ["--scenario", "tiny", "--rounds", "3", "--output", str(file)]
    assert run.main([*common, *arguments]) == status
    results: dict[str, Any] = json.loads(file.read_text())
    return results


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_everybody_does_the_same_work(tmp_path: Path) -> None:
    results = measured(tmp_path, "--optimizer", *ALL)
    assert "failures" not in results
    cases = {case["optimizer"]: case for case in results["cases"]}
    assert list(cases) == ALL
    for case in cases.values():
        assert {OURS, "fusedopt-flat", "torch-foreach", COPY, FLOOR} <= case[WALL].keys()
        assert all(len(taken) == 3 for taken in case[WALL].values())
        assert case["parameters"] == TINY.elements
        assert all(peak >= 2 * 4 * TINY.elements / 2 for peak in case["peak"].values())
    # Parameters, gradients and two states in float32, and what comes on top for tensors so small.
    assert 16 <= cases["AdamW"]["peak"][OURS] / TINY.elements < 18
    assert cases["AdamW"]["peak"]["torch-foreach"] > cases["AdamW"]["peak"]["torch-fused"]
    assert "torch-fused" in cases["AdamW-pipeline"][WALL]
    for name in ("AdamW", "AdamW-clip"):
        assert cases[name]["allocated"][OURS] == cases[name]["allocated"]["fusedopt-flat"] == 0
    assert (tmp_path / "results.md").read_text() == markdown(results)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW-clip", "AdamW-pipeline"])
def test_other_work_is_noticed(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SGD does nothing here, and the others do not clip.
    import fusedopt

    if optimizer == "SGD":
        monkeypatch.setattr(fusedopt.SGD, "step", lambda self: None)
    else:
        monkeypatch.setattr(fusedopt.AdamW, "max_grad_norm", None)
    results = measured(
        *(tmp_path, "--optimizer", optimizer, "--implementation", "torch-foreach", OURS),
        status=1,
    )
    (failure,) = results["failures"]
    assert failure.startswith(f"{optimizer} tiny fusedopt: ")
    assert OURS not in results["cases"][0][WALL]
    assert "FAILED" in markdown(results)


def test_time_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "IMPORTS", 1)
    (seconds,) = run.seconds_to_import()
    assert 0 < seconds < 10


def test_memory_in_use_and_handed_out() -> None:
    with MemoryEvents(torch.device("cpu")) as events:
        first = torch.empty(1000)
        del first
        kept = [torch.empty(500), torch.empty(600)]
    del kept
    assert events.allocated == 4 * 2100
    assert events.peak == 4 * 1100


def test_memory_of_a_cpu_decides_on_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, cpu = OPTIMIZERS["AdamW"], torch.device("cpu")
    monkeypatch.setattr("benchmarks.measure.cases.free_memory", lambda device: 2**34)
    scenario = SCENARIOS["1x64Mi"]
    assert fit_to_memory(scenario, setup, 6, cpu) is scenario
    assert fit_to_memory(SCENARIOS["1x1Gi"], setup, 2, cpu).elements < 2**28
    with pytest.raises(ValueError, match="GPT-2-medium does not fit"):
        fit_to_memory(SCENARIOS["GPT-2-medium"], setup, 4, cpu)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_curves_and_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "SCALING", {"tensors": ("1x8", "10x8"), "groups": ("2x8-groups",)})
    ours = ["--optimizer", "AdamW", "--implementation", OURS, "torch-foreach"]
    results = measured(tmp_path, *ours, "--scaling")
    assert [(case["axis"], case["scenario"]) for case in results["scaling"]] == [
        *(("tensors", "1x8"), ("tensors", "10x8"), ("groups", "2x8-groups"))
    ]
    assert all(case[WALL].keys() == {OURS, COPY, FLOOR} for case in results["scaling"])
    assert "| tensors | 10x8 |" in scaling_block(results)
    assert (tmp_path / "results" / "steps.png").stat().st_size > 10_000
    assert (tmp_path / "results" / "scaling.png").stat().st_size > 10_000
    # Against a run in which a step was a thousand times as fast.
    for case in results["cases"]:
        case[WALL][OURS] = [seconds / 1000 for seconds in case[WALL][OURS]]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(results))
    capsys.readouterr()
    measured(tmp_path, *ours, "--compare", str(old))
    assert "3 and 3 rounds are too few" in capsys.readouterr().out
    monkeypatch.setattr(compare, "LEAST_ROUNDS", 3)
    measured(tmp_path, *ours, "--compare", str(old), status=1)
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "10x"], "unknown scenario 10x; known are"),
        (["--implementation", "nobody"], "invalid choice: 'nobody'"),
        (["--compare", "no-such-file.json"], "--compare no-such-file.json"),
        (["--update", "--output", "no-such-file.json"], "--update --output no-such-file.json"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_no_time_left(tmp_path: Path) -> None:
    results = measured(tmp_path, "--limit", "1e-9", status=1)
    assert results["cases"] == [] and len(results["failures"]) == 3
    assert "not measured" in markdown(results)


def test_implementations_that_are_not_installed_say_so() -> None:
    for implementation in IMPLEMENTATIONS.values():
        reason = implementation.missing()
        assert implementation.package or reason is None
        assert reason is None or "not installed" in reason or "cannot be imported" in reason


def test_an_implementation_of_another_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--implementation", "fusedopt-graph"])
    assert "not measured on --device cpu" in capsys.readouterr().err


def test_a_graph_keeps_what_it_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeGraph:
        def replay(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    setup, data = OPTIMIZERS["AdamW"], make_data(TINY, torch.device("cpu"))
    work = IMPLEMENTATIONS["torch-foreach"].build(setup, TINY, data)
    optimizer = weakref.ref(work.call.__self__)  # type: ignore[attr-defined]
    work = captured(work)
    gc.collect()
    assert optimizer() is not None
    del work
    gc.collect()
    assert optimizer() is None


@pytest.mark.skipif(bool(HOST_RUN), reason="times a real GPU")
@pytest.mark.usefixtures("tiny")
def test_a_run_on_a_gpu(tmp_path: Path, cuda: str) -> None:
    results = measured(tmp_path, "--device", cuda, "--optimizer", *ALL)
    assert "failures" not in results
    cases = {case["optimizer"]: case for case in results["cases"]}
    for case in cases.values():
        for timed in (WALL, HOST, DEVICE):
            assert {OURS, "fusedopt-flat", "torch-foreach", COPY} <= case[timed].keys()
            assert all(seconds > 0 for taken in case[timed].values() for seconds in taken)
    assert {"fusedopt-graph", "torch-fused-graph"} <= cases["AdamW"][WALL].keys()
    assert results["provenance"]["copy_bandwidth"] > 1e9
    assert gpu_summary(results) in gpu_block([results])
