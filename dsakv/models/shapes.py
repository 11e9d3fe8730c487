"""The shape of a model of any family, from its config. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from dsakv.errors import InputError
from dsakv.models import deepseek_v32_shape, glm_moe_dsa, llama_shape
from dsakv.models.dsa_shape import DsaShape, check_ranks
from dsakv.models.llama_shape import LlamaShape

Shape = DsaShape | LlamaShape

PARSERS: Mapping[str, Callable[[dict[str, Any], str], Shape]] = MappingProxyType(
    {
        "deepseek_v32": deepseek_v32_shape.parse_shape,
        "glm_moe_dsa": glm_moe_dsa.parse_shape,
        "llama": llama_shape.parse_shape,
    }
)
"""Reads a config, by its ``model_type``."""


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


def shape_of(config: dict[str, Any], source: str) -> Shape:
    """The shape that a config gives; ``source`` names the file in errors. DeepSeek's own form names no model type.

    Raises InputError for a model type that is not supported, missing keys, wrong values and impossible dimensions.
    """
    kind = config.get("model_type", "deepseek_v32" if "index_topk" in config else None)
    if not isinstance(kind, str) or kind not in PARSERS:
        raise InputError(f"{source}: model_type {kind!r} is not supported", f"supported: {', '.join(PARSERS)}")
    return PARSERS[kind](config, source)


def check_ranks_of(shape: Shape, n_ranks: int, source: str) -> None:
    """Raise InputError where ``n_ranks`` ranks cannot share the model."""
    if isinstance(shape, DsaShape):
        check_ranks(shape, n_ranks, source)
    elif n_ranks > 1:
        raise InputError(f"{source}: a Llama model runs on one rank", "leave --model-parallel out")


def dsa_shape_of(config: dict[str, Any], source: str) -> DsaShape:
    """As :func:`shape_of`; also raises InputError for a model without indexers of its own."""
    if config.get("model_type") == "llama":
        raise InputError(f"{source}: a Llama model is not converted", "it runs as it is: --ckpt-path")
    shape = shape_of(config, source)
    assert isinstance(shape, DsaShape)
    return shape
