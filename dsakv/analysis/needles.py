"""Did the selection hold what the answer needs? For workloads that know where it stands, as RULER does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.locality import Columns
from dsakv.analysis.records import StreamRecords
from dsakv.compiled import compiled

NEEDLES = ("needle_recall", "needle_found")
Spans = Mapping[int | str, Sequence[tuple[int, int]]]
"""Half-open token ranges by id of the request; one without any does not count."""


def needle_recall(records: StreamRecords, spans: Spans, id_of: Callable[[int], int | str]) -> Columns:
    """Share of the needles' tokens that a record selects, and of the needles of which it selects a token, [2, R].

    NaN for a request without needles. ``positions`` may repeat; a token counts once. ``id_of`` tells the id of a
    request by the number that records have.
    """
    out = np.full((len(NEEDLES), len(records)), np.nan)
    if not spans:
        return out
    places: list[int] = [0]
    flat: list[tuple[int, int]] = []
    known: dict[int, int] = {}
    number = []
    for request in records.request.tolist():
        if request not in known:
            known[request] = len(known)
            flat += spans.get(id_of(request), ())
            places.append(len(flat))
        number.append(known[request])
    ranges = np.array(flat, dtype=np.int64).reshape(-1, 2)
    _recall(records.positions, records.offsets, np.array(number), np.array(places), ranges, out)
    return out


@compiled
def _recall(
    positions: NDArray[np.int32],  # [N]
    offsets: NDArray[np.int64],  # [R + 1]
    number: NDArray[np.int64],  # [R], of the request among those of the batch
    places: NDArray[np.int64],  # [requests + 1], into ranges
    ranges: NDArray[np.int64],  # [spans, 2]
    out: Columns,  # [2, R]
) -> None:
    for r in range(len(number)):
        own = positions[offsets[r] : offsets[r + 1]]
        total, selected, found = 0, 0, 0
        first, last = places[number[r]], places[number[r] + 1]
        for span in range(first, last):
            begin, end = ranges[span, 0], ranges[span, 1]
            hit, before = 0, -1
            for position in own[np.searchsorted(own, begin) : np.searchsorted(own, end)]:
                hit += position != before
                before = position
            total += end - begin
            selected += hit
            found += hit > 0
        if total:
            out[0, r] = selected / total
            out[1, r] = found / (last - first)
