"""What decode asked of a tiered KV cache, layer by layer: a trace's records and block tables as sets of blocks.

The tables are those that the run had: prompts that found a prefix in the cache read the same blocks. For the meaning of
a step see :mod:`dsakv.policies.placement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.kv_facts import KvFacts
from dsakv.analysis.kv_schedule import Schedule
from dsakv.compiled import compiled
from dsakv.errors import InputError
from dsakv.policies.base import Ints, doubled, enlarged
from dsakv.trace.batch import TraceBatch
from dsakv.trace.intake import Intake
from dsakv.trace.ordered import in_engine_order
from dsakv.trace.units import Unit

_READ, _OPEN, _CLOSES, _WRITTEN = range(4)
"""What a mark says of a block in a layer-step."""


@dataclass(frozen=True, slots=True)
class KvSteps:
    """``R`` layer-steps in engine order (engine step, then layer), with ``T`` blocks in all."""

    layer: Ints  # [R]
    engine_step: Ints  # [R]
    offsets: Ints  # [R + 1], into the [T] arrays
    ids: Ints
    """[T] the sets, ascending: selected blocks that their sequences have filled before, and those just filled."""
    written: NDArray[np.bool_]  # [T] just filled
    touched: Ints
    """[R] distinct selected blocks, open ones (which their sequences were still filling) included."""
    open_touched: Ints  # [R] of them, open ones, those that the step filled included
    queries: Ints  # [R] records of the layer-step
    rows: Ints  # [R] selected tokens of all its records
    begins: Sequence[tuple[int, Ints]]
    """(r, ids [n] ascending): full prompt blocks of the requests that decode from layer-step r on; a cache that starts
    warm is offered them before it. An entry for each layer of the step."""
    ended: Sequence[tuple[int, Ints]]
    """(r, ids [n] ascending): blocks that no running request holds any more, to drop after layer-step r - 1, before
    what begins at r; r may be R, and is there once."""

    def __len__(self) -> int:
        return len(self.layer)


class KvStepper:
    """Batches of records, in the order of the engine, to steps for blocks of ``block_size`` tokens.

    At the run's own block size ids are those of the run; else see :class:`~dsakv.analysis.kv_tables.BlockTables`.
    Requests with known answers are read as if they had been decoded; ``forced`` False leaves them out, as the running
    cache does.

    Raises:
        InputError: the trace is sampled, so that most of what decode read is missing.
    """

    def __init__(
        self,
        facts: KvFacts,
        block_size: int,
        id_of: Callable[[int], int | str] = lambda number: number,
        *,
        forced: bool = True,
    ) -> None:
        """``id_of`` gives a request's id by its number in the columns: ``Intake.id_of``."""
        if facts.sample_rate < 1:
            raise InputError(
                f"the trace holds {facts.sample_rate:.0%} of the decode steps, which does not tell what a cache held",
                "trace with --trace-sample-rate 1",
            )
        self._schedule = Schedule(facts, block_size, id_of, forced)
        self._shift = block_size.bit_length() - 1 if block_size & (block_size - 1) == 0 else -1
        self.block_size = block_size
        self._marks = np.zeros(0, dtype=np.int64)  # by id: four times the number of the layer-step, and what it is
        self._done = 0

    @property
    def unfinished(self) -> int:
        """Requests so far that have no line in ``requests.jsonl``."""
        return self._schedule.unfinished

    @property
    def gaps(self) -> int:
        """Decode steps of requests so far of which records are missing."""
        return self._schedule.gaps

    @property
    def width(self) -> int:
        """Above every id so far."""
        return self._schedule.tables.width

    def steps(self, batch: TraceBatch) -> KvSteps:
        """The steps of ``batch``, which holds every record of its engine steps, sorted. There may be none.

        Raises:
            InputError: records are at odds with each other, or with ``requests.jsonl``.
        """
        planned = self._schedule.plan(batch)
        batch, first = planned.batch, planned.first
        places = batch.offsets.astype(np.int64)
        tables = self._schedule.tables
        self._marks = enlarged(self._marks, (doubled(len(self._marks), tables.width),))
        count = len(first) - 1
        ids = np.empty(len(batch.positions) + len(batch), dtype=np.int64)
        written = np.empty(len(ids), dtype=np.bool_)
        offsets = np.zeros(count + 1, dtype=np.int64)
        touched, open_touched = np.zeros((2, count), dtype=np.int64)
        _gather(
            batch.positions.astype(np.int32, copy=False), places, batch.seq_len.astype(np.int64), planned.row, first,
            tables.grid, self.block_size, self._shift, self._marks, self._done,
            ids, written, offsets, touched, open_touched,
        )  # fmt: skip
        self._done += count
        assert batch.engine_step is not None
        return KvSteps(
            batch.layer_id[first[:-1]].astype(np.int64),
            batch.engine_step[first[:-1]].astype(np.int64),
            offsets,
            ids[: offsets[-1]],
            written[: offsets[-1]],
            touched,
            open_touched,
            np.diff(first),
            np.diff(places[first]),
            planned.begins,
            planned.ended,
        )


def kv_steps(
    units: Sequence[Unit],
    facts: KvFacts,
    block_size: int,
    intake: Intake,
    *,
    forced: bool = True,
    advance: Callable[[int], None] = lambda done: None,
) -> Iterator[KvSteps]:
    """The steps of all ``units``; ``intake`` must ask for engine steps, ``advance`` is called with the bytes just read.

    Raises:
        InputError: a bad record where ``intake`` is strict, no order of the engine's steps, what :class:`KvStepper`
            raises.
        DsakvError: a file cannot be read.
    """
    stepper = KvStepper(facts, block_size, intake.id_of, forced=forced)
    told = intake.counts.bytes
    for batch in in_engine_order(units, intake):
        yield stepper.steps(batch)
        advance(intake.counts.bytes - told)
        told = intake.counts.bytes


@compiled
def _gather(
    positions: NDArray[np.int32],  # [N]
    places: Ints,  # [Q + 1], into positions
    seq_len: Ints,  # [Q]
    row: Ints,  # [Q], of the table
    first: Ints,  # [R + 1], into the records
    table: NDArray[np.int32],  # [rows, blocks]
    size: int,
    shift: int,  # of a size that is a power of two, else -1
    marks: Ints,  # [ids]
    done: int,  # layer-steps before
    ids: Ints,  # [N + Q], filled up to the last offset
    written: NDArray[np.bool_],  # likewise
    offsets: Ints,  # [R + 1]
    touched: Ints,  # [R]
    open_touched: Ints,  # [R]
) -> None:
    end = 0
    for g in range(len(first) - 1):
        stamp = 4 * (done + g + 1)
        begin = end
        low, high = len(marks), -1
        for q in range(first[g], first[g + 1]):
            block = table[row[q], (seq_len[q] - 1) // size]
            marks[block] = stamp + (_CLOSES if seq_len[q] % size == 0 else _OPEN)
        for q in range(first[g], first[g + 1]):
            before = -1
            for i in range(places[q], places[q + 1]):
                place = positions[i] >> shift if shift >= 0 else positions[i] // size
                if place == before:
                    continue
                before = place
                block = table[row[q], place]
                if marks[block] < stamp:
                    marks[block] = stamp + _READ
                    touched[g] += 1
                    ids[end] = block
                    end += 1
                    low, high = min(low, block), max(high, block)
        for q in range(first[g], first[g + 1]):
            place = (seq_len[q] - 1) // size
            block = table[row[q], place]
            last = positions[places[q + 1] - 1] // size
            if last == place:  # no position lies further back than the newest token's block
                touched[g] += 1
                open_touched[g] += 1
            if marks[block] == stamp + _CLOSES:
                marks[block] = stamp + _WRITTEN
                ids[end] = block
                end += 1
                low, high = min(low, block), max(high, block)
        _ascend(ids[begin:end], low, high, marks, stamp)
        for i in range(begin, end):
            written[i] = marks[ids[i]] == stamp + _WRITTEN
        offsets[g + 1] = end


@compiled
def _ascend(ids: Ints, low: int, high: int, marks: Ints, stamp: int) -> None:
    """Sort the distinct ``ids`` of a set, which lie within ``low .. high`` and are those that ``marks`` has in it."""
    for i in range(1, len(ids)):
        if ids[i] < ids[i - 1]:
            if high - low < 16 * len(ids):  # looking through all of them is faster
                count = 0
                for block in range(low, high + 1):
                    if marks[block] == stamp + _READ or marks[block] == stamp + _WRITTEN:
                        ids[count] = block
                        count += 1
            else:
                ids.sort()
            return
