"""The memory that is free, and what torch's allocators hand out of it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.scenarios import KI


def free_memory(device: torch.device) -> int:
    """The bytes that are free; for a CPU that does not tell, all the memory it has."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    # The system does not count as available what glibc keeps of freed memory: hand that back first.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    return int(found[1]) * KI if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class MemoryEvents:
    """What torch's allocators hand out and take back while this is entered.

    On a CPU the profiler reports every allocation of torch's CPU allocator; on CUDA the caching
    allocator counts by itself.

    Attributes:
        allocated: bytes handed out, whether freed again or not.
        peak: the most bytes that were in use at once, above those at the start.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self.allocated = self.peak = 0

    def __enter__(self) -> MemoryEvents:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._in_use = torch.cuda.memory_allocated(self._device)
            self._handed_out = allocated_on_cuda(self._device)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = [
            (event.start_ns(), event.nbytes())
            for event in self._profile.profiler.kineto_results.events()
            if event.name() == "[memory]" and event.device_type().name == "CPU"
        ]
        sizes = [size for _, size in sorted(events, key=lambda event: event[0])]
        self.allocated = sum(max(size, 0) for size in sizes)
        self.peak = max(itertools.accumulate(sizes, initial=0))
        if self._device.type == "cuda":
            self.allocated += allocated_on_cuda(self._device) - self._handed_out
            self.peak += torch.cuda.max_memory_allocated(self._device) - self._in_use


def allocated_on_cuda(device: torch.device) -> int:
    """Bytes that the CUDA caching allocator has handed out so far; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"])


def peak_of_process() -> int:
    """The most bytes that this process has had resident. (ru_maxrss is its parent's at first.)"""
    status = Path("/proc/self/status").read_text()
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    return 1024 * int(peak)
