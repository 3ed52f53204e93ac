"""How launches on a device are sized, and how they fail: csrc/cuda/launch.h over a fake runtime."""

import ctypes
import itertools
from collections.abc import Iterator
from ctypes import c_char_p, c_int64
from pathlib import Path

import pytest

from .build import build_alone

SOURCE = Path(__file__).with_name("fake_runtime.cpp")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
CALLS = ["current_device", "driver_version", "processors", "resident_blocks", "launch"]
RESIDENT = 200  # blocks on all multiprocessors of the fake device
WAVES = 8
LACKS_CODE = 209
DEVICES = itertools.count()


@pytest.fixture
def fake() -> Iterator[ctypes.CDLL]:
    """The library, on a device of its own: what is known of others is kept."""
    library = ctypes.CDLL(str(build_alone("fake-runtime", SOURCE, FLAGS)))
    for name in ("launch", "launch_other"):
        getattr(library, name).restype = c_char_p
        getattr(library, name).argtypes = [c_int64]
    library.set_device(next(DEVICES))
    library.blocks_of_launch()
    yield library
    for call in range(len(CALLS)):
        library.set_error(call, 0)
    library.set_driver(12010)


@pytest.mark.parametrize(
    ("wanted", "blocks"),
    [(0, 1), (1, 1), (199, 199), (1600, 1600), (1601, 1600), (2**40, RESIDENT * WAVES)],
)
def test_blocks(fake: ctypes.CDLL, wanted: int, blocks: int) -> None:
    """A block for each chunk, up to several times those that the device holds."""
    assert fake.launch(wanted) is None
    assert fake.blocks_of_launch() == blocks


def test_a_device_is_asked_once_for_each_kernel(fake: ctypes.CDLL) -> None:
    fake.count_queries()
    for _ in range(3):
        assert fake.launch(5) is None
    assert fake.count_queries() == 1
    assert fake.launch_other(5) is None
    assert fake.count_queries() == 1


@pytest.mark.parametrize("call", range(len(CALLS)), ids=CALLS)
def test_an_error_is_told_once(fake: ctypes.CDLL, call: int) -> None:
    """By the launch that it belongs to: nothing is launched, and the next one finds no trace."""
    fake.set_error(call, 700)
    assert fake.launch(5) == b"an error"
    assert fake.blocks_of_launch() == 0
    assert fake.left_error() == 0
    fake.set_error(call, 0)
    assert fake.launch(5) is None
    assert fake.blocks_of_launch() == 5


@pytest.mark.parametrize("call", ["resident_blocks", "launch"])
def test_a_device_without_code(fake: ctypes.CDLL, call: str) -> None:
    fake.set_error(CALLS.index(call), LACKS_CODE)
    said = fake.launch(5).decode()
    assert said.startswith("no image; fusedopt has no code for this GPU"), said
    assert "FUSEDOPT_CUDA_ARCHS=native" in said


def test_a_driver_that_is_too_old(fake: ctypes.CDLL) -> None:
    """It would refuse the size of the argument with an error that says nothing."""
    fake.set_driver(12000)
    said = fake.launch(5).decode()
    assert "for CUDA 12.0; expected 530 or newer" in said, said
    assert fake.blocks_of_launch() == 0


def test_more_devices_than_are_remembered(fake: ctypes.CDLL) -> None:
    fake.set_device(1000)
    fake.count_queries()
    for _ in range(2):
        assert fake.launch(7) is None
        assert fake.blocks_of_launch() == 7
    assert fake.count_queries() == 2


@pytest.mark.parametrize(("kernel", "rule"), [(0, -1), (2, -1), (-1, 0), (-1, 1)])
def test_nothing_is_launched_where_one_kernel_is_lacking(
    fake: ctypes.CDLL, kernel: int, rule: int
) -> None:
    assert fake.launches_without(-1, -1) == 5
    assert fake.launches_without(kernel, rule) == -1
