"""A model in memory, with what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsakv.engine.weights import Weights
from dsakv.errors import InputError
from dsakv.jobs.recipe import Selected
from dsakv.kv.formats import row_format
from dsakv.models.contracts import Model
from dsakv.models.indexer import IndexerShape
from dsakv.tokenizer import Tokenizer
from dsakv.weights.streamer import Streamer


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, where the checkpoint has one, and what is worth saying about both."""

    model: Model
    weights: Weights
    """What puts its weights in place."""
    directory: Path
    eos_token_ids: frozenset[int]
    text_tokenizer: Tokenizer | None
    indexer: IndexerShape | None
    """Of the indexers, where they select."""
    indexer_digest: str | None
    """SHA-256 of their file, where they have one of their own."""
    selection: Selected
    name: str
    random_weights: bool
    caveat: str | None
    """What its selections are not, where that has to be said."""
    precision: Literal["float32", "bfloat16", "fp8"]
    index_fp8: bool
    slow: str | None
    """What keeps a GPU from its own kernels, if anything does."""

    @property
    def streamer(self) -> Streamer | None:
        """What brings its weights in; None where all are in place."""
        return self.weights if isinstance(self.weights, Streamer) else None

    def close(self) -> None:
        """Let go of the files and threads that streamed weights take."""
        self.weights.close()

    @property
    def max_seq_len(self) -> int:
        return self.model.max_seq_len

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InputError for a checkpoint without one: it takes and gives token ids alone."""
        if self.text_tokenizer is None:
            raise InputError(
                f"no tokenizer.json in {self.directory}: text cannot be read or printed",
                "copy the model's tokenizer files there, or use --json with prompt_token_ids in a .jsonl --input-file",
            )
        return self.text_tokenizer

    def text(self, token_ids: list[int]) -> str | None:
        """What the ids say; None without a tokenizer."""
        return self.text_tokenizer.decode(token_ids) if self.text_tokenizer else None

    def describe(self) -> dict[str, Any]:
        """The model's part of ``run_meta.json``."""
        model = self.model
        return {
            "name": self.name,
            "random_weights": self.random_weights,
            "caveat": self.caveat,
            "dtype": self.precision,
            "device": str(model.device),
            "index_fp8": self.index_fp8,
            "n_layers": len(model.layers),
            "selection": self.selection,
            "index_topk": model.top_k,
            "index_n_heads": self.indexer.n_heads if self.indexer else 0,
            "indexer_digest": self.indexer_digest,
            "index_head_dim": self.indexer.head_dim if self.indexer else 0,
            "max_seq_len": self.max_seq_len,
            "kv_bytes_per_token_layer": row_format(model.kv_row_dim, model.dtype, model.kv_fp8).row_bytes,
        }
