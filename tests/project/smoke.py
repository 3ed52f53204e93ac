"""Smoke test of an installed fusedopt: all of its modules, and 20 steps against torch.optim each.

Run by its path (`python tests/project/smoke.py`), so that the checkout is not on the import path.
"""

import importlib
import pkgutil
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
    modules = [module.name for module in pkgutil.walk_packages(fusedopt.__path__, "fusedopt.")]
    for module in modules:
        importlib.import_module(module)
    sources = (checkout / "fusedopt").rglob("*.py")
    names = {".".join(path.relative_to(checkout).with_suffix("").parts) for path in sources}
    missing = {name.removesuffix(".__init__") for name in names} - {"fusedopt", *modules}
    assert not missing, f"{home} lacks {', '.join(sorted(missing))}"
    assert (home / "py.typed").exists() and (home / "_C.pyi").exists()
    for name, options in OPTIMIZERS:
        ours = train(getattr(fusedopt, name), options)
        torch.testing.assert_close(ours, train(getattr(torch.optim, name), options))
    print(f"fusedopt in {home}, torch {torch.__version__}: ok")


if __name__ == "__main__":
    main()
