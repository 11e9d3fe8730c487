"""Sizes in bytes as users write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_DIGITS = 30
"""Of a number: more of them would be no float."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?)?b", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> float | None:
    """The bytes of ``512MiB``, ``2GB`` or ``4096B``; None for a text that is no such size."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or len(found[1]) > _DIGITS:
        return None
    return float(found[1]) * _UNITS[(found[2] or "").lower()]
