"""Memory that units pass through, and what brings them there: reads from disk, then conversion.

A unit is read into the raw memory of a slot, on the host. What is not needed as it is stored is converted into the
slot's ready memory, on the device: on CUDA everything, by copies on a stream of their own. One thread does that, in the
order in which units were asked for, while others read on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsakv.kv.marks import Mark, mark
from dsakv.weights.direct import DirectFiles
from dsakv.weights.units import Unit


class Slot:
    """Memory for one unit at a time."""

    def __init__(self, host: Tensor, device: Tensor | None) -> None:
        """``host`` ``[bytes]`` uint8 holds what was read and, without ``device``, behind it what was converted."""
        self.host, self.device = host, device
        self.load: Load | None = None
        """The last one, whether it is done or under way."""
        self.freed: Any = None
        """CUDA: when the device had done with what was here."""

    def raw(self, unit: Unit) -> Tensor:
        return self.host[: unit.raw_bytes]

    def ready(self, unit: Unit) -> Tensor:
        if self.device is not None:
            return self.device[: unit.ready_bytes]
        return self.host[unit.raw_bytes : unit.raw_bytes + unit.ready_bytes]


class Load:
    """A unit on its way into a slot, or there."""

    def __init__(self, unit: Unit, slot: Slot, host: Tensor | None) -> None:
        self.unit, self.slot = unit, slot
        self.raw = slot.raw(unit) if host is None else host
        self.planned_bytes = unit.disk_bytes if host is None else 0
        self.disk_bytes = 0
        self.reads: list[Future[int]] = []
        self.staged: Future[None]
        """Done when the unit is read and conversion is told to the device; raises DsakvError."""
        self.there: Any = None
        """CUDA: when it is converted."""
        self.ahead = False
        """Whether it was begun before it was asked for."""
        self.used = False
        """Whether it has been computed with."""
        self.in_place = False
        """Whether the model has its parameters now."""

    def put(self) -> None:
        """Give the model its parameters."""
        self.unit.put(self.raw, self.slot.ready(self.unit))

    def settle(self) -> None:
        """Return when nothing is under way any more, however it went."""
        wait([read for read in self.reads if not read.cancel()])  # of one that was never begun there is no end
        if not self.staged.cancelled():
            wait([self.staged])
        if self.there is not None:
            self.there.synchronize()


class Loader:
    """Begins to bring units into slots."""

    def __init__(self, files: DirectFiles, device: torch.device) -> None:
        self.files, self.device = files, device
        self._stage = ThreadPoolExecutor(1, "dsakv-weights")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._converted: deque[tuple[Mark, Mark]] = deque()

    def start(self, unit: Unit, slot: Slot, host: Tensor | None) -> Load:
        """Bring ``unit`` into ``slot``, from ``host`` ``[raw_bytes]`` where that holds it, else from disk."""
        if slot.load is not None:
            slot.load.settle()
        load = slot.load = Load(unit, slot, host)
        if host is None:
            load.reads = self.read(unit, load.raw)

        def stage() -> None:
            if load.reads:
                load.disk_bytes = self.files.wait(load.reads, unit.files)
            if unit.ready_bytes:
                with torch.inference_mode(), self._on_stream(slot):
                    begin = mark(self.device)
                    unit.convert(load.raw, slot.ready(unit))
                    self._converted.append((begin, mark(self.device)))
                    load.there = self._event()

        load.staged = self._stage.submit(stage)
        return load

    def read(self, unit: Unit, raw: Tensor) -> list[Future[int]]:
        """Begin to read ``unit`` from disk."""
        view = raw.numpy().data
        return [read for extent, place in unit.extents for read in self.files.read(extent, view[place:])]

    def wait(self, load: Load) -> tuple[Mark, Mark]:
        """Let the device, or on CPU this thread, go on when ``load`` is done; begin and end of the wait.

        Raises DsakvError where it could not be read.
        """
        begin = mark(self.device)
        load.staged.result()
        if load.there is not None:
            torch.cuda.current_stream(self.device).wait_event(load.there)
        return begin, mark(self.device)

    def free(self, slot: Slot) -> None:
        """The device has been told all that it is to do with what is in ``slot``."""
        if self._stream is not None:
            slot.freed = torch.cuda.Event()
            slot.freed.record()

    def converted_us(self, since: Mark) -> float:
        """Microseconds from ``since`` on that conversions took which have ended since this was last asked."""
        total = 0.0
        while self._converted and self._converted[0][1].passed():
            begin, end = self._converted.popleft()
            total += max(0.0, min(begin.us_until(end), since.us_until(end)))
        return total

    def close(self) -> None:
        """Return when nothing is read or converted any more."""
        self._stage.shutdown(cancel_futures=True)
        self.files.close()
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def _on_stream(self, slot: Slot) -> Iterator[None]:
        """Conversions go on beside what the device computes, behind the last use of the slot."""
        if self._stream is None:
            yield
            return
        if slot.freed is not None:
            self._stream.wait_event(slot.freed)
        with torch.cuda.stream(self._stream):
            yield

    def _event(self) -> Any:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
