"""A request on its way through the engine."""

from __future__ import annotations

import hashlib

import torch

from dsakv.kv.step import BlockTable, Span
from dsakv.prefix import chained_hash
from dsakv.request import Completion, Request


class Sequence:
    """The state of one running request: its tokens, its blocks, how far it is computed, its random numbers."""

    def __init__(self, request: Request, arrival: float, seed: int, device: torch.device) -> None:
        self.request = request
        self.arrival = arrival
        self.prompt_tokens = len(request.prompt_token_ids)
        forced = request.forced_token_ids
        self.token_ids = [*request.prompt_token_ids, *(forced or ())]
        self.to_prefill = self.prompt_tokens if forced is None else len(self.token_ids) - 1
        """Tokens whose KV is computed in chunks; of a forced answer the last one is never needed."""
        self.computed = 0
        """Tokens whose KV is in the cache."""
        self.planned = 0
        """Tokens that are in the cache, or will be after the steps that are planned."""
        self.cached_tokens = 0
        """How many of them an earlier request left there."""
        self.generator = torch.Generator(device).manual_seed(_stream_seed(seed, request.request_id))
        self.started: float | None = None
        self.first_token: float | None = None
        self._hashes: list[bytes] = []

    def place(self, table: BlockTable, cached_tokens: int) -> None:
        """Give the sequence its blocks, the first of which hold ``cached_tokens`` of its tokens already."""
        self.table = table
        self.planned = self.computed = self.cached_tokens = cached_tokens

    @property
    def prefilling(self) -> bool:
        """Whether a step that is not planned yet has to prefill."""
        return self.planned < self.to_prefill

    @property
    def forced(self) -> bool:
        return self.request.forced_token_ids is not None

    @property
    def generated(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    def hashes(self, tokens: int, block_size: int) -> list[bytes]:
        """Chained hashes of the full blocks among the first ``tokens`` tokens."""
        blocks = tokens // block_size
        while len(self._hashes) < blocks:
            begin = len(self._hashes) * block_size
            parent = self._hashes[-1] if self._hashes else b""
            self._hashes.append(chained_hash(parent, self.token_ids[begin : begin + block_size]))
        return self._hashes[:blocks]

    def plan(self, length: int) -> Span:
        """The next ``length`` tokens to compute, which a step will."""
        start = self.planned
        self.planned += length
        first_decode = not self.forced and start == self.prompt_tokens
        return Span(self.table, start, length, self.prompt_tokens if first_decode else 0)

    def begin(self, now: float) -> None:
        """Note when the prefill starts; called before every step that the sequence is part of."""
        if self.started is None:
            self.started = now

    def advance(self, tokens: int, now: float) -> None:
        """``tokens`` more are in the cache."""
        self.computed += tokens
        if self.first_token is None and self.computed >= self.prompt_tokens:
            self.first_token = now

    def completion(self, *, stopped: bool, now: float) -> Completion:
        """What the request came to. Its last token is dropped where it ended the sequence (``stopped``)."""
        token_ids = self.token_ids[self.prompt_tokens :]
        decode_steps = len(token_ids) - 1
        started, first_token = self.started or 0.0, self.first_token or 0.0
        return Completion(
            request_id=self.request.request_id,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            token_ids=token_ids[:-1] if stopped else token_ids,
            finish_reason="stop" if stopped else "length",
            decode_steps=decode_steps,
            arrival_ms=self.arrival * 1e3,
            queue_ms=(started - self.arrival) * 1e3,
            ttft_ms=(first_token - self.arrival) * 1e3,
            tpot_ms=(now - first_token) * 1e3 / decode_steps if decode_steps and not self.forced else None,
            latency_ms=(now - self.arrival) * 1e3,
            kv_blocks=self.table.blocks,
        )


def _stream_seed(seed: int, request_id: int) -> int:
    """A seed of its own for each request, so that its tokens do not depend on its neighbours in the batch."""
    digest = hashlib.blake2b(f"{seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
