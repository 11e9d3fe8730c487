"""What a JSONL shard says, read line by line through orjson alone, and through the reader: to be compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dsakv.errors import InputError
from dsakv.trace.intake import BadRecordError, Intake, ReadCounts
from dsakv.trace.jsonl_reader import CHUNK_BYTES, read_jsonl
from dsakv.trace.jsonl_record import Row, UnfinishedError, read_record

Options = dict[str, bool]


class Outcome(NamedTuple):
    """All that can be known of a shard's reading."""

    rows: list[tuple[int, int, int, int, int, list[int]]]
    counts: ReadCounts
    requests: set[int | str]
    rejected: list[tuple[str, str, str]]
    """Reason, message and place of each."""
    stopped: str | None
    """The message that reading ended with."""


class RecordingIntake(Intake):
    """Also remembers what it says of each rejected record."""

    def __init__(self, on_error: Literal["strict", "skip"], **options: bool) -> None:
        super().__init__(on_error, **options)
        self.rejected: list[tuple[str, str, str]] = []

    def reject(self, error: BadRecordError, path: Path, place: str) -> None:
        self.rejected.append((error.reason, error.detail, place))
        super().reject(error, path, place)


def expected(path: Path, on_error: Any, options: Options) -> Outcome:
    """By orjson alone."""
    intake = RecordingIntake(on_error, **options)
    rows: list[Row] = []
    stopped = None
    intake.counts.files = 1
    intake.counts.bytes = path.stat().st_size
    try:
        rows += _records(path, intake)
    except InputError as error:
        stopped = error.message
    found = [(*row[:5], row.positions.tolist()) for row in rows if row.positions is not None]
    intake.counts.accepted = len(found)
    intake.counts.without_positions = len(rows) - len(found)
    return Outcome(found, intake.counts, intake.requests, intake.rejected, stopped)


def _records(path: Path, intake: Intake) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read_record(line, intake)
            except BadRecordError as error:
                intake.reject(error, path, str(number))
            except UnfinishedError:
                intake.counts.unfinished.append(f"{path.name}:{number}")


def actual(path: Path, on_error: Any, options: Options, chunk_bytes: int = CHUNK_BYTES) -> Outcome:
    """By the reader."""
    intake = RecordingIntake(on_error, **options)
    found = []
    stopped = None
    try:
        for batch in read_jsonl(path, intake, chunk_bytes=chunk_bytes):
            assert len(batch) > 0
            engine_step = batch.step_idx * 0 if batch.engine_step is None else batch.engine_step
            columns = (batch.request_id, batch.layer_id, batch.step_idx, batch.seq_len, engine_step)
            for r, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
                found.append((*row, batch.positions[batch.offsets[r] : batch.offsets[r + 1]].tolist()))
    except InputError as error:
        stopped = error.message
    return Outcome(found, intake.counts, intake.requests, intake.rejected, stopped)


def assert_same(path: Path, options: Options | None = None, chunk_bytes: int = CHUNK_BYTES) -> Outcome:
    """The reader makes the same of the shard as orjson, in both modes. Returns what that is without the bad lines.

    A strict reader may stop before it has told of all that is right up to there.
    """
    options = options or {}
    wanted = expected(path, "skip", options)
    assert actual(path, "skip", options, chunk_bytes) == wanted
    strict, strict_wanted = actual(path, "strict", options, chunk_bytes), expected(path, "strict", options)
    assert (strict.stopped, strict.rejected) == (strict_wanted.stopped, strict_wanted.rejected)
    if strict_wanted.stopped is None:
        assert strict == strict_wanted == wanted
    return wanted
