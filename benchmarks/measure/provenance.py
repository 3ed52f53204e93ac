"""Where figures come from: machine, versions, and the commit that is measured."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure.implementation import Implementation
from benchmarks.measure.timing import time_on_cuda
from benchmarks.measure.work import MOST_COPIED, memory_works
from benchmarks.report.case import COPY, DEVICE

HERE = Path(__file__).parent
COPY_SAMPLES = 21


def git(*arguments: str) -> str | None:
    """What git answers about this checkout, or None where it cannot."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def processor() -> str:
    """The CPU's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.+)", text)
    return found[1] if found else platform.processor()


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None where nvidia-smi does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.split()[0] if answer.stdout.split() else None


def gpu_provenance(device: torch.device) -> dict[str, Any]:
    """The GPU, what runs it, and the bandwidth at which it copies."""
    properties = torch.cuda.get_device_properties(device)
    elements = min(MOST_COPIED, properties.total_memory // 4) // 8
    copy = memory_works(elements, device)[COPY]
    time_on_cuda(copy, 1)
    bandwidths = [8 * elements / time_on_cuda(copy, 5)[DEVICE] for _ in range(COPY_SAMPLES)]
    return {
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "copy_bandwidth": median(bandwidths),
        "copy_bandwidth_samples": bandwidths,
    }


def provenance(device: torch.device, implementations: list[Implementation]) -> dict[str, Any]:
    """Everything that a reader needs to know about where the figures come from.

    Where the checkout has no history, FUSEDOPT_COMMIT in the environment can tell the commit.
    """
    try:
        fusedopt = importlib.import_module("fusedopt")
        ours = {"fusedopt": fusedopt.__version__, "isa": fusedopt.isa()}
    except ImportError:
        ours = {}
    peers = {other.package: other.installed_version() for other in implementations if other.package}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or os.environ.get("FUSEDOPT_COMMIT"),
        "dirty": None if changes is None else changes != "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **ours,
        **({"peers": peers} if peers else {}),
        **(gpu_provenance(device) if device.type == "cuda" else {}),
    }
