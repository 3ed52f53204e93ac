"""The machine code of the built module, and the core that says what it has to do."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from core.build import build, build_losses
from core.library import Core
from core.loss_library import Losses

from fusedopt._extension import _C

from .emulator import ARGUMENT, ELEMENTS, Machine
from .machine_api import (
    CROSS_ENTROPIES,
    CROSS_ENTROPY,
    LOSS,
    MEASURE,
    MSE,
    NORM,
    PREPARE,
    ROWS,
    SCALE,
    TARGETS,
    TOTAL,
    MachineApi,
    build_machine_api,
)
from .sass import find_disassembler, read_kernels


@pytest.fixture(scope="session")
def core() -> Core:
    return Core(build("plain"))


@pytest.fixture(scope="session")
def losses() -> Losses:
    return Losses(build_losses("losses"))


@pytest.fixture(scope="session")
def api() -> MachineApi:
    return MachineApi(build_machine_api())


@pytest.fixture(scope="session")
def machine_of(api: MachineApi) -> Callable[[str], Machine]:
    """The machine that runs the code for an architecture."""
    if not _C.has_cuda:
        pytest.skip("fusedopt was built without CUDA")
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("there is no cuobjdump; pip install nvidia-cuda-cuobjdump")

    @cache
    def make(arch: str) -> Machine:
        machine = Machine(read_kernels(disassembler, Path(_C.__file__), arch), arch, api)
        coded = enumerate("coded" in name for name in api.kernel_names())
        of_steps = {(k, f) for k, c in coded for f in range(len(api.state_formats()) if c else 1)}
        of_rules = {(PREPARE, rule) for rule in range(len(api.rules()))}
        elements = range(len(ELEMENTS))
        of_losses = {(k, e) for k in (*CROSS_ENTROPIES, MSE, SCALE) for e in elements}
        of_losses |= {(k, len(elements) + e) for k in (ROWS, CROSS_ENTROPY) for e in elements}
        others = {(NORM, 0), (TOTAL, 0), (TARGETS, 0), (LOSS, 0)}
        others |= {(MEASURE + kernel, 0) for kernel in api.kernels_that_measure()}
        assert set(machine.code) == of_steps | of_rules | of_losses | others, "a kernel is missing"
        return machine

    return make


# Every architecture in make test-all, the first one otherwise.
@pytest.fixture(
    params=[
        pytest.param(arch, marks=[pytest.mark.slow] if number else [])
        for number, arch in enumerate(ARGUMENT)
    ]
)
def machine(request: pytest.FixtureRequest, machine_of: Callable[[str], Machine]) -> Machine:
    return machine_of(request.param)
