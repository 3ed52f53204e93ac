"""python -m fusedopt: it says what is there, and finds what is wrong."""

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

import fusedopt

self_test: Any = importlib.import_module("fusedopt.__main__")


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedopt"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert f"fusedopt {fusedopt.__version__}, built for torch {torch.__version__}" in lines
    assert any(line.startswith(f"CPU: {fusedopt.isa()}, ") for line in lines)
    assert any("AdamW" in line and "losses" in line for line in lines)
    assert any("a step of AdamW" in line and "torch fused" in line for line in lines)
    assert lines[-1] == "All is well."


def test_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that is a little too long, and a loss that is."""
    monkeypatch.setattr(self_test, "SECONDS", 0.0)
    step = fusedopt.SGD.step

    def too_long(self: Any, closure: Any = None) -> None:
        step(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(1.001)

    monkeypatch.setattr(fusedopt.SGD, "step", too_long)
    mse_loss = fusedopt.nn.functional.mse_loss
    monkeypatch.setattr(fusedopt.nn.functional, "mse_loss", lambda *given: 1.001 * mse_loss(*given))
    assert self_test.main([]) == 1
    captured = capsys.readouterr()
    assert "SGD on cpu is not as torch's: " in captured.err
    assert "losses on cpu is not as torch's: " in captured.err
    assert "AdamW on cpu" not in captured.err
    assert captured.out.endswith("please report it with all of this.\n")
