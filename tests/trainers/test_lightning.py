"""Lightning: automatic and manual optimisation, mixed precision, clipping, Fabric, resuming."""

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

import fusedopt

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


def batches() -> Any:
    data = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(data, batch_size=4)


class Model(lightning.LightningModule):
    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 3))
        self.make, self.options = make, options

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layers(batch).float().square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters(), lr=1e-2, **self.options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Adversaries(lightning.LightningModule):
    """Two optimizers that take turns, by hand."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 3)
        self.make = make

    def training_step(self, batch: Tensor) -> None:
        first, second = self.optimizers()
        for optimizer, sign in ((first, 1), (second, -1)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * self.second(self.first(batch)).square().mean())
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [self.make(m.parameters(), lr=1e-2) for m in (self.first, self.second)]


def trained(model: Any, folder: Path, resume: Any = None, **arguments: Any) -> list[Tensor]:
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **{"max_epochs": 2, "enable_checkpointing": False} | arguments,
    )  # fmt: skip
    trainer.fit(model, batches(), ckpt_path=resume)
    if arguments.get("enable_checkpointing"):
        trainer.save_checkpoint(folder / "model.ckpt")
    return [p.detach().clone() for p in model.parameters()]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_as_torch_optim(settings: str, tmp_path: Path) -> None:
    ours = trained(Model(fusedopt.AdamW), tmp_path, **SETTINGS[settings])
    theirs = trained(Model(torch.optim.AdamW), tmp_path, **SETTINGS[settings])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision: str, clip: float | None, tmp_path: Path) -> None:
    """With a GradScaler where it is 16 bits of float16, with clipping as well."""

    def run(make: Any) -> list[Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision[0] == "1" else None
        plugin = MixedPrecision(precision, "cpu", scaler)
        return trained(Model(make), tmp_path, plugins=[plugin], gradient_clip_val=clip)

    torch.testing.assert_close(run(fusedopt.AdamW), run(torch.optim.AdamW), rtol=0, atol=2e-3)


def test_manual_optimisation_of_two(tmp_path: Path) -> None:
    ours = trained(Adversaries(fusedopt.AdamW), tmp_path)
    theirs = trained(Adversaries(torch.optim.AdamW), tmp_path)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "min_8bit_size": 1}], ids=str)
def test_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    wanted = trained(Model(fusedopt.AdamW, **options), tmp_path)
    trained(Model(fusedopt.AdamW, **options), tmp_path, max_epochs=1, enable_checkpointing=True)
    resumed = trained(Model(fusedopt.AdamW, **options), tmp_path, resume=tmp_path / "model.ckpt")
    for got, want in zip(resumed, wanted, strict=True):
        assert torch.equal(got, want)


def test_fabric(tmp_path: Path) -> None:
    def run(make: Any, stop: bool = False) -> list[Tensor]:
        fabric = lightning.Fabric(accelerator="cpu", precision="bf16-mixed")
        model = Model(make).layers
        model, optimizer = fabric.setup(model, make(model.parameters(), lr=1e-2))
        for number, batch in enumerate(batches()):
            if stop and number == 3:
                state = {"model": model, "optimizer": optimizer}
                fabric.save(tmp_path / "fabric.ckpt", state)
                for p in model.parameters():
                    torch.nn.init.zeros_(p)
                fabric.load(tmp_path / "fabric.ckpt", state)
            fabric.backward(model(batch).float().square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    ours, again, theirs = run(fusedopt.AdamW), run(fusedopt.AdamW, True), run(torch.optim.AdamW)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
