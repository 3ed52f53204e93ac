"""timm: its factory with layer decay, its registry, and its averages of a model.

All of timm needs torchvision, which the CPU build of torch has none for: what optimizers have to
do with is imported by itself.
"""

import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt

NAME = "fusedadamw"


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm.optim, in whose registry ours is; with ModelEmaV3 besides."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    for name in ("timm", "timm.layers", "timm.models", "timm.utils"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [folder + name.removeprefix("timm").replace(".", "/")]

    def lend(to: str, name: str, of: str) -> None:
        setattr(sys.modules[to], name, getattr(importlib.import_module(of), name))

    lend("timm.layers", "use_reentrant_ckpt", "timm.layers.config")
    lend("timm.models", "group_parameters", "timm.models._manipulate")
    found = importlib.import_module("timm.optim")
    lend("timm.optim", "ModelEmaV3", "timm.utils.model_ema")
    registry = importlib.import_module("timm.optim._optim_factory").default_registry
    registry.register(found.OptimInfo(NAME, fusedopt.AdamW, has_betas=True))
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]


class Classifier(nn.Module):
    """With the groups of layers by which timm lets a learning rate decay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            for _ in range(3)
        )
        self.head = nn.Linear(4, 5)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((-2, -1)))


def train(model: nn.Module, optimizer: Any, steps: range, average: Any = None) -> list[Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 1, 6, 6, generator=generator)
        labels = torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if average is not None:
            average.update(model)
    return [p.detach().clone() for p in model.parameters()]


def made(timm: Any, model: nn.Module, name: str, **options: Any) -> Any:
    return timm.create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.05, **options)


def test_layer_decay(timm: Any) -> None:
    """Each layer is a group, with `lr_scale`."""
    optimizers, found = [], []
    for name in (NAME, "adamw"):
        model = Classifier()
        optimizer = made(timm, model, name, layer_decay=0.75, betas=(0.9, 0.95))
        assert len(optimizer.param_groups) > 4
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]  # as timm's schedulers do
        optimizers.append(optimizer)
        found.append(train(model, optimizer, range(10)))
    assert type(optimizers[0]) is fusedopt.AdamW
    torch.testing.assert_close(*found)


def test_without_layer_decay(timm: Any) -> None:
    model, other = Classifier(), Classifier()
    ours, theirs = made(timm, model, NAME), made(timm, other, "adamw")
    torch.testing.assert_close(train(model, ours, range(8)), train(other, theirs, range(8)))


def test_averages_of_a_model(timm: Any) -> None:
    """ModelEmaV3, and the same by ema_decay= in the step."""
    model = Classifier()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, ema_decay=0.9)
    train(model, optimizer, range(1))
    average = timm.ModelEmaV3(model, decay=0.9, foreach=True)
    train(model, optimizer, range(1, 8), average)
    for p, q in zip(optimizer.ema_params(), average.module.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_resumes_bit_for_bit(timm: Any) -> None:
    model = Classifier()
    optimizer = made(timm, model, NAME, layer_decay=0.75)
    train(model, optimizer, range(4))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    wanted = train(model, optimizer, range(4, 8))
    resumed = Classifier()
    again = made(timm, resumed, NAME, layer_decay=0.75)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for got, want in zip(train(resumed, again, range(4, 8)), wanted, strict=True):
        assert torch.equal(got, want)
