"""What of a record, whatever its layout, the columns of a Parquet shard can hold; for :mod:`dsakv.trace.convert`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, Union

import pyarrow as pa

from dsakv.errors import InputError
from dsakv.trace.intake import shown

POSITIONS = "selected_token_pos"
REQUIRED = frozenset({"request_id", "layer_id", "step_idx", "seq_len_current", POSITIONS})
_TEXT_ID = "request_id as text"


class _Column:
    """What a column can hold without changing it."""

    def __init__(self, type: pa.DataType) -> None:
        self.type = type
        self._is_list = bool(pa.types.is_list(type))
        item = type.value_type if self._is_list else type
        self._limit = 1 << (item.bit_width - 1) if pa.types.is_integer(item) else 0
        if self._limit:
            kinds: set[type] = {int}
        elif pa.types.is_floating(item):
            kinds = {int, float}
        else:
            kinds = {bool if pa.types.is_boolean(item) else str}
        self._kinds = kinds

    def takes(self, value: Any) -> bool:
        """Whether it can hold ``value``, which is not null. A bool is no number."""
        if self._is_list and type(value) is not list:
            return False
        values = value if self._is_list else (value,)
        if not set(map(type, values)) <= self._kinds:
            return False
        return not (self._limit and values) or -self._limit <= min(values) <= max(values) < self._limit


Columns: TypeAlias = dict[str, Union[_Column, "Columns"]]


def columns_of(fields: Iterable[pa.Field]) -> Columns:
    """The columns by name, those of a struct as a dict of their own."""
    return {
        field.name: columns_of(field.type) if pa.types.is_struct(field.type) else _Column(field.type)
        for field in fields
    }


def paths(record: dict[str, Any], columns: Columns, unknown: set[str], path: str = "") -> set[str]:
    """The fields of a record that have a column; the others are added to ``unknown``."""
    found = set()
    for name, value in record.items():
        column = columns.get(name)
        if column is None:
            unknown.add(path + name)
        elif isinstance(column, dict) and isinstance(value, dict):
            found |= paths(value, column, unknown, f"{path}{name}.")
        elif name == "request_id" and isinstance(value, str):
            found.add(_TEXT_ID)
        else:
            found.add(path + name)
    return found


def pruned(fields: Sequence[pa.Field], known: set[str], path: str = "") -> list[pa.Field]:
    """The fields with one of ``known`` in them, nullable but for those that every record has."""
    kept = []
    for field in fields:
        type = field.type
        if pa.types.is_struct(type):
            type = pa.struct(pruned(list(type), known, f"{path}{field.name}."))
            if type.num_fields == 0:
                continue
        elif path + field.name == "request_id" and _TEXT_ID in known:
            type = pa.string()
        elif path + field.name not in known:
            continue
        kept.append(pa.field(field.name, type, nullable=bool(path) or field.name not in REQUIRED))
    return kept


def check(place: str, record: dict[str, Any], columns: Columns, path: str = "") -> None:
    """No value may change on its way into its column. The readers have checked what every record must have.

    Raises:
        InputError: one would, in the record at ``place``.
    """
    for name, value in record.items():
        column = columns.get(name)
        if column is None or value is None or name in REQUIRED:
            continue
        if not isinstance(column, dict):
            right = column.takes(value)
        elif right := isinstance(value, dict):
            check(place, value, column, f"{path}{name}.")
        if not right:
            why = "not an object" if isinstance(column, dict) else f"which a column of {column.type} cannot hold"
            raise InputError(
                f'{place}: bad record: "{path}{name}" is {shown(value)}, {why}',
                "repair the record or remove the field",
            )
