"""The dynamic map: the code by table that other libraries have, with which all are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.studies.codes.code import Code

DYNAMIC = "dynamic map"


class Dynamic(Code):
    """The dynamic map (Dettmers et al., 2022, arXiv:2110.02861), as bitsandbytes has it.

    Seven decades, of which the smaller have fewer numbers: decade i has 2^i of them (twice as many
    without a sign), the middles of equal parts of 0.1 to 1, times 10^(i - 6). There are also 0 and
    1, but not -1: a block whose largest magnitude is negative does not get it back exactly.
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
