"""A model ready to run, from what the configuration says."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError

import dsakv
from dsakv.config import ModelConfig
from dsakv.console import Console
from dsakv.distributed import ALONE, World
from dsakv.errors import DsakvError, InputError
from dsakv.kernels import tile
from dsakv.kernels.select import kernels_for, why_slow
from dsakv.kv.formats import row_format
from dsakv.models.contracts import Model
from dsakv.models.deepseek_v32 import DeepseekV32
from dsakv.models.dsa_shape import DsaShape, check_fp8, check_ranks
from dsakv.models.options import ModelOptions
from dsakv.models.shapes import dsa_shape_of, read_config
from dsakv.models.tiny import ensure_tiny_model
from dsakv.tokenizer import Tokenizer, generation_eos_ids, load_tokenizer
from dsakv.weights.checkpoint import Checkpoint
from dsakv.weights.layout import Layout, layout_of
from dsakv.weights.load import Progress, load_parameters, silent

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
"""What models of each precision compute in, quantised projections aside."""
SHOWN_FROM = 1_000_000_000
"""Bytes of weights whose loading is worth a progress bar."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, where the checkpoint has one, and what is worth saying about both."""

    model: Model
    directory: Path
    eos_token_ids: frozenset[int]
    text_tokenizer: Tokenizer | None
    shape: DsaShape
    name: str
    random_weights: bool
    precision: Literal["float32", "bfloat16", "fp8"]
    index_fp8: bool
    slow: str | None
    """What keeps a GPU from its own kernels, if anything does."""

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
            "dtype": self.precision,
            "device": str(model.device),
            "index_fp8": self.index_fp8,
            "n_layers": self.shape.n_layers,
            "index_topk": self.shape.index_topk,
            "index_n_heads": self.shape.index_n_heads,
            "index_head_dim": self.shape.index_head_dim,
            "max_seq_len": self.max_seq_len,
            "kv_bytes_per_token_layer": row_format(model.kv_row_dim, model.dtype, model.kv_fp8).row_bytes,
        }


def cache_home(environ: dict[str, str] | os._Environ[str] = os.environ) -> Path:
    """The folder for what dsakv makes or downloads once: ``DSAKV_HOME``, else ``dsakv`` in the user's cache."""
    if home := environ.get("DSAKV_HOME"):
        return Path(os.path.expanduser(home))
    return Path(os.path.expanduser(environ.get("XDG_CACHE_HOME") or "~/.cache")) / "dsakv"


def load_model(config: ModelConfig, world: World = ALONE, console: Console | None = None) -> LoadedModel:
    """Load the checkpoint that ``config`` names, or the embedded model; with several ranks, this rank's part of it.

    ``console`` is where rank 0 shows how far it is with a large one. Raises InputError for a checkpoint, shape,
    device or length that does not work.
    """
    device = choose_device(config.device)
    if config.ckpt_path is None:
        if config.config is not None:
            raise InputError(
                "--config without --ckpt-path", "name the checkpoint that has this shape; CONFIG counts too"
            )
        try:
            directory = ensure_tiny_model(cache_home())
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DsakvError(
                f"cannot make the embedded model in {cache_home()}: {reason}",
                "set DSAKV_HOME to a writable folder with 30 MB free",
            ) from error
    else:
        directory = Path(os.path.expanduser(config.ckpt_path))
        if not directory.is_dir():
            raise InputError(f"no checkpoint at {directory}", "--ckpt-path names a directory of safetensors files")
    config_path = _find_config(config.config) if config.config else directory / "config.json"
    raw = read_config(config_path)
    shape = dsa_shape_of(raw, str(config_path))
    check_ranks(shape, world.size, str(config_path))
    layout = layout_of(directory, shape, world)
    precision = _precision(config.dtype, device, directory, layout)
    fp8 = precision == "fp8"
    index_fp8 = config.index_fp8 or fp8
    if index_fp8 and shape.index_head_dim & (shape.index_head_dim - 1):
        flag, without = ("--dtype fp8", "use another --dtype") if fp8 else ("--index-fp8", "leave it out")
        raise InputError(
            f"{flag} rotates index keys by a Hadamard matrix, which has no size {shape.index_head_dim}",
            f"{without}: this model's index_head_dim is no power of two",
        )
    if fp8:
        check_fp8(shape, world.size, str(config_path))
    # Before the weights: it takes seconds, they may take minutes.
    tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").is_file() else None
    options = ModelOptions(_DTYPES[precision], device, kernels_for(device), world=world, fp8=fp8, index_fp8=index_fp8)
    model = DeepseekV32(shape, options)
    try:
        with Checkpoint(directory, layout.file) as checkpoint:
            load_parameters(model, checkpoint, layout, device=device, progress=_progress(console, world))
    except InputError as error:
        if config.ckpt_path is None:
            raise DsakvError(error.message, f"remove {directory}: it is made anew") from error
        raise
    ready = cast(Model, model)
    if config.max_seq_len:
        if config.max_seq_len > ready.max_seq_len:
            raise InputError(
                f"--max-seq-len {config.max_seq_len} is more than the model's {ready.max_seq_len}",
                "lower it, or leave it out",
            )
        ready.max_seq_len = config.max_seq_len
    own = directory / "config.json"  # the mark belongs to the weights, whichever shape they are read with
    marked = read_config(own) if own.is_file() else raw
    random_weights = bool(marked.get("dsakv_random_weights", False))
    name = "tiny-random (embedded)" if config.ckpt_path is None else directory.resolve().name
    eos = tokenizer.eos_token_ids if tokenizer else generation_eos_ids(directory) or _config_eos_ids(marked)
    slow = why_slow(options.kernels, device)
    return LoadedModel(ready, directory, eos, tokenizer, shape, name, random_weights, precision, index_fp8, slow)


def _precision(
    wanted: Literal["auto", "float32", "bfloat16", "fp8"], device: torch.device, directory: Path, layout: Layout
) -> Literal["float32", "bfloat16", "fp8"]:
    """What ``--dtype`` means here. Raises InputError for fp8 of a checkpoint that holds no fp8 weights."""
    if wanted in ("float32", "bfloat16"):
        return wanted
    if wanted == "auto" and device.type == "cpu":
        return "float32"
    with Checkpoint(directory, layout.file) as checkpoint:
        probe = checkpoint.tensors.get(layout.stored_name("layers.0.attn.wo.weight"))
    fp8 = probe is not None and probe.dtype == "F8_E4M3"
    if wanted == "fp8" and not fp8:
        raise InputError(
            f"--dtype fp8, but {directory} holds no fp8 weights",
            "use --dtype bfloat16; --index-fp8 rounds the indexer alone",
        )
    return "fp8" if fp8 and (wanted == "fp8" or tile.capability(device) >= tile.OLDEST) else "bfloat16"


def _progress(console: Console | None, world: World) -> Progress:
    """A bar for the user to look at, where there is time to; ranks load equal parts, and one of them talks."""
    if console is None or world.rank:
        return silent

    def bar(n_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        return console.megabytes(n_bytes, "loading weights") if n_bytes >= SHOWN_FROM else silent(n_bytes)

    return bar


def _config_eos_ids(config: dict[str, Any]) -> frozenset[int]:
    """End-of-sequence ids of a ``config.json``, for a checkpoint that names them nowhere else."""
    ids = config.get("eos_token_id")
    return frozenset(i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int)


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` means here. Raises InputError for CUDA where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda, but PyTorch sees no CUDA device", "use --device cpu, or check nvidia-smi")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def _find_config(name: str) -> Path:
    """A path as given, else a file of ``configs/`` here or beside the package, with or without ``.json``."""
    folders = [Path("configs"), Path(dsakv.__file__).parent.parent / "configs"]
    candidates = [Path(os.path.expanduser(name))]
    if candidates[0].name == name:
        candidates += [folder / file for folder in folders for file in (name, f"{name}.json")]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(f"no model config {name}", "give a path, or a file name in configs/")
