"""One layer of a tiered cache in one step: new rows in, selected rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsakv.kv.frames import Ints
from dsakv.kv.marks import mark
from dsakv.kv.step import Read, StepTables
from dsakv.kv.tiered import TieredRows
from dsakv.kv.writes import Part, Writes
from dsakv.models.contracts import Selection
from dsakv.policies.placement import HBM, LOCAL, REMOTE, Placed
from dsakv.request import Phase

_NONE: Ints = np.zeros(0, dtype=np.int64)


class TieredStep:
    """A step of all layers; see :class:`~dsakv.kv.step.StepRows`."""

    def __init__(self, store: TieredRows, tables: StepTables) -> None:
        self.store, self.tables = store, tables
        seats = [store.seat(span.table) for span in tables.spans]
        self.writes = Writes.of(tables.spans, seats, store.block_size, store.device, tables.decode)
        self.phase: Phase = "decode" if tables.decode else "prefill"
        begun = {
            block
            for span in tables.spans
            if store.options.start == "warm"
            for block in span.table.blocks[: span.begins // store.block_size]
        }
        self.warm = np.array(sorted(begun), dtype=np.int64)
        """Blocks that the hot tier is offered before decode reads."""
        ends = [np.arange(span.start, span.start + span.length) + 1 for span in tables.spans]
        self.lengths = np.concatenate(ends)
        """[T] tokens that each query may read."""

    def layer(self, layer_id: int) -> TieredLayer:
        return TieredLayer(self, layer_id)


class TieredLayer:
    """See :class:`~dsakv.kv.step.LayerRows`. Blocks go by number: ``block * layers + layer``."""

    def __init__(self, step: TieredStep, layer_id: int) -> None:
        self.store, self.tables, self.writes, self.phase = step.store, step.tables, step.writes, step.phase
        self.warm, self.layer_id = step.warm, layer_id
        self.lengths = step.lengths
        self._first_open = step.store.frames.first_open(layer_id)
        self.reads: list[Read] = []
        self.everything = slice(0, len(step.lengths))
        self._selection: Selection | None = None
        self._sequences: dict[int, Tensor] = {}
        self._own = _NONE  # blocks of this step in staging frames
        self._tier: Tensor | None = None  # [n_blocks] uint8 on the device: where blocks were found
        self._fetched: torch.cuda.Event | None = None

    def append(self, rows: Tensor) -> None:
        store, writes = self.store, self.writes
        store.frames.clear_staging()
        self._into_open(writes.goes_on, rows)
        if not self.tables.decode:
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
                store.write_home(self.phase, self._numbers(self._own), whole)
            self._into_open(writes.begins, rows)
        if len(writes.opened):
            store.frames.point(self._numbers(writes.opened), self._first_open + writes.opened_seats)

    def fetch(self, selection: Selection | None) -> None:
        store = self.store
        store.frames.clear_staging(len(self._own))
        self._selection = selection
        touched = self._touched(selection)  # [n_blocks]
        open_blocks = self.writes.open[touched[self.writes.open]]
        with self._on_copy_stream():
            if self.tables.decode:
                if len(self.warm):
                    self._warm_up()
                tier = self._read_decoding(touched)
            else:
                tier = self._read_past_hot(touched)
        store.ledger.found(self.phase, HBM, len(open_blocks))
        self._tier = torch.from_numpy(tier).to(store.device)

    def gather(self, rows: slice) -> Tensor:
        store = self.store
        self._wait()
        begin = mark(store.device)
        blocks, places = self._blocks[rows], self._places[rows]  # [t, K]
        frames = store.frames.readable.take(blocks * store.n_layers + self.layer_id)
        slots = frames * store.block_size + places
        stored = store.frames.data.view(-1, store.width).index_select(0, slots.view(-1)).view(*slots.shape, -1)
        end = mark(store.device)
        self.reads.append(Read(HBM, rows, begin, end))
        count = int(np.minimum(self.lengths[rows], blocks.shape[1]).sum())  # padding columns aside
        store.ledger.read(self.phase, HBM, count, count * store.row_bytes, begin, end)
        return stored  # [t, K, width]

    def sequence(self, segment: int) -> Tensor:
        """Before ``fetch`` what is not on the device is staged, and no policy hears of it."""
        if segment not in self._sequences:
            self._sequences[segment] = self._whole(segment)
        return self._sequences[segment]

    def _whole(self, segment: int) -> Tensor:
        store, tables = self.store, self.tables
        seq_len = tables.segments[segment].seq_len
        blocks = np.array(tables.spans[segment].table.blocks[: -(-seq_len // store.block_size)], dtype=np.int64)
        if self._tier is None:
            store.frames.clear_staging(len(self._own))
            touched = np.zeros(store.n_blocks, dtype=np.bool_)
            touched[blocks] = True
            with self._on_copy_stream():
                self._read_past_hot(touched, lookup=False)
        self._wait()
        numbers = torch.from_numpy(self._numbers(blocks)).to(store.device)
        content = store.frames.data.index_select(0, store.frames.readable.take(numbers))
        return content.view(-1, store.width)[:seq_len]

    def found(self, rows: Tensor) -> Tensor | None:
        assert self._tier is not None
        return self._tier.take(self._blocks[rows])  # [B, K]

    def _touched(self, selection: Selection | None) -> NDArray[np.bool_]:
        """Which blocks the step reads."""
        store, tables = self.store, self.tables
        touched = torch.zeros(store.n_blocks, dtype=torch.bool, device=store.device)
        if selection is None:
            for span, segment in zip(tables.spans, tables.segments, strict=True):
                touched[span.table.ids[: -(-segment.seq_len // store.block_size)]] = True
            return np.asarray(touched.cpu().numpy())
        columns = torch.arange(selection.positions.shape[1], device=store.device)
        # Padding columns read what the first one does.
        valid = columns < selection.counts.unsqueeze(1)  # [T, K]
        positions = torch.where(valid, selection.positions, selection.positions[:, :1])
        self._blocks, self._places = tables.blocks(positions, self.everything)  # [T, K]
        touched[self._blocks.view(-1)] = True
        return np.asarray(touched.cpu().numpy())

    def _read_decoding(self, touched: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Let the policy see the step's set, and bring to the device what is not there; the tier of each block."""
        store, writes = self.store, self.writes
        wanted = touched.copy()
        wanted[writes.open] = False
        wanted[writes.closed] = True
        blocks = np.flatnonzero(wanted)
        written = np.zeros(len(blocks), dtype=np.bool_)
        written[np.searchsorted(blocks, writes.closed)] = True
        tier = np.zeros(store.n_blocks, dtype=np.uint8)
        if len(blocks):
            placed = store.placement.step(self.layer_id, blocks, written)
            self._move(self.phase, blocks, placed, written)
            tier[blocks] = placed.tier
            read = ~written  # those are counted as open blocks are
            for number in (HBM, LOCAL, REMOTE):
                of_tier = read & (placed.tier == number)
                store.ledger.found(self.phase, number, int(of_tier.sum()), int(placed.cold[of_tier].sum()))
        return tier

    def _warm_up(self) -> None:
        """Offer the prompts' blocks to the hot tier. Only what stays there, or on the host, is moved."""
        placed = self.store.placement.step(self.layer_id, self.warm)
        self._move("warm_up", self.warm, placed, np.zeros(len(self.warm), dtype=np.bool_))
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
        seats = self.writes.closed_seats[np.argsort(self.writes.closed)]
        content = frames.take(self._first_open + seats)
        stays, goes = torch.from_numpy(np.flatnonzero(kept)), torch.from_numpy(np.flatnonzero(~kept))
        frames.put(frames.hot[numbers[kept]], content[stays.to(store.device)])
        if store.options.write == "through":
            store.write_home(phase, numbers, content)
        else:
            store.dirty[numbers[kept]] = True
            store.write_home(phase, numbers[~kept], content[goes.to(store.device)])

    def _read_past_hot(self, touched: NDArray[np.bool_], *, lookup: bool = True) -> NDArray[np.uint8]:
        """Stage what the step reads and the device does not have; the tier of each block."""
        store, frames = self.store, self.store.frames
        wanted = touched.copy()
        wanted[self.writes.open] = False
        wanted[self._own] = False
        blocks = np.flatnonzero(wanted)
        numbers = self._numbers(blocks)
        hot = frames.hot[numbers] >= 0
        held = np.where(hot, HBM, store.home.held(numbers)).astype(np.uint8)
        staged = np.full(len(numbers), -1, dtype=np.int64)
        staged[~hot] = frames.stage(int((~hot).sum()))
        frames.point(numbers[~hot], staged[~hot])
        self._bring(self.phase, numbers, staged, held)
        tier = np.zeros(store.n_blocks, dtype=np.uint8)
        tier[blocks] = held
        if lookup:
            own = int(touched[self._own].sum())
            store.ledger.found(self.phase, HBM, own + int(hot.sum()))
            for number in (LOCAL, REMOTE):
                store.ledger.found(self.phase, number, int((held == number).sum()))
        return tier

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
        if placed is not None and placed.local_kept.any():
            stays = placed.local_kept[remote]
            home.keep(numbers[remote][stays], content[torch.from_numpy(stays)])

    def _batch(
        self, phase: Phase, tier: int, numbers: Ints, frames: Ints, which: NDArray[np.bool_],
        read: Callable[[Ints, Tensor], None],
    ) -> Tensor:  # fmt: skip
        """Read ``which`` [k] of the blocks; returns them as they lie in the bounce buffer."""
        store = self.store
        numbers, frames = numbers[which], frames[which]
        content = store.bounce(len(numbers))
        if len(numbers):
            begin = mark(store.device)
            read(numbers, content)
            on_device = frames >= 0
            store.to_frames(frames[on_device], content if on_device.all() else content[torch.from_numpy(on_device)])
            end = mark(store.device)
            self.reads.append(Read(tier, self.everything, begin, end))
            store.ledger.read(phase, tier, len(numbers), len(numbers) * store.block_bytes, begin, end)
        return content

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
            slots = (part.seats + self._first_open) * store.block_size + part.places
            store.frames.data.view(-1, store.width).index_copy_(0, slots, rows.index_select(0, part.rows))

    def _numbers(self, blocks: Ints) -> Ints:
        return blocks * self.store.n_layers + self.layer_id
