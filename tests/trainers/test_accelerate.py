"""Accelerate: prepared, accumulated, clipped, saved and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import fusedopt


def batches(steps: range) -> list[Tensor]:
    return [torch.randn(8, 12, generator=torch.Generator().manual_seed(step)) for step in steps]


class Run:
    def __init__(self, make: Any, microbatches: int = 1, precision: str = "no", **options: Any):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=microbatches, mixed_precision=precision
        )
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 3))
        optimizer = make(model.parameters(), lr=1e-2, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            model, optimizer, schedule
        )

    def train(self, steps: range, clip: float | None = None) -> "Run":
        for batch in batches(steps):
            with self.accelerator.accumulate(self.model):
                loss = self.model(batch).float().square().mean()
                self.accelerator.backward(loss)
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_as_torch_optim(microbatches: int, clip: float | None) -> None:
    ours = Run(fusedopt.AdamW, microbatches).train(range(12), clip).weights()
    theirs = Run(torch.optim.AdamW, microbatches).train(range(12), clip).weights()
    torch.testing.assert_close(ours, theirs)


def test_bfloat16() -> None:
    ours = Run(fusedopt.AdamW, precision="bf16").train(range(6)).weights()
    theirs = Run(torch.optim.AdamW, precision="bf16").train(range(6)).weights()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "min_8bit_size": 1}], ids=str)
def test_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = Run(fusedopt.AdamW, **options).train(range(3))
    whole.accelerator.save_state(str(tmp_path))
    whole.train(range(3, 6))
    wanted = whole.weights()
    resumed = Run(fusedopt.AdamW, **options)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(range(3, 6))
    for got, want in zip(resumed.weights(), wanted, strict=True):
        assert torch.equal(got, want)
