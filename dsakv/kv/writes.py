"""Where a step's own rows go in a tiered cache: into open frames, or as whole blocks straight home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsakv.kv.step import Span
from dsakv.policies.base import Ints


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that go into open frames."""

    rows: torch.Tensor  # [r] of the step's rows
    slots: torch.Tensor  # [r] where they go, counted from the layer's first open frame


@dataclass(frozen=True, slots=True)
class Writes:
    """A step's writes, the same in every layer. A block that began in an earlier step goes on in its open frame."""

    goes_on: Part
    closed: Ints  # blocks that their open frames fill, ascending
    closed_seats: Ints
    whole: Ints  # blocks that lie in the step entirely; in decode they go through open frames too
    whole_rows: torch.Tensor  # [len(whole) * block_size] of the step's rows
    begins: Part  # rows of blocks that the step begins and does not fill, in prefill
    opened: Ints  # blocks that are in open frames from this step on
    opened_seats: Ints
    open: Ints  # blocks that the step reads in open frames

    @classmethod
    def of(cls, spans: Sequence[Span], seats: Sequence[int], size: int, device: torch.device, decode: bool) -> Writes:
        """``seats`` [n] are those of the spans, ``size`` is that of a block."""
        goes_on: list[tuple[int, int]] = []  # row, slot
        begins: list[tuple[int, int]] = []
        closed: list[tuple[int, int]] = []  # block, seat
        opened: list[tuple[int, int]] = []
        open_blocks: list[int] = []
        whole: list[int] = []
        whole_rows: list[torch.Tensor] = []
        row = 0
        for span, seat in zip(spans, seats, strict=True):
            blocks = span.table.blocks
            position, end = span.start, span.start + span.length
            if decode or position % size:
                block, place = divmod(position, size)
                count = min(size - place, span.length)
                goes_on += [(row + i, seat * size + place + i) for i in range(count)]
                if place == 0:
                    opened.append((blocks[block], seat))
                if place + count == size:
                    closed.append((blocks[block], seat))
                if decode or place + count < size:
                    open_blocks.append(blocks[block])
                row, position = row + count, position + count
            count = (end - position) // size
            if count:
                whole += blocks[position // size : position // size + count]
                whole_rows.append(torch.arange(row, row + count * size))
                row, position = row + count * size, position + count * size
            if position < end:
                begins += [(row + i, seat * size + i) for i in range(end - position)]
                opened.append((blocks[position // size], seat))
                open_blocks.append(blocks[position // size])
                row += end - position
        rows = torch.cat(whole_rows) if whole_rows else torch.empty(0, dtype=torch.int64)
        return cls(
            _part(goes_on, device),
            *_columns(sorted(closed)),
            np.array(whole, dtype=np.int64),
            rows.to(device),
            _part(begins, device),
            *_columns(opened),
            np.array(open_blocks, dtype=np.int64),
        )


def _part(entries: list[tuple[int, int]], device: torch.device) -> Part:
    columns = torch.tensor(entries, dtype=torch.int64).reshape(-1, 2).T.contiguous().to(device)
    return Part(columns[0], columns[1])


def _columns(entries: list[tuple[int, int]]) -> tuple[Ints, Ints]:
    columns = np.array(entries, dtype=np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()
