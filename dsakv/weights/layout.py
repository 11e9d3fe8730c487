"""The layouts of checkpoints: what this rank's parameters are called in it, and which part it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsakv.distributed import World
from dsakv.layout import check_converted, converted_file
from dsakv.models import llama_names
from dsakv.models.deepseek_v32_names import hf_name, own_name, split_of, unused
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.llama_shape import LlamaShape
from dsakv.weights.checkpoint import WHOLE, Part


@dataclass(frozen=True)
class Layout:
    """How a model finds its parameters in a checkpoint."""

    stored_name: Callable[[str], str] = lambda name: name
    """The checkpoint's name for a parameter's own."""
    part: Callable[[str], Part] = lambda name: WHOLE
    """What of the stored tensor a parameter holds, by the parameter's name."""
    unused: Callable[[set[str]], set[str]] = lambda names: set()
    """Which of the checkpoint's names have no part in the model."""
    file: str | None = None
    """The one file that counts, where not all of the folder do."""


def layout_of(directory: Path, shape: DsaShape, world: World) -> Layout:
    """The layout of ``directory`` as the rank of ``world`` reads it.

    A rank cuts its part out of the tensors of a Hugging Face folder, and has a file of its own, under DeepSeek's
    names, in a converted one. Raises InputError where the folder was converted for another number of ranks, is not
    complete, or holds files of both layouts.
    """
    if check_converted(directory, world.size):
        indexers = tuple(f"layers.{layer_id}.attn.indexer." for layer_id in shape.shared_layers)
        return Layout(
            unused=lambda names: {name for name in names if name.startswith(indexers)},
            file=converted_file(world.rank, world.size),
        )

    def not_mine(names: set[str]) -> set[str]:
        return unused(names, shape.n_layers, shape.shared_layers) | _experts_of_others(names, shape, world)

    return Layout(hf_name, lambda name: Part(split_of(name).dim, world.rank, world.size), not_mine)


def _experts_of_others(names: set[str], shape: DsaShape, world: World) -> set[str]:
    n_local = shape.n_routed_experts // world.size
    found = set()
    for name in names if world.size > 1 else ():
        own = own_name(name)
        expert = split_of(own).expert if own else None
        if expert is not None and expert < shape.n_routed_experts and expert // n_local != world.rank:
            found.add(name)
    return found


def llama_layout(shape: LlamaShape) -> Layout:
    """The layout of a Llama checkpoint, with indexers or without."""
    return Layout(llama_names.hf_name, unused=lambda names: llama_names.unused(names, tied=shape.tied))
