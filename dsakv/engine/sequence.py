"""A request on its way through the engine."""

from __future__ import annotations

import hashlib
import time

import torch

from dsakv.kv.paged import BlockTable
from dsakv.request import Completion, Request


class Sequence:
    """The state of one running request: its tokens, its blocks, how far it is computed, its random numbers."""

    def __init__(self, request: Request, table: BlockTable, seed: int, device: torch.device, arrival: float) -> None:
        self.request = request
        self.table = table
        self.prompt_tokens = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)
        self.computed = 0
        """Tokens whose KV is in the cache."""
        self.generator = torch.Generator(device).manual_seed(_stream_seed(seed, request.request_id))
        self.arrival = arrival
        self.started = 0.0
        self.first_token = 0.0

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_tokens

    @property
    def generated(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    def begin(self) -> None:
        """Note the time where the prefill starts; called before every step that the sequence is part of."""
        if not self.computed:
            self.started = time.perf_counter()

    def append(self, token: int) -> None:
        if not self.generated:
            self.first_token = time.perf_counter()
        self.token_ids.append(token)

    def completion(self, *, stopped: bool, epoch: float) -> Completion:
        """What the request came to. Its last token is dropped where it ended the sequence (``stopped``)."""
        now = time.perf_counter()
        token_ids = self.token_ids[self.prompt_tokens :]
        decode_steps = len(token_ids) - 1
        return Completion(
            request_id=self.request.request_id,
            prompt_tokens=self.prompt_tokens,
            token_ids=token_ids[:-1] if stopped else token_ids,
            finish_reason="stop" if stopped else "length",
            decode_steps=decode_steps,
            arrival_ms=(self.arrival - epoch) * 1e3,
            queue_ms=(self.started - self.arrival) * 1e3,
            ttft_ms=(self.first_token - self.arrival) * 1e3,
            tpot_ms=(now - self.first_token) * 1e3 / decode_steps if decode_steps else None,
            latency_ms=(now - self.arrival) * 1e3,
        )


def _stream_seed(seed: int, request_id: int) -> int:
    """A seed of its own for each request, so that its tokens do not depend on its neighbours in the batch."""
    digest = hashlib.blake2b(f"{seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
