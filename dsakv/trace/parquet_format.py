"""Shards as Parquet: the facts of the JSON lines in a tenth of the space, for any tool that reads tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dsakv.config import TraceConfig
from dsakv.trace.batch import TraceBatch
from dsakv.trace.files import replacing
from dsakv.trace.parquet_file import ParquetTrace
from dsakv.trace.parquet_schema import record_schema, to_arrow, writer_options
from dsakv.trace.parquet_seal import SealingFile
from dsakv.trace.records import Derived, PrefixFacts

ROW_GROUP = 1024
"""Records in a row group at most."""
_SMALL = ROW_GROUP // 4  # not worth a row group of their own
_READ = 256
# Bytes of a record beside its lists, and with 40 columns what a file takes for being there.
_RECORD = 48.0
_SHARD = 12_500
_SCORE = 3.6
_OVER_ENTROPY = 1.3


class ParquetShard:
    """A Parquet file of records that takes the place of ``path`` when it is complete."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Raises OSError."""
        self.schema = schema
        self._stack = ExitStack()
        self._sink = SealingFile(self._stack.enter_context(replacing(path)))
        try:
            self._writer = pq.ParquetWriter(self._sink, schema, **writer_options(schema))
        except BaseException:
            self._leave()
            raise
        self._gathered: list[pa.RecordBatch] = []
        self._rows = 0

    @property
    def held(self) -> int:
        """Bytes of records that wait for their row group to fill."""
        return sum(batch.nbytes for batch in self._gathered)

    def write(self, rows: pa.RecordBatch, which: Sequence[int]) -> None:
        """Add some of the rows, which have the columns of the schema. Raises OSError."""
        self.add(rows if len(which) == len(rows) else rows.take(pa.array(which, type=pa.int64())))

    def add(self, rows: pa.RecordBatch) -> None:
        """Add all of the rows. Raises OSError."""
        self._gathered.append(rows)
        self._rows += len(rows)
        while self._rows >= ROW_GROUP:
            self._end_row_group(ROW_GROUP)

    def sync(self) -> bool:
        """False: without its footer the file cannot be read."""
        return False

    def pause(self) -> None:
        """End the row group, unless it is too small. Raises OSError."""
        if self._rows >= _SMALL:
            self._end_row_group(self._rows)

    def spill(self) -> None:
        """End the row group. Raises OSError."""
        if self._rows:
            self._end_row_group(self._rows)

    def close(self) -> None:
        """Complete the file. Raises OSError, and then ``path`` is as it was."""
        try:
            self.spill()
            self._writer.add_key_value_metadata(self._sink.begin_footer())
            self._writer.close()
            self._sink.end_footer()
        except BaseException:
            self.discard()
            raise
        self._stack.close()

    def discard(self) -> None:
        """Leave ``path`` as it was."""
        self._sink.drop()
        self._gathered = []
        try:
            self._writer.close()  # into nothing
        finally:
            self._leave()

    def _leave(self) -> None:
        """Remove the new file: an error is what makes ``replacing`` do so."""
        given_up = InterruptedError("the file is given up")
        self._stack.__exit__(type(given_up), given_up, None)

    def _end_row_group(self, rows: int) -> None:
        table = pa.Table.from_batches(self._gathered, self.schema)
        rest = table.slice(rows)
        self._gathered, self._rows = rest.to_batches(), len(rest)
        self._writer.write_table(table.slice(0, rows), row_group_size=rows)
        self._sink.end_row_group()


class ParquetFormat:
    """``trace_steps_0_4.parquet``."""

    suffix = ".parquet"
    shard_bytes = _SHARD

    def encode(
        self, batch: TraceBatch, derived: Derived, block_size: int, prefix: list[PrefixFacts], options: TraceConfig
    ) -> pa.RecordBatch:
        return to_arrow(batch, derived, block_size, prefix, options)

    def open(self, path: Path, options: TraceConfig) -> ParquetShard:
        shard = ParquetShard(path, record_schema(options))
        if path.exists():
            try:
                _copy(path, shard)
            except BaseException:
                shard.discard()
                raise
        return shard

    def records(self, path: Path, fields: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
        with ParquetTrace(path) as source:
            for first, batch in source.batches(_READ, fields):
                for row, record in enumerate(batch.to_pylist(), first):
                    yield f"{path}:{row}", record

    def complete(self, path: Path) -> bool:
        return True  # it has its name since it was

    def keep(self, path: Path, requests: Collection[int]) -> None:
        with ParquetTrace(path) as source:
            target = ParquetShard(path, source.schema)
        try:
            _copy(path, target, requests)
        except BaseException:
            target.discard()
            raise
        target.close()

    def record_bytes(self, seq_len: int, selected: int, block_size: int, options: TraceConfig) -> float:
        size = _RECORD
        if options.store_token_pos:
            size += selected * _position_bytes(selected / seq_len)
        if options.store_scores:
            size += selected * _SCORE
        if options.store_block_ids:
            blocks = -(-seq_len // block_size)
            touched = blocks * (1 - (1 - selected / seq_len) ** block_size)
            size += 2 * touched * _position_bytes(touched / blocks)
        return size


def _position_bytes(share: float) -> float:
    """Bytes of one of the numbers that a random choice of this share of a range holds; one like the last takes half."""
    if share >= 1:
        return 0.0
    bits = -math.log2(share) - (1 - share) / share * math.log2(1 - share)
    return _OVER_ENTROPY * bits / 8


def _copy(path: Path, target: ParquetShard, requests: Collection[int] | None = None) -> None:
    """Add the records of a file, or those of some ``requests``."""
    with ParquetTrace(path) as source:
        for _, batch in source.batches(_READ):
            if requests is not None:
                batch = batch.filter(pc.is_in(batch["request_id"], pa.array(list(requests), type=pa.int64())))
            target.add(batch.cast(target.schema))  # a converted file allows nulls
        target.pause()
