"""Codes whose points have equal distances after a function: none, a root, or softsign."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.studies.codes.code import Code, signed_as, with_sign


class Linear(Code):
    """Equal distances: one multiplication, one rounding to an integer."""

    def __init__(self, signed: bool) -> None:
        self.name = "linear"
        self.signed = signed
        self.top = 127 if signed else 255
        self.formula = f"q / {self.top}"
        self.note = "multiply, round to integer; convert, multiply"

    def quantize(self, ratio: Tensor) -> Tensor:
        q = (ratio.abs() * self.top).round()
        return with_sign(q, ratio) if self.signed else q.to(torch.uint8)

    def ratio(self, codes: Tensor) -> Tensor:
        magnitude = (codes & 0x7F if self.signed else codes).float() / self.top
        return signed_as(magnitude, codes) if self.signed else magnitude

    def bound(self, ratio: Tensor) -> Tensor:
        return torch.full_like(ratio, 0.5 / self.top)


class Root(Code):
    """Equal distances of square roots, or of fourth roots.

    Rounding the root of a number to an integer does not find the square nearest to the number: the
    middle between q^2 and (q + 1)^2 is (q + 1/2)^2 + 1/4. So 1/4 is subtracted before the root is
    taken. An update takes the root of ``exp_avg_sq``, so its codes find the nearest root instead:
    square roots are just rounded, and for fourth roots the 1/4 is subtracted from the square root.

    Without zero, byte c is ((c + 1) / 256)^power, and numbers nearer to zero than to the smallest
    code point become the smallest.
    """

    def __init__(self, signed: bool, power: int = 2, zero: bool = True) -> None:
        self.signed, self.power, self.zero = signed, power, zero
        self.levels = 127 if signed else 255 if zero else 256
        self.top = 127 if signed else 255
        self.name = ("square root" if power == 2 else "fourth root") + ("" if zero else ", no zero")
        q = "q" if zero else "(q + 1)"
        self.formula = f"({q} / {self.levels})^{power}"
        roots = "square root" if power == 2 else "two square roots"
        self.note = f"{roots}, multiply-add, round to integer; convert, {power // 2 + 1} multiplies"

    def quantize(self, ratio: Tensor) -> Tensor:
        square = ratio.abs()
        if self.signed or self.power == 4:
            square = square.sqrt() if self.power == 4 else square
            root = (square * self.levels**2 - 0.25).clamp_(min=0).sqrt_()
        else:
            root = square.sqrt() * self.levels
        q = root.round_()
        if not self.zero:
            q = (q - 1).clamp_(min=0)
        return with_sign(q, ratio) if self.signed else q.to(torch.uint8)

    def ratio(self, codes: Tensor) -> Tensor:
        q = (codes & 0x7F if self.signed else codes).float()
        root = (q if self.zero else q + 1) / self.levels
        magnitude = root * root
        if self.power == 4:
            magnitude = magnitude * magnitude
        return signed_as(magnitude, codes) if self.signed else magnitude

    def metric(self, x: Tensor) -> Tensor:
        return x if self.signed else x.sqrt()

    def bound(self, ratio: Tensor) -> Tensor:
        root = ratio.abs().sqrt()
        if self.power == 4:
            distance = root.sqrt() / self.levels + 0.5 / self.levels**2
        elif not self.signed:
            distance = torch.full_like(root, 0.5 / self.levels)
        else:
            return root / self.levels + 0.5 / self.levels**2
        bound = distance * (2 * root + distance)
        return bound if self.zero else bound.clamp(min=self.levels**-self.power)


class Softsign(Code):
    """Equal distances of 2r / (1 + |r|): finer near zero, without a square root."""

    name = "softsign"
    signed = True
    formula = "z / (2 - z) of z = q / 127"
    note = "add, divide, multiply, round to integer; convert, multiply, subtract, divide, multiply"
    top = 127

    def quantize(self, ratio: Tensor) -> Tensor:
        return with_sign((self.metric(ratio.abs()) * 127).round(), ratio)

    def ratio(self, codes: Tensor) -> Tensor:
        z = (codes & 0x7F).float() / 127
        return signed_as(z / (2 - z), codes)

    def metric(self, x: Tensor) -> Tensor:
        return 2 * x / (1 + x.abs())

    def bound(self, ratio: Tensor) -> Tensor:
        """Half the distance of two points of that scale, times the steepest slope within it."""
        z = (self.metric(ratio.abs()) + 0.5 / 127).clamp(max=1)
        return 2 / (2 - z).square() * 0.5 / 127
