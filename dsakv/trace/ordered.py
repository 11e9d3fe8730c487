"""All shards of a trace as one stream in the order in which the engine ran: by engine step, layer and request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsakv.errors import InputError
from dsakv.trace.batch import TraceBatch
from dsakv.trace.intake import Intake
from dsakv.trace.units import Unit, read_unit

_LAST = np.iinfo(np.int64).max


def in_engine_order(units: Sequence[Unit], intake: Intake) -> Iterator[TraceBatch]:
    """Batches that hold every record of their engine steps, sorted; ``intake`` must ask for engine steps.

    A unit is opened when the engine gets to its first step, so that not all of them are open at once.

    Raises:
        InputError: an engine step goes backwards within a unit, or what reading raises.
        DsakvError: a file cannot be read.
    """
    waiting = sorted((_first_step(unit), at) for at, unit in enumerate(units))
    open_units: list[_Cursor] = []
    while waiting or open_units:
        if not open_units or (waiting and waiting[0][0] <= min(cursor.limit for cursor in open_units)):
            cursor = _Cursor(units[waiting.pop(0)[1]], intake)
            if cursor.advance():
                open_units.append(cursor)
            continue
        limit = min(cursor.limit for cursor in open_units)
        parts = [part for cursor in open_units if (part := cursor.take(limit)) is not None]
        if parts:
            yield _sorted(parts)
        open_units = [cursor for cursor in open_units if cursor.advance()]


def _first_step(unit: Unit) -> int:
    """Engine step of the first good record; -1 where there is none, so that whoever reads the unit sees why."""
    for batch in read_unit(unit, Intake("skip", engine_steps=True)):
        return int(_steps(batch)[0])
    return -1


def _steps(batch: TraceBatch) -> NDArray[np.int64]:
    assert batch.engine_step is not None
    return batch.engine_step.astype(np.int64)


class _Cursor:
    """A unit that is being read, up to ``limit``: the last engine step that it surely holds whole."""

    def __init__(self, unit: Unit, intake: Intake) -> None:
        self._path: Path = unit.path
        self._batches = read_unit(unit, intake)
        self._kept: list[TraceBatch] = []
        self._last = -1
        self.limit = -1

    def advance(self) -> bool:
        """Read on until a step is whole; False at the end with nothing left."""
        while not self._kept or int(_steps(self._kept[0])[0]) > self.limit:
            batch = next(self._batches, None)
            if batch is None:
                self.limit = _LAST
                return bool(self._kept)
            steps = _steps(batch)
            if steps[0] < self._last or (steps[1:] < steps[:-1]).any():
                raise InputError(
                    f"{self._path}: engine_step goes backwards",
                    "a cache that requests share needs the order of the engine: use --cache-scope request or stream",
                )
            self._last = int(steps[-1])
            self.limit = self._last - 1  # more records of its last step may follow
            self._kept.append(batch)
        return True

    def take(self, limit: int) -> TraceBatch | None:
        """The records up to step ``limit``."""
        taken: list[TraceBatch] = []
        rest: list[TraceBatch] = []
        for batch in self._kept:
            cut = int(np.searchsorted(_steps(batch), limit, side="right"))
            behind = np.arange(len(batch)) >= cut
            if cut:
                taken.append(batch.take(~behind))
            if cut < len(batch):
                rest.append(batch.take(behind))
        self._kept = rest
        return TraceBatch.joined(taken) if taken else None


def _sorted(parts: Sequence[TraceBatch]) -> TraceBatch:
    batch = TraceBatch.joined(parts)
    order = np.lexsort((batch.request_id, batch.layer_id, _steps(batch)))
    return batch if (order[1:] > order[:-1]).all() else batch.take(order)
