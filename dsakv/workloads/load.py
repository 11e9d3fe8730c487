"""What the workloads share that know requests by length and time alone, and make their prompts up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsakv.errors import InputError

NO_PROMPT = "no prompt tokens"
NO_ANSWER = "failed in the trace: no response tokens"


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    place: str
    """``file:line``."""
    seconds: float
    prompt_tokens: int
    output_tokens: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the trace says, for ``Request.metadata``."""


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of a trace in order of time, the first at 0 s, and why others were dropped."""

    rows: tuple[Row, ...]
    dropped: Counter[str]

    @classmethod
    def of(cls, path: Path, rows: list[Row], dropped: Counter[str]) -> Load:
        """The rows of a file, in any order. Raises InputError where there are none."""
        if not rows:
            reasons = "; ".join(f"{number} dropped: {reason}" for reason, number in dropped.items())
            raise InputError(f"{path} holds no request to run ({reasons or 'it has no rows'})", "give another trace")
        begin = min(row.seconds for row in rows)
        ordered = sorted(rows, key=lambda row: row.seconds)
        return cls(tuple(replace(row, seconds=row.seconds - begin) for row in ordered), dropped)

    def check_room(self, max_seq_len: int, max_new_tokens_cap: int) -> None:
        """Raise InputError where the new tokens of a request leave no room for a prompt."""
        longest = max(min(row.output_tokens, max_new_tokens_cap) for row in self.rows)
        if longest >= max_seq_len:
            raise InputError(
                f"{longest} new tokens leave no room for a prompt: a sequence holds {max_seq_len} tokens",
                "lower --max-new-tokens-cap or raise --max-seq-len",
            )


def failure(prompt_tokens: int, output_tokens: int) -> str | None:
    """Why a row is no request to run, if it is none."""
    if output_tokens == 0:
        return NO_ANSWER
    return NO_PROMPT if prompt_tokens == 0 else None
