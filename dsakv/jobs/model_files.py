"""Where a model's parts are: a checkpoint folder, a GGUF file, or a model that comes with dsakv."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import dsakv
from dsakv.config import ModelConfig
from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.gguf.config import gguf_config
from dsakv.gguf.tokenizer import has_tokenizer, load_gguf_tokenizer
from dsakv.jobs.default_model import ensure_default_model
from dsakv.models.shapes import read_config
from dsakv.models.tiny import ensure_tiny_model
from dsakv.settings import cache_home
from dsakv.tokenizer import Tokenizer, generation_eos_ids, load_tokenizer
from dsakv.weights.checkpoint import Checkpoint, TensorSource
from dsakv.weights.gguf import GgufCheckpoint

INDEXER = Path(dsakv.__file__).parent / "models" / "smollm2_135m_dsa" / "indexer.safetensors"
"""Of the default model."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, whichever form they have."""

    path: Path
    """A checkpoint folder, or a GGUF file."""
    name: str
    indexer: Path | None = None
    remade: bool = False
    """Whether they are made anew where they are gone."""

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    @property
    def config_source(self) -> str:
        """The file that holds the config."""
        return str(self.path if self.is_gguf else self.path / "config.json")

    def config(self) -> dict[str, Any] | None:
        """As Hugging Face's ``config.json`` has it; None in a folder without. Raises InputError for a broken one."""
        if self.is_gguf:
            return gguf_config(self.path)
        path = Path(self.config_source)
        return read_config(path) if path.is_file() else None

    def open(self, file: str | None = None) -> AbstractContextManager[TensorSource]:
        """The weights: all of a folder, or those of one ``file`` in it."""
        return GgufCheckpoint(self.path) if self.is_gguf else Checkpoint(self.path, file)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where there is one. Raises InputError for one that cannot be read."""
        if self.is_gguf:
            return load_gguf_tokenizer(self.path) if has_tokenizer(self.path) else None
        return load_tokenizer(self.path) if (self.path / "tokenizer.json").is_file() else None

    def eos_ids(self, config: dict[str, Any]) -> frozenset[int]:
        """End-of-sequence ids of a model without tokenizer."""
        ids = config.get("eos_token_id")
        named = frozenset(i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int)
        return named if self.is_gguf else generation_eos_ids(self.path) or named


def find_model(config: ModelConfig, console: Console) -> ModelFiles:
    """The files of the model that ``config`` names; the embedded ones are made or fetched where they are not there.

    Raises InputError for names of nothing, DsakvError where an embedded model cannot be had.
    """
    indexer = Path(os.path.expanduser(config.indexer)) if config.indexer else None
    if indexer is not None and not indexer.is_file():
        if indexer.is_dir():
            raise InputError(f"--indexer {indexer} is a folder", "name the file in it, as indexer.safetensors")
        raise InputError(f"no indexer file at {indexer}", "--indexer takes what scripts/train_indexer.py writes")
    if config.ckpt_path is not None:
        path = Path(os.path.expanduser(config.ckpt_path))
        if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".gguf"):
            raise InputError(
                f"no checkpoint at {path}", "--ckpt-path names a directory of safetensors files, or a .gguf file"
            )
        return ModelFiles(path, path.resolve().name, indexer)
    if config.config is not None:
        raise InputError("--config without --ckpt-path", "name the checkpoint that has this shape; CONFIG counts too")
    if config.name == "tiny-random":
        return ModelFiles(_tiny(), f"{config.name} (embedded)", indexer, remade=True)
    base = ensure_default_model(cache_home(), console)
    return ModelFiles(base, f"{config.name} (base {base.name})", indexer or INDEXER, remade=True)


def _tiny() -> Path:
    try:
        return ensure_tiny_model(cache_home())
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DsakvError(
            f"cannot make the embedded model in {cache_home()}: {reason}",
            "set DSAKV_HOME to a writable folder with 30 MB free",
        ) from error
