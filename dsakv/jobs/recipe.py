"""What a model is made of, from its shape and what the configuration says of its selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from torch import nn

from dsakv.config import ModelConfig
from dsakv.distributed import World
from dsakv.errors import InputError
from dsakv.jobs.model_files import ModelFiles
from dsakv.models.deepseek_v32 import DeepseekV32, indexer_shape
from dsakv.models.dsa_shape import DsaShape, check_fp8
from dsakv.models.indexer import IndexerShape
from dsakv.models.llama import Learned, Llama, Oracle, Recent
from dsakv.models.llama_shape import LlamaShape
from dsakv.models.options import ModelOptions
from dsakv.models.shapes import Shape
from dsakv.weights.indexer_file import read_indexer_file
from dsakv.weights.layout import Layout, layout_of, llama_layout

Selected = Literal["indexer", "oracle", "recent", "dense"]
"""What decides which tokens are read."""
TOP_K = 256
"""Tokens that a Llama's layers select where nothing else says how many."""


NOT_DSA = "these are not the statistics of DeepSeek-V3.2"


class Recipe(NamedTuple):
    """What a model is made of."""

    build: Callable[[ModelOptions], nn.Module]
    layout: Layout
    selection: Selected
    indexer: IndexerShape | None = None
    """Of the indexers, where they select."""
    indexer_file: Path | None = None
    """Where they are, if not in the checkpoint."""
    caveat: str | None = None
    """What the selections are not, where that has to be said."""


def recipe_of(shape: Shape, config: ModelConfig, files: ModelFiles, world: World) -> Recipe:
    """Raises InputError for a selection that the model does not have, and for files that do not belong to it."""
    return _llama(shape, config, files) if isinstance(shape, LlamaShape) else _dsa(shape, config, files, world)


def _dsa(shape: DsaShape, config: ModelConfig, files: ModelFiles, world: World) -> Recipe:
    if config.selection not in ("auto", "indexer") or config.indexer:
        flag = "--indexer" if config.indexer else f"--selection {config.selection}"
        raise InputError(f"{flag}, but {files.name} has indexers of its own", "it is for Llama models: leave it out")
    if config.index_topk:
        shape = msgspec.structs.replace(shape, index_topk=config.index_topk)
    layout = layout_of(files.path, shape, world)
    return Recipe(partial(DeepseekV32, shape), layout, "indexer", indexer_shape(shape))


def _llama(shape: LlamaShape, config: ModelConfig, files: ModelFiles) -> Recipe:
    by: Selected = ("indexer" if files.indexer else "dense") if config.selection == "auto" else config.selection
    layout, build = llama_layout(shape), partial(Llama, shape)
    if by == "dense":
        if config.index_topk:
            raise InputError("--index-topk, but a dense model reads all tokens", "give --selection, or leave it out")
        if config.indexer:
            raise InputError("--indexer, but --selection dense reads all tokens", "leave one of them out")
        return Recipe(build, layout, by)
    about = read_indexer_file(files.indexer, shape.n_layers, shape.dim) if files.indexer else None
    top_k = config.index_topk or (about.shape.top_k if about else TOP_K)
    if by == "oracle":
        caveat = f"an oracle selected, the attention of {files.name} itself, and no indexer: {NOT_DSA}"
        return Recipe(partial(build, selecting=Oracle(top_k)), layout, by, caveat=caveat)
    if by == "recent":
        caveat = f"a sliding window over {files.name} selected, and no indexer: {NOT_DSA}"
        return Recipe(partial(build, selecting=Recent(top_k)), layout, by, caveat=caveat)
    if about is None:
        raise InputError(
            f"--selection indexer, but {files.name} comes without indexers",
            "give --indexer FILE; scripts/train_indexer.py trains them",
        )
    learned = Learned(replace(about.shape, top_k=top_k), about.rope_theta)
    caveat = f"indexers selected that were trained afterwards for {about.base}, a dense model: {NOT_DSA}"
    return Recipe(partial(build, selecting=learned), layout, by, learned.shape, files.indexer, caveat)


def check_float8(
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
