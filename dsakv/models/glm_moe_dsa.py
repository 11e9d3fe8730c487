"""GLM-5: DeepSeek-V3.2's architecture with three differences.

- The indexer turns neighbouring dimensions, as attention does.
- Layers may share a selection: GLM-5.2 has an indexer in one of four layers, and the three behind it read what that
  one selected, each from its own KV (IndexCache, https://arxiv.org/abs/2603.12201).
- RoPE is plain in the released models, and experts form one group.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from dsakv.distributed import World
from dsakv.errors import InputError
from dsakv.models import deepseek_v32
from dsakv.models.dsa_shape import DsaShape, check
from dsakv.models.hf_shape import convert_keys, read_hf_shape

_FIXED = {"rope_interleave": True, "indexer_rope_interleave": True}

_Mode = Literal["full", "shared"]
_LETTERS: dict[str, _Mode] = {"F": "full", "S": "shared"}


class _Sharing(Struct, frozen=True, kw_only=True):
    """The three ways to say which layers share, the first that is there counts; as transformers reads them."""

    indexer_types: list[_Mode] | None = None
    index_topk_pattern: str | list[_Mode] | None = None
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2


def parse_shape(config: dict[str, Any], source: str) -> DsaShape:
    """Read the ``config.json`` of a GLM-5 model; ``source`` names the file in errors.

    Raises InputError for missing keys, wrong types, features that the architecture does not have, and a first layer
    that shares: there is nothing before it.
    """
    shape = read_hf_shape(config, source, kind="glm_moe_dsa", fixed=_FIXED)
    check(shape, source)
    key, modes = _modes(convert_keys(config, _Sharing, source), shape.n_layers, source)
    if len(modes) < shape.n_layers:
        raise InputError(f"{source}: {key} names {len(modes)} of {shape.n_layers} layers", "name every layer")
    if modes[0] == "shared":
        raise InputError(f"{source}: {key} has the first layer share a selection", "the first layer needs an indexer")
    shared = tuple(i for i, mode in enumerate(modes[: shape.n_layers]) if mode == "shared")
    return msgspec.structs.replace(shape, indexer_rope="interleaved", shared_layers=shared)


def _modes(sharing: _Sharing, n_layers: int, source: str) -> tuple[str, list[_Mode]]:
    """The key that counts, and the mode of each layer; a list may go on behind the last one."""
    if sharing.indexer_types is not None:
        return "indexer_types", sharing.indexer_types
    pattern = sharing.index_topk_pattern
    if isinstance(pattern, str):
        if unknown := set(pattern) - set(_LETTERS):
            raise InputError(f"{source}: index_topk_pattern holds {min(unknown)!r}", "F is full, S is shared")
        return "index_topk_pattern", [_LETTERS[letter] for letter in pattern]
    if pattern is not None:
        return "index_topk_pattern", pattern
    # Counted from the layer before the offset: it, and every freq-th behind it, has an indexer; so have all before.
    every, first = max(sharing.index_topk_freq, 1), sharing.index_skip_topk_offset - 1
    return "index_skip_topk_offset", ["shared" if max(i - first, 0) % every else "full" for i in range(n_layers)]


def unused_tensors(shape: DsaShape, world: World, names: set[str]) -> set[str]:
    """Stored tensors that have no part in decoding: DeepSeek's, and indexers of layers that share a selection.

    Sharing can be switched on in the config of a model that was trained without it, and such a checkpoint has them.
    """
    indexers = tuple(f"model.layers.{layer_id}.self_attn.indexer." for layer_id in shape.shared_layers)
    return deepseek_v32.unused_tensors(shape, world, names) | {name for name in names if name.startswith(indexers)}
