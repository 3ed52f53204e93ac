"""Fused losses, as torch.nn has them: modules here, functions in fusedopt.nn.functional.

>>> loss = fusedopt.nn.CrossEntropyLoss(inplace=True)
"""

from fusedopt.nn import functional
from fusedopt.nn._modules import CrossEntropyLoss, LinearCrossEntropyLoss, MSELoss

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "MSELoss", "functional"]
