"""What every figure is: something that sees batches of columns in the order of the trace and can be merged."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from dsakv.analysis.history import Accesses
from dsakv.analysis.records import BlockRecords

M = TypeVar("M", bound="Metric")


class Metric(Protocol):
    """One family of figures for one block size. It keeps sums alone: what a stream did before is in the history."""

    def add(self, batch: BlockRecords, accesses: Accesses) -> None:
        """Take in the next records."""

    def merge(self: M, later: M) -> None:
        """Add the figures of a later part of the trace."""

    def result(self) -> dict[str, Any]:
        """The figures as they stand in the results."""
