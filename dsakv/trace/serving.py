"""How requests were served: waiting, latency and throughput, from ``requests.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dsakv.errors import InputError
from dsakv.trace.files import read_lines

SPANS = {
    "queue_ms": "from arrival to the start of the prefill",
    "ttft_ms": "from arrival to the first new token",
    "tpot_ms": "(latency - TTFT) / (new tokens - 1)",
    "latency_ms": "from arrival to the last token",
}
"""The times of a request that are summarized, and what they are."""
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


class _Line(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    arrival_ms: float
    queue_ms: float
    ttft_ms: float
    tpot_ms: float | None
    latency_ms: float
    cached_tokens: int = 0
    forced: bool = False


def serving(requests_path: Path) -> dict[str, Any]:
    """Summary of all finished requests.

    ``requests``, ``forced`` of them with known answers, which are read and not served: the rates are None then, and
    times are those of the others; ``duration_s`` from the first arrival to the last token; ``requests_per_s``,
    ``output_tokens_per_s`` and ``total_tokens_per_s`` (prompts included) over this time, None where it is 0;
    ``prompt_tokens``, ``cached_tokens`` (of the prompts, reused from the prefix cache), ``output_tokens``; and
    ``p50, p95, p99, max`` of each of ``SPANS``, nearest-rank, None without values.

    Raises:
        InputError: a damaged line.
    """
    lines = _lines(requests_path)
    served = [line for line in lines if not line.forced]
    prompt, output = sum(line.prompt_tokens for line in lines), sum(line.completion_tokens for line in lines)
    begin = min((line.arrival_ms for line in lines), default=0.0)
    seconds = (_end_ms(lines) - begin) / 1e3

    def a_second(count: int) -> float | None:
        return count / seconds if seconds > 0 and len(served) == len(lines) else None

    return {
        "requests": len(lines),
        "forced": sum(line.forced for line in lines),
        "duration_s": seconds,
        "requests_per_s": a_second(len(lines)),
        "output_tokens_per_s": a_second(output),
        "total_tokens_per_s": a_second(prompt + output),
        "prompt_tokens": prompt,
        "cached_tokens": sum(line.cached_tokens for line in lines),
        "output_tokens": output,
        **{name: _quantiles([getattr(line, name) for line in served]) for name in SPANS},
    }


def last_token_s(requests_path: Path) -> float:
    """When the last of the finished requests ended, in seconds on the run's clock; 0 where there is none.

    Raises:
        InputError: a damaged line.
    """
    return _end_ms(_lines(requests_path)) / 1e3


def _lines(requests_path: Path) -> list[_Line]:
    return [_decode(place, line) for place, line in read_lines(requests_path)] if requests_path.exists() else []


def _end_ms(lines: list[_Line]) -> float:
    return max((line.arrival_ms + line.latency_ms for line in lines), default=0.0)


def _quantiles(values: list[float | None]) -> dict[str, float | None]:
    known = sorted(value for value in values if value is not None)
    return {name: known[round((len(known) - 1) * q)] if known else None for name, q in QUANTILES.items()}


def _decode(place: str, line: bytes) -> _Line:
    try:
        return msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{place}: not a line of requests.jsonl: {error}", "the file is damaged") from None
