"""Train with as little memory as there can be: 8 bytes a parameter, or 6 without gradients.

    python examples/low_memory.py --width 1024 --layers 8

bfloat16 weights with exact float32 masters in two bytes more, states of one byte each, and
gradients that are freed in the backward pass. It prints what each of these saves.
"""

import argparse

import torch
from torch import nn

import fusedopt


def main() -> None:
    """Train, and tell what memory that takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--microbatches", type=int, default=1)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers: list[nn.Module] = []
    for _ in range(options.layers):
        layers += [nn.Linear(options.width, options.width), nn.GELU()]
    model = nn.Sequential(*layers).to(device, torch.bfloat16)
    optimizer = fusedopt.AdamW(
        model.named_parameters(), lr=1e-3, master_bits=32, state_dtype="int8"
    )
    release = fusedopt.GradientRelease(optimizer)

    goal = torch.randn(64, options.width, device=device, dtype=torch.bfloat16)
    for step in range(options.steps):
        for number in range(options.microbatches):
            loss = (model(goal) - goal).float().square().mean() / options.microbatches
            if number < options.microbatches - 1:
                with release.accumulate():  # gradients of all but the last one add up
                    loss.backward()
            else:
                loss.backward()  # parameters are stepped in here, and gradients freed
        optimizer.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")

    numel = sum(p.numel() for p in model.parameters())
    report = fusedopt.memory_report(optimizer)
    print(report)
    print(f"{report.total.total / numel:.2f} bytes a parameter; AdamW in float32 has 16")


if __name__ == "__main__":
    main()
