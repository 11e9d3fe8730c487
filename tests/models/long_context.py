"""A program: a prefill chunk and two decode steps at 128K tokens, what they cost and whether they selected right.

Scoring 128K keys is nearly all that a chunk costs, and costs as much for each head and layer: the indexer has 32 heads
of the released 64, of which no step keeps more than a tile, and the second layer, the one with experts, reads what the
first selects.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from dsakv.kernels import reference
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable
from dsakv.models.contracts import Selection
from scripts import bench_long_context as bench

CONTEXT, CHUNK = 131072, 512
CHECKED = (0, 127, 128, 300, 511)
"""Queries of the chunk that are checked, on both sides of the tiles of queries."""


class Recorder:
    """The reference kernels, which keep what was scored, and how large the matrix of scores was."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.largest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def index_scores(self, q: Tensor, weights: Tensor, keys: Tensor, key_scale: Tensor | None, out: Tensor) -> None:
        self.calls.append((q, weights))
        self.largest = max(self.largest, out.untyped_storage().nbytes())
        reference.index_scores(q, weights, keys, key_scale, out)

    def take(self) -> tuple[Tensor, Tensor]:
        """Queries ``[T, H, D]`` and weights ``[T, H]`` of the layer that scored since the last time."""
        calls, self.calls = self.calls, []
        return torch.cat([q for q, _ in calls]), torch.cat([w for _, w in calls])


def faults(selection: Selection, query: int, position: int, q: Tensor, weights: Tensor, keys: Tensor) -> list[str]:
    """What is wrong with the selection of a query at ``position``, by brute force in float64. ``keys`` ``[S, D]``."""
    seen = keys[: position + 1].double()
    scores = (q[query].double() @ seen.T).relu().mul(weights[query].double().unsqueeze(1)).sum(0)  # [position + 1]
    k = selection.positions.shape[1]
    boundary, margin = scores.topk(k).values[-1], 1e-5 * scores.abs().max()
    chosen = selection.positions[query]
    wrong = []
    if int(selection.counts[query]) != k or int(chosen.max()) > position:
        wrong.append(f"query {query} sees beyond {position}")
        return wrong
    if not bool((chosen[1:] > chosen[:-1]).all()):
        wrong.append(f"query {query} has positions out of order")
    picked = torch.zeros(position + 1, dtype=torch.bool)
    picked[chosen] = True
    if bool((picked & (scores < boundary - margin)).any()) or bool((~picked & (scores > boundary + margin)).any()):
        wrong.append(f"query {query} selects others than the best")
    if not torch.allclose(selection.scores[query].double(), scores[chosen], rtol=0, atol=float(margin)):
        wrong.append(f"query {query} has other scores")
    return wrong


def layer_keys(cache: PagedCache, table: BlockTable, layer: int) -> Tensor:
    blocks = cache.index_rows[layer].view(-1, cache.block_size, cache.index_rows.shape[-1])
    return blocks[table.ids].flatten(0, 1)


def main() -> None:
    kernels = Recorder()
    shape = structs.replace(bench.cut_shape(), index_n_heads=32, shared_layers=(1,))
    model = bench.random_model(shape, kernels)
    cache = bench.random_cache(model, CONTEXT + 2)
    table = bench.scattered(cache)
    wrong: list[str] = []
    measured: dict[str, int] = {}
    for name, start, length, queries in (
        ("decode", CONTEXT, 1, (0,)),
        ("decode again", CONTEXT + 1, 1, (0,)),
        ("chunk", CONTEXT - CHUNK, CHUNK, CHECKED),
    ):
        selections: list[Selection] = []
        cost = bench.measured(lambda: selections.extend(bench.step(model, cache, table, start, length)))  # noqa: B023
        measured[name] = cost.added_bytes
        (q, weights), keys = kernels.take(), layer_keys(cache, table, 0)
        for query in queries:
            found = faults(selections[0], query, start + query, q, weights, keys)
            wrong += [f"{name}: {fault}" for fault in found]
    json.dump(
        {
            "wrong": wrong,
            "largest": kernels.largest,
            "measured": measured,
            "bounds": {
                name: bench.bound_of(bench.working_bytes(shape, CONTEXT, length))
                for name, length in (("decode", 1), ("decode again", 1), ("chunk", CHUNK))
            },
            "resident": bench.resident()[0],
            "known": bench.total_bytes(model.parameters()) + bench.total_bytes([cache.resident.rows, cache.index_rows]),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
