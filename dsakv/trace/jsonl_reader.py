"""JSONL shards into column batches, compressed or not.

Lines that are plain are read by :mod:`dsakv.trace.jsonl_scan`, any other by :mod:`dsakv.trace.jsonl_record`; both make
the same of a line that both take. Either way records are entered in the order of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import numpy as np

from dsakv.errors import DsakvError, InputError
from dsakv.trace.batch import TraceBatch
from dsakv.trace.intake import BadRecordError, Intake
from dsakv.trace.jsonl_record import Row, UnfinishedError, read_record
from dsakv.trace.jsonl_scan import BLOCK_SIZE, ENGINE_STEP, FULL, ODD, make_columns, scan

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BATCH_RECORDS = 512
CHUNK_BYTES = 4 << 20
_BATCH_POSITIONS = 1 << 20


def read_jsonl(path: Path, intake: Intake, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[TraceBatch]:
    """The records of one shard in batches, none without positions; an unfinished last line is left out.

    A shard whose name ends in ``.zst`` is decompressed; its bytes are counted as they are on disk. ``chunk_bytes`` are
    read at a time, more where a line is longer.

    Raises:
        InputError: a bad record, where ``intake`` is strict; a compressed file that is damaged or cut off.
        DsakvError: the file cannot be read.
    """
    intake.counts.files += 1
    batches = _Batches(path, intake)
    for buffer, end in _whole_lines(path, intake, chunk_bytes):
        yield from batches.read(buffer, end)
    yield from batches.flush()


def _whole_lines(path: Path, intake: Intake, chunk_bytes: int) -> Iterator[tuple[bytearray, int]]:
    """Buffers, each with an end behind a newline; what follows the file's last newline comes last.

    Raises:
        InputError: a compressed file that is damaged or cut off.
        DsakvError: the file cannot be read.
    """
    buffer = bytearray(chunk_bytes)
    filled = 0
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(path.open("rb", buffering=0))
            file: FileIO | zstd.ZstdFile = raw
            if path.suffix == ".zst":
                file = stack.enter_context(zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31}))
            counted = 0
            while count := file.readinto(memoryview(buffer)[filled:]):
                intake.counts.bytes += raw.tell() - counted
                counted = raw.tell()
                end = buffer.rfind(b"\n", filled, filled + count) + 1
                filled += count
                if end:
                    yield buffer, end
                    buffer[: filled - end] = buffer[end:filled]
                    filled -= end
                elif filled == len(buffer):
                    buffer = buffer + bytes(filled)
            intake.counts.bytes += raw.tell() - counted
    except (zstd.ZstdError, EOFError) as error:
        raise InputError(f"{path} is damaged or cut off: {error}", "copy or compress it again") from error
    except OSError as error:
        raise DsakvError(f"cannot read {path}: {error.strerror}", "check the disk and the permissions") from error
    if filled:
        yield buffer, filled


class _Batches:
    """Gathers the records of one file: every line that is a record becomes the next row of the columns."""

    def __init__(self, path: Path, intake: Intake) -> None:
        self._path = path
        self._intake = intake
        self._wanted = intake.engine_steps << ENGINE_STEP | intake.block_sizes << BLOCK_SIZE
        self._columns = make_columns(BATCH_RECORDS, _BATCH_POSITIONS)
        self._rows = 0
        self._out_of_order: list[int] = []
        self._lines = 0

    def read(self, buffer: bytearray, end: int) -> Iterator[TraceBatch]:
        """The batches that ``buffer[:end]`` fills; only the last line of a file may lack its newline."""
        if not buffer.endswith(b"\n", 0, end):
            yield from self._read_with_care(bytes(buffer[:end]))
            return
        text = np.frombuffer(buffer, dtype=np.uint8, count=end)
        at = 0
        while at < end:
            first = self._rows
            at, self._rows, outcome = scan(text, at, self._columns, first, self._wanted)
            self._enter(first)
            if outcome == FULL:
                yield from self.flush()
            elif outcome == ODD:
                behind = buffer.index(b"\n", at) + 1
                yield from self._read_with_care(bytes(buffer[at:behind]))
                at = behind

    def flush(self) -> Iterator[TraceBatch]:
        """What was gathered as a batch, unless it is empty."""
        rows, counts = self._rows, self._intake.counts
        integers = self._columns.integers[:, :rows]
        offsets = self._columns.offsets[: rows + 1]
        positions = self._columns.positions[: offsets[-1]]
        lengths = np.diff(offsets)  # [rows]
        in_order = np.ones(rows, dtype=bool)
        in_order[self._out_of_order] = False
        counts.block_sizes.update(integers[BLOCK_SIZE, in_order].tolist())
        counts.block_sizes.discard(0)  # those without
        kept = in_order & (lengths > 0)
        accepted = int(kept.sum())
        counts.accepted += accepted
        counts.without_positions += int(in_order.sum()) - accepted
        self._rows = 0
        self._out_of_order = []
        if not accepted:
            return
        request_id, layer_id, step_idx, seq_len, engine_step, _ = integers[:, kept]
        kept_offsets = np.zeros(accepted + 1, dtype=np.int64)
        np.cumsum(lengths[kept], out=kept_offsets[1:])
        yield TraceBatch(
            request_id=request_id,
            layer_id=layer_id.astype(np.int32),
            step_idx=step_idx,
            seq_len=seq_len,
            offsets=kept_offsets,
            positions=positions.copy() if accepted == rows else positions[np.repeat(kept, lengths)],
            engine_step=engine_step if self._intake.engine_steps else None,
        )

    def _enter(self, first: int) -> None:
        """Enter the rows from ``first`` on, which are right in themselves."""
        requests, layers, steps = self._columns.integers[:3, first : self._rows].tolist()
        at = 0
        while (at := self._intake.enter_many(requests, layers, steps, at)) < len(requests):
            try:
                self._intake.enter(requests[at], layers[at], steps[at])
            except BadRecordError as error:
                self._intake.reject(error, self._path, str(self._lines + at + 1))
            self._out_of_order.append(first + at)
            at += 1
        self._lines += len(requests)

    def _read_with_care(self, line: bytes) -> Iterator[TraceBatch]:
        """Read one line of any kind; a batch, if the columns are full."""
        if self._rows == BATCH_RECORDS:
            yield from self.flush()
        self._lines += 1
        try:
            self._put(read_record(line, self._intake))
        except BadRecordError as error:
            self._intake.reject(error, self._path, str(self._lines))
        except UnfinishedError:
            self._intake.counts.unfinished.append(f"{self._path.name}:{self._lines}")

    def _put(self, record: Row) -> None:
        columns, row = self._columns, self._rows
        count = 0 if record.positions is None else len(record.positions)
        begin = int(columns.offsets[row])
        if begin + count > len(columns.positions):
            more = np.empty(begin + count, dtype=np.int32)
            more[:begin] = columns.positions[:begin]
            self._columns = columns = columns._replace(positions=more)
        columns.integers[:, row] = (*record[:5], 0)  # its block size is noted already
        columns.offsets[row + 1] = begin + count
        if record.positions is not None:
            columns.positions[begin : begin + count] = record.positions
        self._rows = row + 1
