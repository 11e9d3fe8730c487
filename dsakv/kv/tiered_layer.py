"""One layer of a tiered cache in one step: new rows in, selected rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsakv.kv.marks import Mark, mark
from dsakv.kv.step import Read
from dsakv.kv.tiered_step import TieredStep, Wanted
from dsakv.kv.writes import Part
from dsakv.models.contracts import Selection
from dsakv.policies.base import Ints
from dsakv.policies.placement import HBM, LOCAL, REMOTE, Placed
from dsakv.request import TIERS, Phase

_NONE: Ints = np.zeros(0, dtype=np.int64)


class TieredLayers:
    """See :class:`~dsakv.kv.step.StepRows`."""

    def __init__(self, step: TieredStep) -> None:
        self.step = step

    def layer(self, layer_id: int) -> TieredLayer:
        return TieredLayer(self.step, layer_id)


class TieredLayer:
    """See :class:`~dsakv.kv.step.LayerRows`. Blocks go by number: ``block * layers + layer``."""

    def __init__(self, step: TieredStep, layer_id: int) -> None:
        self.step, self.store, self.writes, self.layer_id = step, step.store, step.writes, layer_id
        self._first_open = step.store.frames.first_open(layer_id)
        self.reads: list[Read] = []
        self._wanted: Wanted | None = None
        self._sequences: dict[int, Tensor] = {}
        self._own = _NONE  # blocks of this step in staging frames
        self._held: NDArray[np.uint8] | None = None  # [n_blocks] where blocks were found
        self._fetched: torch.cuda.Event | None = None

    def append(self, rows: Tensor) -> None:
        store, writes = self.store, self.writes
        store.frames.clear_staging()
        self._into_open(writes.goes_on, rows)
        if not self.step.tables.decode:
            content = []
            if len(writes.closed):
                content.append(store.frames.take(self._first_open + writes.closed_seats))
            if len(writes.whole):
                content.append(rows.index_select(0, writes.whole_rows).view(len(writes.whole), -1))
            if content:
                self._own = np.concatenate((writes.closed, writes.whole))
                whole = torch.cat(content)
                frames = store.frames.stage(len(self._own))
                store.frames.put(frames, whole)
                store.frames.point(self._numbers(self._own), frames)
                store.write_home(self.step.phase, self._numbers(self._own), whole)
            self._into_open(writes.begins, rows)
        if len(writes.opened):
            store.frames.point(self._numbers(writes.opened), self._first_open + writes.opened_seats)

    def fetch(self, selection: Selection | None) -> None:
        store, phase = self.store, self.step.phase
        store.frames.clear_staging(len(self._own))
        if selection is None:
            touched = self.step.everything()
        else:
            self._wanted = self.step.wanted(selection)
            touched = self._wanted.touched
        with self._on_copy_stream():
            held, cold = self._read_decoding(touched) if phase == "decode" else self._read_past_hot(phase, touched)
        found = np.bincount(held[touched], minlength=len(TIERS))
        for tier in range(len(TIERS)):
            store.ledger.found(phase, tier, int(found[tier]), int(cold[tier]))
        store.ledger.staged(phase, store.frames.staged)
        self._held = held

    def gather(self, rows: slice) -> Tensor:
        assert self._wanted is not None
        store = self.store
        self._wait()
        begin = mark(store.device)
        blocks, places = self._wanted.blocks[rows], self._wanted.places[rows]  # [t, K]
        frames = store.frames.readable.take(blocks * store.n_layers + self.layer_id)
        slots = frames * store.block_size + places
        stored = store.frames.data.view(-1, store.width).index_select(0, slots.view(-1)).view(*slots.shape, -1)
        count = int(np.minimum(self.step.lengths[rows], blocks.shape[1]).sum())  # padding columns aside
        self._note(self.step.phase, HBM, rows, count, count * store.row_bytes, begin)
        return stored  # [t, K, width]

    def sequence(self, segment: int) -> Tensor:
        """Before ``fetch`` what is not on the device is staged, and no policy hears of it."""
        if segment not in self._sequences:
            self._sequences[segment] = self._whole(segment)
        return self._sequences[segment]

    def _whole(self, segment: int) -> Tensor:
        store = self.store
        blocks = np.array(self.step.blocks(segment), dtype=np.int64)
        if self._held is None:
            store.frames.clear_staging(len(self._own))
            touched = np.zeros(store.n_blocks, dtype=np.bool_)
            touched[blocks] = True
            with self._on_copy_stream():
                self._read_past_hot("scoring", touched)
        self._wait()
        numbers = torch.from_numpy(self._numbers(blocks)).to(store.device)
        content = store.frames.data.index_select(0, store.frames.readable.take(numbers))
        return content.view(-1, store.width)[: self.step.tables.segments[segment].seq_len]

    def found(self, rows: Tensor) -> Tensor | None:
        assert self._held is not None
        assert self._wanted is not None
        held = torch.from_numpy(self._held).to(self.store.device)
        return held.take(self._wanted.blocks[rows])  # [B, K]

    def _read_decoding(self, touched: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], Ints]:
        """Let the policy see the step's set, and bring to the device what is not there.

        The tier of each block [n_blocks], and how many each tier had for the first time.
        """
        store, writes = self.store, self.writes
        if len(self.step.warm):
            self._warm_up()
        wanted = touched.copy()
        wanted[writes.open] = False
        wanted[writes.closed] = True
        blocks = np.flatnonzero(wanted)
        written = np.zeros(len(blocks), dtype=np.bool_)
        written[np.searchsorted(blocks, writes.closed)] = True
        held, cold = np.zeros(store.n_blocks, dtype=np.uint8), np.zeros(len(TIERS), dtype=np.int64)
        if len(blocks):
            placed = store.placement.step(self.layer_id, blocks, written)
            self._move(self.step.phase, blocks, placed, written)
            held[blocks] = placed.tier
            cold = np.bincount(placed.tier[placed.cold], minlength=len(TIERS))
        return held, cold

    def _warm_up(self) -> None:
        """Offer the prompts' blocks to the hot tier. Only what stays there, or on the host, is moved."""
        placed = self.store.placement.offer(self.layer_id, self.step.warm)
        self._move("warm_up", self.step.warm, placed, np.zeros(len(self.step.warm), dtype=np.bool_))
        self.store.frames.clear_staging()
        moved = placed.kept | placed.local_kept
        for number in (LOCAL, REMOTE):
            self.store.ledger.found("warm_up", number, int((moved & (placed.tier == number)).sum()))

    def _move(self, phase: Phase, blocks: Ints, placed: Placed, written: NDArray[np.bool_]) -> None:
        """Put into effect what was decided of the set ``blocks`` [k]."""
        store, frames = self.store, self.store.frames
        numbers = self._numbers(blocks)
        store.write_home(phase, placed.evicted[store.dirty[placed.evicted]])
        frames.cool(placed.evicted)
        hit = (placed.tier == HBM) & ~written
        leaving = numbers[hit & ~placed.kept]
        if len(leaving):  # read once more in this step, while others get their frames
            store.write_home(phase, leaving[store.dirty[leaving]])
            staged = frames.stage(len(leaving))
            frames.put(staged, frames.take(frames.hot[leaving]))
            frames.cool(leaving)
            frames.point(leaving, staged)
        entering = numbers[~hit & placed.kept]
        frames.point(entering, frames.heat(entering))
        if written.any():
            self._settle_closed(phase, numbers[written], placed.kept[written])
        missing = placed.tier != HBM
        destination = frames.hot[numbers]
        if phase == "warm_up":
            missing &= placed.kept | placed.local_kept
        else:
            passing = missing & ~placed.kept
            destination[passing] = frames.stage(int(passing.sum()))
            frames.point(numbers[passing], destination[passing])
        self._bring(phase, numbers, destination, np.where(missing, placed.tier, HBM), placed)

    def _settle_closed(self, phase: Phase, numbers: Ints, kept: NDArray[np.bool_]) -> None:
        """Bring blocks that this step filled from their open frames to where they stay."""
        store, frames = self.store, self.store.frames
        content = frames.take(self._first_open + self.writes.closed_seats)
        stays, goes = torch.from_numpy(np.flatnonzero(kept)), torch.from_numpy(np.flatnonzero(~kept))
        frames.put(frames.hot[numbers[kept]], content[stays.to(store.device)])
        if store.options.write == "through":
            store.write_home(phase, numbers, content)
        else:
            store.dirty[numbers[kept]] = True
            store.write_home(phase, numbers[~kept], content[goes.to(store.device)])

    def _read_past_hot(self, phase: Phase, touched: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], Ints]:
        """Stage what the step reads and the device does not have; as :meth:`_read_decoding`, nothing being cold."""
        store, frames = self.store, self.store.frames
        wanted = touched.copy()
        wanted[self.writes.open] = False
        wanted[self._own] = False
        blocks = np.flatnonzero(wanted)
        numbers = self._numbers(blocks)
        hot = frames.hot[numbers] >= 0
        tier = np.where(hot, HBM, store.home.held(numbers)).astype(np.uint8)
        staged = np.full(len(numbers), -1, dtype=np.int64)
        staged[~hot] = frames.stage(int((~hot).sum()))
        frames.point(numbers[~hot], staged[~hot])
        self._bring(phase, numbers, staged, tier)
        held = np.zeros(store.n_blocks, dtype=np.uint8)
        held[blocks] = tier
        return held, np.zeros(len(TIERS), dtype=np.int64)

    def _bring(
        self, phase: Phase, numbers: Ints, frames: Ints, tier: NDArray[np.uint8], placed: Placed | None = None
    ) -> None:
        """Copy those of the blocks [k] that are not in ``HBM`` into ``frames`` [k] (-1: only into host memory), one
        batch a tier; keep and let go the host's copies as ``placed`` says.
        """
        home = self.store.home
        self._batch(phase, LOCAL, numbers, frames, tier == LOCAL, home.read_local)
        if placed is not None and len(placed.local_evicted):
            home.let_go(placed.local_evicted)
        remote = tier == REMOTE
        content = self._batch(phase, REMOTE, numbers, frames, remote, home.read_remote)
        if placed is not None and content is not None and placed.local_kept.any():
            stays = placed.local_kept[remote]
            home.keep(numbers[remote][stays], content[torch.from_numpy(stays)])

    def _batch(
        self, phase: Phase, tier: int, numbers: Ints, frames: Ints, which: NDArray[np.bool_],
        read: Callable[[Ints, Tensor], None],
    ) -> Tensor | None:  # fmt: skip
        """Read ``which`` [k] of the blocks; returns them as they lie in the bounce buffer, None where none are."""
        store = self.store
        numbers, frames = numbers[which], frames[which]
        if not len(numbers):
            return None  # before the buffer is asked for, which waits for its last copy
        content = store.bounce(len(numbers))
        begin, retries = mark(store.device), store.home.retries
        read(numbers, content)
        on_device = frames >= 0
        store.to_frames(frames[on_device], content if on_device.all() else content[torch.from_numpy(on_device)])
        every = slice(0, len(self.step.lengths))
        self._note(phase, tier, every, len(numbers), len(numbers) * store.block_bytes, begin)
        store.ledger.retried(phase, tier, store.home.retries - retries)
        return content

    def _note(self, phase: Phase, tier: int, rows: slice, ops: int, n_bytes: int, begin: Mark) -> None:
        """Book a read that ends now."""
        end = mark(self.store.device)
        self.reads.append(Read(tier, rows, begin, end))
        self.store.ledger.read(phase, tier, ops, n_bytes, begin, end)

    def _wait(self) -> None:
        """Let what follows on the device wait for the copies."""
        if self._fetched is not None:
            torch.cuda.current_stream(self.store.device).wait_event(self._fetched)

    @contextmanager
    def _on_copy_stream(self) -> Iterator[None]:
        """Copies wait for what the device was told before, and compute that follows goes on beside them."""
        store = self.store
        if store.stream is None:
            yield
            return
        store.stream.wait_stream(torch.cuda.current_stream(store.device))
        with torch.cuda.stream(store.stream):
            yield
        self._fetched = torch.cuda.Event()
        self._fetched.record(store.stream)

    def _into_open(self, part: Part, rows: Tensor) -> None:
        if len(part.rows):
            store = self.store
            slots = part.slots + self._first_open * store.block_size
            store.frames.data.view(-1, store.width).index_copy_(0, slots, rows.index_select(0, part.rows))

    def _numbers(self, blocks: Ints) -> Ints:
        return blocks * self.store.n_layers + self.layer_id
