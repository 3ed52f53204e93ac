"""The check on a GPU: its steps, in order, each within its time."""

import io
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import sanitize, smoke


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


def test_nothing_is_tried_after_a_vital_step_that_fails() -> None:
    steps = [
        gpu_check.Step("first", [python("raise SystemExit(1)")], 30, 0, vital=True),
        gpu_check.Step("second", [python("print('not run')")], 30, 0),
    ]
    log = io.StringIO()
    outcomes = gpu_check.Checker(log, time.monotonic() + 600).run(steps)
    assert [outcome.name for outcome in outcomes] == ["first"]
    assert "nothing else is tried, as first failed" in log.getvalue()


def test_what_takes_too_long_says_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 2.0)
    stuck = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    steps = [
        gpu_check.Step("hangs", [python("import time\ntime.sleep(60)")], 3, 0),
        gpu_check.Step("is stuck", [python(stuck)], 3, 0),
    ]
    log, start = io.StringIO(), time.monotonic()
    outcomes = gpu_check.Checker(log, time.monotonic() + 600).run(steps)
    assert all(outcome.verdict == "FAILED: ended after 3 s" for outcome in outcomes)
    assert "KeyboardInterrupt" in log.getvalue()
    assert time.monotonic() - start < 40


def test_the_first_steps(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--device", device]) == 0
    assert "have the CPU's bits" in capsys.readouterr().out


def test_first_steps_that_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step, or a loss, that loses an element is told of, by name."""
    real, real_loss = smoke.step, smoke.loss
    losing = "SGD"

    def step(name: str, options: dict, dtype: torch.dtype, device: str) -> dict:
        found = real(name, options, dtype, "cpu")
        if device == "another" and name == losing:
            found["param of parameter 1"][-1] = 0
        return found

    def loss(shape: tuple[int, int], dtype: torch.dtype, device: str) -> dict:
        found = real_loss(shape, dtype, "cpu")
        if device == "another" and losing == "losses":
            found["gradient of mse_loss"][-1] = 0.5
        return found

    monkeypatch.setattr(smoke, "step", step)
    monkeypatch.setattr(smoke, "loss", loss)
    assert len(list(smoke.differences("another"))) == len(smoke.STORAGE)
    assert all(text.startswith("SGD") for text in smoke.differences("another"))
    losing = "losses"
    assert len(list(smoke.differences("another"))) == 2 * len(smoke.LOGITS)
    assert all("gradient of mse_loss" in text for text in smoke.differences("another"))


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
        *("build", "smoke", "bits", "graphs", "clipping", "sharded"),
        *("memcheck", "initcheck", "synccheck", "racecheck", "benchmark", "table", "busy"),
    ]
    assert [step.name for step in steps if step.vital] == ["build", "smoke"]
    assert steps[2].commands[0][-2:] == ("-k", "adamw") and "cuda" in steps[2].commands[0]
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
