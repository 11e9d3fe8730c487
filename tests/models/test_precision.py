"""Other precisions than float32: close to it, and different from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsakv.config import ModelConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.errors import InputError
from dsakv.jobs.model import load_model
from dsakv.models.tiny import CONFIG, write_checkpoint
from dsakv.request import Request, StepRecords
from tests.shapes import SMALL_SHAPE

PROMPT = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(2)).tolist()


def tail_records(checkpoint: Path, **config: Any) -> StepRecords:
    """What the last 50 queries of a prompt selected, in one prefill step."""
    model = load_model(ModelConfig(ckpt_path=str(checkpoint), device="cpu", **config)).model
    steps = list(Engine(model, EngineOptions(record=True, record_prefill_tail=50)).run([Request(0, PROMPT, 1)]))
    assert steps[0].records is not None
    return steps[0].records


def kept(one: StepRecords, other: StepRecords, layer: int) -> float:
    """Mean Jaccard similarity of two programs' selections in a layer."""
    pairs = zip(one.positions[layer], other.positions[layer], strict=True)
    return sum(len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in pairs) / len(one.positions[layer])


@pytest.fixture(scope="module")
def exact(small_checkpoint: Path) -> StepRecords:
    return tail_records(small_checkpoint, dtype="float32")


def test_bfloat16_selects_almost_the_same(small_checkpoint: Path, exact: StepRecords) -> None:
    records = tail_records(small_checkpoint, dtype="bfloat16")
    assert records.row_bytes * 2 == exact.row_bytes
    assert 0.9 < kept(exact, records, 0) <= 1
    assert kept(exact, records, 2) > 0.6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_index_keys_change_a_few_selections(small_checkpoint: Path, exact: StepRecords, dtype: str) -> None:
    records = tail_records(small_checkpoint, dtype=dtype, index_fp8=True)
    assert 0.8 < kept(exact, records, 0) < 1
    assert kept(exact, records, 2) > 0.5


def test_fp8_needs_a_head_that_can_be_rotated(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG | SMALL_SHAPE | {"index_head_dim": 48})
    load_model(ModelConfig(ckpt_path=str(tmp_path), device="cpu"))
    with pytest.raises(InputError, match="no size 48"):
        load_model(ModelConfig(ckpt_path=str(tmp_path), device="cpu", index_fp8=True))
