"""One line of a JSONL shard, every field checked, none coerced: the arbiter of what a record is.

Takes what the tracer writes and what its predecessors wrote: string request ids, no ``event``, fields that were
added later missing. Only the fields that locality needs are looked at.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from dsakv.trace.intake import BadRecordError, Intake, shown

_MISSING = object()
_STEPS = 1 << 53
SCALARS = (("layer_id", 0, 1 << 31), ("step_idx", -_STEPS, _STEPS), ("seq_len_current", 0, 1 << 31))
"""Integers of a record with their bounds: layers and positions are 32-bit columns, differences of steps fit 64 bits."""


class Row(NamedTuple):
    """What is read of a record."""

    request_id: int
    """Its number, where ids are strings."""
    layer_id: int
    step_idx: int
    seq_len: int
    engine_step: int
    """0 where it is not asked for."""
    positions: NDArray[np.int64] | None
    """Ascending; None for none."""


class UnfinishedError(Exception):
    """A last line that was cut off."""


def read_record(line: bytes, intake: Intake) -> Row:
    """The record on ``line``, which is entered; a last line has no newline.

    Raises:
        BadRecordError: it is wrong or out of order. Then nothing is noted.
        UnfinishedError: the line has no newline and is not JSON.
    """
    try:
        record: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            raise UnfinishedError from error
        raise BadRecordError("json", f"not JSON ({error})") from None
    return check_record(record, intake)


def check_record(record: Any, intake: Intake) -> Row:
    """What is read of a record, everything in it being right; it is entered.

    Raises:
        BadRecordError: it is not, or out of order. Then nothing is noted.
    """
    if not isinstance(record, dict):
        raise BadRecordError("json", "not a JSON object")
    event = record.get("event", _MISSING)
    if event is not _MISSING and event != "dsa_topk":
        raise BadRecordError("event", f'"event" is {shown(event)}, not "dsa_topk"')
    request = _field(record, "request_id")
    if type(request) is not int and type(request) is not str:
        raise BadRecordError("wrong_type", f'"request_id" is {shown(request)}, not an integer or a string')
    intake.number(request)
    if type(request) is int and not -(1 << 63) <= request < 1 << 63:
        raise BadRecordError("out_of_range", f'"request_id" {request} does not fit 64 bits')
    layer, step, seq_len = (_integer(record, *bounds) for bounds in SCALARS)
    block_size = None
    if intake.block_sizes and "block_size_tokens" in record:
        block_size = _integer(record, "block_size_tokens", -(1 << 31), 1 << 31)
        if block_size < 1:
            raise BadRecordError("out_of_range", f'"block_size_tokens" is {block_size}, not positive')
    engine_step = _integer(record, "engine_step", -_STEPS, _STEPS) if intake.engine_steps else 0
    selected = record.get("selected_token_pos", _MISSING)
    positions = None if selected is _MISSING else _positions(selected, seq_len)
    number = intake.enter(request, layer, step)
    if block_size is not None:
        intake.counts.block_sizes.add(block_size)
    return Row(number, layer, step, seq_len, engine_step, positions)


def _field(record: dict[str, Any], name: str) -> Any:
    value = record.get(name, _MISSING)
    if value is _MISSING:
        raise BadRecordError("missing_field", f'"{name}" is missing')
    return value


def _integer(record: dict[str, Any], name: str, least: int, end: int) -> int:
    value = _field(record, name)
    if type(value) is not int:  # a bool is not one
        raise BadRecordError("wrong_type", f'"{name}" is {shown(value)}, not an integer')
    if value < least:
        raise BadRecordError("out_of_range", f'"{name}" {value} is {"negative" if least == 0 else "too small"}')
    if value >= end:
        raise BadRecordError("out_of_range", f'"{name}" {value} is too large')
    return value


def _positions(selected: Any, seq_len: int) -> NDArray[np.int64] | None:
    """The positions in ascending order, None for an empty list."""
    if type(selected) is not list:
        raise BadRecordError("wrong_type", f'"selected_token_pos" is {shown(selected)}, not a list of integers')
    if not selected:
        return None
    if set(map(type, selected)) != {int}:  # numpy would take true for 1
        wrong = next(value for value in selected if type(value) is not int)
        raise BadRecordError("wrong_type", f'"selected_token_pos" holds {shown(wrong)}, not an integer')
    try:
        positions = np.array(selected, dtype=np.int64)
    except OverflowError:
        raise BadRecordError("out_of_range", f"position {max(selected)} does not fit 64 bits") from None
    if not (positions[1:] > positions[:-1]).all():
        positions.sort()
        twice = positions[1:] == positions[:-1]
        if twice.any():
            raise BadRecordError(
                "duplicate_position", f"position {positions[int(np.argmax(twice))]} stands there twice"
            )
    low, high = int(positions[0]), int(positions[-1])
    if low < 0:
        raise BadRecordError("negative_position", f"position {low} is negative")
    if high >= seq_len:
        raise BadRecordError("position_beyond_sequence", f'position {high} with "seq_len_current" {seq_len}')
    return positions
