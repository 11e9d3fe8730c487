"""Which requests a step works on: who has been sent, who is admitted, and how many tokens of each are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Literal, NamedTuple

import torch

from dsakv.engine.blocks import BlockManager, blocks_for
from dsakv.engine.options import EngineOptions
from dsakv.engine.sequence import Sequence
from dsakv.kv.step import BlockTable, Span
from dsakv.request import Request

Sent = tuple[Request, float]
"""A request, and when it was sent."""


class Work(NamedTuple):
    """What a step computes of a sequence."""

    sequence: Sequence
    span: Span


class Pass(NamedTuple):
    """Steps whose tokens go through each layer one step after the other, before the next layer's turn."""

    kind: Literal["prefill", "decode"]
    steps: list[list[Work]]


class Clients:
    """Those who send the requests: each at its time, and at most ``max_concurrency`` in flight (0: no limit).

    What was sent waits in ``queue`` for the engine.
    """

    def __init__(self, requests: Iterable[Request], max_concurrency: int = 0) -> None:
        self.queue: deque[Sent] = deque()
        self._unsent = deque(sorted(requests, key=lambda request: request.arrival_s or 0.0))
        self._limit = max_concurrency
        self._in_flight = 0
        self._free_since = 0.0

    @property
    def next_arrival(self) -> float | None:
        """When the next request wants to be sent; None where none is left."""
        return self._unsent[0].arrival_s or 0.0 if self._unsent else None

    def send(self, now: float) -> None:
        """Put into the queue what was sent up to now."""
        while self._unsent and (self._unsent[0].arrival_s or 0.0) <= now and not self._full:
            request = self._unsent.popleft()
            self.queue.append((request, max(request.arrival_s or 0.0, self._free_since)))
            self._in_flight += 1

    def finished(self, count: int, now: float) -> None:
        """``count`` requests were answered at ``now``."""
        self.send(now)  # those whose time came before
        if count and self._full:
            self._free_since = now
        self._in_flight -= count

    @property
    def _full(self) -> bool:
        return 0 < self._limit <= self._in_flight


class Scheduler:
    """Prompts go first and in order, ``prefill_chunk`` tokens a step; then every running sequence decodes one token.

    A sequence is admitted when its prefill begins, so that it finds the blocks of all prompts before it in the
    cache, those of its own step too: a layer stores the rows of a whole step before it reads any.
    """

    def __init__(self, clients: Clients, manager: BlockManager, options: EngineOptions, device: torch.device) -> None:
        self.running: list[Sequence] = []
        self._clients, self._manager, self._options, self._device = clients, manager, options, device
        self._joining = 0  # by batch: how many of the queue may still join those that run
        self._head: Sequence | None = None  # of the queue, while too few blocks are free for it

    @property
    def done(self) -> bool:
        return not self.running and not self._clients.queue and self._clients.next_arrival is None

    @property
    def idle_until(self) -> float | None:
        """When the next request comes, where there is nothing to do before; None where there is."""
        return None if self.running or self._clients.queue else self._clients.next_arrival

    def plan(self, now: float, *, whole_prompts: bool = False) -> Pass:
        """What is computed next. With ``whole_prompts`` all steps that prefill, until nothing is left to."""
        self._clients.send(now)
        if not self.running:
            self._joining = min(self._options.batch_size, len(self._clients.queue))
        steps = []
        while step := self._prefill_step():
            steps.append(step)
            if not whole_prompts:
                break
        if steps:
            return Pass("prefill", steps)
        return Pass("decode", [[self._work(sequence, 1) for sequence in self.running]])

    def _prefill_step(self) -> list[Work]:
        """Up to ``prefill_chunk`` prompt tokens."""
        planned = []
        room = self._options.prefill_chunk
        for sequence in self._prefilling():
            length = min(room, sequence.to_prefill - sequence.planned)
            planned.append(self._work(sequence, length))
            room -= length
            if not room:
                break
        return planned

    def retire(self, finished: Collection[Sequence], now: float) -> tuple[list[int], list[int]]:
        """Let sequences go that are finished; as :meth:`BlockManager.release`."""
        blank: list[int] = []
        idle: list[int] = []
        for sequence in finished:
            for found, released in zip((blank, idle), self._manager.release(sequence.table.blocks), strict=True):
                found += released
        self.running = [sequence for sequence in self.running if sequence not in finished]
        self._clients.finished(len(finished), now)
        return blank, idle

    def _prefilling(self) -> Iterator[Sequence]:
        """Sequences with prompt tokens to compute; one more is admitted whenever one more is asked for."""
        yield from [sequence for sequence in self.running if sequence.prefilling]
        continuous = self._options.admission == "continuous"
        queue = self._clients.queue
        while queue and (len(self.running) < self._options.batch_size if continuous else self._joining):
            sequence = self._head or Sequence(*queue[0], self._options.seed, self._device)
            if not self._place(sequence):
                self._head = sequence
                return
            self._head = None
            queue.popleft()
            self._joining -= 1
            self.running.append(sequence)
            yield sequence

    def _place(self, sequence: Sequence) -> bool:
        """Give the sequence all blocks that it will need, if so many are free."""
        options = self._options
        shared: list[int] = []
        if options.prefix_cache:
            # The last token is computed in any case, for its logits, and so is what is to be recorded.
            reusable = sequence.prompt_tokens - max(1, options.record_prefill_tail)
            shared = self._manager.cached(sequence.hashes(max(0, reusable), options.block_size))
        blocks = self._manager.allocate(blocks_needed(sequence.request, options.block_size), shared)
        if blocks is not None:
            sequence.place(BlockTable(blocks, self._device), len(shared) * options.block_size)
        return blocks is not None

    def _work(self, sequence: Sequence, length: int) -> Work:
        """Plan the next tokens of a sequence, and offer the blocks that they fill to other prompts."""
        span = sequence.plan(length)
        if self._options.prefix_cache:
            hashes = sequence.hashes(sequence.planned, self._options.block_size)
            for i in range(span.start // self._options.block_size, len(hashes)):
                self._manager.publish(sequence.table.blocks[i], hashes[i])
        return Work(sequence, span)


def blocks_needed(request: Request, block_size: int) -> int:
    """KV blocks that a request fills to its end. The last generated token is never computed: its KV is not needed."""
    return blocks_for(len(request.prompt_token_ids) + request.max_new_tokens - 1, block_size)
