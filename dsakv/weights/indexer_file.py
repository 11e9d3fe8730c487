"""A file of trained indexers: one for each layer of a model that came without."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsakv.config import LARGEST
from dsakv.errors import InputError
from dsakv.models.indexer import IndexerShape

FORMAT, VERSION = "dsakv-indexer", "1"
DTYPES = frozenset({"BF16", "F16", "F32"})
_NUMBERS = ("n_heads", "head_dim", "rope_dim", "top_k")


@dataclass(frozen=True)
class IndexerFile:
    """What a file says of its indexers."""

    shape: IndexerShape
    rope_theta: float
    """Base of their RoPE frequencies."""
    base: str
    """The model that they were trained for."""


def write_indexers(path: Path, tensors: Mapping[str, torch.Tensor], about: IndexerFile) -> None:
    """Write ``tensors``, by parameter name (``layers.0.attn.indexer.wk.weight``), in bfloat16.

    Raises ValueError for indexers that no Llama has.
    """
    if about.shape.interleaved or about.shape.query_dim != about.shape.dim:
        raise ValueError("indexers of a Llama make queries of hidden states, and turn halves")
    metadata = {name: str(getattr(about.shape, name)) for name in _NUMBERS}
    metadata |= {"format": FORMAT, "version": VERSION, "rope_theta": str(about.rope_theta), "base": about.base}
    kept = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(kept, path, metadata=metadata)


def read_indexer_file(path: Path, n_layers: int, dim: int) -> IndexerFile:
    """What ``path`` says of its indexers, for a model of ``n_layers`` layers of width ``dim``.

    Raises InputError where it is no such file, or was made for a model of other dimensions.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {part.get_dtype() for part in slices.values()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"indexer file {path} cannot be read as safetensors: {error}",
            "--indexer takes what scripts/train_indexer.py writes",
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise InputError(f"{path} is no file of indexers", "--indexer takes what scripts/train_indexer.py writes")
    layers = sum(name.endswith(".indexer.wk.weight") for name in found)
    width = (0, *found.get("layers.0.attn.indexer.wk.weight", ()))[-1]
    if (layers, width) != (n_layers, dim):
        raise InputError(
            f"indexer file {path} is for {layers} layers of width {width}, the model has {n_layers} of {dim}",
            f"it was trained for {metadata.get('base', 'another model')}; train one for this model",
        )
    try:
        numbers = {name: int(metadata[name]) for name in _NUMBERS}
        theta = float(metadata["rope_theta"])
    except (KeyError, ValueError) as error:
        raise InputError(f"indexer file {path}: metadata are damaged: {error}", "train or download it again") from error
    turned = numbers["rope_dim"] % 2 == 0 and numbers["rope_dim"] <= numbers["head_dim"]
    small = all(1 <= number <= LARGEST for number in numbers.values())
    if not small or not turned or not 1 < theta < math.inf:
        raise InputError(f"indexer file {path}: metadata make no sense", "train or download it again")
    shape = IndexerShape(
        dim=dim,
        query_dim=dim,
        n_heads=numbers["n_heads"],
        head_dim=numbers["head_dim"],
        rope_dim=numbers["rope_dim"],
        top_k=numbers["top_k"],
    )
    if found != tensor_shapes(shape, n_layers):
        raise InputError(f"indexer file {path} lacks tensors, or has others", "train or download it again")
    if not dtypes <= DTYPES:
        raise InputError(f"indexer file {path} holds {', '.join(sorted(dtypes - DTYPES))}", "train it again")
    return IndexerFile(shape, theta, metadata.get("base", "unknown"))


def tensor_shapes(shape: IndexerShape, n_layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a file, by name."""
    one = {
        "wq_b.weight": (shape.n_heads * shape.head_dim, shape.dim),
        "wk.weight": (shape.head_dim, shape.dim),
        "k_norm.weight": (shape.head_dim,),
        "k_norm.bias": (shape.head_dim,),
        "weights_proj.weight": (shape.n_heads, shape.dim),
    }
    return {f"layers.{i}.attn.indexer.{name}": size for i in range(n_layers) for name, size in one.items()}
