"""Two and four ranks over gloo compute what one does."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsakv.models.tiny import CONFIG, write_checkpoint
from tests.distributed.cases import CASES, agree, compute
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
    return directory


@pytest.fixture(scope="module")
def alone(checkpoints: Path) -> dict[str, Any]:
    return {name: compute(case, checkpoints) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest, checkpoints: Path) -> dict[str, Any]:
    results = checkpoints / f"results-{request.param}"
    program = ["-m", "tests.distributed.cases", str(checkpoints), str(results)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    subprocess.run(
        [sys.executable, *launcher, *program], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return dict(pickle.loads(results.read_bytes()))


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_does(name: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    (tokens, selections), (expected_tokens, expected) = together[name], alone[name]
    assert tokens == expected_tokens
    assert len(tokens) == 6
    assert selections.keys() == expected.keys()
    assert bool(selections) == ("record" in CASES[name].options)
    differing = [key for key in expected if not agree(selections[key], expected[key])]
    assert not differing
