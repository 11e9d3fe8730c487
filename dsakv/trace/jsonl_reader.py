"""JSONL shards into column batches, every record checked, none coerced.

Reads what the tracer writes and what its predecessors wrote: string request ids, no ``event``, fields that were
added later missing. Only the columns that locality needs are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from dsakv.errors import DsakvError, InputError
from dsakv.trace.batch import TraceBatch

BATCH_RECORDS = 512
KEPT_PLACES = 5
"""First places kept of each reason to reject."""
_CHUNK_BYTES = 4 << 20
_MISSING = object()
# Bits: layers and positions are int32 columns; differences of steps and lengths must fit int64.
_SCALARS = (("layer_id", 31), ("step_idx", 53), ("seq_len_current", 53))


@dataclass(slots=True)
class Rejected:
    """Records left out for one reason."""

    count: int = 0
    places: list[str] = field(default_factory=list)
    """The first of them as ``file:line``."""


@dataclass(slots=True)
class ReadCounts:
    """What became of the lines that were read; each counts in exactly one place."""

    files: int = 0
    bytes: int = 0
    accepted: int = 0
    """Records handed on."""
    without_positions: int = 0
    """Records in order but for having no positions."""
    rejected: dict[str, Rejected] = field(default_factory=dict)
    """By reason."""
    unfinished: list[str] = field(default_factory=list)
    """Places of last lines that were cut off."""
    block_sizes: set[int] = field(default_factory=set)
    """``block_size_tokens`` of the records, where the reader was asked to look."""

    def merge(self, later: ReadCounts) -> None:
        """Add what was read after this."""
        self.files += later.files
        self.bytes += later.bytes
        self.accepted += later.accepted
        self.without_positions += later.without_positions
        for reason, other in later.rejected.items():
            mine = self.rejected.setdefault(reason, Rejected())
            mine.count += other.count
            mine.places = (mine.places + other.places)[:KEPT_PLACES]
        self.unfinished += later.unfinished
        self.block_sizes |= later.block_sizes


class _BadRecordError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class _Row(NamedTuple):
    request_id: int
    layer_id: int
    step_idx: int
    seq_len: int
    positions: NDArray[np.int64] | None


class JsonlReader:
    """Reads shards one after the other; what it has seen of a request in one shard counts in the next.

    Args:
        on_error: ``strict`` raises at a bad record; ``skip`` leaves it out and counts it.
        request_order: a step must not go backwards within a request, rather than within a layer of a request.
        block_sizes: also check and collect ``block_size_tokens``, where a record has it.
    """

    def __init__(
        self, on_error: Literal["strict", "skip"], *, request_order: bool = False, block_sizes: bool = False
    ) -> None:
        self.counts = ReadCounts()
        self._strict = on_error == "strict"
        self._request_order = request_order
        self._block_sizes = block_sizes
        self._last_step: dict[tuple[int, int | None], int] = {}  # by (request, layer); by (request, None) over layers
        self._names: dict[str, int] = {}
        self._id_type: type | None = None

    @property
    def requests(self) -> set[int | str]:
        """Ids of the requests seen so far, as the records have them."""
        return set(self._names) if self._names else {request for request, _ in self._last_step}

    def read(self, path: Path) -> Iterator[TraceBatch]:
        """The records of one shard in batches, none without positions; an unfinished last line is left out.

        Raises:
            InputError: a bad record, where ``on_error`` is ``strict``.
            DsakvError: the file cannot be read.
        """
        rows: list[_Row] = []
        self.counts.files += 1
        try:
            with path.open("rb", buffering=_CHUNK_BYTES) as file:
                for number, line in enumerate(file, 1):
                    self.counts.bytes += len(line)
                    row = self._accept(line, path, number)
                    if row is not None:
                        rows.append(row)
                    if len(rows) == BATCH_RECORDS:
                        yield _to_batch(rows)
                        rows = []
        except OSError as error:
            raise DsakvError(f"cannot read {path}: {error.strerror}", "check the disk and the permissions") from error
        if rows:
            yield _to_batch(rows)

    def _accept(self, line: bytes, path: Path, number: int) -> _Row | None:
        place = f"{path.name}:{number}"
        try:
            record: Any = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if not line.endswith(b"\n"):
                self.counts.unfinished.append(place)
            else:
                self._reject("json", f"not JSON ({error})", path, number)
            return None
        try:
            row = self._check(record)
        except _BadRecordError as error:
            self._reject(error.reason, error.detail, path, number)
            return None
        if row.positions is None:
            self.counts.without_positions += 1
            return None
        self.counts.accepted += 1
        return row

    def _reject(self, reason: str, detail: str, path: Path, number: int) -> None:
        if self._strict:
            raise InputError(
                f"{path}:{number}: bad record: {detail}",
                "repair or remove the line, or leave bad records out with --on-error skip",
            )
        rejected = self.counts.rejected.setdefault(reason, Rejected())
        rejected.count += 1
        if len(rejected.places) < KEPT_PLACES:
            rejected.places.append(f"{path.name}:{number}")

    def _check(self, record: Any) -> _Row:
        if not isinstance(record, dict):
            raise _BadRecordError("json", "not a JSON object")
        event = record.get("event", _MISSING)
        if event is not _MISSING and event != "dsa_topk":
            raise _BadRecordError("event", f'"event" is {_shown(event)}, not "dsa_topk"')
        request = _field(record, "request_id")
        if type(request) is not int and type(request) is not str:
            raise _BadRecordError("wrong_type", f'"request_id" is {_shown(request)}, not an integer or a string')
        if self._id_type not in (None, type(request)):
            raise _BadRecordError("wrong_type", f'"request_id" is {_shown(request)}, of another type than before it')
        if type(request) is int and not -(1 << 63) <= request < 1 << 63:
            raise _BadRecordError("out_of_range", f'"request_id" {request} does not fit 64 bits')
        layer, step, seq_len = (_integer(record, name, bits) for name, bits in _SCALARS)
        block_size = None
        if self._block_sizes and "block_size_tokens" in record:
            block_size = _integer(record, "block_size_tokens", 31)
            if block_size < 1:
                raise _BadRecordError("out_of_range", f'"block_size_tokens" is {block_size}, not positive')
        selected = record.get("selected_token_pos", _MISSING)
        positions = None if selected is _MISSING else _positions(selected, seq_len)

        number = request if isinstance(request, int) else self._names.get(request, len(self._names))
        for key in ((number, layer), (number, None)) if self._request_order else ((number, layer),):
            last = self._last_step.get(key)
            if last is None:
                continue
            if step == last and key[1] is not None:
                raise _BadRecordError(
                    "repeated_step", f"request {_shown(request)}, layer {layer}, step {step} has been there before"
                )
            if step < last:
                raise _BadRecordError(
                    "backward_step",
                    f"request {_shown(request)}, layer {layer} goes back from step {last} to step {step}",
                )
        self._id_type = type(request)
        if block_size is not None:
            self.counts.block_sizes.add(block_size)
        if isinstance(request, str):
            self._names[request] = number
        self._last_step[number, layer] = step
        if self._request_order:
            self._last_step[number, None] = step
        return _Row(number, layer, step, seq_len, positions)


def _field(record: dict[str, Any], name: str) -> Any:
    value = record.get(name, _MISSING)
    if value is _MISSING:
        raise _BadRecordError("missing_field", f'"{name}" is missing')
    return value


def _integer(record: dict[str, Any], name: str, bits: int) -> int:
    value = _field(record, name)
    if type(value) is not int:  # a bool is not one
        raise _BadRecordError("wrong_type", f'"{name}" is {_shown(value)}, not an integer')
    if not -(1 << bits) <= value < 1 << bits:
        raise _BadRecordError("out_of_range", f'"{name}" {value} is too large')
    return value


def _positions(selected: Any, seq_len: int) -> NDArray[np.int64] | None:
    """The positions in ascending order, None for an empty list."""
    if type(selected) is not list:
        raise _BadRecordError("wrong_type", f'"selected_token_pos" is {_shown(selected)}, not a list of integers')
    if not selected:
        return None
    if set(map(type, selected)) != {int}:  # numpy would take true for 1
        wrong = next(value for value in selected if type(value) is not int)
        raise _BadRecordError("wrong_type", f'"selected_token_pos" holds {_shown(wrong)}, not an integer')
    try:
        positions = np.array(selected, dtype=np.int64)
    except OverflowError:
        raise _BadRecordError("out_of_range", f"position {max(selected)} does not fit 64 bits") from None
    if not (positions[1:] > positions[:-1]).all():
        positions.sort()
        twice = positions[1:] == positions[:-1]
        if twice.any():
            raise _BadRecordError(
                "duplicate_position", f"position {positions[int(np.argmax(twice))]} stands there twice"
            )
    low, high = int(positions[0]), int(positions[-1])
    if low < 0:
        raise _BadRecordError("negative_position", f"position {low} is negative")
    if high >= seq_len:
        raise _BadRecordError("position_beyond_sequence", f'position {high} with "seq_len_current" {seq_len}')
    if high >= 1 << 31:
        raise _BadRecordError("out_of_range", f"position {high} does not fit 32 bits")
    return positions


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."


def _to_batch(rows: list[_Row]) -> TraceBatch:
    positions = [row.positions for row in rows if row.positions is not None]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in positions], out=offsets[1:])
    return TraceBatch(
        request_id=np.array([row.request_id for row in rows], dtype=np.int64),
        layer_id=np.array([row.layer_id for row in rows], dtype=np.int32),
        step_idx=np.array([row.step_idx for row in rows], dtype=np.int64),
        seq_len=np.array([row.seq_len for row in rows], dtype=np.int64),
        offsets=offsets,
        positions=np.concatenate(positions, dtype=np.int32, casting="same_kind"),
    )
