"""A model ready to run, from what the configuration says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

import dsakv
from dsakv.config import ModelConfig, WeightsConfig
from dsakv.console import Console
from dsakv.distributed import ALONE, World
from dsakv.engine.weights import IN_PLACE
from dsakv.errors import DsakvError, InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model_files import ModelFiles, find_model
from dsakv.jobs.recipe import Recipe, check_float8, recipe_of
from dsakv.jobs.streaming import stream_options
from dsakv.kernels import tile
from dsakv.kernels.select import kernels_for, why_slow
from dsakv.models.contracts import Model
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.options import ModelOptions
from dsakv.models.shapes import check_ranks_of, read_config, shape_of
from dsakv.weights.checkpoint import Checkpoint, TensorSource, Together
from dsakv.weights.layout import Layout
from dsakv.weights.load import Progress, load_parameters, silent
from dsakv.weights.stream import Planned, plan_stream, stream

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
"""What models of each precision compute in, quantised projections aside."""
ALL_LOADED = WeightsConfig()
SHOWN_FROM = 1_000_000_000
"""Bytes of weights whose loading is worth a progress bar."""


@dataclass
class PreparedModel:
    """A model that is known in every respect, while its weights are still on disk."""

    loaded: LoadedModel
    """As it will be; ``weights`` are not there yet."""
    sources: TensorSource
    recipe: Recipe
    files: ModelFiles
    planned: Planned | None
    """How its weights are streamed; None where all are to be loaded."""

    def load(self, progress: Progress) -> LoadedModel:
        """Bring in the weights, or of streamed ones what stays."""
        module, device = cast(nn.Module, self.loaded.model), self.loaded.model.device
        with _named(self.files):
            if self.planned is not None:
                return replace(self.loaded, weights=stream(self.planned, progress))
            load_parameters(module, self.sources, self.recipe.layout, device=device, progress=progress)
        return self.loaded


def load_model(
    config: ModelConfig,
    world: World = ALONE,
    console: Console | None = None,
    weights: WeightsConfig = ALL_LOADED,
) -> LoadedModel:
    """Load the model that ``config`` names, as far as ``weights`` allows; with several ranks, this rank's part of it.

    ``console`` is where rank 0 shows how far it is with a large one. Raises InputError for a checkpoint, shape,
    device, selection, length or budget that does not work, DsakvError where an embedded model cannot be had.
    """
    with prepared_model(config, world, console, weights) as prepared:
        return prepared.load(_progress(console, world))


@contextmanager
def prepared_model(
    config: ModelConfig, world: World, console: Console | None, weights: WeightsConfig
) -> Iterator[PreparedModel]:
    """The model with its files open; raises as :func:`load_model` does. Only headers are read."""
    device = choose_device(config.device)
    files = find_model(config, console or Console())
    with _named(files):
        own = files.config()
    source, raw = files.config_source, own or {}
    if config.config:
        path = _find_config(config.config)
        source, raw = str(path), read_config(path)
    elif own is None:
        raise InputError(f"no model config at {source}", "give one with --config")
    shape = shape_of(raw, source)
    check_ranks_of(shape, world.size, source)
    recipe = recipe_of(shape, config, files, world)
    has_experts = isinstance(shape, DsaShape) and shape.n_dense_layers < shape.n_layers
    options = stream_options(weights, device, has_experts=has_experts)
    precision = _precision(config.dtype, device, files, recipe.layout, has_fp8=isinstance(shape, DsaShape))
    fp8 = precision == "fp8"
    index_fp8 = config.index_fp8 or fp8
    check_float8(shape, recipe.indexer, source, world, fp8=fp8, index_fp8=index_fp8)
    # Before the weights: it takes seconds, they may take minutes.
    with _named(files):
        tokenizer = files.tokenizer()
    how = ModelOptions(_DTYPES[precision], device, kernels_for(device), world=world, fp8=fp8, index_fp8=index_fp8)
    module = recipe.build(how)
    model = cast(Model, module)
    if config.index_topk > model.max_seq_len:
        raise InputError(
            f"--index-topk {config.index_topk} is more than the model's context of {model.max_seq_len}",
            "lower it, or leave it out",
        )
    if config.max_seq_len:
        if config.max_seq_len > model.max_seq_len:
            raise InputError(
                f"--max-seq-len {config.max_seq_len} is more than the model's {model.max_seq_len}",
                "lower it, or leave it out",
            )
        model.max_seq_len = config.max_seq_len
    marks = raw if own is None else own  # they belong to the weights, whichever shape these are read with
    loaded = LoadedModel(
        model=model,
        weights=IN_PLACE,
        directory=files.path,
        eos_token_ids=tokenizer.eos_token_ids if tokenizer else files.eos_ids(marks),
        text_tokenizer=tokenizer,
        indexer=recipe.indexer,
        indexer_digest=hashlib.sha256(recipe.indexer_file.read_bytes()).hexdigest() if recipe.indexer_file else None,
        selection=recipe.selection,
        name=files.name,
        random_weights=bool(marks.get("dsakv_random_weights", False)),
        caveat=recipe.caveat,
        precision=precision,
        index_fp8=index_fp8,
        slow=why_slow(how.kernels, device),
    )
    with ExitStack() as stack:
        with _named(files):
            sources = [stack.enter_context(files.open(recipe.layout.file))]
            if recipe.indexer_file:
                indexers = stack.enter_context(Checkpoint(recipe.indexer_file.parent, recipe.indexer_file.name))
                _check_finite(indexers, recipe.indexer_file)
                sources.append(indexers)
            together = Together(*sources)
            planned = plan_stream(module, together, recipe.layout, options, device) if options else None
        yield PreparedModel(loaded, together, recipe, files, planned)


def _check_finite(indexers: TensorSource, file: Path) -> None:
    """Raise InputError for indexers whose scores would be no numbers: their selections would look like any others."""
    for name in indexers.tensors:
        if not indexers.read(name).isfinite().all():
            raise InputError(f"indexer file {file}: {name} holds numbers that are not finite", "train it again")


@contextmanager
def _named(files: ModelFiles) -> Iterator[None]:
    """Let errors in files that are made or fetched here say how they are made anew."""
    try:
        yield
    except InputError as error:
        if files.remade and str(files.path) in error.message:
            raise DsakvError(error.message, f"remove {files.path}: it is made anew") from error
        raise


def _precision(
    wanted: Literal["auto", "float32", "bfloat16", "fp8"],
    device: torch.device,
    files: ModelFiles,
    layout: Layout,
    *,
    has_fp8: bool,
) -> Literal["float32", "bfloat16", "fp8"]:
    """What ``--dtype`` means here. Raises InputError for fp8 of a checkpoint that holds no fp8 weights."""
    if wanted in ("float32", "bfloat16"):
        return wanted
    if wanted == "auto" and device.type == "cpu":
        return "float32"
    if not has_fp8:
        if wanted == "fp8":
            raise InputError("--dtype fp8, which Llama models do not have", "use --dtype bfloat16")
        return "bfloat16"
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
