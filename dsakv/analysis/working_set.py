"""How many distinct blocks the last W records of a stream touch."""

from __future__ import annotations

from typing import Any

from dsakv.analysis.distribution import Distribution
from dsakv.analysis.history import Accesses
from dsakv.analysis.records import BlockRecords


class WorkingSet:
    """``working_set``: a distribution over records for each window; the history must count the same ``windows``."""

    def __init__(self, windows: tuple[int, ...]) -> None:
        self._sizes = {window: Distribution() for window in windows}

    def add(self, batch: BlockRecords, accesses: Accesses) -> None:
        for distribution, sizes in zip(self._sizes.values(), accesses.window_sizes, strict=True):
            distribution.add(sizes)

    def merge(self, later: WorkingSet) -> None:
        for window, distribution in self._sizes.items():
            distribution.merge(later._sizes[window])

    def result(self) -> dict[str, Any]:
        return {str(window): distribution.result() for window, distribution in self._sizes.items()}
