"""From which concurrency offloading pays: more requests fit, and each step takes longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsakv.analysis.plan_facts import RunFacts, StepTime

MOST = 1 << 16
"""Requests at a time that are looked at, at most."""
_SHOWN = 6
_RULE = (
    "requests at a time / (TPOT + added TPOT) against the most that fit / TPOT, for an average request of the trace; "
    "added time grows with the number of requests, and each keeps the largest simulated share that the device has "
    "room for, beside its index keys, the blocks being filled and one layer's KV to stage"
)


def concurrency(
    tier: str, where: str, rows: Sequence[dict[str, Any]], run: RunFacts, base: StepTime, hbm: float
) -> dict[str, Any]:
    """The answer for ``rows`` of one block size; ``hbm`` bytes of the device are for KV, 0 being what the trace's took.

    A request takes the bytes of its rows and index keys. With a hot share ``h`` it takes ``h`` of its rows, all of its
    index keys, the block that it fills in each layer, and a layer's share of its rows for staging.
    """
    memory = hbm or float(run.kv_bytes_at_once)
    tokens = float(run.tokens.mean())
    all_rows, keys = tokens * run.layers * run.row_bytes, tokens * run.layers * run.key_bytes
    fits = int(memory // (all_rows + keys))
    plain = fits / base.at(fits) if fits else 0.0
    table: list[dict[str, float]] = []
    for count in _counts(fits, memory, keys):
        fixed = keys + all_rows / run.layers + rows[0]["block_bytes"] * run.layers
        share = (memory / count - fixed) / all_rows
        possible = [row for row in rows if row["hot_share"] <= share]
        if not possible:
            break
        best = min(possible, key=lambda row: row["added_ms"])
        added = best["added_ms"] * max(count / base.mean_batch, 1.0)
        table.append(
            {
                "requests": count,
                "hot_share": best["hot_share"],
                "added_ms": added,
                "tokens_per_s": 1e3 * count / (base.at(count) + added),
            }
        )
    paying = [entry for entry in table if entry["tokens_per_s"] > 1e3 * plain]
    return {
        "question": f"From which concurrency does offloading to {where} pay?",
        "answer": _text(fits, memory, 1e3 * plain, table, paying, base),
        "rule": _RULE,
        "measured": {
            "hbm_bytes": memory,
            "bytes_per_request": all_rows + keys,
            "fits_without": fits,
            "tokens_per_s_without": 1e3 * plain,
            "pays_from": paying[0]["requests"] if paying else None,
            **({"best_requests": _best(paying)["requests"], "best_tokens_per_s": _best(paying)["tokens_per_s"]}
               if paying else {}),
        },
        "table": _sampled(table, paying),
    }  # fmt: skip


def _counts(fits: int, memory: float, keys: float) -> list[int]:
    """Numbers of requests above ``fits``: each up to 64 more, then some 5% apart."""
    most = min(int(memory // keys) if keys else MOST, MOST)
    counts, count = [], fits + 1
    while count <= most:
        counts.append(count)
        count += 1 if count <= fits + 64 else max(count // 20, 1)
    return counts


def _text(
    fits: int, memory: float, plain: float, table: list[dict[str, float]], paying: list[dict[str, float]],
    base: StepTime,
) -> str:  # fmt: skip
    size = f"{memory / 1e9:.3g} GB" if memory >= 1e9 else f"{memory / 1e6:.3g} MB"
    requests = f"{fits:,} average request{'' if fits == 1 else 's'}"
    without = f"{size} of device memory hold {requests} without offloading ({plain:,.4g} tokens/s)"
    grows = (
        f"A step is taken to last {base.per_request_ms:.3g} ms longer for each request more, as measured between the "
        "trace's batches."
        if base.per_request_ms
        else "A step is taken to last as long with more requests as with those of the trace, as it does where reading "
        "weights dominates; where it does not, offloading gains less, or nothing."
    )
    if not table:
        return f"It does not: {without}, and no simulated share leaves room for one more. {grows}"
    if not paying:
        most = table[-1]
        return (
            f"It does not. {without[0].upper()}{without[1:]}; with it up to {most['requests']:,.0f} fit, and none of "
            f"these numbers makes more tokens a second ({max(e['tokens_per_s'] for e in table):,.4g} at best). {grows}"
        )
    first, best = paying[0], _best(paying)
    return (
        f"From {first['requests']:,.0f} requests at a time. {without[0].upper()}{without[1:]}. With offloading "
        f"{first['requests']:,.0f} make {first['tokens_per_s']:,.4g} tokens/s ({first['hot_share']:.0%} hot), and "
        f"{best['requests']:,.0f} the most, {best['tokens_per_s']:,.4g} ({best['hot_share']:.0%} hot). {grows}"
    )


def _best(paying: list[dict[str, float]]) -> dict[str, float]:
    return max(paying, key=lambda entry: entry["tokens_per_s"])


def _sampled(table: list[dict[str, float]], paying: list[dict[str, float]]) -> list[dict[str, float]]:
    """Some entries from the first to the last, the break-even and the best among them."""
    if not table:
        return []
    wanted = {round(i * (len(table) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)}
    wanted |= {table.index(entry) for entry in (paying[:1] + ([_best(paying)] if paying else []))}
    return [table[at] for at in sorted(wanted)]
