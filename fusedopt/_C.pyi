from typing import TypedDict

import torch
from torch import Tensor

slot: int
block: int
has_cuda: bool
accelerator: str
version: str
cuda_version: str
torch_version: str

class RuleInfo(TypedDict):
    counts_steps: bool
    variants: tuple[tuple[str, ...], ...]
    never_negative: set[str]

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def state_names(
    optimizer: str, rule: str, group: dict[str, object], index: int
) -> tuple[str, ...]: ...
def rules() -> dict[str, RuleInfo]: ...
def combinations() -> list[list[torch.dtype]]: ...
def encode(values: Tensor, never_negative: bool) -> tuple[Tensor, Tensor]: ...
def decode(codes: Tensor, scales: Tensor, numel: int, never_negative: bool) -> Tensor: ...
def flat_tensors(like: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]: ...
def flat_steps(values: list[float], device: torch.device) -> list[Tensor]: ...
def is_capturing(device: torch.device) -> bool: ...
def is_recorded() -> bool: ...
def attach_gradients(
    params: list[Tensor], grads: list[Tensor], addresses: list[int], grad_addresses: list[int]
) -> bool: ...

class Workspace:
    captured: bool
    @property
    def grad_norm(self) -> Tensor | None: ...
    def forget_weights(self) -> None: ...
    def forget_weights_of(self, param: Tensor) -> None: ...
    def note_weights_of(self, param: Tensor) -> None: ...
    def are_outdated(self, param: Tensor) -> bool: ...

class Storage:
    def __init__(
        self,
        state: torch.dtype,
        master_bits: int,
        stochastic: bool,
        counts_steps: bool,
        seed: int,
        ordinal: int,
    ) -> None: ...

class Plan:
    def __init__(self, optimizer: str, rule: str, workspace: Workspace) -> None: ...
    def add_group(self, group: dict[str, object], capturable: bool) -> None: ...
    def add(
        self,
        param: Tensor,
        name: str,
        duplicate: bool,
        states: tuple[Tensor, ...] | None,
        first: bool,
        flat_grad: int,
        storage: Storage,
        on_device: bool,
        first_count: Tensor | None,
        lineage: int,
    ) -> None: ...
    def step(
        self,
        groups: list[dict[str, object]],
        grad_scale: Tensor | float | None,
        found_inf: Tensor | float | None,
        max_grad_norm: float | None,
    ) -> list[int] | None: ...
    @property
    def span_count(self) -> int: ...
