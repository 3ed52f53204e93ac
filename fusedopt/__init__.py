"""Fused Adam, AdamW, RMSprop and SGD: drop-ins for torch.optim, with the same bits on every device.

>>> optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)
"""

from fusedopt._extension import _C
from fusedopt._flat import FlatParameters
from fusedopt._report import MemoryReport, memory_report
from fusedopt.adam import Adam, AdamW
from fusedopt.rmsprop import RMSprop
from fusedopt.sgd import SGD

__version__ = _C.version
__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "FlatParameters",
    "MemoryReport",
    "RMSprop",
    "isa",
    "memory_report",
]


def isa() -> str:
    """The instruction set that CPU steps use: "avx512", "avx2" or "baseline".

    The best that the processor has, or the one that the environment variable FUSEDOPT_ISA named
    when the package was imported. Results do not depend on it.
    """
    return _C.isa()
