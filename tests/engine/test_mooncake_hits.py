"""A Mooncake trace served with a faked model: the prefix cache hits what the trace's hash ids say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest

from dsakv.config import Config, MooncakeConfig, WorkloadConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.models.contracts import Model
from dsakv.tokenizer import load_tokenizer, write_byte_tokenizer
from dsakv.workloads.arrival import arrange
from dsakv.workloads.mooncake import Mooncake
from tests.engine.fakes import FakeModel

TRACE_BLOCK = 512


def made_up_trace(count: int) -> list[dict[str, Any]]:
    """Conversations that go on: a request takes some leading full blocks of an earlier one and adds new ones."""
    draw = random.Random(4)
    rows: list[dict[str, Any]] = []
    fresh = 0
    for i in range(count):
        base: dict[str, Any] = {"hash_ids": [], "input_length": 0}
        if rows and draw.random() < 0.7:
            base = draw.choice(rows)
        shared = base["hash_ids"][: draw.randint(0, base["input_length"] // TRACE_BLOCK)]
        new = draw.randint(1, 4)
        ids = shared + list(range(fresh, fresh + new))
        fresh += new
        length = len(ids) * TRACE_BLOCK - draw.choice([0, 1, 100, 511])
        rows.append({"timestamp": 100 * i, "input_length": length, "output_length": 5, "hash_ids": ids})
    return rows


@pytest.mark.parametrize("block_size", [512, 64])
def test_hits_are_those_of_the_hash_ids(tmp_path: Path, block_size: int) -> None:
    rows = made_up_trace(200)
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_byte_tokenizer(tmp_path / "tokenizer")
    config = Config(mooncake=MooncakeConfig(jsonl=str(path)), workload=WorkloadConfig(limit=200, max_new_tokens_cap=1))
    drawn = Mooncake.from_config(config).requests(load_tokenizer(tmp_path / "tokenizer"), 1 << 20)
    requests = arrange(list(drawn), config.serving, 0)
    options = EngineOptions(block_size=block_size, prefix_cache=True, batch_size=4, prefill_chunk=1 << 14)
    engine = Engine(cast(Model, FakeModel(vocab_size=300)), options)
    cached = {c.request_id: c.cached_tokens for step in engine.run(requests) for c in step.finished}
    expected = 0
    for i, row in enumerate(rows):
        # The longest run of leading ids that one earlier request has too, in so many full blocks of its own.
        best = 0
        for earlier in rows[:i]:
            same = 0
            while (
                same < min(row["input_length"], earlier["input_length"]) // TRACE_BLOCK
                and row["hash_ids"][same] == earlier["hash_ids"][same]
            ):
                same += 1
            best = max(best, same * TRACE_BLOCK)
        hits = min(best, (row["input_length"] - 1) // block_size * block_size)
        assert cached[i] == hits
        expected += hits
    assert expected > 0.2 * sum(row["input_length"] for row in rows)
