"""Model families by the ``model_type`` of their config, and where a config is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from torch import nn

from dsakv.distributed import World
from dsakv.errors import InputError
from dsakv.models import deepseek_v32, glm_moe_dsa
from dsakv.models.deepseek_v32_names import Split, hf_name, split_of
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.options import ModelOptions


class Family(NamedTuple):
    """How to make a model of one architecture, and how its checkpoints name things."""

    parse_shape: Callable[[dict[str, Any], str], DsaShape]
    build: Callable[[DsaShape, ModelOptions], nn.Module]
    stored_name: Callable[[str], str]
    split: Callable[[str], Split]
    """How ranks divide a parameter."""
    unused: Callable[[DsaShape, World, set[str]], set[str]]
    """Tensors of a checkpoint that have no part in the model of a rank (multi-token prediction, say)."""


FAMILIES = {
    "deepseek_v32": Family(parse_shape, deepseek_v32.DeepseekV32, hf_name, split_of, deepseek_v32.unused_tensors),
    "glm_moe_dsa": Family(
        glm_moe_dsa.parse_shape, deepseek_v32.DeepseekV32, hf_name, split_of, glm_moe_dsa.unused_tensors
    ),
}


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's config JSON; InputError where there is none or it is no JSON object."""
    try:
        config = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no model config at {path}", "give one with --config") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read model config {path}: {error}", "it must be a JSON object") from error
    if not isinstance(config, dict):
        raise InputError(f"model config {path} is no JSON object", "see configs/ for examples")
    return config


def family_of(config: dict[str, Any], source: str) -> Family:
    """The family that a config names. DeepSeek's own form names none: its keys tell."""
    kind = config.get("model_type", "deepseek_v32" if "index_topk" in config else None)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{source}: model_type {kind!r} is not supported", f"supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind]
