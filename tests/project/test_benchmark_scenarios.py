"""The benchmark's scenarios: as large as their names say, and which of them are run."""

from math import prod
from typing import Any

import pytest
import torch

from benchmarks.measure import scenarios
from benchmarks.measure.cases import fit_to_memory
from benchmarks.measure.scenarios import OPTIMIZERS, SCENARIOS, SUITES, choose_cases, find_scenario
from benchmarks.models import shapes
from benchmarks.report.targets import CPU_TARGETS, GPU_TARGETS


def count(of: shapes.Shapes) -> int:
    return sum(map(prod, of))


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
        **{"AdamW-clip": 32, "AdamW-pipeline": 32, "Lion": 20, "AdEMAMix": 36, "ADOPT": 28},
        **{"Adan": 44, "RAdam": 28, "Adagrad": 20, "Adamax": 28, "Adadelta": 28, "Rprop": 28},
        **{"NAdam": 28, "ASGD": 20, "ScheduleFreeAdamW": 28, "ScheduleFreeSGD": 20},
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
    assert names("cpu", None, ["ViT-B-16"]) == [("AdamW", "ViT-B-16")]
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
