"""GLM-5: DeepSeek-V3.2's architecture with three differences.

- The indexer turns neighbouring dimensions, as attention does.
- Layers may share a selection: GLM-5.2 has an indexer in one of four layers, and the three behind it read what that
  one selected, each from its own KV (IndexCache, https://arxiv.org/abs/2603.12201).
- RoPE is plain in the released models, and experts form one group.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dsakv.models.dsa_shape import DsaShape, check
from dsakv.models.glm_sharing import shared_layers
from dsakv.models.hf_shape import read_hf_shape

_FIXED = {"rope_interleave": True, "indexer_rope_interleave": True}


def parse_shape(config: dict[str, Any], source: str) -> DsaShape:
    """Read the ``config.json`` of a GLM-5 model; ``source`` names the file in errors.

    Raises InputError for missing keys, wrong types, features that the architecture does not have, and a first layer
    that shares: there is nothing before it.
    """
    shape = read_hf_shape(config, source, kind="glm_moe_dsa", fixed=_FIXED)
    check(shape, source)
    shared = shared_layers(config, shape.n_layers, source)
    return msgspec.structs.replace(shape, indexer_rope="interleaved", shared_layers=shared)
