"""Which 8-bit codes suit the states of Adam? ``python -m benchmarks.studies.codes``.

A code stores a block of consecutive elements of a parameter's state as one byte each and one
float32, the block's largest magnitude. Candidates are compared by four questions:

- stored once: how far are a training's float32 states from what is decoded?
- the update of the decoded states: how far is ``m_hat / (sqrt(v_hat) + eps)``?
- stored at every step: with the gradients of a float32 training, how far is a step's update from
  the exact one when the states before it were decoded, and are encoded after it, at every step?
- trained with: how far is the final loss from that of float32 states with the same seed?

The results go to a JSON file, and as Markdown to a file beside it; ``--tables`` only writes the
latter again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.networks import GPT, digits_classifier
from benchmarks.report.case import Json

# What writes the tables, and what the tests need of the codes, does without scikit-learn; so
# benchmarks.models.data and benchmarks.run are imported where they are used.

RESULTS = Path(__file__).parents[1] / "results" / "codes.json"
BLOCKS = (128, 256)
FLOAT32 = "float32"
NUDGED = "float32, weights moved by one rounding"

SMALLEST = 4096  # elements of a parameter whose states are encoded
BETAS, EPS = (0.9, 0.999), 1e-8
CONTEXT, TEXT_BATCH, IMAGE_BATCH = 64, 8, 64
WIDTH, HEADS, GPT_BLOCKS = 64, 4, 2
RATES = {"GPT": 2e-3, "digits": 2e-3}
DECAYS = {"GPT": 0.1, "digits": 1e-2}
SNAPSHOTS = (10, 50, 150, 300)  # the steps after which states are looked at
STEPS = {"GPT": 240, "digits": 300}  # of the trainings
SEEDS = 5
LAST = 20  # training losses whose mean is that of the end of a training
CHOSEN = 3  # pairs that are trained with because of their errors


# -- codes --------------------------------------------------------------------------------------


class Code:
    """A block of numbers as bytes, relative to its largest magnitude.

    ``quantize`` and ``ratio`` are all that a code has to define: bytes from numbers between -1 and
    1, or 0 and 1, and back. Bytes of a code that is not signed are in the order of what they mean.

    Attributes:
        name: for people, short.
        signed: whether it is for ``exp_avg``; the others are for ``exp_avg_sq``.
        formula: what a byte means.
        cheap: whether both directions are a few instructions, without a table.
        note: what they are.
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
        """How far from a number the nearest code point can be."""
        raise NotImplementedError

    def fresh(self) -> Code:
        """This code, as it is before anything was encoded."""
        return self

    def metric(self, x: Tensor) -> Tensor:
        """What the nearest code point is nearest by: the numbers themselves, unless overridden."""
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
        # Nothing but zeros, infinity and NaN: the scale alone decides what is decoded.
        ratio = (rows / scales[:, None]).nan_to_num_(nan=0.0)
        return self.quantize(ratio).view(-1)[: x.numel()], scales

    def decode(self, codes: Tensor, scales: Tensor, block: int) -> Tensor:
        """What was encoded, in float32 and one dimension."""
        values = in_blocks(self.ratio(codes), block) * scales[:, None]
        return values.view(-1)[: codes.numel()]

    def describe(self) -> Json:
        """What the tables say of it."""
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
    """Magnitudes as bytes, the sign in the highest bit."""
    return codes.to(torch.uint8) | (ratio.signbit().to(torch.uint8) << 7)


def signed_as(magnitude: Tensor, codes: Tensor) -> Tensor:
    """Numbers with the signs in the highest bits of their bytes."""
    return torch.where(codes >= 128, -magnitude, magnitude)


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

    Rounding a root to the nearest integer does not find the nearest square: between q and q + 1, a
    square's middle is that of q^2 and q^2 + 2q + 1, which is a quarter more than (q + 1/2)^2. So a
    quarter is subtracted first. ``exp_avg_sq`` is used by its root, so there the nearest root is
    looked for: plain rounding for square roots, the quarter for fourth roots.

    Without zero, byte c is ((c + 1) / 256)^power, and what is nearer to zero than to the smallest
    becomes the smallest.
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
    """Equal distances of 2r / (1 + |r|): finer near zero, and no square root."""

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
        """Half a distance of the companded numbers, times the steepest slope within it."""
        z = (self.metric(ratio.abs()) + 0.5 / 127).clamp(max=1)
        return 2 / (2 - z).square() * 0.5 / 127


class Minifloat(Code):
    """A small floating-point number, with subnormals, whose largest is 1.

    Byte c is number c of the format's numbers in order, from zero on; without zero it is number
    c + 1, and nothing is rounded to zero. It is made from the bits of a float32: rounded to nearest
    even and shifted; below the smallest normal number, a sum with a power of two does the rounding.
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
        # One ulp of this power of two is the distance of the subnormal numbers.
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
    """A small floating-point number whose mantissa has the fewer bits, the smaller it is.

    The bits of a float32, divided by 2 or 4, are those of a number that is not far from its square
    or fourth root, and runs along a straight line between two powers of two. Of these roots,
    distances are equal: q / 128 with a sign, where 127 / 128 is that of the largest number, and
    (q + 2) / 256 without. Powers of two are code points, as far as these go, so that between two
    neighbours a number has its place as its root has.
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
        """Half a gap, or a whole one among the smallest, between which powers of two lie."""
        table = self.table.to(ratio.dtype)
        above = torch.bucketize(ratio.abs(), table).clamp(1, self.top)
        gap = table[above] - table[above - 1]
        share = torch.where(above < 9, 1.0, 0.5 + 1e-6)
        return torch.maximum(gap * share, table[0] - ratio.abs())


class Dynamic(Code):
    """The dynamic map (Dettmers et al., 2022, arXiv:2110.02861), as bitsandbytes has it.

    Seven decades, the smaller the fewer numbers: decade i has 2^i of them (twice as many without a
    sign), the middles of equal parts of 0.1 to 1, times 10^(i - 6). Besides there are 0 and 1, but
    not -1: a block whose largest magnitude is negative does not get it back.
    """

    cheap = False
    note = "a search among 255 boundaries; a table of 256 floats"

    def __init__(self, signed: bool) -> None:
        self.name = "dynamic map"
        self.signed = signed
        self.formula = "seven decades, 2^i numbers in decade i" + (" and sign" if signed else "")
        points = [0.0, 1.0]
        for decade in range(7):
            parts = 2 ** (decade if signed else decade + 1)
            middles = [0.1 + 0.9 * (part + 0.5) / parts for part in range(parts)]
            magnitudes = [10.0 ** (decade - 6) * middle for middle in middles]
            points += magnitudes + ([-magnitude for magnitude in magnitudes] if signed else [])
        table = torch.tensor(sorted(points), dtype=torch.float64)
        self.table = table.float()
        self.boundaries = ((table[1:] + table[:-1]) / 2).float()
        self.gaps = table.diff()

    def valid(self) -> Tensor:
        return torch.arange(256, dtype=torch.uint8)

    def quantize(self, ratio: Tensor) -> Tensor:
        return torch.bucketize(ratio, self.boundaries, out_int32=True).to(torch.uint8)

    def ratio(self, codes: Tensor) -> Tensor:
        return self.table[codes.int()]

    def bound(self, ratio: Tensor) -> Tensor:
        gap = torch.bucketize(ratio.float(), self.table).clamp(1, 255) - 1
        beyond = (self.table[0].double() - ratio).clamp(min=0)
        return torch.maximum(self.gaps[gap].to(ratio.dtype) / 2, beyond)


class Rounded(Code):
    """Another code without a sign, but for the choice between the two code points around a number.

    ``up`` takes the larger one. ``dithered`` takes the larger one in as many of all steps as make
    the mean right: in each, a threshold between 0 and 1 is compared with the number's place between
    the two code points. ``dithered roots`` goes by the place of its root between theirs, for which
    the threshold is only added before the root is rounded down.

    Thresholds are a sequence in two dimensions with low discrepancy, of position and step: the
    fractional parts of multiples of 1/g and 1/g^2, g^3 = g + 1. A sum of 32-bit integers makes one.
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
        """From 0 to 1, for all positions; others in each call."""
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
        """Less than the distance of the neighbours, which is at most twice the bound at either."""
        bound = self.code.bound(ratio)
        return 2 * torch.maximum(bound, self.code.bound((ratio + 2 * bound).clamp(max=1)))


SIGNED = (
    Linear(signed=True),
    Root(signed=True),
    Softsign(),
    Minifloat(3, 4, signed=True),
    Minifloat(4, 3, signed=True),
    Tapered(signed=True, shift=1),
    Tapered(signed=True, shift=2),
    Dynamic(signed=True),
)
UNSIGNED = (
    Linear(signed=False),
    Root(signed=False),
    Root(signed=False, zero=False),
    Root(signed=False, power=4),
    Root(signed=False, power=4, zero=False),
    Minifloat(4, 4, signed=False),
    Minifloat(4, 4, signed=False, zero=False),
    Minifloat(5, 3, signed=False),
    Minifloat(5, 3, signed=False, zero=False),
    Rounded(Root(signed=False, power=4), "up"),
    Rounded(Root(signed=False, zero=False), "dithered"),
    Rounded(Root(signed=False, power=4, zero=False), "dithered"),
    Rounded(Root(signed=False, power=4, zero=False), "dithered roots"),
    Rounded(Minifloat(4, 4, signed=False, zero=False), "dithered"),
    Tapered(signed=False, shift=2),
    Rounded(Tapered(signed=False, shift=2), "dithered"),
    Dynamic(signed=False),
)
DYNAMIC = "dynamic map"
# Trained with, whatever their errors: codes of m and of v.
ALSO = (
    ("tapered 4", "tapered 4, no zero, dithered"),
    ("square root", "fourth root, no zero"),
    ("square root", "minifloat 4+4, no zero"),
    ("square root", "minifloat 5+3"),
    ("square root", "square root, no zero"),
    ("square root", "square root"),
    (DYNAMIC, DYNAMIC),
    ("linear", "linear"),
)


def named(codes: tuple[Code, ...], name: str) -> Code:
    """The code of that name."""
    return next(code for code in codes if code.name == name)


# -- training -----------------------------------------------------------------------------------


class Flat:
    """Tensors behind one another in one buffer, each from a multiple of the largest block on.

    So no block spans two tensors. What lies between them is zero and stays zero.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.gaps = [-tensor.numel() % max(BLOCKS) for tensor in tensors]
        self.sizes = [t.numel() + gap for t, gap in zip(tensors, self.gaps, strict=True)]
        self.used = self.gather([torch.ones_like(tensor) for tensor in tensors]) != 0

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """Tensors of these shapes in a new buffer."""
        parts = []
        for tensor, gap in zip(tensors, self.gaps, strict=True):
            parts += [tensor.reshape(-1), tensor.new_zeros(gap)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def scatter(self, buffer: Tensor) -> list[Tensor]:
        """The tensors that lie in a buffer."""
        parts = buffer.split(self.sizes) if self.sizes else ()
        return [
            part[: tensor.numel()].view_as(tensor)
            for part, tensor in zip(parts, self.tensors, strict=True)
        ]


class Moments:
    """Adam's two moving averages of a buffer, encoded after every step where there are codes.

    An update is made of the averages before they are encoded, as a step in one pass has them.
    """

    def __init__(self, size: int, codes: tuple[Code | None, Code | None], block: int) -> None:
        self.codes = [code and code.fresh() for code in codes]
        self.block, self.steps = block, 0
        self.stored: list[Any] = [self.store(code, torch.zeros(size)) for code in self.codes]

    def store(self, code: Code | None, values: Tensor) -> Any:
        return values if code is None else code.encode(values, self.block)

    def load(self, code: Code | None, stored: Any) -> Tensor:
        return stored if code is None else code.decode(*stored, self.block)

    def step(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Both averages with one more gradient."""
        self.steps += 1
        m, v = (self.load(*pair) for pair in zip(self.codes, self.stored, strict=True))
        m = m + (1 - BETAS[0]) * (gradient - m)
        v = v + (1 - BETAS[1]) * (gradient * gradient - v)
        self.stored = [self.store(*pair) for pair in zip(self.codes, (m, v), strict=True)]
        return m, v


def update_of(m: Tensor, v: Tensor, steps: int) -> Tensor:
    """What Adam subtracts, before the learning rate."""
    m_hat = m / (1 - BETAS[0] ** steps)
    v_hat = v / (1 - BETAS[1] ** steps)
    return m_hat / (v_hat.sqrt() + EPS)


class AdamW:
    """AdamW whose states of large parameters are encoded; biases and norms are not decayed."""

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float,
        codes: tuple[Code | None, Code | None] = (None, None),
        block: int = 256,
    ) -> None:
        self.weight_decay = weight_decay
        parameters = list(model.parameters())
        large = Flat([p for p in parameters if p.numel() >= SMALLEST])
        small = Flat([p for p in parameters if p.numel() < SMALLEST])
        self.parts = [
            (large, Moments(sum(large.sizes), codes, block)),
            (small, Moments(sum(small.sizes), (None, None), block)),
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update all parameters by their gradients."""
        for flat, moments in self.parts:
            m, v = moments.step(gradients(flat))
            updates = flat.scatter(update_of(m, v, moments.steps))
            for parameter, update in zip(flat.tensors, updates, strict=True):
                if parameter.dim() > 1:
                    parameter.mul_(1 - rate * self.weight_decay)
                parameter.sub_(update, alpha=rate)
                parameter.grad = None


def gradients(flat: Flat) -> Tensor:
    """Of all parameters, in a buffer."""
    return flat.gather([p.grad for p in flat.tensors if p.grad is not None])


@dataclass
class Work:
    """A model before training, its endless batches, and a batch that it has not seen."""

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    unseen: tuple[Tensor, Tensor]


def work(task: str, seed: int) -> Work:
    """A new one, the same for the same seed."""
    from benchmarks.models.data import image_batches, load_digits, load_text, text_batches

    if task == "digits":
        train, test = load_digits(seed)
        torch.manual_seed(seed)
        return Work(digits_classifier(), image_batches(train, IMAGE_BATCH, seed), test)
    text = load_text()
    unseen = next(text_batches(text.validation, 128, CONTEXT, seed))
    torch.manual_seed(seed)
    model = GPT(len(text.vocabulary), CONTEXT, WIDTH, HEADS, GPT_BLOCKS)
    return Work(model, text_batches(text.train, TEXT_BATCH, CONTEXT, seed), unseen)


def rate_at(task: str, step: int, steps: int) -> float:
    """A cosine from the task's learning rate to zero."""
    return RATES[task] * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    task: str,
    seed: int,
    steps: int,
    codes: tuple[Code | None, Code | None],
    block: int,
    nudge: bool,
) -> Json:
    """Losses of one training: the mean of the last ones, and that of data it has not seen."""
    from benchmarks.demo.tasks import cross_entropy
    from benchmarks.demo.training import nudge as move

    one = work(task, seed)
    if nudge:
        move(one.model)
    optimizer = AdamW(one.model, DECAYS[task], codes, block)
    losses = []
    for step, batch in enumerate(islice(one.batches, steps)):
        loss = cross_entropy(one.model, batch)
        loss.backward()
        optimizer.step(rate_at(task, step, steps))
        losses.append(loss.item())
    with torch.no_grad():
        unseen = cross_entropy(one.model, one.unseen).item()
    return {"train": fmean(losses[-LAST:]), "unseen": unseen}


def train_all(
    pairs: list[tuple[str, str, int]],
    seeds: int,
    steps: dict[str, int],
    known: dict[tuple[Any, ...], Json],
) -> list[Json]:
    """Trainings with float32 states, with every (m's code, v's code, block), and nudged ones.

    Those that are known already are not done again.
    """
    rows = []
    for task in RATES:
        for m, v, block in [(FLOAT32, FLOAT32, 0), (NUDGED, FLOAT32, 0), *pairs]:
            if (task, m, v, block) in known:
                rows.append(known[task, m, v, block])
                continue
            start = time.perf_counter()
            codes = (named(SIGNED, m), named(UNSIGNED, v)) if block else (None, None)
            done = [
                train(task, seed, steps[task], codes, block or max(BLOCKS), m == NUDGED)
                for seed in range(seeds)
            ]
            losses = {key: [one[key] for one in done] for key in done[0]}
            rows.append({"task": task, "m": m, "v": v, "block": block, "losses": losses})
            note(f"{task}: {m} / {v}, {block}", start, f"{fmean(losses['unseen']):.4f}")
    return rows


# -- errors -------------------------------------------------------------------------------------


def errors_of(x: Tensor, decoded: Tensor) -> Json:
    """Relative errors of numbers that are not zero, and the share of them that became zero.

    The drift is the median of the errors with their signs.
    """
    kept = x != 0
    x, decoded = x[kept], decoded[kept]
    signed = (decoded - x).double() / x.double()
    median, p99 = signed.abs().quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {
        "median": short(median),
        "p99": short(p99),
        "drift": short(signed.median().item()),
        "zeroed": short((decoded == 0).double().mean().item()),
    }


def errors_of_update(u: Tensor, exact: Tensor) -> Json:
    """The error's norm over the update's; its 99th percentile over the update's RMS."""
    difference = (u - exact).double()
    exact = exact.double()
    p99 = difference.abs().kthvalue(math.ceil(0.99 * len(exact))).values
    return {
        "norm": short((difference.norm() / exact.norm()).item()),
        "p99": short((p99 / exact.square().mean().sqrt()).item()),
    }


def short(value: float) -> float:
    """Six digits, for a smaller file."""
    return float(f"{value:.6g}")


def observe(task: str, snapshots: tuple[int, ...], rows: list[Json]) -> None:
    """Train with float32 states, and add what every code makes of them at every snapshot.

    Beside the training, every code stores its own moving average of the same gradients.
    """
    from benchmarks.demo.tasks import cross_entropy

    start = time.perf_counter()
    one, steps = work(task, 0), max(snapshots)
    optimizer = AdamW(one.model, DECAYS[task])
    flat, exact = optimizer.parts[0]
    size = sum(flat.sizes)
    followers = [
        (code, block, Moments(size, (code, None) if code.signed else (None, code), block))
        for code in SIGNED + UNSIGNED
        for block in BLOCKS
    ]
    for step, batch in enumerate(islice(one.batches, steps), 1):
        cross_entropy(one.model, batch).backward()
        with torch.no_grad():
            gradient = gradients(flat)
            followed = {
                (code.signed, code.name, block): moments.step(gradient)[0 if code.signed else 1]
                for code, block, moments in followers
            }
        optimizer.step(rate_at(task, step - 1, steps))
        if step in snapshots:
            snapshot(task, step, flat.used, exact.stored, followed, rows)
    note(f"{task}: states of {int(flat.used.sum()):,} elements", start, "")


def snapshot(
    task: str,
    step: int,
    used: Tensor,
    exact: list[Tensor],
    followed: dict[tuple[bool, str, int], Tensor],
    rows: list[Json],
) -> None:
    """Add the errors of all codes and of all pairs of them."""
    u = update_of(*(state[used] for state in exact), step)
    for block in BLOCKS:
        once: dict[tuple[bool, str], Tensor] = {}
        for code in SIGNED + UNSIGNED:
            state = exact[0] if code.signed else exact[1]
            decoded = code.decode(*code.encode(state, block), block)
            once[code.signed, code.name] = decoded[used]
            rows.append(
                {
                    "task": task,
                    "step": step,
                    "block": block,
                    "state": "exp_avg" if code.signed else "exp_avg_sq",
                    "code": code.name,
                    **errors_of(state[used], decoded[used]),
                    "followed": errors_of(
                        state[used], followed[code.signed, code.name, block][used]
                    ),
                }
            )
        for m in SIGNED:
            for v in UNSIGNED:
                stored_once = update_of(once[True, m.name], once[False, v.name], step)
                stored_always = update_of(
                    followed[True, m.name, block][used], followed[False, v.name, block][used], step
                )
                rows.append(
                    {
                        "task": task,
                        "step": step,
                        "block": block,
                        "m": m.name,
                        "v": v.name,
                        "once": errors_of_update(stored_once, u),
                        "always": errors_of_update(stored_always, u),
                    }
                )


def folded(rows: list[Json]) -> list[Json]:
    """One row for what has one at every step: errors become lists."""
    found: dict[tuple[Any, ...], Json] = {}
    for row in rows:
        of_what = {key: value for key, value in row.items() if isinstance(value, str | int)}
        of_what.pop("step")
        errors = {key: value for key, value in row.items() if isinstance(value, float | dict)}
        append(found.setdefault(tuple(of_what.items()), of_what), errors)
    return list(found.values())


def append(to: Json, errors: Json) -> None:
    """Numbers to the lists of the same names."""
    for key, value in errors.items():
        if isinstance(value, dict):
            append(to.setdefault(key, {}), value)
        else:
            to.setdefault(key, []).append(value)


def score(
    results: Json, m: str, v: str, block: int, kind: str = "always", of: str = "norm"
) -> float:
    """The error of a pair's updates: the geometric mean over tasks and snapshots."""
    return geometric_mean(
        error
        for row in results["errors"]
        if row["block"] == block and (row.get("m"), row.get("v")) == (m, v)
        for error in row[kind][of]
    )


def choose(results: Json, block: int = 256) -> list[tuple[str, str, int]]:
    """The pairs to train with.

    For each family of cheap codes of v, the pair with the smallest error of the updates when
    states are stored at every step; the best of these pairs, and those in ``ALSO``.
    """
    cheap: dict[bool, list[str]] = {True: [], False: []}
    for code in results["codes"]:
        if code["cheap"]:
            cheap[code["signed"]].append(code["name"])
    best: dict[str, tuple[float, str, str]] = {}
    for v in cheap[False]:
        found = min((score(results, m, v, block), m, v) for m in cheap[True])
        family = v.replace(", no zero", "")
        best[family] = min(found, best.get(family, found))
    pairs = [(m, v, block) for _, m, v in sorted(best.values())[:CHOSEN]]
    return list(dict.fromkeys([*pairs, *((m, v, block) for m, v in ALSO)]))


# -- tables -------------------------------------------------------------------------------------


def markdown(results: Json) -> str:
    """All tables, and the best code by every criterion."""
    from benchmarks.report.__main__ import table

    source, settings = results["provenance"], results["settings"]
    commit = f"commit {source['commit'][:10]}" if source["commit"] else "no commit"
    dirty = " with changes" if source["commit"] and source["dirty"] else ""
    parts = [
        "# 8-bit codes for Adam's states\n\n"
        f"{source['processor']}, torch {source['torch']}, Python {source['python']}, "
        f"{source['date'][:10]}, {commit}{dirty}. By `python -m benchmarks.studies.codes`.\n\n"
        "A code stores a block of a state as one byte per element and the block's largest "
        "magnitude; `q` is a\nbyte without its sign, and what it means is a multiple of that "
        "magnitude. `exp_avg` is m, `exp_avg_sq` is v.\n\n",
        table(
            ("of", "code", "a byte means", "table-free", "encode; decode"),
            (
                [
                    "m" if code["signed"] else "v",
                    code["name"],
                    code["formula"],
                    "yes" if code["cheap"] else "no",
                    code["note"],
                ]
                for code in results["codes"]
            ),
            left=5,
        ),
        f"\n## Errors of states\n\nStates of trainings with float32 states ({sizes(results)} "
        f"elements; steps {', '.join(map(str, settings['snapshots']))}; the mean over\nthe steps), "
        "stored once: `|x - decoded| / |x|` over all x that are not zero, and the share of these "
        "that\nare decoded as zero. `always`: the 99th percentile when a state is stored at every "
        "step, with the\nsame gradients, before it is encoded; `drift`: the median of these errors "
        "with their signs.\n\n",
        table(
            (
                *("of", "code", "block"),
                *(f"{task}: {what}" for task in RATES for what in ERROR_COLUMNS),
            ),
            error_rows(results),
            left=2,
        ),
        "\n## Errors of updates\n\n`|u - u_exact| / |u_exact|` of `u = m_hat / (sqrt(v_hat) + "
        "eps)`, a geometric mean over tasks and steps. The\nfirst number: states stored at every "
        "step, decoded before a step and used before they are encoded\nafter it. The second: "
        "decoded states, stored once.\n",
    ]
    for block in BLOCKS:
        parts += [f"\nBlocks of {block}:\n\n", update_table(results, block)]
    parts += [
        f"\n## Trainings\n\nAdamW, betas {settings['betas']}, cosine learning rates, "
        f"{settings['seeds']} seeds, steps: "
        + ", ".join(f"{task} {steps}" for task, steps in settings["steps"].items())
        + earlier(results)
        + f". Parameters of fewer than {SMALLEST:,} elements keep\nfloat32 states. Losses at the "
        f"end: `train` is the mean of the last {LAST}, `unseen` that of data not trained on; "
        "mean\nand standard deviation over the seeds. `difference`: from float32 states with the "
        "same seed, mean and\nits standard error. The row with moved weights shows what rounding "
        "alone makes of a training.\n\n",
        table(
            (
                *("task", "m", "v", "block"),
                *("unseen", "difference", "train", "difference"),
            ),
            training_rows(results),
            left=3,
        ),
        "\n## Conclusions\n\n",
        *(f"- {line}\n" for line in conclusions(results)),
    ]
    return "".join(parts)


ERROR_COLUMNS = ("median", "p99", "zeroed", "always", "drift")


def earlier(results: Json) -> str:
    """When those trainings were made that were not made again."""
    dates = sorted({source["date"] for source in results.get("earlier", ())})
    return f"; some from earlier runs ({', '.join(dates)})" if dates else ""


# What is measured of states that are stored at every step.
FOLLOWED = {"always": "p99", "drift": "drift"}


def sizes(results: Json) -> str:
    """Elements of the encoded states, by task."""
    return ", ".join(f"{task} {count:,}" for task, count in results["settings"]["elements"].items())


def error_of(results: Json, task: str, signed: bool, code: str, block: int, of: str) -> float:
    """The mean over the snapshots of a code's error."""
    state = "exp_avg" if signed else "exp_avg_sq"
    row = next(
        row
        for row in results["errors"]
        if (row["task"], row["block"], row.get("state"), row.get("code"))
        == (task, block, state, code)
    )
    return fmean(row["followed"][FOLLOWED[of]] if of in FOLLOWED else row[of])


def error_rows(results: Json) -> list[list[str]]:
    return [
        [
            "m" if code["signed"] else "v",
            code["name"],
            str(block),
            *(
                percent(error_of(results, task, code["signed"], code["name"], block, of))
                for task in RATES
                for of in ERROR_COLUMNS
            ),
        ]
        for code in results["codes"]
        for block in BLOCKS
    ]


def percent(share: float) -> str:
    """With three digits; 0% only for zero."""
    return "0%" if share == 0 else f"{100 * share:.3g}%" if abs(share) < 10 else f"{share:.2g}x"


def names_of(results: Json, signed: bool) -> list[str]:
    return [code["name"] for code in results["codes"] if code["signed"] == signed]


def update_table(results: Json, block: int) -> str:
    """Rows are codes of v, columns codes of m."""
    from benchmarks.report.__main__ import table

    of_m = names_of(results, True)
    return table(
        ("v \\ m", *of_m),
        (
            [v]
            + [
                f"{percent(score(results, m, v, block))}, "
                f"{percent(score(results, m, v, block, 'once'))}"
                for m in of_m
            ]
            for v in names_of(results, False)
        ),
        left=1,
    )


def differences(results: Json, row: Json, key: str) -> list[float]:
    """A training's losses minus those with float32 states, by seed."""
    exact = next(
        one for one in results["training"] if one["task"] == row["task"] and one["m"] == FLOAT32
    )
    return [a - b for a, b in zip(row["losses"][key], exact["losses"][key], strict=True)]


def standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def training_rows(results: Json) -> list[list[str]]:
    rows = []
    for row in results["training"]:
        cells = []
        for key in ("unseen", "train"):
            losses = row["losses"][key]
            spread = stdev(losses) if len(losses) > 1 else math.nan
            apart = differences(results, row, key)
            cells += [
                f"{fmean(losses):.4f} ± {spread:.4f}",
                "" if row["m"] == FLOAT32 else f"{fmean(apart):+.5f} ± {standard_error(apart):.5f}",
            ]
        block = str(row["block"] or "-")
        rows.append([row["task"], row["m"], "" if row["m"] == NUDGED else row["v"], block, *cells])
    return rows


def conclusions(results: Json) -> list[str]:
    """The best code by every criterion, and how the dynamic map does."""
    lines = []
    for signed, state in ((True, "m"), (False, "v")):
        cheap = [c["name"] for c in results["codes"] if c["signed"] == signed and c["cheap"]]
        for of, what in (
            ("median", "median error, stored once"),
            ("p99", "99th percentile of the error, stored once"),
            ("always", "99th percentile of the error, stored at every step"),
            ("drift", "drift, stored at every step"),
        ):
            for block in BLOCKS:
                found = {
                    name: geometric_mean(
                        max(abs(error_of(results, task, signed, name, block, of)), 1e-12)
                        for task in RATES
                    )
                    for name in [*cheap, DYNAMIC]
                }
                best = min(cheap, key=lambda name: found[name])
                lines.append(
                    f"{state}, {what}, blocks of {block}: `{best}`, {percent(found[best])} "
                    f"(dynamic map {percent(found[DYNAMIC])})."
                )
    of_m, of_v = (
        [c["name"] for c in results["codes"] if c["cheap"] and c["signed"] == s]
        for s in (True, False)
    )
    for kind, how in (("once", "stored once"), ("always", "stored at every step")):
        for of, what in (("norm", "norm"), ("p99", "99th percentile over RMS")):
            for block in BLOCKS:
                error, m, v = min(
                    (score(results, m, v, block, kind, of), m, v) for m in of_m for v in of_v
                )
                dynamic = score(results, DYNAMIC, DYNAMIC, block, kind, of)
                lines.append(
                    f"Update, {what} of the error, {how}, blocks of {block}: m `{m}`, v `{v}`, "
                    f"{percent(error)} (dynamic map {percent(dynamic)})."
                )
    for task in RATES:
        rows = [r for r in results["training"] if r["task"] == task and r["block"]]
        nudged = next(r for r in results["training"] if r["task"] == task and r["m"] == NUDGED)
        apart = {
            f"m `{r['m']}`, v `{r['v']}`, blocks of {r['block']}": differences(results, r, "unseen")
            for r in rows
        }
        nearest = min(apart, key=lambda name: abs(fmean(apart[name])))
        farthest = max(apart, key=lambda name: abs(fmean(apart[name])))
        floor = standard_error(differences(results, nudged, "unseen"))
        lines += [
            f"{task}, loss nearest to float32's: {nearest}, {fmean(apart[nearest]):+.5f} ± "
            f"{standard_error(apart[nearest]):.5f}; farthest: {farthest}, "
            f"{fmean(apart[farthest]):+.5f} ± {standard_error(apart[farthest]):.5f}; rounding "
            f"alone: ± {floor:.5f}.",
        ]
    return lines


# -- the script ---------------------------------------------------------------------------------


def note(what: str, start: float, result: str) -> None:
    """One line about what was done."""
    print(f"{what}  {result}  {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def elements(task: str) -> int:
    """Of parameters whose states are encoded."""
    return sum(p.numel() for p in work(task, 0).model.parameters() if p.numel() >= SMALLEST)


def known_trainings(results: Json, wanted: Json) -> dict[tuple[Any, ...], Json]:
    """Trainings of an earlier run with the same settings and codes, by what was trained."""
    if results["settings"] != wanted["settings"]:
        return {}
    same = {(c["signed"], c["name"]) for c in results["codes"] if c in wanted["codes"]}
    same |= {(signed, name) for signed in (True, False) for name in (FLOAT32, NUDGED)}
    return {
        (row["task"], row["m"], row["v"], row["block"]): row
        for row in results["training"]
        if {(True, row["m"]), (False, row["v"])} <= same
    }


def study(options: argparse.Namespace) -> Json:
    """Measure everything."""
    from benchmarks.run import provenance

    snapshots = tuple(step for step in SNAPSHOTS if step <= options.steps)
    steps = {task: min(most, options.steps) for task, most in STEPS.items()}
    results: Json = {
        "provenance": provenance(torch.device("cpu"), []),
        "settings": {
            "betas": list(BETAS),
            "eps": EPS,
            "learning_rates": RATES,
            "weight_decays": DECAYS,
            "smallest_encoded_parameter": SMALLEST,
            "gpt": {"width": WIDTH, "heads": HEADS, "blocks": GPT_BLOCKS, "context": CONTEXT},
            "batches": {"GPT": TEXT_BATCH, "digits": IMAGE_BATCH},
            "elements": {task: elements(task) for task in RATES},
            "snapshots": list(snapshots),
            "steps": steps,
            "seeds": options.seeds,
            "last": LAST,
        },
        "codes": [code.describe() for code in SIGNED + UNSIGNED],
    }
    errors: list[Json] = []
    for task in RATES:
        observe(task, snapshots, errors)
    results["errors"] = folded(errors)
    known = {}
    if options.resume and options.output.exists():
        before = json.loads(options.output.read_text())
        known = known_trainings(before, results)
        results["earlier"] = [*before.get("earlier", ()), before["provenance"]] if known else []
    results["training"] = train_all(choose(results), options.seeds, steps, known)
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.codes",
        description="Compare 8-bit codes of Adam's states.",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--resume", action="store_true", help="keep the trainings of the JSON file")
    parser.add_argument("--steps", type=int, default=max(SNAPSHOTS), help="at most, of trainings")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each kind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if not options.tables:
        from benchmarks.run import write_json

        torch.set_num_threads(options.threads)
        write_json(options.output, study(options))
    results = json.loads(options.output.read_text())
    options.output.with_suffix(".md").write_text(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
