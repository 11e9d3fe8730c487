"""A model of no layers, and a clock that only the test moves."""

from __future__ import annotations

import torch
from torch import Tensor


class FakeModel:
    """Takes any token and answers with token 0: what is left is the engine."""

    layers = ()
    top_k = 1
    kv_row_dim = index_key_dim = 1
    kv_fp8 = None
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, max_seq_len: int = 1 << 20, vocab_size: int = 1 << 20) -> None:
        self.max_seq_len, self.vocab_size = max_seq_len, vocab_size
        self.index_layer_ids: list[int] = []

    def embed(self, token_ids: Tensor) -> Tensor:
        return token_ids.new_zeros(len(token_ids), 1, dtype=torch.float32)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return positions, positions

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(len(hidden), 2)


class FakeTime:
    """Ticks by ``step`` seconds whenever it is read."""

    def __init__(self, step: float = 0.0) -> None:
        self.seconds, self.step = 0.0, step

    def __call__(self) -> float:
        self.seconds += self.step
        return self.seconds

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.seconds += seconds
