"""Times large copies within host memory, and between pinned host memory and a CUDA device.

Two buffers larger than caches are copied from one to the other and back, by as many threads as the run has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from dsakv.analysis.links_speeds import MemorySpeeds
from dsakv.kv.homes import HostArena
from dsakv.kv.marks import HostMark, mark

COPIED = 128 << 20
"""Bytes of a copy. A power of two, which pinned memory is rounded up to."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One direction."""

    name: str
    once: Callable[[], float]
    """Does one; microseconds."""
    us: list[float] = field(default_factory=list)


class CopyBench:
    """Copies in each direction. Raises DsakvError where there is no host memory for them."""

    def __init__(self, device: torch.device) -> None:
        pin = device.type == "cuda"
        self._device = device
        self._host = [HostArena(1, COPIED, torch.uint8, pin=pin).blocks[0].zero_() for _ in range(2)]
        self.kinds = [Copy("host_to_host", self._in_host)]
        if pin:
            there = torch.zeros(COPIED, dtype=torch.uint8, device=device)
            self.kinds.append(Copy("host_to_device", lambda: self._over(there, self._host[0])))
            self.kinds.append(Copy("device_to_host", lambda: self._over(self._host[1], there)))

    def round(self, advance: Callable[[int], None] = lambda done: None, *, keep: bool = True) -> None:
        """Copy once more in each direction. ``keep`` False forgets the times."""
        for kind in self.kinds:
            us = kind.once()
            if keep:
                kind.us.append(us)
                advance(1)

    def speeds(self) -> MemorySpeeds:
        """The medians of all rounds."""
        return MemorySpeeds(COPIED, **{kind.name: COPIED / median(kind.us) / 1e3 for kind in self.kinds})

    def _in_host(self) -> float:
        self._host.reverse()
        begin = HostMark()
        self._host[0].copy_(self._host[1])
        return begin.us_until(HostMark())

    def _over(self, to: Tensor, of: Tensor) -> float:
        """A copy in the device's order of work, which is empty before."""
        torch.cuda.synchronize(self._device)
        begin = mark(self._device)
        to.copy_(of, non_blocking=True)
        return begin.us_until(mark(self._device))  # waits for it
