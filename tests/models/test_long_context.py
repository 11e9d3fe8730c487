"""Far into a context: what a step needs beside weights and cache is bounded, and selections stay right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsakv.kernels import reference
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Selection
from dsakv.models.deepseek_v32 import indexer_shape
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.indexer import Indexer
from dsakv.models.options import ModelOptions
from dsakv.models.tiny import CONFIG
from tests.shapes import SMALL_SHAPE

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the highest resident memory from /proc")
def test_a_chunk_and_decode_steps_at_128k_tokens_with_released_shapes_and_half_the_index_heads() -> None:
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # threads on busy cores wait for each other
    command = [sys.executable, "-m", "tests.models.long_context"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environ)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["wrong"] == []
    assert found["largest"] <= 64 << 20  # a chunk's scores in one piece are 256 MB
    for step, bound in found["bounds"].items():
        assert found["measured"][step] <= bound, step
    assert found["bounds"]["chunk"] < 750e6
    assert found["bounds"]["decode"] < 180e6


def whole_numbers(*shape: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=generator).float()


class ExactIndexer(Indexer):
    """Queries as they are given: sums of small whole numbers are exact, however they are divided."""

    def _turn(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return x


def selected(monkeypatch: pytest.MonkeyPatch, rows: int) -> Selection:
    """Selections of sequences of 37, 1, 50 and 8 new tokens, ``rows`` queries at a time; ties abound."""
    monkeypatch.setattr(reference, "score_rows", lambda n_keys, device: rows)
    shape = parse_shape(CONFIG | SMALL_SHAPE | {"index_head_dim": 64}, "test")  # 16 heads of 64: a scale of 1/32
    indexer = ExactIndexer(indexer_shape(shape), ModelOptions())
    generator = torch.Generator().manual_seed(0)
    for name in ("wq_b", "weights_proj"):
        weight = whole_numbers(*getattr(indexer, name).weight.shape, high=1, generator=generator)
        getattr(indexer, name).weight = torch.nn.Parameter(weight, requires_grad=False)
    starts, lengths, first = [100, 80, 0, 3], [37, 1, 50, 8], 0
    tables = []
    for start, length in zip(starts, lengths, strict=True):
        blocks = -(-(start + length) // 4)
        tables.append(BlockTable(range(first, first + blocks), CPU))
        first += blocks
    cache = PagedCache(
        n_layers=1, n_blocks=first, block_size=4, row_dim=2, index_dim=64, dtype=torch.float32, device=CPU
    )
    cache.index_rows.copy_(whole_numbers(*cache.index_rows.shape, high=2, generator=generator))
    bound = cache.bind(list(map(Span, tables, starts, lengths)), decode=False)
    x = whole_numbers(sum(lengths), 64, high=1, generator=generator)
    q_latent = whole_numbers(sum(lengths), 48, high=1, generator=generator)
    rope = (torch.ones(1), torch.ones(1))
    selection: Selection = indexer(x, q_latent, rope, bound.positions, bound.layer(0))
    return selection


@pytest.mark.parametrize("rows", [1, 2, 16, 36, 37, 38, 64, 95])
def test_tiles_of_queries_change_no_selection(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tiled = selected(monkeypatch, 1 << 20), selected(monkeypatch, rows)
    assert torch.equal(tiled.counts, whole.counts)
    for query, count in enumerate(whole.counts.tolist()):
        assert torch.equal(tiled.positions[query, :count], whole.positions[query, :count])
        assert torch.equal(tiled.scores[query, :count], whole.scores[query, :count])


@pytest.mark.parametrize(("n_keys", "rows"), [(1, 1 << 24), (32768, 512), (32769, 256), (131072, 128), (1 << 25, 1)])
def test_scores_are_held_for_so_many_queries(n_keys: int, rows: int) -> None:
    assert reference.score_rows(n_keys, CPU) == rows
