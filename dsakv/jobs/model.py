"""A model ready to run, from what the configuration says."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec
import torch
from torch import nn

import dsakv
from dsakv.config import ModelConfig
from dsakv.console import Console
from dsakv.distributed import ALONE, World
from dsakv.errors import DsakvError, InputError
from dsakv.jobs.model_files import ModelFiles, find_model
from dsakv.kernels import tile
from dsakv.kernels.select import kernels_for, why_slow
from dsakv.kv.formats import row_format
from dsakv.models.contracts import Model
from dsakv.models.deepseek_v32 import DeepseekV32, indexer_shape
from dsakv.models.dsa_shape import DsaShape, check_fp8
from dsakv.models.indexer import IndexerShape
from dsakv.models.llama import Llama, Selecting
from dsakv.models.llama_shape import LlamaShape
from dsakv.models.options import ModelOptions
from dsakv.models.shapes import Shape, check_ranks_of, read_config, shape_of
from dsakv.tokenizer import Tokenizer
from dsakv.weights.checkpoint import Checkpoint, Together
from dsakv.weights.indexer_file import read_indexer_file
from dsakv.weights.layout import Layout, layout_of, llama_layout
from dsakv.weights.load import Progress, load_parameters, silent

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
"""What models of each precision compute in, quantised projections aside."""
SHOWN_FROM = 1_000_000_000
"""Bytes of weights whose loading is worth a progress bar."""
TOP_K = 256
"""Tokens that a Llama's layers select where nothing else says how many."""
_CAVEATS = {
    "indexer": "selections that indexers learned for a dense Llama model: not the statistics of DeepSeek-V3.2",
    "oracle": "selections are the true top-k of the attention, which no indexer knows",
    "recent": "selections are a sliding window, which no indexer made",
}
"""What figures from a Llama's selections are and are not."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, where the checkpoint has one, and what is worth saying about both."""

    model: Model
    directory: Path
    eos_token_ids: frozenset[int]
    text_tokenizer: Tokenizer | None
    indexer: IndexerShape | None
    """Of the indexers, where they select."""
    selection: Literal["indexer", "oracle", "recent", "dense"]
    name: str
    random_weights: bool
    caveat: str | None
    """What its selections are not, where that has to be said."""
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
            "caveat": self.caveat,
            "dtype": self.precision,
            "device": str(model.device),
            "index_fp8": self.index_fp8,
            "n_layers": len(model.layers),
            "selection": self.selection,
            "index_topk": model.top_k,
            "index_n_heads": self.indexer.n_heads if self.indexer else 0,
            "index_head_dim": self.indexer.head_dim if self.indexer else 0,
            "max_seq_len": self.max_seq_len,
            "kv_bytes_per_token_layer": row_format(model.kv_row_dim, model.dtype, model.kv_fp8).row_bytes,
        }


class _Recipe(NamedTuple):
    """What a model is made of."""

    build: Callable[[ModelOptions], nn.Module]
    layout: Layout
    selection: Literal["indexer", "oracle", "recent", "dense"] = "indexer"
    indexer: IndexerShape | None = None
    indexer_file: Path | None = None


def load_model(config: ModelConfig, world: World = ALONE, console: Console | None = None) -> LoadedModel:
    """Load the model that ``config`` names; with several ranks, this rank's part of it.

    ``console`` is where rank 0 shows how far it is with a large one. Raises InputError for a checkpoint, shape,
    device, selection or length that does not work, DsakvError where an embedded model cannot be had.
    """
    device = choose_device(config.device)
    files = find_model(config, console or Console())
    own = files.config()
    source, raw = files.config_source, own or {}
    if config.config:
        path = _find_config(config.config)
        source, raw = str(path), read_config(path)
    elif own is None:
        raise InputError(f"no model config at {source}", "give one with --config")
    shape = shape_of(raw, source)
    check_ranks_of(shape, world.size, source)
    recipe = _llama(shape, config, files) if isinstance(shape, LlamaShape) else _dsa(shape, config, files, world)
    precision = _precision(config.dtype, device, files, recipe.layout)
    fp8 = precision == "fp8"
    index_fp8 = config.index_fp8 or fp8
    _check_fp8(shape, recipe.indexer, source, world, fp8=fp8, index_fp8=index_fp8)
    # Before the weights: it takes seconds, they may take minutes.
    tokenizer = files.tokenizer()
    options = ModelOptions(_DTYPES[precision], device, kernels_for(device), world=world, fp8=fp8, index_fp8=index_fp8)
    module = recipe.build(options)
    with ExitStack() as stack:
        try:
            sources = [stack.enter_context(files.open(recipe.layout.file))]
            if recipe.indexer_file:
                sources.append(stack.enter_context(Checkpoint(recipe.indexer_file.parent, recipe.indexer_file.name)))
            progress = _progress(console, world)
            load_parameters(module, Together(*sources), recipe.layout, device=device, progress=progress)
        except InputError as error:
            if files.remade:
                raise DsakvError(error.message, f"remove {files.path}: it is made anew") from error
            raise
    model = cast(Model, module)
    if config.max_seq_len:
        if config.max_seq_len > model.max_seq_len:
            raise InputError(
                f"--max-seq-len {config.max_seq_len} is more than the model's {model.max_seq_len}",
                "lower it, or leave it out",
            )
        model.max_seq_len = config.max_seq_len
    marks = raw if own is None else own  # they belong to the weights, whichever shape these are read with
    return LoadedModel(
        model=model,
        directory=files.path,
        eos_token_ids=tokenizer.eos_token_ids if tokenizer else files.eos_ids(marks),
        text_tokenizer=tokenizer,
        indexer=recipe.indexer,
        selection=recipe.selection,
        name=files.name,
        random_weights=bool(marks.get("dsakv_random_weights", False)),
        caveat=_CAVEATS.get(recipe.selection) if isinstance(shape, LlamaShape) else None,
        precision=precision,
        index_fp8=index_fp8,
        slow=why_slow(options.kernels, device),
    )


def _dsa(shape: DsaShape, config: ModelConfig, files: ModelFiles, world: World) -> _Recipe:
    if config.selection not in ("auto", "indexer") or config.indexer:
        flag = "--indexer" if config.indexer else f"--selection {config.selection}"
        raise InputError(f"{flag}, but {files.name} has indexers of its own", "it is for Llama models: leave it out")
    if config.index_topk:
        shape = msgspec.structs.replace(shape, index_topk=config.index_topk)
    return _Recipe(partial(DeepseekV32, shape), layout_of(files.path, shape, world), indexer=indexer_shape(shape))


def _llama(shape: LlamaShape, config: ModelConfig, files: ModelFiles) -> _Recipe:
    wanted = config.selection
    if wanted == "auto":
        wanted = "indexer" if files.indexer else "dense"
    layout, top_k = llama_layout(shape), config.index_topk
    if wanted == "dense":
        return _Recipe(partial(Llama, shape), layout, wanted)
    if files.indexer is None and wanted == "indexer":
        raise InputError(
            f"--selection indexer, but {files.name} has no indexers",
            "give --indexer FILE; scripts/train_indexer.py trains them",
        )
    about = read_indexer_file(files.indexer, shape.n_layers, shape.dim) if files.indexer else None
    if wanted != "indexer" or about is None:
        top_k = top_k or (about.shape.top_k if about else TOP_K)
        return _Recipe(partial(Llama, shape, selecting=Selecting(wanted, top_k)), layout, wanted)
    indexer = replace(about.shape, top_k=top_k or about.shape.top_k)
    selecting = Selecting(wanted, indexer.top_k, indexer, about.rope_theta)
    return _Recipe(partial(Llama, shape, selecting=selecting), layout, wanted, indexer, files.indexer)


def _check_fp8(
    shape: Shape, indexer: IndexerShape | None, source: str, world: World, *, fp8: bool, index_fp8: bool
) -> None:
    """Raise InputError where a model of this shape cannot have what is to be float8."""
    if index_fp8 and indexer is None:
        raise InputError("--index-fp8, but no indexer selects", "leave it out")
    if index_fp8 and indexer and indexer.head_dim & (indexer.head_dim - 1):
        flag, without = ("--dtype fp8", "use another --dtype") if fp8 else ("--index-fp8", "leave it out")
        raise InputError(
            f"{flag} rotates index keys by a Hadamard matrix, which has no size {indexer.head_dim}",
            f"{without}: this model's index_head_dim is no power of two",
        )
    if fp8 and isinstance(shape, DsaShape):
        check_fp8(shape, world.size, source)


def _precision(
    wanted: Literal["auto", "float32", "bfloat16", "fp8"], device: torch.device, files: ModelFiles, layout: Layout
) -> Literal["float32", "bfloat16", "fp8"]:
    """What ``--dtype`` means here. Raises InputError for fp8 of a checkpoint that holds no fp8 weights."""
    if wanted in ("float32", "bfloat16"):
        return wanted
    if wanted == "auto" and device.type == "cpu":
        return "float32"
    with files.open(layout.file) as checkpoint:
        probe = checkpoint.tensors.get(layout.stored_name("layers.0.attn.wo.weight"))
    fp8 = probe is not None and probe.dtype == "F8_E4M3"
    if wanted == "fp8" and not fp8:
        raise InputError(
            f"--dtype fp8, but {files.path} holds no fp8 weights",
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
