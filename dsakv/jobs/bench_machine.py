"""The machine that a benchmark ran on, and the memory that it took."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from dsakv.kv.copy_bench import COPIED, CopyBench

COPIES = 8
"""Of which the fastest counts: what others do at the same time only slows them down."""


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory and device of this process; None for what the system does not say."""
    cuda = device.type == "cuda"
    return {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "memory_bytes": _field(Path("/proc/meminfo"), "MemTotal"),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
    }


def memory(device: torch.device) -> dict[str, int | None]:
    """Bytes that this process (with several ranks: the first) took at most: host memory, and on CUDA the device's.

    ``device_allocated`` is what tensors took, ``device_reserved`` what PyTorch kept for them.
    """
    cuda = device.type == "cuda"
    return {
        "device_allocated": torch.cuda.max_memory_allocated(device) if cuda else None,
        "device_reserved": torch.cuda.max_memory_reserved(device) if cuda else None,
        "host_peak": _field(Path("/proc/self/status"), "VmHWM"),
    }


def _cpu_name() -> str | None:
    found = _match(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$")
    return found or platform.processor() or platform.machine() or None


def _field(path: Path, name: str) -> int | None:
    """Bytes of a line ``name: N kB``."""
    found = _match(path, rf"^{name}:\s+(\d+) kB$")
    return int(found) * 1024 if found else None


def _match(path: Path, pattern: str) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # systems without /proc do not say
        return None
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else None


def device_speed(device: torch.device) -> float | None:
    """Bytes a second from pinned host memory to ``device``, measured now; None on CPU, which needs no copies."""
    if device.type != "cuda":
        return None
    copy = next(kind for kind in CopyBench(device).kinds if kind.name == "host_to_device")
    return COPIED / min(copy.once() for _ in range(COPIES)) * 1e6
