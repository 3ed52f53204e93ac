"""The same bits on every instruction set, thread count, device and layout in memory."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from support.cases import (
    STORAGES,
    Data,
    Groups,
    Layout,
    Result,
    Storage,
    assert_same_result,
    harsh,
    real_view,
    realistic,
    storage_id,
    train,
)
from support.optimizers import ROWS, Row

import fusedopt
from fusedopt._extension import _C

STEPS = 20
# Once for each set of options they make enough elements for three threads (32768 are too few for
# two), cut inside of a tensor, between two, and between two groups.
LAYOUTS = [
    Layout(()),
    Layout((0,)),
    Layout((3,)),
    Layout((63,)),
    Layout((20011,)),
    Layout((9, 11), stride=(26, 2)),
    Layout((4, 3, 5, 6), stride=(90, 1, 18, 3)),
    Layout((1001,), offset=1),
    Layout((37, 29), stride=(1, 37), offset=3),
]


@dataclass(frozen=True)
class Setting:
    """How a step is carried out, which must not matter."""

    isa: str = "baseline"
    threads: int = 1
    flat: bool = False
    flush: bool = False
    device: str = "cpu"


PLAIN = Setting()
SETTINGS = {
    "avx2": Setting(isa="avx2"),
    "avx512": Setting(isa="avx512"),
    "2-threads": Setting(threads=2),
    "3-threads": Setting(threads=3),
    "flat": Setting(flat=True),
    "flush": Setting(flush=True),
    "flush-avx2-flat-2-threads": Setting("avx2", threads=2, flat=True, flush=True),
    "flush-avx512-3-threads": Setting("avx512", threads=3, flush=True),
}


def choose_isa(name: str) -> None:
    try:
        _C.set_isa(name)
    except ValueError as error:
        pytest.skip(str(error))


def groups_of(row: Row) -> Groups:
    """A group per set of options: one step covers them all."""
    return Groups([*row.option_sets.values()], [LAYOUTS] * len(row.option_sets))


def run(row: Row, data: Data, state_dtype: torch.dtype, setting: Setting = PLAIN) -> Result:
    choose_isa(setting.isa)
    torch.set_num_threads(setting.threads)
    if not torch.set_flush_denormal(setting.flush) and setting.flush:
        pytest.skip("this processor cannot flush denormals")
    try:
        options = {"state_dtype": state_dtype}
        return train(row.ours, groups_of(row), data, setting.device, setting.flat, **options)
    finally:
        torch.set_flush_denormal(False)


def harsh_data(row: Row, storage: Storage) -> Data:
    """Made once for all rows, each of which takes as much as it needs."""
    most = max(groups_of(row).total for row in ROWS)
    return harsh(*storage[:2], most, STEPS).first(groups_of(row).total)


@lru_cache(maxsize=1)
def plain_result(row_name: str, storage: Storage) -> Result:
    row = next(row for row in ROWS if row.name == row_name)
    return run(row, harsh_data(row, storage), storage[2])


# Storages outermost: their data, and the plain result of a pair, are made once.
# The core's tests run every kernel in these ways. Of the rows behind the first ones a third of the
# storages are among the fast tests, each of them with some row.
PAIRS = [
    pytest.param(
        row,
        storage,
        id=f"{storage_id(storage)}-{row.name}",
        marks=[pytest.mark.slow] if place >= 4 and (place + number) % 3 else [],
    )
    for number, storage in enumerate(STORAGES)
    for place, row in enumerate(ROWS)
]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("row", "storage"), PAIRS)
def test_same_bits(row: Row, storage: Storage, setting: Setting) -> None:
    plain = plain_result(row.name, storage)
    data = harsh_data(row, storage)
    assert_same_result(run(row, data, storage[2], setting), plain)


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("storage", STORAGES, ids=storage_id)
def test_same_bits_on_cuda(row: Row, storage: Storage, flat: bool, cuda: str) -> None:
    data = harsh_data(row, storage)
    on_gpu = run(row, data, storage[2], Setting(device=cuda, flat=flat))
    assert_same_result(on_gpu, plain_result(row.name, storage))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_data_is_harsh(row: Row) -> None:
    """And all threads get something to do."""
    values = plain_result(row.name, STORAGES[0]).values
    assert values["param"].numel() > 2 * 32768
    everything = torch.cat([*values.values()])
    denormal = (everything != 0) & (everything.abs() < torch.finfo(everything.dtype).tiny)
    for kind in (everything.isnan(), everything.isinf(), denormal, everything.isfinite()):
        assert kind.sum() > 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("storage", [s for s in STORAGES if s[0] != s[1]], ids=storage_id)
def test_float32_gradients_with_the_same_values(row: Row, storage: Storage) -> None:
    param, grad, state = storage
    narrow = min(param, grad, key=lambda dtype: dtype.itemsize)
    data = realistic(param, narrow, groups_of(row).total, STEPS)
    assert_same_result(
        run(row, data.to(param, grad), state), run(row, data.to(param, param), state)
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_pairs_of_reals(row: Row, dtype: torch.dtype) -> None:
    size, options = 1001, [*row.option_sets.values()]
    data = harsh(dtype, dtype, size * len(options), STEPS)
    as_reals = Data(real_view(data.params), real_view(data.grads))
    numbers = train(row.ours, Groups(options, [[Layout((size,))]] * len(options)), data)
    reals = train(row.ours, Groups(options, [[Layout((2 * size,))]] * len(options)), as_reals)
    assert_same_result(numbers, reals)


def cpu_times() -> dict[str, int]:
    """Nanoseconds that each thread of this process has computed."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        times[task.name] = int((task / "schedstat").read_text().split()[0])
    return times


@pytest.fixture
def big_step() -> Iterator[torch.optim.Optimizer]:
    param = torch.zeros(1 << 23, requires_grad=True)
    param.grad = torch.ones_like(param)
    yield fusedopt.AdamW([param])


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="no /proc/self/schedstat to see threads by"
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_at_work(threads: int, big_step: torch.optim.Optimizer) -> None:
    """at::parallel_for is silently serial in a build without OpenMP."""
    torch.set_num_threads(threads)
    big_step.step()
    time.sleep(0.2)  # OpenMP's idle threads spin for a while, which looks like work
    before = cpu_times()
    for _ in range(10):
        big_step.step()
    spent = [after - before.get(thread, 0) for thread, after in cpu_times().items()]
    assert sum(t > 0.2 * max(spent) for t in spent) == threads, spent
