"""What every reader of shards does with a record, whatever the file's format: order, counts, rejection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from dsakv.errors import InputError

KEPT_PLACES = 5
"""First places kept of each reason to reject."""


@dataclass(slots=True)
class Rejected:
    """Records left out for one reason."""

    count: int = 0
    places: list[str] = field(default_factory=list)
    """The first of them as ``file:line``, or ``file:row`` where a file has no lines."""


@dataclass(slots=True)
class ReadCounts:
    """What became of the records that were read; each counts in exactly one place."""

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


class BadRecordError(Exception):
    """One record that cannot be taken: ``reason`` to count it under, ``detail`` for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Intake:
    """Takes records in the order of the trace, over any number of shards: what was seen in one counts in the next.

    Args:
        on_error: ``strict`` raises at a bad record; ``skip`` leaves it out and counts it.
        request_order: a step must not go backwards within a request, rather than within a layer of a request.
        block_sizes: also check and collect ``block_size_tokens``, where a record has it.
        engine_steps: also fill ``TraceBatch.engine_step``; a record without it is bad.
    """

    def __init__(
        self,
        on_error: Literal["strict", "skip"],
        *,
        request_order: bool = False,
        block_sizes: bool = False,
        engine_steps: bool = False,
    ) -> None:
        self.counts = ReadCounts()
        self.block_sizes = block_sizes
        self.engine_steps = engine_steps
        self._strict = on_error == "strict"
        self._request_order = request_order
        self._last_step: dict[tuple[int, int], int] = {}  # by (request, layer)
        self._last_request_step: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []  # by number
        self._id_type: type | None = None

    @property
    def requests(self) -> set[int | str]:
        """Ids of the requests seen so far, as the records have them."""
        return set(self._numbers) if self._numbers else {request for request, _ in self._last_step}

    def number(self, request: int | str) -> int:
        """The number of a request in the columns: its id, or its place among the string ids seen so far.

        A new string is not entered before one of its records is in order, see :meth:`enter`.

        Raises:
            BadRecordError: the ids before it are of another type.
        """
        if self._id_type not in (None, type(request)):
            raise BadRecordError("wrong_type", f'"request_id" is {shown(request)}, of another type than before it')
        return request if isinstance(request, int) else self._numbers.get(request, len(self._numbers))

    def id_of(self, number: int) -> int | str:
        """The id of a request by its number in the columns."""
        return self._names[number] if self._names else number

    def enter(self, request: int | str, layer: int, step: int) -> int:
        """Note a record that is right in itself as the newest of its stream; returns the request's number.

        Raises:
            BadRecordError: it is out of order. Then nothing is noted.
        """
        number = self.number(request)
        stream = (number, layer)
        last = self._last_step.get(stream)
        if last is not None and step <= last:
            raise _out_of_order(request, layer, step, last)
        if self._request_order:
            last = self._last_request_step.get(number)
            if last is not None and step < last:
                raise _out_of_order(request, layer, step, last)
            self._last_request_step[number] = step
        self._id_type = type(request)
        if isinstance(request, str) and number == len(self._names):
            self._numbers[request] = number
            self._names.append(request)
        self._last_step[stream] = step
        return number

    def enter_many(self, requests: Sequence[int], layers: Sequence[int], steps: Sequence[int], begin: int = 0) -> int:
        """:meth:`enter` records with integer ids from ``begin`` on, up to the first that is out of order.

        Returns its index, or how many there are; entering that one alone says what is wrong with it.
        """
        if self._request_order or self._id_type not in (None, int):
            for at in range(begin, len(requests)):
                try:
                    self.enter(requests[at], layers[at], steps[at])
                except BadRecordError:
                    return at
            return len(requests)
        last_steps = self._last_step
        for at in range(begin, len(requests)):  # what ``enter`` does for integers, some hundred thousand times a second
            stream, step = (requests[at], layers[at]), steps[at]
            last = last_steps.get(stream)
            if last is not None and step <= last:
                return at
            last_steps[stream] = step
            self._id_type = int
        return len(requests)

    def reject(self, error: BadRecordError, path: Path, place: str) -> None:
        """Leave out the record at ``place`` (``line 3`` counts as ``file:3``) of ``path``.

        Raises:
            InputError: where every record must be right.
        """
        if self._strict:
            raise InputError(
                f"{path}:{place}: bad record: {error.detail}",
                "repair or remove it, or leave bad records out with --on-error skip",
            )
        rejected = self.counts.rejected.setdefault(error.reason, Rejected())
        rejected.count += 1
        if len(rejected.places) < KEPT_PLACES:
            rejected.places.append(f"{path.name}:{place}")


def shown(value: Any) -> str:
    """A value of a record for a message, not too long."""
    try:
        text = orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return "nested too deep to show"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _out_of_order(request: int | str, layer: int, step: int, last: int) -> BadRecordError:
    if step == last:
        return BadRecordError(
            "repeated_step", f"request {shown(request)}, layer {layer}, step {step} has been there before"
        )
    return BadRecordError(
        "backward_step", f"request {shown(request)}, layer {layer} goes back from step {last} to step {step}"
    )
