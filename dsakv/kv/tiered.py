"""KV rows of which the device keeps some blocks: a hot tier, and a home for everything behind it.

A layer's step goes like this. ``append`` puts new rows into the sequences' open frames; a block that is full goes home
(in prefill at once, in decode as the options say). ``fetch`` looks the selection's blocks up, brings those that are not
on the device in one batch a tier, on a stream of its own where the device is CUDA, and lets the policy decide what
stays hot. ``gather`` waits for that and reads the rows.

Prefill reads past the hot tier: decode then starts as if the prompt's KV had been computed on another machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsakv.kv.frames import Frames
from dsakv.kv.homes import Home, HostArena
from dsakv.kv.ledger import Ledger
from dsakv.kv.marks import mark
from dsakv.kv.options import TierOptions
from dsakv.kv.step import BlockTable
from dsakv.kv.tiers.contract import open_remote
from dsakv.policies.base import Ints
from dsakv.policies.placement import Placement
from dsakv.request import Phase


class TieredRows:
    """Rows of ``n_blocks`` blocks in each layer. Raises InputError for tiers that cannot hold them, DsakvError where
    memory or a remote pool cannot be had.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_blocks: int,
        block_size: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        seats: int,
        options: TierOptions,
    ) -> None:
        self.n_layers, self.n_blocks, self.block_size, self.width = n_layers, n_blocks, block_size, width
        self.device, self.options = device, options
        numbers, block_numbers = n_blocks * n_layers, block_size * width
        self.row_bytes = width * dtype.itemsize
        self.block_bytes = block_size * self.row_bytes
        tiers = options.resolve(n_blocks, self.block_bytes, n_layers)
        pin = device.type == "cuda"
        arena = None
        if tiers.local_blocks:
            hint = "lower --kv-local" if options.remote else "give --kv-remote, or lower --batch-size or --kv-blocks"
            arena = HostArena(tiers.local_blocks * n_layers, block_numbers, dtype, pin=pin, hint=hint)
        self.frames = Frames(
            n_layers=n_layers, n_blocks=n_blocks, hot=tiers.hot_blocks, scope=tiers.scope, seats=seats,
            block_numbers=block_numbers, dtype=dtype, device=device,
        )  # fmt: skip
        remote = None
        if options.remote:
            remote = open_remote(
                options.remote, n_blocks=numbers, block_bytes=self.block_bytes, timeout_s=options.timeout_s
            )
        self.home = Home(arena, remote, numbers, block_numbers, dtype)
        self.placement = Placement(tiers.placement(n_layers), n_blocks)
        self.placement.prepare()
        self.dirty = np.zeros(numbers, dtype=np.bool_)
        """Hot blocks that home does not have yet."""
        self.ledger = Ledger()
        self.stream: Any = torch.cuda.Stream(device) if pin else None
        self._dtype, self._pin = dtype, pin
        self._bounce = torch.empty(0, block_numbers, dtype=dtype, pin_memory=pin)
        self._bounce_used: Any = None
        self._seats: dict[BlockTable, int] = {}
        self._free_seats = list(range(seats))

    def seat(self, table: BlockTable) -> int:
        """The seat of a running sequence, whose open frames have the same number."""
        if table not in self._seats:
            self._seats[table] = self._free_seats.pop()
        return self._seats[table]

    def retire(self, tables: Iterable[BlockTable], unheld: Sequence[int], published: Sequence[int]) -> None:
        """These sequences have ended: what nobody holds any more leaves all but its home, and comes home first where
        later prompts may use it.
        """
        for table in tables:
            if (seat := self._seats.pop(table, None)) is not None:
                self._free_seats.append(seat)
        if not unheld:
            return
        blocks = np.array(sorted(unheld), dtype=np.int64)
        numbers = self._numbers(blocks)
        kept = self._numbers(np.array(sorted(published), dtype=np.int64))
        self.write_home("decode", kept[self.dirty[kept]])
        self.dirty[numbers] = False
        self.frames.cool(numbers[self.frames.hot[numbers] >= 0])
        self.home.let_go(numbers)
        self.placement.drop(blocks)

    def bounce(self, count: int) -> Tensor:
        """A host buffer for so many blocks, ``[count, block_numbers]``, used for one transfer at a time."""
        if self._bounce_used is not None:
            self._bounce_used.synchronize()
        if len(self._bounce) < count:
            self._bounce = torch.empty(count, self._bounce.shape[1], dtype=self._dtype, pin_memory=self._pin)
        return self._bounce[:count]

    def to_frames(self, frames: Ints, content: Tensor) -> None:
        """Copy blocks out of the bounce buffer."""
        self.frames.put(frames, content)
        if self.stream is not None:
            self._bounce_used = torch.cuda.Event()
            self._bounce_used.record(self.stream)

    def write_home(self, phase: Phase, numbers: Ints, content: Tensor | None = None) -> None:
        """Write blocks home: ``content`` ``[n, block_numbers]``, or what their hot frames hold."""
        if not len(numbers):
            return
        if content is None:
            content = self.frames.take(self.frames.hot[numbers])
        begin, retries = mark(self.device), self.home.retries
        self.home.write(numbers, content.cpu())
        self.dirty[numbers] = False
        end = mark(self.device)
        self.ledger.wrote(phase, self.home.tier, len(numbers), len(numbers) * self.block_bytes, begin, end)
        self.ledger.retried(phase, self.home.tier, self.home.retries - retries)

    def close(self) -> None:
        self.home.close()

    def _numbers(self, blocks: Ints) -> Ints:
        """Of these blocks in every layer."""
        return (blocks[:, None] * self.n_layers + np.arange(self.n_layers)).reshape(-1)
