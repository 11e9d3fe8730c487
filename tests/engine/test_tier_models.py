"""Tiers behind every way to read: all families, dense layers, shared selections, an oracle that scores rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from dsakv.config import ModelConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.jobs.model import load_model
from dsakv.kv.options import Amount, TierOptions
from dsakv.models.contracts import Model
from dsakv.request import Request
from tests.models.checkpoints import save
from tests.models.llamas import save_indexers, save_llama

REQUESTS = [Request(i, [(11 * i + 5 * j * j) % 256 for j in range(20 + 23 * i)], 10) for i in range(4)]
TIERS: list[dict[str, Any]] = [
    {"hot": "2"},
    {"hot": "4", "scope": "shared", "write": "back", "start": "warm"},
    {"hot": "3", "remote": True, "local": "2", "policy": "s3fifo"},
]


@pytest.fixture(scope="module", params=["glm", "dense", "oracle", "recent", "indexer"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("model")
    if request.param == "glm":
        save(directory, "glm types")
        return load_model(ModelConfig(ckpt_path=str(directory), device="cpu")).model
    save_llama(directory, "llama3")
    save_indexers(directory / "indexer")
    selection: Literal["dense", "oracle", "recent", "indexer"] = request.param
    indexer = str(directory / "indexer") if selection == "indexer" else None
    top_k = 0 if selection in ("dense", "indexer") else 12
    config = ModelConfig(ckpt_path=str(directory), device="cpu", selection=selection, index_topk=top_k, indexer=indexer)
    return load_model(config).model


def run(model: Model, options: EngineOptions) -> tuple[dict[int, list[int]], list[Any], int]:
    steps = list(Engine(model, options).run(REQUESTS))
    tokens = {c.request_id: c.token_ids for step in steps for c in step.finished}
    positions = [step.records.positions.tolist() for step in steps if step.records is not None]
    fetched = sum(
        traffic.read_ops
        for step in steps
        for (phase, tier), traffic in step.traffic.items()
        if phase == "decode" and tier != "hbm"
    )
    return tokens, positions, fetched


@pytest.mark.parametrize("tiers", TIERS, ids=lambda tiers: "-".join(map(str, tiers.values())))
def test_tokens_and_selections_stay_the_same(model: Model, tiers: dict[str, Any], tmp_path: Path) -> None:
    plain = EngineOptions(batch_size=3, block_size=4, prefill_chunk=13, temperature=0.8, record=model.top_k > 0)
    options = TierOptions(
        Amount.parse(tiers["hot"], ""),
        policy=tiers.get("policy", "lru"),
        scope=tiers.get("scope", "layer"),
        local=Amount.parse(tiers["local"], "") if "local" in tiers else None,
        remote=f"file://{tmp_path}" if "remote" in tiers else None,
        write=tiers.get("write", "through"),
        start=tiers.get("start", "cold"),
    )
    tokens, positions, nothing = run(model, plain)
    tiered_tokens, tiered_positions, fetched = run(model, replace(plain, tiers=options))
    assert tiered_tokens == tokens
    assert tiered_positions == positions
    assert fetched > nothing == 0
