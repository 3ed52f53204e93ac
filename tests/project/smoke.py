"""Smoke test of an installed fusedopt: three optimizers, 20 steps each, against torch.optim.

Run by its path (`python tests/project/smoke.py`), so that the checkout is not on the import path.
"""

from pathlib import Path

import torch

import fusedopt

OPTIMIZERS = [
    ("AdamW", {"lr": 1e-2}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    ("RMSprop", {"lr": 1e-2}),
]


def train(optimizer: type[torch.optim.Optimizer], options: dict[str, float]) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    x, y = torch.randn(16, 8), torch.randn(16, 3)
    steps = optimizer(model.parameters(), **options)
    for _ in range(20):
        steps.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        steps.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main() -> None:
    home, checkout = Path(fusedopt.__file__).parent, Path(__file__).parents[2]
    assert home != checkout / "fusedopt", f"{home} is the checkout, not an installation"
    for name, options in OPTIMIZERS:
        ours = train(getattr(fusedopt, name), options)
        torch.testing.assert_close(ours, train(getattr(torch.optim, name), options))
    print(f"fusedopt in {home}, torch {torch.__version__}: ok")


if __name__ == "__main__":
    main()
