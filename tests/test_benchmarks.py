"""The benchmarks measure what they say, and their tables show what was measured."""

import gc
import io
import json
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import HOST_RUN

from benchmarks import run
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import sanitize
from benchmarks.measure import scenarios, timing
from benchmarks.measure.cases import fit_to_memory, make_data
from benchmarks.measure.implementations import IMPLEMENTATIONS
from benchmarks.measure.memory import MemoryEvents
from benchmarks.measure.scenarios import (
    OPTIMIZERS,
    SCENARIOS,
    SUITES,
    Scenario,
    choose_cases,
    find_scenario,
)
from benchmarks.measure.work import Work, captured
from benchmarks.models import shapes
from benchmarks.report import __main__ as report
from benchmarks.report import compare
from benchmarks.report.case import COPY, DEVICE, FLOOR, HOST, OURS, WALL
from benchmarks.report.compare import comparison
from benchmarks.report.pages import NO_GPU, gpu_block, gpu_summary, scaling_block, with_blocks
from benchmarks.report.tables import markdown, target_table
from benchmarks.report.targets import CPU_TARGETS, GPU_TARGETS, target_rows


def count(of: shapes.Shapes) -> int:
    return sum(map(prod, of))


# -- shapes and scenarios -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        (shapes.RESNET_50, 161, 25_557_032),
        (shapes.VIT_B_16, 152, 86_567_656),
        (shapes.GPT_2_SMALL, 148, 124_439_808),
        (shapes.GPT_2_MEDIUM, 292, 354_823_168),
        (SCENARIOS["Llama-3-8B"].tensors, 291, 8_030_261_248),
    ],
)
def test_models_have_the_published_number_of_parameters(
    model: shapes.Shapes, tensors: int, parameters: int
) -> None:
    assert (len(model), count(model)) == (tensors, parameters)


def test_scenarios_are_as_large_as_their_names_say() -> None:
    elements = {name: SCENARIOS[name].elements for name in ("1x64Mi", "1x1Gi", "200x100K")}
    assert elements == {"1x64Mi": 2**26, "1x1Gi": 2**30, "200x100K": 20_000_000}
    assert SCENARIOS["1000x1Ki"].tensors == 1000 * ((1024,),)
    assert len(SCENARIOS["500-groups"].tensors) == SCENARIOS["500-groups"].groups == 500


def test_what_does_not_fit_is_scaled_down_and_says_so() -> None:
    llama = SCENARIOS["Llama-3-8B"]
    ends, layer = count(shapes.LLAMA_3_8B_ENDS), count(shapes.LLAMA_3_8B_LAYER)
    assert llama.fitting(llama.elements) is llama
    smaller = llama.fitting(ends + 3 * layer + layer // 2)
    assert smaller.elements == ends + 3 * layer
    assert (smaller.name, smaller.note) == (llama.name, "3 of 32 layers")
    with pytest.raises(ValueError, match="does not fit"):
        llama.fitting(ends)
    with pytest.raises(ValueError, match="does not fit"):
        SCENARIOS["ResNet-50"].fitting(25_000_000)
    single = SCENARIOS["1x1Gi"].fitting(700_000_000)
    assert single.tensors == ((2**29,),) and single.note == "536,870,912 elements"


def test_memory_of_a_gpu_decides_on_the_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, llama = torch.device("cuda"), SCENARIOS["Llama-3-8B"]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (139 * 2**30, 140 * 2**30))
    full, half = (
        fit_to_memory(llama, OPTIMIZERS[name], 3, gpu) for name in ("AdamW", "AdamW-bf16")
    )
    # Three implementations with parameters, gradients and two states, and what comes on top.
    assert full.elements * (3 * 16 + 8 + 3 * 4) < 0.9 * 139 * 2**30
    assert 2 < full.layers < half.layers < llama.layers
    single = SCENARIOS["1x1Gi"]
    assert fit_to_memory(single, OPTIMIZERS["AdamW"], 5, gpu) is single


def test_what_bounds_a_step() -> None:
    bytes_of = {name: setup.bytes_per_parameter for name, setup in OPTIMIZERS.items()}
    assert bytes_of == {
        **{"AdamW": 28, "SGD": 20, "RMSprop": 20, "AdamW-bf16": 14, "AdamW-master": 26},
        **{"AdamW-clip": 32, "AdamW-pipeline": 32},
    }


def test_choice_of_cases() -> None:
    def names(*choice: Any) -> list[tuple[str, str]]:
        return [(setup.name, scenario.name) for setup, scenario in choose_cases(*choice)]

    for kind, suite in SUITES.items():
        whole = [(optimizer, scenario) for scenario in suite for optimizer in suite[scenario]]
        assert names(kind, None, None) == whole
    assert names("cpu", ["SGD"], None) == [
        ("SGD", s) for s in ("1x64Mi", "1000x1Ki", "200x100K", "1x1", "ResNet-50")
    ]
    quick = names("cpu", None, None, True)
    assert 0 < len(quick) < len(names("cpu", None, None)) / 2
    assert set(quick) <= set(names("cpu", None, None))
    assert names("cpu", None, ["GPT-2-small"]) == [("AdamW", "GPT-2-small")]
    assert names("cpu", None, ["1x7"]) == [(optimizer, "1x7") for optimizer in scenarios.PLAIN]
    assert names("cpu", ["AdamW-bf16"], ["ResNet-50"]) == [("AdamW-bf16", "ResNet-50")]
    assert names("cuda", ["AdamW-clip"], None) == []


def test_targets_are_about_cases_of_the_suites() -> None:
    for kind, targets in (("cpu", CPU_TARGETS), ("cuda", GPU_TARGETS)):
        for target in targets:
            assert target.optimizer in SUITES[kind][target.scenario], target


def test_scenarios_by_description() -> None:
    groups = find_scenario("500x4Ki-groups")
    assert groups.tensors == SCENARIOS["500-groups"].tensors and groups.groups == 500
    single = find_scenario("1x7")
    assert single.tensors == ((7,),) and single.groups == 1
    assert find_scenario("3x2M").elements == 6_000_000
    for name in ("0x1", "1x", "1x1Ti", "x", "1000x1Ki-group"):
        with pytest.raises(ValueError, match=f"unknown scenario {name}; known are .*200x100K"):
            find_scenario(name)


def test_curves_are_made_of_what_they_are_named_after() -> None:
    for axis, names in scenarios.SCALING.items():
        curve = [find_scenario(name) for name in names]
        sizes = {
            "tensors": [len(scenario.tensors) for scenario in curve],
            "groups": [scenario.groups for scenario in curve],
            "elements": [scenario.elements for scenario in curve],
        }
        assert all(a < b for a, b in zip(sizes[axis], sizes[axis][1:], strict=False))
        assert axis == "elements" or len({scenario.tensors[0] for scenario in curve}) == 1


# -- clocks -------------------------------------------------------------------------------------


class FakeGpu:
    """A host and a device with one queue, on a clock that only they move."""

    def __init__(self, host: float, device: float) -> None:
        self.now, self.idle_from = 0.0, 0.0
        self.host, self.device = host, device

    def call(self) -> None:
        self.now += self.host
        self.idle_from = max(self.idle_from, self.now) + self.device

    def sleep(self, cycles: int) -> None:
        self.idle_from = max(self.idle_from, self.now) + cycles / timing.CYCLES_PER_SECOND

    def synchronize(self) -> None:
        self.now = max(self.now, self.idle_from)

    def event(self, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    """When the device reaches it."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.idle_from, self.gpu.now)

    def elapsed_time(self, later: "FakeEvent") -> float:
        return 1e3 * (later.at - self.at)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, host: float, device: float) -> FakeGpu:
    gpu = FakeGpu(host, device)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)
    return gpu


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("host", "device"), [(30e-6, 5e-6), (10e-6, 7e-3), (5e-3, 1e-3)])
def test_time_of_the_host_and_of_the_device_apart(
    host: float, device: float, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_gpu(monkeypatch, host, device)
    done: list[str] = []

    def prepare() -> None:
        done.append("prepare")
        gpu.call()

    def call() -> None:
        done.append("call")
        gpu.call()

    sample = timing.time_on_cuda(Work(call, prepare=prepare if prepared else None), 50)
    assert sample[HOST] == pytest.approx(host)
    assert sample[DEVICE] == pytest.approx(device)
    calls = 1 if prepared else 50
    hidden = min(host, device) * (calls - 1) / calls
    assert sample[WALL] == pytest.approx(host + device - hidden)
    if prepared:
        assert done == ["prepare", "call", "prepare", "call"]


def test_a_work_that_needs_preparation_gets_it_before_each_call() -> None:
    ready: deque[int] = deque()
    work = Work(lambda: ready.pop(), prepare=lambda: ready.append(1))
    assert timing.time_on_cpu(work, 100)[WALL] > 0
    assert not ready


# -- runs ---------------------------------------------------------------------------------------

TINY = Scenario("tiny", ((5,), (300, 4), (1,), (7, 3)), groups=2)
ALL = ["AdamW", "SGD", "RMSprop", "AdamW-bf16", "AdamW-clip", "AdamW-pipeline"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A scenario of which a run takes next to no time, without compiling, which takes longer."""
    monkeypatch.delitem(IMPLEMENTATIONS, "torch-compiled")
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


# -- tables -------------------------------------------------------------------------------------


def gpu_case(optimizer: str, scenario: str, seconds: dict[str, float], **more: Any) -> Any:
    return {
        **{"optimizer": optimizer, "scenario": scenario, "parameters": 2**30},
        **{"bytes_per_parameter": 28, "memory_bytes": 2**33, "skipped": {}, "tensors": 1},
        "allocated": {OURS: 0},
        DEVICE: {name: [value] * 3 for name, value in seconds.items()},
        WALL: {name: [value + 1e-6] * 3 for name, value in seconds.items()},
        HOST: {name: [2e-5] * 3 for name in seconds},
        **more,
    }


@pytest.fixture
def gpu_results() -> dict[str, Any]:
    """Invented: the device copies at 1 byte per picosecond."""
    copied, moved = 2**33 * 1e-12, 28 * 2**30 * 1e-12
    return {
        "provenance": {
            **{"device": "NVIDIA Invented", "driver": "1.2", "cuda": "13.0", "torch": "2.11.0"},
            **{"python": "3.12.3", "date": "2026-01-01T00:00:00", "commit": None, "dirty": None},
            **{"copy_bandwidth": 1e12, "threads": 1, "cores": 1, "processor": "-"},
        },
        "cases": [
            gpu_case(
                *("AdamW", "1x1Gi"),
                {"torch-fused": moved / 0.8, OURS: moved / 0.98, COPY: copied, FLOOR: copied},
                note="of invented memory",
            ),
            gpu_case("SGD", "1x1Gi", {"torch-fused": 1.0, OURS: moved / 0.5, COPY: copied}),
        ],
    }


def test_targets_of_a_gpu(gpu_results: dict[str, Any]) -> None:
    text, met = target_table(gpu_results)
    assert not met
    rows = [line.split(" | ") for line in text.splitlines()]
    found = {row[0].strip("| "): row[1:] for row in rows}
    assert found["AdamW 1x1Gi (of invented memory), of the copy's bandwidth"] == [
        *("98.0%", "at least 97%", "yes |")
    ]
    assert found["SGD 1x1Gi, of the copy's bandwidth"][0::2] == ["50.0%", "NO |"]
    assert found["AdamW 1x1Gi (of invented memory) vs torch-fused"][0] == "1.22x"
    within = "AdamW 1000x1Ki, fusedopt-graph, wall time"
    assert found[within] == ["-", "at most 20 us", "NO |"]


def cpu_results(**seconds: list[float]) -> dict[str, Any]:
    """Invented."""
    case = {
        **{"optimizer": "AdamW", "scenario": "1000x1Ki", "parameters": 1_024_000, "tensors": 1000},
        **{"bytes_per_parameter": 28, "memory_bytes": 28_672_000, "skipped": {}, "allocated": {}},
        WALL: {COPY: [1e-3] * 3, FLOOR: [1e-3] * 3, **seconds},
    }
    return {
        "provenance": {
            **{"device": "CPU", "processor": "Invented", "threads": 2, "cores": 2, "torch": "2"},
            **{"python": "3.11", "date": "2026-01-01T00:00:00", "commit": None, "dirty": None},
            "peers": {"deepspeed": "0.1"},
        },
        "absent": {"torchao-8bit": "torchao is not installed"},
        "cases": [case],
        "import_seconds": [0.02, 0.03, 0.04],
    }


def test_targets_of_a_cpu() -> None:
    results = cpu_results(
        **{OURS: [2e-3, 2e-3, 4e-3], "fusedopt-flat": [1.1e-3] * 3, "torch-fused": [0.04] * 3}
    )
    rows = {cells[0]: (cells[1:], met) for cells, met in target_rows(results)}
    assert rows["AdamW 1000x1Ki vs torch-fused"] == (["20.0x", "at least 18x"], True)
    of_floor = rows["AdamW 1000x1Ki, fusedopt, of the floor's time"]
    assert of_floor == (["2.00x", "at most 2.00x"], True)
    assert rows["AdamW 1000x1Ki, fusedopt-flat vs torch-fused"][0][0] == "36.4x"
    assert rows["AdamW 1000x1Ki vs deepspeed-cpu"] == (["-", "at least 17x"], False)
    assert rows["import beyond torch"] == (["30 ms", "at most 50 ms"], True)


def test_places_of_a_page(tmp_path: Path) -> None:
    results = cpu_results(
        **{OURS: [1e-3] * 3, "torch-fused": [1.01e-3] * 3, "deepspeed-cpu": [9e-4] * 3}
    )
    places = ("benchmark-short", "benchmark-peers", "benchmark-better")
    page = "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in places)
    filled = with_blocks(page, results)
    assert "| AdamW | 1000x1Ki | 1 ms | 100% | 1.01x | 0.90x |" in filled
    assert "- deepspeed 0.1\n- torchao-8bit: not measured, torchao is not installed.\n" in filled
    assert "- AdamW 1000x1Ki: torch-fused takes 1.01x of fusedopt's time.\n" in filled
    assert "- AdamW 1000x1Ki: deepspeed-cpu takes 0.90x of fusedopt's time.\n" in filled
    assert with_blocks(filled, results) == filled
    with pytest.raises(ValueError, match="benchmark:begin"):
        with_blocks("nothing", results)


def test_comparison_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "LEAST_ROUNDS", 3)
    old = cpu_results(**{OURS: [2e-3, 2.1e-3, 2.2e-3]})
    within = cpu_results(**{OURS: [2e-3, 2.15e-3, 2.4e-3]})
    slower = cpu_results(**{OURS: [2.5e-3, 2.6e-3, 2.7e-3]})
    assert comparison(old, within)[1] is False
    text, regressed = comparison(old, slower)
    assert regressed and text == (
        "AdamW 1000x1Ki fusedopt: 2.10x of the floor before, 2.60x now, x1.24: SLOWER"
    )
    text, regressed = comparison(slower, old)
    assert not regressed and text.endswith("2.60x of the floor before, 2.10x now, x0.81: faster")
    old["provenance"]["threads"] = 1
    assert comparison(old, slower)[0].startswith("These runs differ in threads: 1 before, 2 now.")
    old["provenance"]["threads"] = 2
    old["cases"][0]["optimizer"] = "SGD"
    assert comparison(old, slower) == ("The two runs have no case in common.", False)


def test_gpu_tables(
    gpu_results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "nvidia-invented.json", tmp_path / "page.md"
    file.write_text(json.dumps(gpu_results))
    page.write_text("before\n<!-- gpu-benchmark:begin -->\nold\n<!-- gpu-benchmark:end -->\nafter")
    common = ["--gpu", "--readme-file", str(page)]
    assert report.main([*common, str(file), "--check"]) == 1
    assert "does not show" in capsys.readouterr().err
    assert report.main([*common, str(file), "--readme"]) == 0
    assert report.main([*common, str(file), "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    assert "| AdamW | 1x1Gi (of invented memory) | 30.7 ms |" in text
    assert "NVIDIA Invented, a copy: 1.00 TB/s" in text
    assert report.main([*common, "--readme"]) == 0
    assert NO_GPU in page.read_text()
    assert "| 98% |" in markdown(gpu_results)


# -- the check on a GPU -------------------------------------------------------------------------


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_steps_of_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out, made = tmp_path / "root", tmp_path / "out", Path("made.txt")
    root.mkdir()
    out.mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", root)
    write = f"from pathlib import Path; Path({str(made)!r}).write_text('kept')"
    steps = [
        gpu_check.Step("fails", [python("raise SystemExit(3)"), python("print('not run')")], 30, 0),
        gpu_check.Step("hangs", [python("import time; time.sleep(60)")], 1, 0),
        gpu_check.Step("absent", [("no-such-command",)], 30, 0, missing="it is not installed"),
        gpu_check.Step("refuses", [python("print('no device'); exit(1)")], 30, 0, unusable="no d"),
        gpu_check.Step("works", [python(write), python("print(12 * 12)")], 30, 0),
        gpu_check.Step("told", [python("import sys; print(sys.argv[1:])")], 100, 0, told=True),
        gpu_check.Step("too late", [python("print('not run')")], 30, 0),
        gpu_check.Step("reserves", [python("print('run')")], 30, 10_000),
    ]
    log = io.StringIO()
    outcomes = gpu_check.Checker(log, time.monotonic() + 600, [made], out).run(steps[:-2])
    assert (out / made).read_text() == "kept"
    outcomes += gpu_check.Checker(log, time.monotonic() + 600).run(steps[-2:])
    assert {outcome.name: outcome.verdict for outcome in outcomes} == {
        "fails": "FAILED: exit status 3",
        "hangs": "FAILED: ended after 1 s",
        "absent": "skipped: it is not installed",
        "refuses": "skipped: the tool does not work here (no d)",
        "works": "ok",
        "told": "ok",
        "too late": "FAILED: no time was left",
        "reserves": "ok",
    }
    assert all(outcome.failed == ("FAILED" in outcome.verdict) for outcome in outcomes)
    assert "144" in log.getvalue() and "['--limit', '85']" in log.getvalue()
    assert "\nnot run\n" not in log.getvalue()
    assert len(gpu_check.summary(outcomes, 1.0).splitlines()) == len(outcomes) + 1


def test_the_check_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "finds none" in said.err


def test_steps_run_in_order_and_fit_in_nine_minutes() -> None:
    steps = gpu_check.make_steps(gpu_check.RESULTS / "nvidia-x.json", ["-k", "adamw"])
    assert [step.name for step in steps] == [
        *("build", "tests", "memcheck", "initcheck", "racecheck", "benchmark", "table")
    ]
    assert steps[1].commands[0][-4:] == ("-m", "cuda", "-k", "adamw")
    assert gpu_check.TOTAL_SECONDS < 540
    assert sum(step.reserved for step in steps) + steps[0].limit < gpu_check.TOTAL_SECONDS


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H200", "nvidia-h200"), ("Tesla T4", "nvidia-tesla-t4")],
)
def test_name_of_the_results(name: str, expected: str) -> None:
    assert gpu_check.slug(name) == expected


def test_small_steps_of_everything(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", device]) == 0
    assert "took their steps" in capsys.readouterr().out
