"""Stable-Baselines3: the optimizer of a policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import DQN, PPO
from torch import Tensor

import fusedopt

ALGORITHMS: dict[str, Any] = {
    "ppo": (PPO, {"n_steps": 64, "batch_size": 32, "n_epochs": 2}, 128),
    "dqn": (DQN, {"learning_starts": 32, "batch_size": 16, "train_freq": 4}, 128),
}


def trained(algorithm: str, make: Any) -> Any:
    kind, options, steps = ALGORITHMS[algorithm]
    policy = {"optimizer_class": make, "optimizer_kwargs": {"eps": 1e-5, "weight_decay": 0.01}}
    model = kind("MlpPolicy", "CartPole-v1", policy_kwargs=policy, seed=0, device="cpu", **options)
    return model.learn(steps)


def weights_of(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.policy.parameters()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_as_torch_optim(algorithm: str) -> None:
    """Rounding may choose another action, and then all is another; so few steps are taken."""
    ours, theirs = (trained(algorithm, make) for make in (fusedopt.AdamW, torch.optim.AdamW))
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_saved_and_loaded(algorithm: str, tmp_path: Path) -> None:
    model = trained(algorithm, fusedopt.AdamW)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.get_env(), device="cpu")
    optimizers = [m.policy.optimizer for m in (model, loaded)]
    assert type(optimizers[1]) is fusedopt.AdamW
    for model_or_loaded in (model, loaded):
        for number, p in enumerate(model_or_loaded.policy.parameters()):
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        model_or_loaded.policy.optimizer.step()
    for got, want in zip(weights_of(loaded), weights_of(model), strict=True):
        assert torch.equal(got, want)
