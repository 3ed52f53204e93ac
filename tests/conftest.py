"""What all tests share: the devices to run on, and settings put back after each test."""

import gc
import os
from collections import defaultdict
from collections.abc import Iterator

# Among several processes, threads that wait for work must not take the others' time. torch's
# threads read this as they are loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from support import accelerator

if accelerator.HOST_RUN:
    accelerator.load_host_run()
from fusedopt._extension import _C

try:
    import hypothesis
except ImportError:  # tests on a GPU do without
    collect_ignore = ["losses/test_loss_properties.py", "steps/test_properties.py"]
else:
    # Examples take as long as the machine is busy. In CI the same ones each time.
    hypothesis.settings.register_profile("default", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

NO_CUDA = "no CUDA device" if not torch.cuda.is_available() else "fusedopt was built without CUDA"
HAS_CUDA = bool(accelerator.HOST_RUN) or (torch.cuda.is_available() and _C.has_cuda)
CUDA = pytest.param(
    accelerator.DEVICE, marks=[pytest.mark.cuda, pytest.mark.skipif(not HAS_CUDA, reason=NO_CUDA)]
)


LARGE = 100  # instances of a test of which a part is run
PARTS = 3
FIRST_ROWS = ("adamw-", "sgd-")  # of these classes all


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "which third of large tests to run, or all of them"
    numbers = [str(number) for number in range(PARTS)]
    parser.addoption("--part", choices=[*numbers, "all"], default="0", help=text)


def part_of(config: pytest.Config) -> int | None:
    """None: everything, as on a GPU and where tests are chosen by name."""
    named = config.option.keyword or any("::" in argument for argument in config.args)
    every = config.option.part == "all" or named or HAS_CUDA
    return None if every else int(config.option.part)


@pytest.fixture(scope="session")
def part(pytestconfig: pytest.Config) -> slice:
    """What to take of the many things that a large test goes over."""
    number = part_of(pytestconfig)
    return slice(None) if number is None else slice(number, None, PARTS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that has many instances a part is run. Where they are pairs of an optimizer and a
    value, each optimizer takes some of the values and each value some of the optimizers."""
    part = part_of(config)
    if part is None:
        return
    instances: dict[object, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            instances[item.function].append(item)
    left_out: set[pytest.Item] = set()
    for those in instances.values():
        if len(those) <= LARGE:
            continue
        indices = [item.callspec.indices for item in those]
        if "case" not in indices[0]:
            if any(item.get_closest_marker("slow") for item in those):
                left_out |= {item for i, item in enumerate(those) if i % PARTS != part}
            continue
        rest = [(*(v for k, v in each.items() if k != "case"),) for each in indices]
        values = {value: number for number, value in enumerate(dict.fromkeys(rest))}
        every = min(PARTS, len(values))
        for item, each, value in zip(those, indices, rest, strict=True):
            first = str(item.callspec.params["case"]).startswith(FIRST_ROWS)
            if not first and (each["case"] + values[value] + part) % every:
                left_out.add(item)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=[*left_out])


def pytest_collection_finish() -> None:
    """What is there by now is not garbage. To walk it takes most of a garbage collection, of which
    tests and benchmarks make hundreds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that steps run on."""
    return str(request.param)


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> str:
    """The GPU, for tests that make no sense without."""
    return str(request.param)


@pytest.fixture
def one_thread() -> None:
    """For parameters this small, threads only wait for each other, and have tests of their own."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    """Seeds the random generators; undoes what a test did to settings of the process."""
    torch.manual_seed(0)
    isa, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
