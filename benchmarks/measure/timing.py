"""How a call is timed, on a CPU and on a GPU, and how several are timed interleaved.

A sample is one number of calls in a row, divided by their number. On a GPU it has three times:

- wall: until the device has done all calls, with one synchronization after the last. This is what a
  step takes in a loop, whichever of host and device is the slower one.
- host: until the last call returned, which is how long the host is busy.
- device: between CUDA events before the first call and after the last. The device is kept waiting
  until the host has enqueued all of them, so that this is the time of the kernels without gaps
  (unless a call waits for the device by itself, or launches more than the queue holds).
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from benchmarks.measure.progress import Progress
from benchmarks.measure.work import Work
from benchmarks.report.case import DEVICE, HOST, WALL

# At least so many, however long they take: on a shared machine, medians of fewer rounds say little.
MIN_ROUNDS = {"cpu": 11, "cuda": 3}
MIN_SAMPLE_SECONDS = {"cpu": 0.01, "cuda": 0.005}
# Libraries may bring OpenMP runtimes of their own. Their idle threads spin for milliseconds, which
# would slow down whatever is timed next.
SETTLE_SECONDS = {"cpu": 0.02, "cuda": 0.0}
# A launch takes the host 2 us or more, and a stream's queue holds about 1,000: all that a host
# enqueues in this time fits into the queue.
QUEUE_SECONDS = 0.002
CYCLES_PER_SECOND = 2e9  # of a GPU, roughly: the device only has to wait long enough

Sample = dict[str, float]  # seconds per call: WALL, on a GPU HOST and DEVICE as well
Clock = Callable[[Work, int], Sample]


def time_on_cpu(work: Work, calls: int) -> Sample:
    """One sample of so many calls; of a single one where each has to be prepared.

    torch's Timer warms up with two calls, so it is left out where one call is enough.
    """
    if work.prepare is None and calls > 1:
        timer = Timer(
            "call()", globals={"call": work.call}, num_threads=torch.get_num_threads()
        ).timeit(calls)
        return {WALL: timer.mean}
    if work.prepare is not None:
        work.prepare()
    start = time.perf_counter()
    work.call()
    return {WALL: time.perf_counter() - start}


def time_on_cuda(work: Work, calls: int) -> Sample:
    """One sample of so many calls on the current device; of a single one where it is prepared."""
    if work.prepare is not None:
        calls = 1
        work.prepare()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work.call()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    done = time.perf_counter()
    host = (returned - start) / calls

    queued = min(calls, max(1, int(QUEUE_SECONDS / host)))
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if work.prepare is not None:
        work.prepare()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2 * queued * host * CYCLES_PER_SECOND))
    before.record()
    for _ in range(queued):
        work.call()
    after.record()
    torch.cuda.synchronize()
    device = 1e-3 * before.elapsed_time(after) / queued
    return {WALL: (done - start) / calls, HOST: host, DEVICE: device}


CLOCKS: dict[str, Clock] = {"cpu": time_on_cpu, "cuda": time_on_cuda}


def measure(
    works: dict[str, Work], device_type: str, rounds: int, seconds: float, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    """Samples by what was timed and by name, one per round, until rounds or seconds run out.

    Each round has an order of its own, so that no work always follows the same other one.
    """
    clock = CLOCKS[device_type]
    least = MIN_SAMPLE_SECONDS[device_type]
    names = list(works)
    calls = {name: math.ceil(least / clock(work, 1)[WALL]) for name, work in works.items()}
    samples: dict[str, dict[str, list[float]]] = {}
    gc.collect()
    gc.disable()  # a pause would count for whatever is timed just then
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= MIN_ROUNDS[device_type] and time.perf_counter() - start > seconds:
                progress.update(rounds - done)
                break
            for name in random.Random(done).sample(names, len(names)):
                time.sleep(SETTLE_SECONDS[device_type])
                sample = clock(works[name], calls[name])
                for timed, value in sample.items():
                    samples.setdefault(timed, {other: [] for other in names})[name].append(value)
                calls[name] = max(calls[name], math.ceil(least / sample[WALL]))
            progress.update()
    finally:
        gc.enable()
    return samples
