"""Streamed weights compute the bits that loaded ones do, and are read as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsakv.config import ModelConfig
from dsakv.engine.options import EngineOptions
from tests.models.checkpoints import save
from tests.models.fp8_checkpoints import write_fp8_checkpoint
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


class Case(NamedTuple):
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
        write_fp8_checkpoint(directory)
        more = {"dtype": "fp8"}
    else:
        directory = small_checkpoint
        more = {"dtype": "bfloat16"} if "bfloat16" in name else {}
    config = ModelConfig(ckpt_path=str(directory), device="cpu", **more)
    dense = name in ("tied", "llama3")
    options = EngineOptions(**(vars(OPTIONS) | {"record": not dense, "record_prefill_tail": 0 if dense else 2}))
    expected, _ = run(load(config), options)
    units = UNITS["llama" if name in ("tied", "llama3", "oracle") else "dsa"]
    return Case(config, options, expected, units)


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: "-".join(map(str, stream.values())) or "plain")
@pytest.mark.parametrize("share", [0.0, 0.4, 1.2])
def test_bits_stay_the_same(case: Case, stream: dict[str, Any], share: float) -> None:
    for unit in case.units:
        least = smallest(case.config, unit=unit, **stream)
        everything = plan_of(case.config, unit=unit, host_budget="1TB", **stream).host_bytes
        budget = int(least + share * max(everything * 8 / 7 - least, 0)) + 1
        loaded = load(case.config, unit=unit, host_budget=f"{budget}B", **stream)
        try:
            outcome, steps = run(loaded, case.options)
            assert outcome.same(case.expected), unit
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
