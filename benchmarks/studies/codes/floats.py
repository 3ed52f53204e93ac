"""Codes that are small floating-point numbers, made from the bits of a float32."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.studies.codes.code import Code, signed_as, with_sign


class Minifloat(Code):
    """A small floating-point number, with subnormals, whose largest is 1.

    Byte c is number c of the format's numbers in order, from zero on; without zero it is number
    c + 1, and nothing is rounded to zero. It is made from the bits of a float32, rounded to nearest
    even and shifted. Below the smallest normal number, adding a power of two does the rounding.
    """

    def __init__(self, exponent: int, mantissa: int, signed: bool, zero: bool = True) -> None:
        self.signed, self.mantissa, self.first = signed, mantissa, 0 if zero else 1
        self.name = f"minifloat {exponent}+{mantissa}" + ("" if zero else ", no zero")
        self.largest = ((1 << exponent) - (1 if zero else 0)) << mantissa  # the number of 1.0
        self.top = self.largest - self.first
        self.smallest_normal = 1 - (self.largest >> mantissa)  # its exponent
        smallest = self.smallest_normal - mantissa
        self.formula = (
            f"{exponent} bits of exponent, {mantissa} of mantissa, 2^{smallest} the least "
            f"above zero{'' if zero else ', which is left out'}"
        )
        self.note = "8 integer and 2 float operations; 3 and 2"

    def quantize(self, ratio: Tensor) -> Tensor:
        shift = 23 - self.mantissa
        magnitude = ratio.abs()
        bits = magnitude.view(torch.int32)
        rounded = bits + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)
        normal = (rounded >> shift) + (self.largest - (0x3F800000 >> shift))
        # One unit in the last place of this power of two is the distance of subnormal numbers.
        power = torch.tensor(2.0 ** (self.smallest_normal + shift))
        subnormal = (magnitude + power).view(torch.int32) - power.view(torch.int32)
        number = torch.where(magnitude < 2.0**self.smallest_normal, subnormal, normal)
        codes = (number - self.first).clamp_(min=0)
        return with_sign(codes, ratio) if self.signed else codes.to(torch.uint8)

    def ratio(self, codes: Tensor) -> Tensor:
        shift = 23 - self.mantissa
        number = (codes & 0x7F if self.signed else codes).int() + self.first
        normal = ((number << shift) + (0x3F800000 - (self.largest << shift))).view(torch.float32)
        subnormal = number.float() * 2.0 ** (self.smallest_normal - self.mantissa)
        magnitude = torch.where(number < 1 << self.mantissa, subnormal, normal)
        return signed_as(magnitude, codes) if self.signed else magnitude

    def bound(self, ratio: Tensor) -> Tensor:
        smallest = 2.0 ** (self.smallest_normal - self.mantissa)
        bound = ratio.abs() * 2.0 ** -(self.mantissa + 1)
        return bound.clamp(min=smallest if self.first else smallest / 2)


class Tapered(Code):
    """A small floating-point number: the smaller it is, the fewer bits its mantissa has.

    Shifting the bits of a float32 right by 1 or 2 gives nearly its square or fourth root: a curve
    of straight lines, with a bend at each power of two. Code points have equal distances of this
    approximate root: q / 128 with a sign, where q = 127 is the largest number, and (q + 2) / 256
    without. As the bends are code points, except among the smallest, a number divides the distance
    between its two neighbours in the same ratio as its root divides theirs.
    """

    def __init__(self, signed: bool, shift: int) -> None:
        self.signed, self.shift = signed, shift
        self.top = 127 if signed else 254
        self.name = f"tapered {2**shift}" + ("" if signed else ", no zero")
        root = "q / 128" if signed else "(q + 2) / 256"
        self.formula = (
            f"({root})^{2**shift} by shifting a float32's bits, over that of the largest q"
        )
        self.note = (
            "multiply, shift, add, multiply-add, convert; convert, subtract, shift, multiply"
        )
        self.offset = 0x3F800000 - (0x3F800000 >> shift)
        self.largest = self.power(torch.tensor([127 / 128])) if signed else torch.ones(1)
        self.table = self.ratio(torch.arange(self.top + 1, dtype=torch.uint8)).double()

    def quantize(self, ratio: Tensor) -> Tensor:
        root = self.root(ratio)
        if self.signed:
            return with_sign((root * 128 + 0.5).floor(), ratio)
        return (root * 256 - 1.5).floor().clamp_(0, self.top).to(torch.uint8)

    def ratio(self, codes: Tensor) -> Tensor:
        q = (codes & 0x7F if self.signed else codes).float()
        magnitude = self.power(q / 128 if self.signed else (q + 2) / 256) / self.largest
        return signed_as(magnitude, codes) if self.signed else magnitude

    def power(self, root: Tensor) -> Tensor:
        bits = (root.view(torch.int32) - self.offset).clamp_(min=0) << self.shift
        return bits.view(torch.float32)

    def root(self, ratio: Tensor) -> Tensor:
        bits = ((ratio.abs().float() * self.largest).view(torch.int32) >> self.shift) + self.offset
        return bits.view(torch.float32)

    def metric(self, x: Tensor) -> Tensor:
        root = self.root(x)
        return torch.where(x < 0, -root, root)

    def bound(self, ratio: Tensor) -> Tensor:
        """Half a gap; a whole one among the smallest, where bends lie within gaps."""
        table = self.table.to(ratio.dtype)
        above = torch.bucketize(ratio.abs(), table).clamp(1, self.top)
        gap = table[above] - table[above - 1]
        share = torch.where(above < 9, 1.0, 0.5 + 1e-6)
        return torch.maximum(gap * share, table[0] - ratio.abs())
