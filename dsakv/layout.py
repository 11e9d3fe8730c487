"""Which files of a checkpoint folder count. No torch.

A converted one has ``model{rank}-mp{ranks}.safetensors`` for each rank. Any other folder of safetensors files is in
Hugging Face layout, which any number of ranks may read.
"""

from __future__ import annotations

import re
from pathlib import Path

import orjson

from dsakv.errors import InputError

INDEX = "model.safetensors.index.json"
_CONVERTED = re.compile(r"model(0|[1-9]\d*)-mp([1-9]\d*)\.safetensors")


def listed(directory: Path) -> dict[str, str]:
    """File by tensor name as the index of a Hugging Face folder has it; empty without an index.

    Raises InputError for an index that is damaged, empty, or names files of other folders.
    """
    path = directory / INDEX
    try:
        weight_map = orjson.loads(path.read_bytes())["weight_map"]
        found = {str(name): str(file) for name, file in weight_map.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}", "download it again") from error
    if not found:
        raise InputError(f"{path} lists no tensor", "download it again")
    for file in found.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{path} lists {file!r}, which is no .safetensors file of its folder", "download it again")
    return found


def shards(directory: Path, index: dict[str, str]) -> list[Path]:
    """The files of a Hugging Face folder: those that ``index`` lists, or all. Raises InputError where there is none."""
    files = sorted({directory / file for file in index.values()} or directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"{directory} holds no .safetensors file", "name the folder of a checkpoint")
    return files


def converted_file(rank: int, n_ranks: int) -> str:
    """Name of the file that holds the weights of ``rank`` of ``n_ranks``."""
    return f"model{rank}-mp{n_ranks}.safetensors"


def converted_ranks(directory: Path) -> int | None:
    """How many ranks ``directory`` was converted for; None for Hugging Face layout, or where no folder is.

    Only names are looked at. Raises InputError where the files of a rank are missing, where they are of more than one
    conversion, and where files of both layouts lie together.
    """
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    ranks: dict[int, set[int]] = {}
    for file in files:
        if match := _CONVERTED.fullmatch(file):
            ranks.setdefault(int(match[2]), set()).add(int(match[1]))
    if not ranks:
        return None
    if len(ranks) > 1:
        counts = " and for ".join(str(n_ranks) for n_ranks in sorted(ranks))
        raise InputError(f"{directory} holds weights converted for {counts} ranks", "keep each in a folder of its own")
    n_ranks, present = ranks.popitem()
    known = {converted_file(rank, n_ranks) for rank in range(n_ranks)}
    if others := [file for file in files if file not in known]:
        raise InputError(
            f"{directory} holds weights converted for {n_ranks} {_ranks(n_ranks)}, and {others[0]} beside them",
            "keep each in a folder of its own",
        )
    if missing := sorted(set(range(n_ranks)) - present):
        raise InputError(
            f"{directory} was converted for {n_ranks} {_ranks(n_ranks)}, but "
            f"{converted_file(missing[0], n_ranks)} is missing ({len(missing)} in all)",
            "convert the checkpoint again, or copy the file there",
        )
    return n_ranks


def check_converted(directory: Path, n_ranks: int) -> bool:
    """Whether ``directory`` is a folder of converted weights; InputError where it is for other than ``n_ranks``."""
    made_for = converted_ranks(directory)
    if made_for is not None and made_for != n_ranks:
        raise InputError(
            f"{directory} was converted for {made_for} {_ranks(made_for)}, this run has {n_ranks}",
            f"run it with {made_for}, convert the checkpoint for {n_ranks}, or name the Hugging Face folder itself",
        )
    return made_for is not None


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"
