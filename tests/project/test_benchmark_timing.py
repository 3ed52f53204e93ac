"""The benchmark's clocks: the time of the host and that of the device apart."""

import time
from collections import deque

import pytest
import torch

from benchmarks.measure import timing
from benchmarks.measure.work import Work
from benchmarks.report.case import DEVICE, HOST, WALL


class FakeGpu:
    """A host and a device with one queue, on a clock that only they move."""

    def __init__(self, host: float, device: float) -> None:
        self.now, self.idle_from = 0.0, 0.0
        self.host, self.device = host, device

    def call(self) -> None:
        self.now += self.host
        self.idle_from = max(self.idle_from, self.now) + self.device

    def sleep(self, cycles: int) -> None:
        self.idle_from = max(self.idle_from, self.now) + cycles / timing.CYCLES_PER_SECOND

    def synchronize(self) -> None:
        self.now = max(self.now, self.idle_from)

    def event(self, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    """When the device reaches it."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.idle_from, self.gpu.now)

    def elapsed_time(self, later: "FakeEvent") -> float:
        return 1e3 * (later.at - self.at)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, host: float, device: float) -> FakeGpu:
    gpu = FakeGpu(host, device)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)
    return gpu


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("host", "device"), [(30e-6, 5e-6), (10e-6, 7e-3), (5e-3, 1e-3)])
def test_time_of_the_host_and_of_the_device_apart(
    host: float, device: float, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_gpu(monkeypatch, host, device)
    done: list[str] = []

    def prepare() -> None:
        done.append("prepare")
        gpu.call()

    def call() -> None:
        done.append("call")
        gpu.call()

    sample = timing.time_on_cuda(Work(call, prepare=prepare if prepared else None), 50)
    assert sample[HOST] == pytest.approx(host)
    assert sample[DEVICE] == pytest.approx(device)
    calls = 1 if prepared else 50
    hidden = min(host, device) * (calls - 1) / calls
    assert sample[WALL] == pytest.approx(host + device - hidden)
    if prepared:
        assert done == ["prepare", "call", "prepare", "call"]


def test_a_work_that_needs_preparation_gets_it_before_each_call() -> None:
    ready: deque[int] = deque()
    work = Work(lambda: ready.pop(), prepare=lambda: ready.append(1))
    assert timing.time_on_cpu(work, 100)[WALL] > 0
    assert not ready
