"""The benchmark's tables, targets and comparisons: they show what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.measure.scenarios import OPTIMIZERS
from benchmarks.report import __main__ as report
from benchmarks.report import compare, pages
from benchmarks.report.case import COPY, DEVICE, FLOOR, HOST, KERNELS, OURS, WALL, where
from benchmarks.report.compare import comparison
from benchmarks.report.pages import NO_GPU, PREDICTED, gpu_summary, with_blocks
from benchmarks.report.tables import markdown, target_table
from benchmarks.report.targets import target_rows


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


def test_predicted_shares_stand_beside_those_measured(
    gpu_results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invented = [
        {"kernel": KERNELS["AdamW"], "shares": {"H100": 0.1, "H200": 0.2}},
        {"kernel": KERNELS["AdamW"], "shares": {"B200": 0.3}},
        {"kernel": KERNELS["SGD"], "shares": {"H100": 0.4, "H200": 0.5}},
    ]
    monkeypatch.setattr(pages, "PREDICTED", tmp_path / "predicted.json")
    pages.PREDICTED.write_text(json.dumps(invented))
    small = gpu_case("AdamW", "1000x1Ki", {OURS: 1e-5, COPY: 1e-5}, tensors=1_000_000)
    gpu_results["cases"].append(small)
    for device, shares in {
        "NVIDIA H200": ["20%", "50%"],
        "NVIDIA B200": ["30%", "-"],
        "NVIDIA H100 PCIe": ["-", "-"],
    }.items():
        gpu_results["provenance"]["device"] = device
        lines = gpu_summary(gpu_results).splitlines()
        rows = [line.split(" | ") for line in lines if line.startswith("|")]
        place = next(row for row in rows if "predicted" in row).index("predicted")
        assert [row[place] for row in rows if "1x1Gi" in row[1]] == shares
        assert [row[place] for row in rows if "1000x1Ki" in row[1]] == ["-"]


def test_kernels_that_are_predicted_have_their_bytes() -> None:
    predictions = json.loads(PREDICTED.read_text())
    for optimizer, kernel in KERNELS.items():
        found = {one["usual"]["bytes"] for one in predictions if one["kernel"] == kernel}
        assert found == {OPTIMIZERS[optimizer].bytes_per_parameter}, optimizer


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


def test_a_target_that_was_met_is_not_lost_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of target, by more than chance, and where both were measured."""
    monkeypatch.setattr(compare, "LEAST_ROUNDS", 4)

    def run(ours: list[float], floor: float = 1e-3, **others: list[float]) -> Any:
        results = cpu_results(**{OURS: ours, **others})
        results["cases"][0][WALL][FLOOR] = [floor] * len(ours)
        return results

    fused = {"torch-fused": [0.036] * 4}
    old = run([1.9e-3] * 4, **fused)
    text, regressed = comparison(old, run([2.2e-3] * 4, 1.12e-3, **fused))
    assert regressed and text.endswith(
        "TARGET LOST: AdamW 1000x1Ki vs torch-fused: 18.9x before, 16.4x now, at least 18x"
    )
    text, regressed = comparison(old, run([2.2e-3] * 4, 0.9e-3, **fused))
    assert "fusedopt, of the floor's time: 1.90x before, 2.44x now, at most 2.00x" in text
    assert text.count("TARGET LOST") == 2
    # Half of the rounds meet it, none of the peer's was measured, it had been missed before.
    chance = run([1.9e-3, 1.95e-3, 2.2e-3, 2.2e-3], 1.1e-3, **fused)
    for before, now in ((old, chance), (old, run([2.2e-3] * 4, 1.12e-3))):
        assert "LOST" not in comparison(before, now)[0]
    missed = run([2.2e-3] * 4, **fused)
    assert "LOST" not in comparison(missed, run([2.25e-3] * 4, **fused))[0]


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


def test_other_rules_have_a_table_of_their_own() -> None:
    results = cpu_results(**{OURS: [1e-3] * 3, "torch-fused": [2e-3] * 3})
    results["cases"] += [{**results["cases"][0], "optimizer": "Lion"}]
    for name, rules in (("benchmark", ["AdamW"]), ("benchmark-rules", ["Lion"])):
        page = with_blocks(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n", results)
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith("|")][2:]
        assert [row[0].strip("| ") for row in rows] == rules


def test_what_is_measured_again_takes_the_place_of_what_was() -> None:
    old, new = cpu_results(**{OURS: [1e-3] * 3}), cpu_results(**{OURS: [2e-3] * 3})
    old["scaling"], new["scaling"] = ["old"], ["new"]
    old["training"] = ["old"]
    del new["import_seconds"]
    new["provenance"]["commit"] = "new"
    merged = run.updated(old, new)
    assert (merged["scaling"], merged["training"]) == (["new"], ["old"])
    assert merged["import_seconds"] == old["import_seconds"]
    assert merged["provenance"] == old["provenance"]
    assert merged["cases"][0][WALL][OURS] == [2e-3] * 3
    assert where(merged).endswith("measured again at commit new: AdamW 1000x1Ki, the curves")
