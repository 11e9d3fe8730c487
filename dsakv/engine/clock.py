"""What time it is in a run: when requests arrive and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from dsakv.distributed import World

LONGEST_SLEEP = 3600.0
"""Seconds; systems refuse sleeps of millennia."""


class Clock(Protocol):
    """Seconds since the run began; a run that is gone on with starts later than at 0."""

    def now(self) -> float: ...

    def wait_until(self, seconds: float) -> None:
        """Return at this time, at once where it has passed."""
        ...

    def pause(self) -> None:
        """The engine hands a step over: what its consumer does with it is no part of the run's work."""
        ...

    def resume(self) -> None: ...


class VirtualClock:
    """Goes while the engine works, stands still while others do, and jumps where the engine would wait.

    So service times are measured, and neither idle hours nor what a consumer of the steps does take part.
    """

    def __init__(self, start: float = 0.0, ticks: Callable[[], float] = time.perf_counter) -> None:
        self._ticks = ticks
        self._begin = ticks() - start
        self._paused: float | None = None
        self._reached = start  # rounding must not put the clock back behind a time that it jumped to

    def now(self) -> float:
        return max(self._reached, (self._ticks() if self._paused is None else self._paused) - self._begin)

    def wait_until(self, seconds: float) -> None:
        self._begin -= max(0.0, seconds - self.now())
        self._reached = max(self._reached, seconds)

    def pause(self) -> None:
        self._paused = self._ticks()

    def resume(self) -> None:
        if self._paused is not None:
            self._begin += self._ticks() - self._paused
            self._paused = None


class WallClock:
    """Real time: waits for arrivals, and goes on while others use the steps."""

    def __init__(
        self,
        start: float = 0.0,
        ticks: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._ticks, self._sleep = ticks, sleep
        self._begin = ticks() - start

    def now(self) -> float:
        return self._ticks() - self._begin

    def wait_until(self, seconds: float) -> None:
        while (left := seconds - self.now()) > 0:
            self._sleep(min(left, LONGEST_SLEEP))

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class SharedClock:
    """Rank 0's clock on every rank: what depends on the time, all must decide alike."""

    def __init__(self, clock: Clock, world: World) -> None:
        self._clock, self._world = clock, world

    def now(self) -> float:
        return self._world.share(self._clock.now())

    def wait_until(self, seconds: float) -> None:
        if self._world.rank == 0:  # the others wait for what it says next
            self._clock.wait_until(seconds)

    def pause(self) -> None:
        self._clock.pause()

    def resume(self) -> None:
        self._clock.resume()
