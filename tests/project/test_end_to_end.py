"""Whole training iterations: what is measured, and what the table and the plot show of it."""

import gc
import re
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.measure import end_to_end
from benchmarks.measure.end_to_end import (
    IMPLEMENTATIONS,
    WORKLOADS,
    Iteration,
    Workload,
)
from benchmarks.measure.progress import Progress
from benchmarks.report.case import DEFAULT, FLAT, FUSED, OURS
from benchmarks.report.tables import training_rows

TINY = Workload(
    model=lambda: nn.Linear(4, 3),
    batches=lambda: repeat((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))),
    batch="5 rows",
)


class Counted(Progress):
    """Counts the rounds it is told."""

    def __init__(self) -> None:
        super().__init__(0)
        self.rounds = 0

    def update(self, rounds: int = 1) -> None:
        self.rounds += rounds


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Of a run whose only workload takes next to no time."""
    monkeypatch.setattr(end_to_end, "WORKLOADS", {"tiny": TINY})
    return Counted()


# -- runs ---------------------------------------------------------------------------------------


def test_everybody_is_measured_in_each_round(progress: Counted) -> None:
    (tiny,) = end_to_end.measure_training(7, 60.0, progress)
    assert list(tiny) == [
        *("workload", "parameters", "tensors", "batch", "iteration_seconds", "optimizer_seconds")
    ]
    assert [tiny[key] for key in list(tiny)[:4]] == ["tiny", 15, 2, "5 rows"]
    wholes, parts = tiny["iteration_seconds"], tiny["optimizer_seconds"]
    assert list(wholes) == list(parts) == [DEFAULT, FUSED, OURS, FLAT]
    for name in wholes:
        assert len(wholes[name]) == len(parts[name]) == 7
        assert all(0 < part < whole for part, whole in zip(parts[name], wholes[name], strict=True))
    assert progress.rounds == 7 and gc.isenabled()


def test_few_rounds_are_measured_where_there_is_no_time(progress: Counted) -> None:
    (tiny,) = end_to_end.measure_training(100, 1e-9, progress)
    assert {len(taken) for taken in tiny["iteration_seconds"].values()} == {end_to_end.MIN_ROUNDS}
    assert progress.rounds == 100


def test_each_round_starts_with_another(progress: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[end_to_end.Training] = []
    iterate = end_to_end.Training.iterate

    def noted(self: end_to_end.Training, batch: Any) -> Iteration:
        order.append(self)
        return iterate(self, batch)

    monkeypatch.setattr(end_to_end.Training, "iterate", noted)
    end_to_end.measure_training(5, 60.0, progress)
    assert order[::2] == order[1::2]  # each iteration that counts follows one of the same
    rounds = [order[start : start + 8 : 2] for start in range(0, len(order), 8)]
    assert len(rounds) == end_to_end.WARM_UP + 5
    assert all(len(set(one)) == 4 for one in rounds)
    firsts = [one[0] for one in rounds]
    assert all(len(set(firsts[start : start + 4])) == 4 for start in range(len(firsts) - 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [(FUSED, {"lr": 1e-2}), (OURS, {"lr": 0.0}), (FLAT, {"eps": 1.0})],
)
def test_other_losses_are_refused(
    name: str, options: dict[str, Any], progress: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, usual = IMPLEMENTATIONS[name]
    monkeypatch.setitem(IMPLEMENTATIONS, name, (module, usual | options))
    with pytest.raises(RuntimeError, match=rf"^tiny, {name}: the loss at step \d+ is "):
        end_to_end.measure_training(100, 60.0, progress)
    assert gc.isenabled()


def test_a_loss_that_is_no_number_is_refused() -> None:
    done = {name: Iteration(1.5, 2.0, 1.0) for name in IMPLEMENTATIONS}
    end_to_end.check_losses("tiny", 4, done)
    done[OURS] = Iteration(float("nan"), 2.0, 1.0)
    with pytest.raises(RuntimeError, match="^tiny, fusedopt: the loss at step 4 is nan, but with "):
        end_to_end.check_losses("tiny", 4, done)


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("GPT-0.1M", 97_102, 42),
        ("GPT-1M", 1_031_038, 114),
        ("GPT-10M", 10_744_414, 78),
        ("wide MLP", 8_546_314, 8),
    ],
)
def test_workloads_are_as_large_as_they_say(name: str, parameters: int, tensors: int) -> None:
    pytest.importorskip("sklearn")
    model, batches = WORKLOADS[name].model(), WORKLOADS[name].batches()
    inputs, targets = next(batches)
    described = re.findall(r"\d+", WORKLOADS[name].batch)
    assert [str(size) for size in targets.shape] == described
    with torch.no_grad():
        assert model(inputs).shape[:-1] == targets.shape
    assert len(list(model.parameters())) == tensors
    # The text, and with it the vocabulary, is another one in another version of Python.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)


# -- tables and plots ---------------------------------------------------------------------------

# Invented: seconds of three rounds.
MEASURED: dict[str, Any] = {
    "workload": "invented",
    "parameters": 1_234_567,
    "tensors": 12,
    "batch": "4 rows",
    "iteration_seconds": {
        DEFAULT: [0.010, 0.090, 0.040],
        FUSED: [0.011, 0.020, 0.030],
        OURS: [0.010, 0.010, 0.0256],
        FLAT: [0.012, 0.013, 0.014],
    },
    "optimizer_seconds": {
        DEFAULT: [0.005, 0.009, 0.010],
        FUSED: [0.0011, 0.010, 0.006],
        OURS: [0.001, 0.0005, 0.000256],
        FLAT: [0.002, 0.001, 0.001],
    },
}


def test_cells_of_the_table() -> None:
    head, rows = training_rows([MEASURED])
    assert head == [
        *("workload", "parameters", "tensors"),
        *("torch-default ms", "torch-fused ms", "fusedopt ms", "fusedopt-flat ms"),
        *("optimizer, torch-default", "optimizer, torch-fused", "optimizer, fusedopt"),
        *("fusedopt vs torch-default", "fusedopt vs torch-fused"),
    ]
    # Shares by round: 50, 10, 25 %; 10, 50, 20 %; 10, 5, 1 %. Speed-ups: 1, 9, 1.5625 and
    # 1.1, 2, 1.17, while the medians' quotients would be 4 and 2.
    assert rows == [
        [
            *("invented", "1,234,567", "12", "40", "20", "10", "13"),
            *("25%", "20%", "5%", "1.56x", "1.17x"),
        ]
    ]


def test_what_was_not_measured_is_left_empty() -> None:
    timed = ("iteration_seconds", "optimizer_seconds")
    without = MEASURED | {
        key: {name: taken for name, taken in MEASURED[key].items() if name != FUSED}
        for key in timed
    }
    _, ((*_, fused, _, _, _, share, _, _, speed_up),) = training_rows([without])
    assert (fused, share, speed_up) == ("-", "-", "-")


def test_the_plot_shows_every_workload(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    from matplotlib.figure import Figure

    from benchmarks.report.training_figure import draw_training, draw_workload

    axes = Figure().subplots()
    draw_workload(MEASURED, axes)
    rests, parts = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert parts == pytest.approx([9, 6, 0.5, 1])
    assert rests == pytest.approx([31, 14, 9.5, 12])
    assert [text.get_text() for text in axes.texts][0] == "40 ms, optimizer 9 ms"
    file = tmp_path / "new" / "training.png"
    draw_training([MEASURED, MEASURED], file)
    assert file.read_bytes().startswith(b"\x89PNG")
