"""What the tests need of an accelerator besides its name: CUDA's, or that of a host-run.

In a host-run, fusedopt's compiled module is one whose accelerator is the CPU and whose kernels run
on the host, thread by thread (tests/core/host_cuda.cpp). Launches can be captured there as well.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable

import torch

HOST_RUN = os.environ.get("FUSEDOPT_HOST_RUN", "")
"""The path of such a module; empty: the module is the one that ships."""


def load_host_run() -> None:
    """Make it the module that fusedopt finds, before fusedopt is imported."""
    assert "fusedopt" not in sys.modules
    spec = importlib.util.spec_from_file_location("fusedopt._C", HOST_RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fusedopt._C"] = module
    spec.loader.exec_module(module)


DEVICE = "cpu" if HOST_RUN else "cuda"


def capture(step: Callable[[], object]) -> Callable[[], None]:
    """Capture a step into a graph, without running it; what it returns replays it."""
    if HOST_RUN:
        host = ctypes.CDLL(HOST_RUN)
        host.host_begin_capture()
        try:
            step()
        finally:
            host.host_end_capture()
        return host.host_replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def launches(step: Callable[[], object]) -> int:
    """The number of kernels that a step launches."""
    if HOST_RUN:
        host = ctypes.CDLL(HOST_RUN)
        host.host_launches()
        step()
        return int(host.host_launches())
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "fusedopt" in event.key)
