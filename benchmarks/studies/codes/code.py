"""What an 8-bit code of a state is: a byte for each element, and a scale for each block."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.report.case import Json


class Code:
    """A block of numbers as bytes, relative to its largest magnitude.

    A code has to define ``quantize`` and ``ratio``: numbers from -1 to 1 (from 0 to 1 without a
    sign) to bytes and back. Without a sign, a larger byte means a larger number.

    Attributes:
        name: what tables call it.
        signed: whether it is for ``exp_avg``; the others are for ``exp_avg_sq``.
        formula: what a byte means.
        cheap: whether both directions are a few instructions, without a table.
        note: these instructions in words.
    """

    name: str
    signed: bool
    formula: str
    cheap = True
    note: str

    def quantize(self, ratio: Tensor) -> Tensor:
        """The bytes nearest to numbers whose magnitudes are at most 1."""
        raise NotImplementedError

    def ratio(self, codes: Tensor) -> Tensor:
        """What bytes mean, in float32."""
        raise NotImplementedError

    def bound(self, ratio: Tensor) -> Tensor:
        """How far from a number the nearest code point is at most."""
        raise NotImplementedError

    def fresh(self) -> Code:
        """This code as it was before it encoded anything."""
        return self

    def metric(self, x: Tensor) -> Tensor:
        """The scale on which the code point is the nearest one: that of the numbers by default."""
        return x

    def valid(self) -> Tensor:
        """All bytes that have a meaning."""
        codes = torch.arange(256, dtype=torch.uint8)
        magnitudes = codes & 0x7F if self.signed else codes
        return codes[magnitudes.int() <= self.top]

    top = 255  # the byte of the largest number, without its sign

    def encode(self, x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """The bytes of all elements, and the scale of every block of so many of them."""
        rows = in_blocks(x, block)
        scales = rows.abs().amax(dim=1)
        # In a block of zeros, or with an infinity or NaN, the scale alone decides what is decoded.
        ratio = (rows / scales[:, None]).nan_to_num_(nan=0.0)
        return self.quantize(ratio).view(-1)[: x.numel()], scales

    def decode(self, codes: Tensor, scales: Tensor, block: int) -> Tensor:
        """What was encoded, in float32 and one dimension."""
        values = in_blocks(self.ratio(codes), block) * scales[:, None]
        return values.view(-1)[: codes.numel()]

    def describe(self) -> Json:
        """Its row in the results."""
        return {
            "name": self.name,
            "signed": self.signed,
            "formula": self.formula,
            "cheap": self.cheap,
            "note": self.note,
        }


def in_blocks(x: Tensor, block: int) -> Tensor:
    """(elements,) -> (blocks, block), the last one filled with zeros."""
    flat = x.reshape(-1)
    missing = -len(flat) % block
    return (torch.cat([flat, flat.new_zeros(missing)]) if missing else flat).view(-1, block)


def with_sign(codes: Tensor, ratio: Tensor) -> Tensor:
    """Bytes of magnitudes, with the sign in the highest bit."""
    return codes.to(torch.uint8) | (ratio.signbit().to(torch.uint8) << 7)


def signed_as(magnitude: Tensor, codes: Tensor) -> Tensor:
    """Numbers with the signs in the highest bits of their bytes."""
    return torch.where(codes >= 128, -magnitude, magnitude)
