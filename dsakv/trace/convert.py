"""Copies of traces as Parquet, for ``analyze --to-parquet``: every record checked by the readers, then written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from dsakv.errors import DsakvError, InputError
from dsakv.trace.columns import POSITIONS, REQUIRED, check, columns_of, paths, pruned
from dsakv.trace.files import TEMP, disk_error
from dsakv.trace.formats import read_records
from dsakv.trace.intake import Intake
from dsakv.trace.open import TraceDir, requests_file
from dsakv.trace.parquet_format import ParquetShard
from dsakv.trace.parquet_schema import VERSION_KEY, all_fields
from dsakv.trace.schema import SCHEMA_VERSION
from dsakv.trace.units import read_unit, to_units

_BATCH = 256
_ELSEWHERE = "name another folder with --to-parquet"


def check_target(target: Path) -> None:
    """Raise DsakvError where there is something at ``target`` already."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DsakvError(f"{target} exists already", _ELSEWHERE)
    if target.exists() and target.samefile(Path.cwd()):
        raise DsakvError(f"{target} is the current folder, whose place a copy cannot take", _ELSEWHERE)


def to_parquet(
    traces: Sequence[TraceDir], root: Path, target: Path, warn: Callable[[str], None], advance: Callable[[int], None]
) -> None:
    """Write copies of ``traces``, which were found in ``root``, into the new folder ``target``, all of them or none.

    Each keeps its path below ``root`` (a trace at ``root`` itself the name of its folder) and its run's other files.
    Selections are sorted, their scores with them. A field that no record of this program has is told to ``warn`` once
    and left out; null and absent become the same. ``advance`` is called with the bytes just read.

    Raises:
        InputError: a bad record or a damaged file.
        DsakvError: ``target`` exists, a file cannot be read or written.
    """
    check_target(target)
    temp = target.with_name(f".{target.name}.{os.getpid()}{TEMP}")
    try:
        temp.mkdir(parents=True)
        for trace in traces:
            name = trace.path.relative_to(root) if trace.path != root else Path(root.resolve().name)
            copy = temp / name
            copy.mkdir(parents=True, exist_ok=True)
            unknown: set[str] = set()
            intake = Intake("strict", block_sizes=True)
            for shard in trace.shards:
                for unit in to_units([shard]):
                    for _ in read_unit(unit, intake):
                        pass
                    advance(unit.bytes)
                unknown |= _convert(shard, copy / f"{shard.name.split('.jsonl')[0].removesuffix('.parquet')}.parquet")
            for place in intake.counts.unfinished:
                warn(f"{trace.path}: {place}: an unfinished last line was dropped")
            if unknown:
                warn(f"{trace.path}: fields that have no column are left out: {', '.join(sorted(unknown))}")
            _copy_facts(trace, copy)
        os.rename(temp, target)
    except OSError as error:
        raise disk_error(error, target, _ELSEWHERE) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _copy_facts(trace: TraceDir, copy: Path) -> None:
    """The files that belong to the run. Where they name the format of its shards, they name the new one."""
    names = [trace.path / "run_meta.json", trace.path / "summary.json"]
    requests = requests_file(trace.path)
    if requests is not None:
        names.append(requests)
    if trace.path.name.startswith("block"):  # else the folder above is none of ours
        names.append(trace.path.parent / "config.json")
    for source in names:
        if not source.is_file():
            continue
        target = copy / source.name if source.parent == trace.path else copy.parent / source.name
        content = source.read_bytes()
        if source.name in ("run_meta.json", "config.json"):
            try:
                facts = orjson.loads(content)
            except orjson.JSONDecodeError as error:
                raise InputError(f"{source} is not JSON: {error}", "repair it, or move it away") from None
            if isinstance(facts, dict) and isinstance(facts.get("trace"), dict) and "format" in facts["trace"]:
                facts["trace"]["format"] = "parquet"
                content = orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        target.write_bytes(content)


def _convert(source: Path, target: Path) -> set[str]:
    """Write one shard; returns the fields left out, as ``name`` or ``name.name``."""
    known, found = set[str](), set(REQUIRED) - {POSITIONS}
    while found != known:  # again, where a later record has fields that none before it had
        known, unknown = found, set[str]()
        found = known | _write(source, target, known, unknown)
    return unknown


def _write(source: Path, target: Path, known: set[str], unknown: set[str]) -> set[str]:
    """Write one shard with the columns ``known``; unless another field is found: then return with it, nothing written.

    Fields that have no column are added to ``unknown``.
    """
    columns = columns_of(all_fields())
    fields = pruned(all_fields(), known)
    shard = ParquetShard(target, pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION)}))
    try:
        rows: list[dict[str, Any]] = []
        seen: set[Any] = set()
        for place, record in read_records(source):
            found = paths(record, columns, unknown)
            if not found <= known:
                shard.discard()
                return found
            check(place, record, columns)
            new = record["request_id"] not in seen
            if rows and (new or len(rows) == _BATCH):
                shard.add(_to_batch(rows, fields))
                rows = []
            if new:
                seen.add(record["request_id"])
                shard.pause()
            rows.append(record)
        if rows:
            shard.add(_to_batch(rows, fields))
    except BaseException:
        shard.discard()
        raise
    shard.close()
    return set()


def _to_batch(rows: list[dict[str, Any]], fields: Sequence[pa.Field]) -> pa.RecordBatch:
    for row in rows:
        _sort(row)
    columns = [_column([row.get(field.name) for row in rows], field) for field in fields]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _column(values: list[Any], field: pa.Field) -> pa.Array:
    nulls = field.name != POSITIONS and any(value is None for value in values)
    if nulls or not pa.types.is_list(field.type):
        return pa.array(values, type=field.type)
    item = field.type.value_type.to_pandas_dtype()
    lists = [np.array(() if value is None else value, dtype=item) for value in values]
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    flat = np.concatenate(lists) if lists else np.zeros(0, dtype=item)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=field.type)


def _sort(row: dict[str, Any]) -> None:
    """Bring the selection of a record into ascending order, and the scores, which stand in the same order."""
    positions, scores = row.get(POSITIONS), row.get("scores_topk")
    if not positions:
        return
    order = np.argsort(positions, kind="stable")
    if (order[1:] < order[:-1]).any():
        row[POSITIONS] = np.array(positions)[order]
        if scores is not None and len(scores) == len(positions):
            row["scores_topk"] = [scores[i] for i in order]
