"""Fused optimizers and losses: drop-ins for torch's, with the same bits on every device.

>>> optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)
"""

import sys

from fusedopt import _memory_report, nn
from fusedopt._extension import _C
from fusedopt._flat import FlatParameters
from fusedopt._memory_report import MemoryReport, memory_report
from fusedopt._release import GradientRelease
from fusedopt.optimizers import adam, rmsprop, sgd
from fusedopt.optimizers.adadelta import Adadelta
from fusedopt.optimizers.adagrad import Adagrad
from fusedopt.optimizers.adam import Adam, AdamW
from fusedopt.optimizers.adamax import Adamax
from fusedopt.optimizers.adan import Adan
from fusedopt.optimizers.ademamix import AdEMAMix
from fusedopt.optimizers.adopt import ADOPT
from fusedopt.optimizers.asgd import ASGD
from fusedopt.optimizers.lamb import LAMB
from fusedopt.optimizers.lars import LARS
from fusedopt.optimizers.lion import Lion
from fusedopt.optimizers.muon import Muon
from fusedopt.optimizers.nadam import NAdam
from fusedopt.optimizers.radam import RAdam
from fusedopt.optimizers.rmsprop import RMSprop
from fusedopt.optimizers.rprop import Rprop
from fusedopt.optimizers.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from fusedopt.optimizers.sgd import SGD
from fusedopt.optimizers.stable_adamw import StableAdamW

__version__ = _C.version
__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "FlatParameters",
    "GradientRelease",
    "Lion",
    "MemoryReport",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "StableAdamW",
    "isa",
    "memory_report",
    "nn",
]

# Pickles of version 0.1 name the modules that classes were in then. Now they name the package.
for _name, _module in {
    "fusedopt.adam": adam,
    "fusedopt.rmsprop": rmsprop,
    "fusedopt.sgd": sgd,
    "fusedopt._report": _memory_report,
}.items():
    sys.modules[_name] = _module


def isa() -> str:
    """The instruction set that CPU steps use: "avx512", "avx2" or "baseline"; "neon" on ARM.

    The best that the processor has, or the one that the environment variable FUSEDOPT_ISA named
    when the package was imported. Results do not depend on it.
    """
    return _C.isa()
