"""Times batches of blocks on the links of this machine, through the tiered cache's own arena, buffer and frames.

A batch is read from its pool into the bounce buffer and copied into frames, or written from a tensor to its pool.
Before each batch another 64 MB are read and written, as compute does between two batches of a run: without that,
arena, buffer and even the code stay in the processor's caches, and a batch of a few blocks looks ten times as fast as
in a run. Memory is touched before it is timed, for the same reason in the other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsakv.analysis.links import LinkProfile, Pool
from dsakv.analysis.links_fit import Batch, fit_link
from dsakv.kv.frames import Frames
from dsakv.kv.homes import Home, HostArena
from dsakv.kv.marks import mark
from dsakv.kv.tiers.contract import RemotePool, open_remote

BATCHES = (1, 4, 16, 64, 256, 512, 2048)
"""Blocks of a batch."""
LARGEST = {"local_pool": 128 << 20, "remote_pool": 32 << 20}
"""Bytes of a batch at most."""
ARENA = 192 << 20
"""Bytes of the pool in host memory, where a run's are not known: more than caches hold."""
BETWEEN = 64 << 20
"""Bytes that are touched between two batches, likewise."""
ROW_BYTES = (576, 1152, 2304)
ROWS = (256, 2048, 8192)
"""Sizes and numbers of rows to gather on the device."""

Ints = NDArray[np.int64]
Statistic = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of batch."""

    tier: str
    direction: str
    block_bytes: int
    blocks: int
    once: Callable[[], float]
    """Does one; microseconds."""
    us: list[float] = field(default_factory=list)


class LinkBench:
    """All kinds of batches on the links of this machine, to be closed after use.

    Raises InputError for a URL that names no pool, DsakvError where memory or a remote pool cannot be had.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        remote: str | None,
        device: torch.device,
        timeout_s: float,
        *,
        arena: int = 0,
        between: int = 0,
    ) -> None:
        """``sizes`` of blocks are bytes, multiples of 4; ``remote`` is a URL. To measure for a certain run, ``arena``
        is what its KV takes in bytes, and ``between`` what a layer of it computes on.
        """
        arena, between = arena or ARENA, between or BETWEEN
        self._device, self._remotes = device, list[RemotePool]()
        self._rng = np.random.default_rng(0)
        self._between = torch.ones(between // 4)
        pin = device.type == "cuda"
        largest = max(min(LARGEST["local_pool"], arena), max(sizes))
        self._largest = {tier: min(limit, largest) for tier, limit in LARGEST.items()}
        # Pools of all block sizes lie in the same memory, one at a time.
        self._arena = HostArena(1, max(arena, largest) // 4, torch.float32, pin=pin)
        self._arena.blocks.zero_()
        self._bounce = torch.ones(largest // 4, pin_memory=pin)
        self._frames = torch.ones(largest // 4, device=device)
        self.kinds: list[Kind] = []
        try:
            for size in sizes:
                self._add("local_pool", size, None)
            for size in sizes if remote is not None else ():
                counts = self._counts("remote_pool", size)
                opened = open_remote(str(remote), n_blocks=max(counts), block_bytes=size, timeout_s=timeout_s)
                self._remotes.append(opened)
                self._add("remote_pool", size, opened)
        except BaseException:
            self.close()
            raise
        self._rows = torch.ones(ARENA // 4, device=device)
        self.kinds += [self._gathering(size, n) for size in ROW_BYTES for n in ROWS]

    def round(self, advance: Callable[[int], None] = lambda done: None, *, keep: bool = True) -> None:
        """Time every kind of batch once more; all in turn, so that a slow moment of the machine falls on several.

        ``keep`` False forgets the times: the first round pays for what is done once.
        """
        for kind in self.kinds:
            us = self.time(kind)
            if keep:
                kind.us.append(us)
                advance(1)

    def time(self, kind: Kind) -> float:
        """Microseconds of one batch, after other memory was touched."""
        self._between.add_(1.0)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return kind.once()

    def batches(self, statistic: Statistic) -> dict[tuple[str, str], list[Batch]]:
        """``statistic`` of the times of each kind, by tier and direction."""
        found: dict[tuple[str, str], list[Batch]] = {}
        for kind in self.kinds:
            one = Batch(kind.block_bytes, kind.blocks, statistic(kind.us))
            found.setdefault((kind.tier, kind.direction), []).append(one)
        return found

    def close(self) -> None:
        """Remove what lies in the remote pool."""
        for remote in self._remotes:
            remote.close()

    def _add(self, tier: str, size: int, remote: RemotePool | None) -> None:
        """Reads and writes of blocks of ``size`` bytes."""
        counts, numbers = self._counts(tier, size), size // 4
        slots = max(counts) if remote else self._arena.blocks.numel() // numbers
        arena = None
        if remote is None:
            arena = HostArena(0, numbers, torch.float32, pin=False)
            arena.blocks = self._arena.blocks.view(-1)[: slots * numbers].view(slots, numbers)
        home = Home(arena, remote, slots, numbers, torch.float32)
        frames = Frames(
            n_layers=1, n_blocks=0, hot=0, scope="layer", seats=0, block_numbers=numbers, dtype=torch.float32,
            device=self._device,
        )  # fmt: skip
        frames.data = self._frames[: max(counts) * numbers].view(-1, numbers)
        bounce = self._bounce[: max(counts) * numbers].view(-1, numbers)
        if remote is not None:
            home.write(np.arange(slots), bounce)  # what was never written cannot be read
        read = home.read_remote if remote is not None else home.read_local

        def reading(n: int) -> Callable[[], float]:
            def once() -> float:
                blocks, into, content = self._some(slots, n), self._into(len(frames.data), n), bounce[:n]
                begin = mark(self._device)
                read(blocks, content)
                frames.put(into, content)
                return begin.us_until(mark(self._device))

            return once

        def writing(n: int) -> Callable[[], float]:
            def once() -> float:
                blocks, content = self._some(slots, n), frames.take(self._some(len(frames.data), n))
                begin = mark(self._device)
                home.write(blocks, content.cpu())
                return begin.us_until(mark(self._device))

            return once

        for n in counts:
            self.kinds += [Kind(tier, "read", size, n, reading(n)), Kind(tier, "write", size, n, writing(n))]

    def _counts(self, tier: str, size: int) -> list[int]:
        return [n for n in BATCHES if n * size <= self._largest[tier]] or [1]

    def _some(self, slots: int, n: int) -> Ints:
        numbers: Ints = np.sort(self._rng.choice(slots, n, replace=False))
        return numbers

    def _into(self, frames: int, n: int) -> Ints:
        """Where a batch goes: half to frames that follow each other, as those of staging do and get used again at once,
        half anywhere, as hot ones."""
        staged = n // 2
        return np.concatenate([np.arange(staged), staged + self._rng.permutation(frames - staged)[: n - staged]])

    def _gathering(self, size: int, n: int) -> Kind:
        rows = self._rows[: len(self._rows) // (size // 4) * (size // 4)].view(-1, size // 4)

        def once() -> float:
            chosen: Tensor = torch.from_numpy(self._rng.integers(0, len(rows), n)).to(self._device)
            begin = mark(self._device)
            rows.index_select(0, chosen)
            return begin.us_until(mark(self._device))

        return Kind("hbm", "read", size, n, once)


def profile_of(name: str, batches: dict[tuple[str, str], list[Batch]]) -> LinkProfile:
    """The links that come nearest to measured batches."""
    links = {kind: fit_link(found) for kind, found in batches.items()}
    pools = {tier: Pool(links[tier, "read"], links[tier, "write"]) for tier, _ in links if tier != "hbm"}
    return LinkProfile(name, pools.get("local_pool"), pools.get("remote_pool"), links["hbm", "read"], measured=True)
