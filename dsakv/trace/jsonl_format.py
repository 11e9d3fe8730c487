"""Shards with one JSON object a line: readable everywhere, and whole up to the last line whenever a run is killed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from dsakv.config import TraceConfig
from dsakv.errors import InputError
from dsakv.trace.batch import TraceBatch
from dsakv.trace.files import ends_with_newline, read_lines, replacing, write_all
from dsakv.trace.jsonl_writer import record_lines
from dsakv.trace.records import Derived, PrefixFacts
from dsakv.trace.schema import HINT

# Bytes of a line beside its lists, with numbers of usual length.
_RECORD = 890
_BLOCK_LISTS = 85  # the names and brackets that --trace-store-block-ids adds
_SCORE = 10.6  # eight digits, point, sign or exponent now and then, comma


class JsonlFormat:
    """``trace_steps_0_4.jsonl``."""

    suffix = ".jsonl"
    shard_bytes = 0

    def encode(
        self, batch: TraceBatch, derived: Derived, block_size: int, prefix: list[PrefixFacts], options: TraceConfig
    ) -> list[bytes]:
        return record_lines(batch, derived, block_size, prefix, options)

    def open(self, path: Path, options: TraceConfig) -> _Shard:
        return _Shard(path)

    def records(self, path: Path, fields: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
        for place, line in read_lines(path):
            try:
                yield place, orjson.loads(line)
            except ValueError as error:
                raise InputError(f"{place}: the line is damaged: {error}", HINT) from None

    def complete(self, path: Path) -> bool:
        return ends_with_newline(path)

    def keep(self, path: Path, requests: Collection[int]) -> None:
        with replacing(path) as file:
            for _, line in read_lines(path):
                if orjson.loads(line)["request_id"] in requests:
                    file.write(line + b"\n")

    def record_bytes(self, seq_len: int, selected: int, block_size: int, options: TraceConfig) -> float:
        size = float(_RECORD)
        if options.store_token_pos:
            size += selected * (1 + _mean_digits(seq_len))
        if options.store_scores:
            size += selected * _SCORE
        if options.store_block_ids:
            blocks = -(-seq_len // block_size)
            touched = blocks * (1 - (1 - selected / seq_len) ** block_size)  # of its tokens, not one is selected
            size += _BLOCK_LISTS + 2 * touched * (1 + _mean_digits(blocks))
        return size


class _Shard:
    held = 0

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close or discard

    def write(self, rows: list[bytes], which: Sequence[int]) -> None:
        write_all(self._file, b"".join([rows[r] for r in which]))

    def sync(self) -> bool:
        os.fsync(self._file.fileno())
        return True

    def pause(self) -> None:
        pass

    def spill(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self._file.close()


def _mean_digits(n: int) -> float:
    """Mean number of decimal digits of 0 .. n - 1."""
    digits, total, low = 1, 0, 0
    while low < n:
        high = min(n, 10**digits)
        total += digits * (high - low)
        low, digits = high, digits + 1
    return total / n
