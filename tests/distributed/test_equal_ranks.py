"""Two and four ranks over gloo compute what one does."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import ConvertConfig
from dsakv.console import Console
from dsakv.jobs.convert import convert
from dsakv.models.tiny import CONFIG, write_checkpoint
from tests.distributed.cases import CASES, OF_MANY, agree, compute
from tests.models.checkpoints import save
from tests.shapes import SMALL_SHAPE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in ("deepseek", "dense", "glm"):
        (directory / name).mkdir()
    write_checkpoint(directory / "deepseek", CONFIG | SMALL_SHAPE, seed=3)
    write_checkpoint(directory / "dense", CONFIG | SMALL_SHAPE | {"first_k_dense_replace": 3}, seed=4)
    save(directory / "glm", "glm types")
    for ranks in (1, 2, 4):
        target = str(directory / f"converted-{ranks}")
        source = str(directory / "deepseek")
        convert(ConvertConfig(hf_ckpt_path=source, save_path=target, model_parallel=ranks), Console())
    return directory


@pytest.fixture(scope="module")
def alone(checkpoints: Path) -> dict[str, Any]:
    return {name: compute(case, checkpoints) for name, case in CASES.items()}


def together(n_ranks: int, names: Iterable[str], checkpoints: Path) -> dict[str, Any]:
    """What the cases give over so many ranks, which one launch computes."""
    results = checkpoints / f"results-{n_ranks}"
    program = ["-m", "tests.distributed.cases", str(checkpoints), str(results), *names]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    subprocess.run(
        [sys.executable, *launcher, *program], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return dict(pickle.loads(results.read_bytes()))


def test_a_converted_checkpoint_computes_what_its_source_does(alone: dict[str, Any], checkpoints: Path) -> None:
    """But for the last bits: where weights lie in a mapped file, some sums are taken in another order."""
    found = compute(replace(CASES["converted"], checkpoint="deepseek"), checkpoints)
    assert found is not None
    (tokens, selections), (expected_tokens, expected) = found, alone["converted"]
    assert tokens == expected_tokens
    assert selections.keys() == expected.keys()
    assert all(agree(selections[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("n_ranks", "names"), [(2, tuple(CASES)), (4, OF_MANY)])
def test_ranks_compute_what_one_does(
    n_ranks: int, names: tuple[str, ...], alone: dict[str, Any], checkpoints: Path
) -> None:
    found = together(n_ranks, names, checkpoints)
    assert tuple(found) == names
    for name, (tokens, selections) in found.items():
        expected_tokens, expected = alone[name]
        assert tokens == expected_tokens, name
        assert len(tokens) == 6, name
        assert selections.keys() == expected.keys(), name
        assert bool(selections) == ("record" in CASES[name].options), name
        differing = [key for key in expected if not agree(selections[key], expected[key])]
        assert not differing, name
