"""What the workloads share that know requests by length and time alone, and make their prompts up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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
    def read(cls, path: Path, given: Iterable[Row], limit: int) -> Load:
        """The first ``limit`` rows of a file that are requests, in any order; no more are asked for.

        Raises InputError where there are none.
        """
        rows: list[Row] = []
        dropped: Counter[str] = Counter()
        for row in given:
            if row.output_tokens and row.prompt_tokens:
                rows.append(row)
                if len(rows) == limit:
                    break
            else:
                dropped[NO_PROMPT if row.output_tokens else NO_ANSWER] += 1
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
