"""The engine: a generator of steps.

    for step in Engine(model, ...).run(requests):
        ...

A step is one forward pass, either over prompt tokens or over one token of every running sequence; prompts go first,
so that waiting requests join the batch as soon as there is room. The engine owns the loop over layers; progress,
timing and tracing are bodies of the caller's loop over steps.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from dsakv.engine.blocks import BlockManager, blocks_for
from dsakv.engine.recording import Recorder
from dsakv.engine.sampling import sample
from dsakv.engine.sequence import Sequence
from dsakv.errors import DsakvError, InputError
from dsakv.kv.paged import BlockTable, PagedCache
from dsakv.models.contracts import Model
from dsakv.request import Request, Step


@dataclass(frozen=True)
class EngineOptions:
    """How requests run, and what of it is recorded."""

    batch_size: int = 1
    block_size: int = 64
    prefill_chunk: int = 512
    temperature: float = 0.0
    seed: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    record: bool = False
    """Whether steps carry what the layers selected."""
    record_prefill_tail: int = 0
    """With ``record``: how many last queries of each prompt are recorded too."""
    sync: bool = True
    """On CUDA: wait for the device before the clock is read."""


class Engine:
    """Runs requests on a model, ``batch_size`` at a time."""

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self.model = model
        self.options = options
        self._steps = 0

    def check(self, requests: Iterable[Request]) -> None:
        """Raise InputError for a request that the model cannot hold."""
        for request in requests:
            total = len(request.prompt_token_ids) + request.max_new_tokens
            if not request.prompt_token_ids:
                raise InputError(f"prompt {request.request_id} is empty", "remove it from the input")
            if total > self.model.max_seq_len:
                raise InputError(
                    f"prompt {request.request_id} has {len(request.prompt_token_ids)} tokens; with "
                    f"{request.max_new_tokens} new ones it exceeds the limit of {self.model.max_seq_len}",
                    "shorten the prompt, or lower --max-new-tokens",
                )
            bad = next((t for t in request.prompt_token_ids if not 0 <= t < self.model.vocab_size), None)
            if bad is not None:
                raise InputError(
                    f"prompt {request.request_id} holds token {bad}, the vocabulary has {self.model.vocab_size}",
                    "were the token ids made for another model?",
                )

    def run(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yield the steps that complete ``requests``, admitted in order as others finish.

        The KV cache is sized for the ``batch_size`` longest of them, so all are known at the start. Steps are
        numbered on from those of earlier runs. Raises InputError as ``check`` does, before the first step.
        """
        waiting = deque(requests)
        self.check(waiting)
        options = self.options
        needs = [self._blocks_needed(request) for request in waiting]
        n_blocks = sum(heapq.nlargest(options.batch_size, needs))
        cache = PagedCache(
            n_layers=len(self.model.layers),
            n_blocks=n_blocks,
            block_size=options.block_size,
            row_dim=self.model.kv_row_dim,
            index_dim=self.model.index_key_dim,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        manager = BlockManager(n_blocks)
        running: list[Sequence] = []
        epoch = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < options.batch_size:
                blocks = manager.allocate(self._blocks_needed(waiting[0]))
                if blocks is None:
                    break
                table = BlockTable(blocks, self.model.device)
                running.append(Sequence(waiting.popleft(), table, options.seed, self.model.device, epoch))
            try:
                step = self._step(running, cache, epoch)
            except torch.OutOfMemoryError as error:
                raise DsakvError(
                    f"{self.model.device} ran out of memory in a step of {len(running)} sequences",
                    "lower --prefill-chunk or --batch-size",
                ) from error
            done = {completion.request_id for completion in step.finished}
            for sequence in running:
                if sequence.request.request_id in done:
                    manager.release(sequence.table.blocks)
            running = [sequence for sequence in running if sequence.request.request_id not in done]
            self._steps += 1
            yield step

    @torch.inference_mode()
    def _step(self, running: list[Sequence], cache: PagedCache, epoch: float) -> Step:
        """One forward pass over the next tokens of ``running``."""
        begin = self._clock()
        prefilling = [sequence for sequence in running if sequence.prefilling]
        batch, lengths = self._schedule(prefilling or running)
        starts = [sequence.computed for sequence in batch]
        for sequence in batch:
            sequence.begin()
        bound = cache.bind([sequence.table for sequence in batch], starts, lengths)
        tokens = [
            token
            for sequence, start, length in zip(batch, starts, lengths, strict=True)
            for token in sequence.token_ids[start : start + length]
        ]
        hidden = self.model.embed(torch.tensor(tokens, device=self.model.device))  # [T, dim]
        rope = self.model.rope(bound.positions)
        tail = self.options.record_prefill_tail if prefilling else None
        recorder = Recorder(batch, bound.segments, tail) if self.options.record else None
        for i, layer in enumerate(self.model.layers):
            output = layer(hidden, rope, bound.positions, bound.layer(i))
            hidden = output.hidden
            if recorder:
                recorder.add(output)
        for sequence, length in zip(batch, lengths, strict=True):
            sequence.computed += length
        new_tokens = self._sample(batch, hidden, [segment.rows.stop - 1 for segment in bound.segments])
        wall_us = round((self._clock() - begin) * 1e6)

        finished = []
        for sequence, token in new_tokens:
            stopped = token in self.options.eos_token_ids
            if stopped or sequence.generated == sequence.request.max_new_tokens:
                finished.append(sequence.completion(stopped=stopped, epoch=epoch))
        return Step(
            index=self._steps,
            kind="prefill" if prefilling else "decode",
            wall_us=wall_us,
            new_tokens=[(sequence.request.request_id, token) for sequence, token in new_tokens],
            prompt_tokens=len(tokens) if prefilling else 0,
            finished=finished,
            records=recorder.records(self.model, cache.row_bytes) if recorder else None,
        )

    def _schedule(self, sequences: list[Sequence]) -> tuple[list[Sequence], list[int]]:
        """Which sequences compute how many tokens: prompts share ``prefill_chunk``, decoding takes one each."""
        batch, lengths = [], []
        room = self.options.prefill_chunk
        for sequence in sequences:
            length = 1
            if sequence.prefilling:
                length = min(room, sequence.prompt_tokens - sequence.computed)
                room -= length
            if length:
                batch.append(sequence)
                lengths.append(length)
        return batch, lengths

    def _sample(self, batch: list[Sequence], hidden: torch.Tensor, last_rows: list[int]) -> list[tuple[Sequence, int]]:
        """Append the next token to every sequence of the batch whose prompt is computed."""
        ready = [(sequence, row) for sequence, row in zip(batch, last_rows, strict=True) if not sequence.prefilling]
        if not ready:
            return []
        rows = torch.tensor([row for _, row in ready], device=hidden.device)
        logits = self.model.logits(hidden[rows])  # [n, vocab]
        tokens = sample(logits, self.options.temperature, [sequence.generator for sequence, _ in ready])
        for (sequence, _), token in zip(ready, tokens, strict=True):
            sequence.append(token)
        return [(sequence, token) for (sequence, _), token in zip(ready, tokens, strict=True)]

    def _blocks_needed(self, request: Request) -> int:
        # The last generated token is never computed: its KV is not needed.
        return blocks_for(len(request.prompt_token_ids) + request.max_new_tokens - 1, self.options.block_size)

    def _clock(self) -> float:
        if self.options.sync and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
