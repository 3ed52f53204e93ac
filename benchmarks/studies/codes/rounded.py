"""A code with another way to round: always up, or dithered so that the mean is right."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.studies.codes.code import Code


class Rounded(Code):
    """A code without a sign that chooses in another way between the two points next to a number.

    ``up`` takes the larger one. ``dithered`` takes the larger one in such a share of the steps that
    the mean is right: in each step, a threshold between 0 and 1 is compared with the number's place
    between the two points. ``dithered roots`` goes by the place of the number's root between their
    roots: the threshold is added before the root is rounded down.

    Thresholds are a low-discrepancy sequence in two dimensions, position and step: the fractional
    parts of multiples of 1/g and 1/g^2, where g^3 = g + 1. A sum of 32-bit integers makes one.
    """

    NOTES = {
        "up": "compare with the neighbours",
        "dithered": "position and step to a threshold, and the place between the neighbours",
        "dithered roots": "position and step to a threshold, which is added",
    }

    def __init__(self, code: Code, how: str) -> None:
        self.code, self.how, self.signed, self.top = code, how, False, code.top
        self.name = f"{code.name}, {how}"
        self.formula = code.formula
        self.note = f"{code.note}; encode: {self.NOTES[how]}"
        self.step = 0

    def fresh(self) -> Code:
        return Rounded(self.code, self.how)

    def thresholds(self, ratio: Tensor) -> Tensor:
        """Numbers from 0 to 1, one for each position, new ones in each call."""
        self.step += 1
        position = torch.arange(ratio.numel(), dtype=torch.int64)
        mixed = position * 0xC13FA9A9 + self.step * 0x91E10DA5
        return (((mixed & 0xFFFFFFFF) >> 8).float() * 2.0**-24).view_as(ratio)

    def quantize(self, ratio: Tensor) -> Tensor:
        if self.how == "dithered roots":
            root = ratio.sqrt().sqrt_() * self.code.levels - (0 if self.code.zero else 1)
            return (root + self.thresholds(ratio)).floor_().clamp_(0, self.top).to(torch.uint8)
        nearest = self.code.quantize(ratio)
        below = (nearest.int() - (self.code.ratio(nearest) > ratio).int()).clamp_(min=0)
        low = self.code.ratio(below.to(torch.uint8))
        above = (below + 1).clamp_(max=self.top)
        if self.how == "up":
            higher = ratio > low
        else:
            high = self.code.ratio(above.to(torch.uint8))
            higher = self.thresholds(ratio) * (high - low) < ratio - low
        return torch.where(higher, above, below).to(torch.uint8)

    def ratio(self, codes: Tensor) -> Tensor:
        return self.code.ratio(codes)

    def bound(self, ratio: Tensor) -> Tensor:
        """The distance of the two points: at most twice the other code's bound at either."""
        bound = self.code.bound(ratio)
        return 2 * torch.maximum(bound, self.code.bound((ratio + 2 * bound).clamp(max=1)))
