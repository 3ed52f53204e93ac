"""Train a small language model on the text of a file, by default this one, and go on later.

    python examples/train_gpt.py --text my.txt --steps 500 --checkpoint gpt.pt

AdamW with clipping and an average of the weights in the same pass, a fused loss without all logits
at once, a schedule; with a checkpoint it resumes where it was, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedopt
import fusedopt.nn.functional as F

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 64, 4, 3, 16
VOCABULARY = 256  # bytes


class GPT(nn.Module):
    """From (batch, time) bytes to what the head makes logits of."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token(tokens) + self.position.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        return self.layers(x, mask=mask, is_causal=True)

    def loss(self, tokens: Tensor) -> Tensor:
        hidden = self(tokens[:, :-1]).flatten(0, 1)
        return F.linear_cross_entropy(hidden, self.head.weight, tokens[:, 1:].flatten())


def main() -> None:
    """Train, and save where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stop", type=int, help="stop before this step, to go on later")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--checkpoint", type=Path, help="read where it exists, written at the end")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.tensor([*options.text.read_bytes()], dtype=torch.long)
    model = GPT().to(device)
    # What is no matrix of a layer does not decay.
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "layers" not in name]
    optimizer = fusedopt.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=options.lr,
        weight_decay=0.1,
        max_grad_norm=1.0,
        ema_decay=0.98,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps)
    begin, end = 0, options.stop or options.steps
    if options.checkpoint is not None and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        begin = saved["step"]

    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)  # the same batches after a break
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])
        loss = model.loss(batch.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == end - 1:
            print(f"step {step}: loss {loss.item():.4f}, gradient norm {optimizer.grad_norm:.3f}")

    if begin >= end:
        return
    with optimizer.swap_ema(), torch.no_grad():
        print(f"averaged weights: loss {model.loss(batch.to(device)).item():.4f}")
    if options.checkpoint is not None:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": end,
            },
            options.checkpoint,
        )


if __name__ == "__main__":
    main()
