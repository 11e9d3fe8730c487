"""Which layers of a GLM-5 model share another layer's selection. No torch."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from dsakv.errors import InputError

_Mode = Literal["full", "shared"]
_LETTERS: dict[str, _Mode] = {"F": "full", "S": "shared"}


class _Sharing(Struct, frozen=True, kw_only=True):
    """The three ways to say which layers share, the first that is there counts; as transformers reads them."""

    indexer_types: list[_Mode] | None = None
    index_topk_pattern: str | list[_Mode] | None = None
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2


def shared_layers(config: dict[str, Any], n_layers: int, source: str) -> tuple[int, ...]:
    """Layers without an indexer of their own, by a Hugging Face ``config``; ``source`` names the file in errors.

    Raises InputError for values of another type, too short a list, and a first layer that shares: there is nothing
    before it.
    """
    try:
        sharing = msgspec.convert(config, _Sharing)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error}", "correct the value in the file") from error
    key, modes = _modes(sharing, n_layers, source)
    if len(modes) < n_layers:
        raise InputError(f"{source}: {key} names {len(modes)} of {n_layers} layers", "name every layer")
    if modes[0] == "shared":
        raise InputError(f"{source}: {key} has the first layer share a selection", "the first layer needs an indexer")
    return tuple(i for i, mode in enumerate(modes[:n_layers]) if mode == "shared")


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
