"""What is measured of losses, as data: shapes, and the ways in which a process gets its memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

CROSS_ENTROPY, LINEAR, MSE = "cross_entropy", "linear_cross_entropy", "mse_loss"

# Implementations besides benchmarks.report.case.OURS.
IN_PLACE = "fusedopt, in place"
TORCH, COMPILED = "torch", "torch.compile"
CHUNKED, BEST_CHUNKED = "torch, chunked", "torch, chunked, best"
LIGER, CUT = "liger-kernel", "cut-cross-entropy"
MAY_FAIL = (COMPILED, LIGER, CUT)  # and are left out then
# And what else is timed: what a loss cannot do without.
UPDATE, COPIED, READ_TWO, PRODUCTS = (
    "read-modify-write",
    "copy",
    "read two, write one",
    "three products",
)
FLOORS = (UPDATE, COPIED, READ_TWO, PRODUCTS)

# glibc hands large memory back to the system as soon as it is freed, and gets it anew, a page fault
# for each 4 KB of it. Told to keep it, it has it at once, at the price of what is kept.
FRESH, REUSED, CACHED = "fresh", "reused", "cached"
KEEP = str(1 << 40)
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {
        FRESH: {},
        REUSED: {"MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TRIM_THRESHOLD_": KEEP},
    },
    "cuda": {CACHED: {}},  # torch's allocator keeps what is freed
}


@dataclass(frozen=True)
class Case:
    """A loss of tensors of some size.

    Attributes:
        loss: CROSS_ENTROPY, LINEAR or MSE.
        shape: of the logits, or of what MSE compares.
        dtype: of all but the classes.
        features: of the hidden states that LINEAR makes logits of.
        rounds: at most, where a call takes seconds.
    """

    loss: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    features: int = 0
    rounds: int | None = None

    @property
    def size(self) -> str:
        """The shape in words."""
        if self.loss == MSE:
            return f"{prod(self.shape):,}"
        rows, classes = self.shape
        middle = [self.features] if self.features else []
        return "x".join(map(str, [rows, *middle, classes]))

    @property
    def name(self) -> str:
        """How the command line and the tables call it."""
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{self.loss} {self.size}{dtype}"

    @property
    def bytes(self) -> int:
        """Of the logits, or of one of the two that MSE compares."""
        return prod(self.shape) * self.dtype.itemsize


CASES = {
    case.name: case
    for case in (
        Case(CROSS_ENTROPY, (1024, 50257)),
        Case(CROSS_ENTROPY, (1024, 50257), torch.bfloat16),
        Case(CROSS_ENTROPY, (512, 32000)),
        Case(CROSS_ENTROPY, (4096, 1000)),
        Case(CROSS_ENTROPY, (65536, 10)),
        Case(CROSS_ENTROPY, (8, 10)),
        Case(MSE, (1 << 24,)),
        Case(MSE, (1000,)),
        Case(LINEAR, (1024, 50257), features=768, rounds=5),
    )
}
QUICK = ("cross_entropy 512x32000", "cross_entropy 8x10", "mse_loss 1,000")
