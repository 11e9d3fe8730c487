"""Figures, tables and verdicts on trained indexers, from what was measured text by text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from scripts.needle_quality import Answer
from scripts.selection_quality import BLOCKS, METHODS, Mass, Reading

MASS = {2048: 0.92, 4096: 0.90, 8192: 0.85}
"""Least share of the attention that indexers must capture, by context length."""
PERPLEXITY = {4096: 1.05}
"""Largest perplexity, as a multiple of the dense model's."""
ITEMS_PER_MISS = 12
"""Needles of which the sparse model may miss one more than the dense model."""
TIED = 0.001
"""Largest share of queries with a tie."""


@dataclass(slots=True)
class Found:
    """All that was measured, by length of the texts."""

    mass: dict[int, list[tuple[str, Mass]]]
    """With the kind of each text."""
    readings: dict[int, dict[str, list[Reading]]]
    """By method, a text each."""
    answers: dict[int, dict[str, list[Answer]]]
    """By method, an item each."""


def summary(found: Found, parts: Iterable[str]) -> dict[str, Any]:
    """The figures of each of ``parts``, by length and, as a rule, method. Shares are 0 to 1."""
    made = {
        "mass": {length: _mass(texts) for length, texts in found.mass.items()},
        "ties": {length: _ties([mass for _, mass in texts]) for length, texts in found.mass.items()},
        "perplexity": {length: _perplexity(by_method) for length, by_method in found.readings.items()},
        "jaccard": {length: _jaccard(by_method) for length, by_method in found.readings.items()},
        "needles": {
            length: {method: _needles(answers) for method, answers in by_method.items()}
            for length, by_method in found.answers.items()
        },
    }
    return {part: made[part] for part in made if part in set(parts)}


def _mass(texts: list[tuple[str, Mass]]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(kind for kind, _ in texts))
    every = [mass for _, mass in texts]
    return {
        "texts": len(texts),
        "rows": sum(mass.rows for mass in every),
        "captured": {method: _mean(mass.captured[method] for mass in every) for method in METHODS},
        "beside_sink": {method: _mean(mass.beside_sink[method] for mass in every) for method in METHODS},
        "recall": {method: _mean(mass.recall[method] for mass in every) for method in METHODS},
        "kinds": {
            of: {method: _mean(mass.captured[method] for kind, mass in texts if kind == of) for method in METHODS}
            for of in kinds
        },
        "layers": {
            method: [fmean(layer) for layer in zip(*(mass.captured[method] for mass in every), strict=True)]
            for method in METHODS
        },
    }


def _mean(texts: Iterable[Sequence[float]]) -> float:
    """Over texts, and over the layers of each."""
    return fmean(fmean(layers) for layers in texts)


def _ties(texts: list[Mass]) -> dict[str, Any]:
    queries = sum(mass.rows * len(mass.tied) for mass in texts)
    layers = [sum(tied) for tied in zip(*(mass.tied for mass in texts), strict=True)]
    return {"queries": queries, "tied": sum(layers), "share": sum(layers) / queries, "layers": layers}


def _perplexity(by_method: dict[str, list[Reading]]) -> dict[str, Any]:
    """Of the methods that read all texts."""
    made: dict[str, Any] = {}
    most = max(map(len, by_method.values()))
    for method, readings in by_method.items():
        if len(readings) == most:
            predictions = sum(each.predictions for each in readings)
            made[method] = {
                "perplexity": math.exp(sum(each.nats for each in readings) / predictions),
                "predictions": predictions,
                "captured": _mean(each.captured for each in readings) if method != "dense" else None,
            }
            made[method]["ratio"] = (
                made[method]["perplexity"] / made["dense"]["perplexity"] if "dense" in made else None
            )
    return made


def _jaccard(by_method: dict[str, list[Reading]]) -> dict[str, Any]:
    return {
        method: {"texts": len(readings)}
        | {str(block): _mean(each.jaccard[block] for each in readings) for block in BLOCKS}
        for method, readings in by_method.items()
        if method != "dense"
    }


def _needles(answers: list[Answer]) -> dict[str, Any]:
    inside = [each.inside for each in answers if each.inside is not None]
    return {
        "items": len(answers),
        "found": sum(each.score for each in answers),
        "scores": [each.score for each in answers],
        "texts": [each.text for each in answers],
        "tasks": [each.task for each in answers],
        "selected": None
        if not inside
        else {
            "items": len(inside),
            "tokens": _mean(inside),
            "layers": _mean([float(share > 0) for share in layers] for layers in inside),
            "any_layer": fmean(float(max(layers) > 0) for layers in inside),
        },
    }


def checks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that indexers must reach, as far as they were measured, each with ``passed``."""
    made: list[dict[str, Any]] = []

    def check(what: str, value: str, wanted: str, passed: bool) -> None:
        made.append({"what": what, "value": value, "wanted": wanted, "passed": passed})

    for length, of in figures.get("mass", {}).items():
        if length in MASS:
            share = of["captured"]["indexer"]
            check(f"attention mass at {length}", _percent(share), f">= {_percent(MASS[length])}", share >= MASS[length])
    for length, of in figures.get("ties", {}).items():
        check(f"queries with a tie at {length}", f"{of['share']:.3%}", f"< {TIED:.1%}", of["share"] < TIED)
    for length, of in figures.get("perplexity", {}).items():
        if length in PERPLEXITY:
            ratio, most = of["indexer"]["ratio"], PERPLEXITY[length]
            check(f"perplexity at {length} over dense", f"{ratio:.3f}", f"<= {most}", ratio <= most)
    for length, of in figures.get("needles", {}).items():
        found, items = of["indexer"]["found"], of["indexer"]["items"]
        least = of["dense"]["found"] - items / ITEMS_PER_MISS
        check(f"needles found at {length}", f"{found:g} of {items}", f">= {least:.3g}", found >= least)
    return made


def headline(about: dict[str, Any]) -> str:
    """What was judged, and what its figures are not."""
    judged = f"{about['model']}, indexer {about['indexer']}, k {about['index_topk']}, {about['dtype']}"
    return f"{judged}, seed {about['seed']}\n{about['caveat']}"


def tables(result: dict[str, Any]) -> list[Table]:
    """What is printed of all figures."""
    made = []
    for length, of in result.get("mass", {}).items():
        made.append(_mass_table(length, of))
        made.append(_layer_table(length, of))
    if "ties" in result:
        rows = [[str(n), str(of["queries"]), str(of["tied"]), f"{of['share']:.3%}"] for n, of in result["ties"].items()]
        made.append(_table("ties of the k-th best score", ["length", "queries", "tied", "share"], rows))
    if "perplexity" in result:
        made.append(_perplexity_table(result["perplexity"]))
    if "jaccard" in result:
        jaccard = [
            [str(length), method, *(f"{of[str(block)]:.3f}" for block in BLOCKS), str(of["texts"])]
            for length, by_method in result["jaccard"].items()
            for method, of in by_method.items()
        ]
        columns = ["length", "selection", *(f"block {block}" for block in BLOCKS), "texts"]
        made.append(_table("Jaccard of consecutive decode steps", columns, jaccard))
    if "needles" in result:
        made.append(_needle_table(result["needles"]))
    verdicts = [[c["what"], c["value"], c["wanted"], "pass" if c["passed"] else "FAIL"] for c in result["checks"]]
    made.append(_table("required", ["figure", "value", "wanted", ""], verdicts))
    return made


def _mass_table(length: int, of: dict[str, Any]) -> Table:
    rows = [[kind, *(_percent(shares[method]) for method in METHODS)] for kind, shares in of["kinds"].items()]
    for name, key in (("all kinds", "captured"), ("beside token 0", "beside_sink"), ("oracle's tokens", "recall")):
        rows.append([name, *(_percent(of[key][method]) for method in METHODS)])
    caption = f"texts {of['texts']}, queries {of['rows']} in each layer"
    return _table(f"attention mass at {length} tokens", ["kind", *METHODS], rows, caption)


def _layer_table(length: int, of: dict[str, Any]) -> Table:
    layers = zip(*(of["layers"][method] for method in METHODS), strict=True)
    rows = [[str(i), *map(_percent, shares)] for i, shares in enumerate(layers)]
    return _table(f"attention mass at {length} tokens, by layer", ["layer", *METHODS], rows)


def _perplexity_table(figures: dict[int, Any]) -> Table:
    rows = []
    for length, by_method in figures.items():
        for method, of in by_method.items():
            ratio, captured = of["ratio"], of["captured"]
            rows.append(
                [
                    *(str(length), method, f"{of['perplexity']:.3f}", "" if ratio is None else f"{ratio:.3f}"),
                    *("" if captured is None else _percent(captured), str(of["predictions"])),
                ]
            )
    columns = ["length", "selection", "perplexity", "over dense", "mass, own states", "predictions"]
    return _table("perplexity of the second half of texts, all layers sparse", columns, rows)


def _needle_table(figures: dict[int, Any]) -> Table:
    rows = []
    for length, by_method in figures.items():
        for method, of in by_method.items():
            row, selected = [str(length), method, f"{of['found']:g} of {of['items']}"], of["selected"]
            shares = [] if selected is None else [selected["any_layer"], selected["layers"], selected["tokens"]]
            rows.append(row + [_percent(share) for share in shares])
    columns = ["length", "selection", "found", "in some layer", "layers with it", "of its tokens"]
    return _table("RULER needles, and what the first decode step selects of them", columns, rows)


def _table(title: str, columns: list[str], rows: list[list[str]], caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _percent(share: float) -> str:
    return f"{share:.1%}"
