"""The two layouts of a checkpoint folder: what this rank's parameters are called in it, and which part it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsakv.distributed import ALONE, World
from dsakv.layout import check_converted, converted_file
from dsakv.models.deepseek_v32_names import hf_name
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.registry import Family
from dsakv.weights.checkpoint import WHOLE, Part


def nothing(names: set[str]) -> set[str]:
    return set()


@dataclass(frozen=True)
class Layout:
    """How a model finds its parameters in a checkpoint."""

    stored_name: Callable[[str], str] = lambda name: name
    """The checkpoint's name for a parameter's own."""
    part: Callable[[str], Part] = lambda name: WHOLE
    """What of the stored tensor a parameter holds, by the parameter's name."""
    unused: Callable[[set[str]], set[str]] = nothing
    """Which of the checkpoint's names have no part in the model."""
    file: str | None = None
    """The one file that counts, where not all of the folder do."""


def layout_of(directory: Path, family: Family, shape: DsaShape, world: World) -> Layout:
    """The layout of ``directory`` as the rank of ``world`` reads it.

    A rank cuts its part out of the tensors of a Hugging Face folder, and has a file of its own, under DeepSeek's
    names, in a converted one. Raises InputError where the folder was converted for another number of ranks, is not
    complete, or holds files of both layouts.
    """
    if not check_converted(directory, world.size):
        return Layout(
            family.stored_name,
            lambda name: Part(family.split(name).dim, world.rank, world.size),
            lambda names: family.unused(shape, world, names),
        )

    def unused(names: set[str]) -> set[str]:
        own = {_hf_name(name): name for name in names}
        # The file holds this rank's experts alone: those of others would be a mistake.
        return {own[name] for name in family.unused(shape, ALONE, set(own))}

    return Layout(unused=unused, file=converted_file(world.rank, world.size))


def _hf_name(name: str) -> str:
    """Hugging Face's name; one that no model has stays."""
    try:
        return hf_name(name)
    except (KeyError, ValueError):
        return name
