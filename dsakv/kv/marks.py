"""Moments on the clock of whatever does the work."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in time on the device that ran the work."""

    def us_until(self, later: Mark) -> float:
        """Microseconds between two marks; may wait for the device."""
        ...

    def passed(self) -> bool:
        """Whether the device has come to it."""
        ...


@dataclass(frozen=True, slots=True)
class HostMark:
    """A moment on the host's clock."""

    ns: int = field(default_factory=time.perf_counter_ns)

    def us_until(self, later: Mark) -> float:
        assert isinstance(later, HostMark)
        return (later.ns - self.ns) / 1e3

    def passed(self) -> bool:
        return True


class CudaMark:
    """A moment in the current CUDA stream: recorded without waiting, read once the step is over."""

    def __init__(self) -> None:
        self.event: Any = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def us_until(self, later: Mark) -> float:
        assert isinstance(later, CudaMark)
        later.event.synchronize()
        return float(self.event.elapsed_time(later.event)) * 1e3

    def passed(self) -> bool:
        return bool(self.event.query())


def mark(device: torch.device) -> Mark:
    """Now, in ``device``'s order of work."""
    return CudaMark() if device.type == "cuda" else HostMark()
