"""Streamed weights compute the bits that loaded ones do, and are read as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsakv.config import ModelConfig
from dsakv.engine.options import EngineOptions
from dsakv.models.tiny import CONFIG
from tests.models.checkpoints import save
from tests.models.fp8_checkpoints import FP8_SHAPE, write_fp8_checkpoint
from tests.models.llamas import save_llama
from tests.weights.streamed import Outcome, load, plan_of, run, smallest, traffic

OPTIONS = EngineOptions(batch_size=2, block_size=4, prefill_chunk=13, temperature=0.8)
UNITS = {"llama": ("layer", "sublayer"), "dsa": ("layer", "sublayer", "expert")}
STREAMS: list[dict[str, Any]] = [
    {},
    {"residency": "none"},
    {"residency": "lru", "prefetch_depth": 2},
    {"prefetch_depth": 0, "io_threads": 3, "io_request": "4KiB"},
    {"prefetch_depth": 3, "io_request": "12KiB"},
]
SHARES = [0.0, 0.4, 1.2]
"""Of what is beyond the smallest budget."""
SMALL_FP8: dict[str, Any] = CONFIG | FP8_SHAPE
SMALL_FP8 |= {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
SMALL_FP8 |= {"num_key_value_heads": 4, "kv_lora_rank": 128, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}


class Case(NamedTuple):
    number: int
    config: ModelConfig
    options: EngineOptions
    expected: Outcome
    units: tuple[str, ...]


MODELS = ["tied", "llama3", "oracle", "deepseek", "deepseek bfloat16", "fp8", "glm"]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Case:
    directory, name = tmp_path_factory.mktemp("model"), request.param
    more: dict[str, Any] = {}
    if name in ("tied", "llama3", "oracle"):
        save_llama(directory, "llama3" if name == "oracle" else name)
        more = {"selection": "oracle", "index_topk": 12} if name == "oracle" else {}
    elif name == "glm":
        save(directory, "glm types")
    elif name == "fp8":
        write_fp8_checkpoint(directory, SMALL_FP8)
        more = {"dtype": "fp8"}
    else:
        directory = small_checkpoint
        more = {"dtype": "bfloat16"} if "bfloat16" in name else {}
    config = ModelConfig(ckpt_path=str(directory), device="cpu", **more)
    dense = name in ("tied", "llama3")
    options = EngineOptions(**(vars(OPTIONS) | {"record": not dense, "record_prefill_tail": 0 if dense else 2}))
    expected, _ = run(load(config), options)
    units = UNITS["llama" if name in ("tied", "llama3", "oracle") else "dsa"]
    return Case(MODELS.index(name), config, options, expected, units)


@pytest.mark.parametrize("turn", range(len(SHARES)))
def test_bits_stay_the_same(case: Case, turn: int) -> None:
    """Models and units take turns with the streams: each stream meets each unit, and each budget."""
    share = SHARES[turn]
    for i, unit in enumerate(case.units):
        stream = STREAMS[(2 * case.number + i + turn) % len(STREAMS)]
        least = smallest(case.config, unit=unit, **stream)
        everything = plan_of(case.config, unit=unit, host_budget="1TB", **stream).host_bytes
        budget = int(least + share * max(everything * 8 / 7 - least, 0)) + 1
        loaded = load(case.config, unit=unit, host_budget=f"{budget}B", **stream)
        try:
            outcome, steps = run(loaded, case.options)
            assert outcome.same(case.expected), (unit, stream)
            plan, passes = loaded.weights.plan, traffic(steps)  # type: ignore[attr-defined]
            assert plan.host_bytes <= budget
            assert all(one.disk_bytes == one.planned_bytes for one in passes)
            # In the first pass a tied head may have to be read once more than later, when it is still there.
            for one in passes[1:] if plan.residency != "lru" else []:
                assert one.units - one.expert_misses == plan.pass_units
                if not plan.n_experts:
                    assert one.disk_bytes == plan.pass_disk_bytes
        finally:
            loaded.close()
