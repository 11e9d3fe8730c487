"""The engine: a generator of steps.

    for step in Engine(model, ...).run(requests):
        ...

A step computes either prompt tokens or one token of every running sequence; prompts go first, so that waiting requests
join the batch as soon as there is room. Each step is a pass over the layers of its own, unless weights are streamed:
then all steps of a batch's prompts share one. The engine owns the loop over layers; progress, timing and tracing are
bodies of the caller's loop over steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch

from dsakv.distributed import ALONE, World
from dsakv.engine.blocks import BlockManager
from dsakv.engine.clock import Clock, SharedClock, VirtualClock
from dsakv.engine.forward import Chunk, forward
from dsakv.engine.options import EngineOptions
from dsakv.engine.recording import Recorder
from dsakv.engine.sampling import sample
from dsakv.engine.scheduler import Clients, Pass, Scheduler, Work, blocks_needed
from dsakv.engine.sequence import Sequence
from dsakv.engine.weights import IN_PLACE, Weights
from dsakv.errors import DsakvError, InputError
from dsakv.kv.formats import row_format
from dsakv.kv.paged import PagedCache
from dsakv.models.contracts import Model
from dsakv.policies.placement import Tiers
from dsakv.request import Request, Step


def dismiss(world: World) -> None:
    """Let the engines of the other ranks return from ``follow``; rank 0 calls it when it has nothing more to run."""
    world.share(None)


class Engine:
    """Runs requests on a model, ``batch_size`` at a time.

    Where several ranks hold the model, rank 0's engine is used as if it were alone. Those of the others ``follow``:
    they take part in what it runs, and decide nothing that depends on the time or on chance. They wait in a run until
    its last step is taken: only then may the next begin, or ``dismiss`` be called.
    """

    def __init__(self, model: Model, options: EngineOptions, world: World = ALONE, weights: Weights = IN_PLACE) -> None:
        self.model, self.options, self.world, self.weights = model, options, world, weights
        self._steps = 0
        self._running = False

    def follow(self) -> None:
        """Take part in the runs of rank 0's engine until its ``dismiss``."""
        nothing: list[Request] | None = None
        while (requests := self.world.share(nothing)) is not None:
            for _ in self._start(requests, VirtualClock()):
                pass

    def check(self, requests: list[Request]) -> None:
        """Raise InputError for a request that the model cannot hold, or for tiers that cannot hold them all."""
        for request in requests:
            ids, name = request.prompt_token_ids, request.source_id or request.request_id
            total = len(ids) + request.max_new_tokens
            if not ids:
                raise InputError(f"prompt {name} is empty", "remove it from the input")
            if total > self.model.max_seq_len:
                raise InputError(
                    f"prompt {name} has {len(ids)} tokens; with "
                    f"{request.max_new_tokens} new ones it exceeds the limit of {self.model.max_seq_len}",
                    "shorten the prompt, or lower --max-new-tokens",
                )
            low, high = min(ids), max(ids)
            if low < 0 or high >= self.model.vocab_size:
                raise InputError(
                    f"prompt {name} holds token {low if low < 0 else high}, the vocabulary has {self.model.vocab_size}",
                    "were the token ids made for another model?",
                )
            needed = blocks_needed(request, self.options.block_size)
            if 0 < self.options.kv_blocks < needed:
                raise InputError(
                    f"prompt {name} with its {request.max_new_tokens} new tokens fills {needed} blocks, "
                    f"the KV cache has {self.options.kv_blocks}",
                    "raise --kv-blocks, or shorten the prompt",
                )
        self.tiers(requests)

    def tiers(self, requests: list[Request]) -> Tiers | None:
        """What tiers ``run`` would have for these requests; None where all KV is on the device, or there are none.

        Raises InputError where they would be too small.
        """
        if self.options.tiers is None or not requests:
            return None
        model, block_size = self.model, self.options.block_size
        row_bytes = row_format(model.kv_row_dim, model.dtype, model.kv_fp8).row_bytes
        return self.options.tiers.resolve(self.n_blocks(requests), block_size * row_bytes, len(model.layers))

    def run(self, requests: Iterable[Request], clock: Clock | None = None) -> Iterator[Step]:
        """The steps that complete ``requests``, each admitted after its arrival and in that order.

        The KV cache is sized for them, so all are known at the start. Steps are numbered on from those of earlier
        runs. Times are told by ``clock``, a :class:`VirtualClock` by default, from the first step on. Raises, before
        any step is asked for, InputError as ``check`` does and DsakvError where there is no room for the KV cache.
        """
        waiting = list(requests)
        self.check(waiting)
        if self._running and self.world.size > 1:
            raise RuntimeError("the run before has steps left, in which the other ranks wait")
        return self._start(self.world.share(waiting), clock or VirtualClock())

    def _start(self, waiting: list[Request], clock: Clock) -> Iterator[Step]:
        options, n_blocks = self.options, self.n_blocks(waiting)
        cache = PagedCache(
            n_layers=len(self.model.layers),
            n_blocks=n_blocks,
            block_size=options.block_size,
            row_dim=self.model.kv_row_dim,
            index_dim=self.model.index_key_dim,
            dtype=self.model.dtype,
            device=self.model.device,
            fp8=self.model.kv_fp8,
            tiers=options.tiers if waiting else None,
            seats=min(options.batch_size, len(waiting)),
        )
        if self.world.size > 1:
            clock = SharedClock(clock, self.world)
        clients = Clients(waiting, options.max_concurrency)
        scheduler = Scheduler(clients, BlockManager(n_blocks), options, self.model.device)
        clock.pause()
        return self._serve(scheduler, cache, clock)

    def n_blocks(self, requests: Iterable[Request]) -> int:
        """Blocks of the KV cache for these requests."""
        options = self.options
        needs = [blocks_needed(request, options.block_size) for request in requests]
        at_once = needs if options.prefix_cache else heapq.nlargest(options.batch_size, needs)
        return options.kv_blocks or sum(at_once)

    def _serve(self, scheduler: Scheduler, cache: PagedCache, clock: Clock) -> Iterator[Step]:
        self._running = True
        try:
            yield from self._steps_of(scheduler, cache, clock)
        except BaseException:
            with suppress(DsakvError):  # the first error is the one to tell
                cache.close()
            raise
        cache.close()
        self._running = False

    def _steps_of(self, scheduler: Scheduler, cache: PagedCache, clock: Clock) -> Iterator[Step]:
        clock.resume()
        while not scheduler.done:
            if (arrival := scheduler.idle_until) is not None:
                clock.wait_until(arrival)
            planned = scheduler.plan(clock.now(), whole_prompts=self.weights.streamed)
            try:
                steps, finished = self._pass(planned, cache, clock)
            except torch.OutOfMemoryError as error:
                raise DsakvError(
                    f"{self.model.device} ran out of memory in a step of {len(planned.steps[0])} sequences",
                    "lower --prefill-chunk or --batch-size",
                ) from error
            blank, idle = scheduler.retire(finished, clock.now())
            cache.retire([sequence.table for sequence in finished], blank + idle, idle)
            clock.pause()
            steps[-1] = replace(steps[-1], traffic=cache.traffic())
            yield from steps
            clock.resume()

    @torch.inference_mode()
    def _pass(self, planned: Pass, cache: PagedCache, clock: Clock) -> tuple[list[Step], list[Sequence]]:
        """Compute the planned steps; also returns which sequences are finished."""
        begin = self._time(clock)
        chunks = [self._chunk(works, planned.kind, cache, begin) for works in planned.steps]
        forward(self.model, self.weights, chunks)
        new_tokens = self._sample(chunks)
        weights = self.weights.traffic()
        now = self._time(clock)
        shares = _shares(round((now - begin) * 1e6), [len(chunk.token_ids) for chunk in chunks])
        steps, finished = [], []
        for chunk, tokens, wall_us in zip(chunks, new_tokens, shares, strict=True):
            for sequence, span in chunk.works:
                sequence.advance(span.length, now)
            completions = []
            for sequence, _ in chunk.ready:
                stopped = not sequence.forced and sequence.token_ids[-1] in self.options.eos_token_ids
                if stopped or sequence.forced or sequence.generated == sequence.request.max_new_tokens:
                    finished.append(sequence)
                    completions.append(sequence.completion(stopped=stopped, now=now))
            recorder = chunk.recorder
            steps.append(
                Step(
                    index=self._steps,
                    kind=planned.kind,
                    wall_us=wall_us,
                    new_tokens=tokens,
                    prompt_tokens=len(chunk.token_ids) if planned.kind == "prefill" else 0,
                    finished=completions,
                    records=recorder.records(self.model, cache.row_bytes) if recorder else None,
                )
            )
            self._steps += recorder.decode_steps if recorder else 1
        steps[-1] = replace(steps[-1], weights=weights)
        return steps, finished

    def _chunk(self, works: list[Work], kind: Literal["prefill", "decode"], cache: PagedCache, begin: float) -> Chunk:
        for sequence, _ in works:
            sequence.begin(begin)
        chunk = Chunk(works, cache, self.model, decode=kind == "decode")
        if self.options.record:
            tail = self.options.record_prefill_tail if kind == "prefill" else None
            chunk.recorder = Recorder([work.sequence for work in works], chunk.bound.segments, tail)
        return chunk

    def _sample(self, chunks: list[Chunk]) -> list[list[tuple[int, int]]]:
        """Append the next token to every sequence that is ready for it; (request, token) pairs of each chunk."""
        found: list[list[tuple[int, int]]] = [[] for _ in chunks]
        if not any(chunk.asking for chunk in chunks):
            return found
        with self.weights.head():
            for chunk, pairs in zip(chunks, found, strict=True):
                if not (asking := chunk.asking):
                    continue
                rows = torch.tensor([row for _, row in asking], device=chunk.hidden.device)
                logits = self.model.logits(chunk.hidden[rows])  # [n, vocab]
                tokens: list[int] = []
                if self.world.rank == 0:
                    generators = [sequence.generator for sequence, _ in asking]
                    tokens = sample(logits, self.options.temperature, generators, self.options.top_p)
                tokens = self.world.share(tokens)
                for (sequence, _), token in zip(asking, tokens, strict=True):
                    sequence.token_ids.append(token)
                    pairs.append((sequence.request.request_id, token))
        return found

    def _time(self, clock: Clock) -> float:
        if self.options.sync and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return clock.now()


def _shares(total: int, parts: list[int]) -> list[int]:
    """``total`` divided in proportion to ``parts``, to whole numbers with the same sum."""
    ends = [round(total * end / sum(parts)) for end in accumulate(parts)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
