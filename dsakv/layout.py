"""What files a checkpoint directory holds. No torch."""

from __future__ import annotations

import re
from pathlib import Path

_CONVERTED = re.compile(r"model\d+-mp(\d+)\.safetensors")


def converted_ranks(directory: Path) -> int | None:
    """How many ranks the checkpoint in ``directory`` was converted for; None where it was not."""
    found = {
        int(match[1]) for path in directory.glob("model*-mp*.safetensors") if (match := _CONVERTED.fullmatch(path.name))
    }
    return max(found, default=None)
