"""Fine-tune a frozen model by low-rank adapters: many small matrices, and little to step.

    python examples/finetune_lora.py --rank 8 --steps 100

The adapters lie in flat buffers, so that a step is one pass over memory, however many there are.
Only they have gradients and states; only they are saved.
"""

import argparse

import torch
from torch import Tensor, nn

import fusedopt

WIDTH, LAYERS, CLASSES, BATCH = 128, 12, 10, 64


class LoRA(nn.Module):
    """A frozen linear layer, and what two thin matrices add to it (Hu et al., 2021)."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.down.T @ self.up.T)


def make_model(rank: int) -> nn.Sequential:
    """A model that was trained before, as it were, with an adapter in each of its layers."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [LoRA(nn.Linear(WIDTH, WIDTH), rank), nn.LayerNorm(WIDTH), nn.GELU()]
    model = nn.Sequential(*layers, LoRA(nn.Linear(WIDTH, CLASSES), rank))
    for module in model:
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    return model


def main() -> None:
    """Train the adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", help="a file for the adapters")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(options.rank).to(device)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    share = sum(p.numel() for p in adapters.values()) / sum(p.numel() for p in model.parameters())
    print(f"{len(adapters)} matrices are trained, {share:.1%} of the parameters")
    optimizer = fusedopt.AdamW(adapters.items(), lr=options.lr, flat=True, max_grad_norm=1.0)

    centres = torch.randn(CLASSES, WIDTH, device=device)
    for step in range(options.steps):
        labels = torch.randint(CLASSES, (BATCH,), device=device)
        inputs = centres[labels] + 0.5 * torch.randn(BATCH, WIDTH, device=device)
        loss = fusedopt.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    if options.output:
        torch.save({name: p.detach() for name, p in adapters.items()}, options.output)


if __name__ == "__main__":
    main()
