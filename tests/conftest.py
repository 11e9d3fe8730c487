"""Small checkpoints that several rooms' tests run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dsakv.models.tiny import CONFIG, write_checkpoint
from tests.shapes import SMALL_SHAPE

# A busy machine must not fail a test; CI repeats the same examples, a developer's machine looks for new ones.
settings.register_profile("dsakv", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("dsakv")

# The models of these tests are too small to share between threads.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def model_without_download() -> Iterator[None]:
    """Commands run the model that is made on the spot where a test names none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSAKV_MODEL_NAME", "tiny-random")
        yield


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``deepseek_v32`` checkpoint of a few thousand parameters: top-k 16, YaRN from 64 to 512 tokens."""
    directory = tmp_path_factory.mktemp("small")
    write_checkpoint(directory, CONFIG | SMALL_SHAPE, seed=3)
    return directory


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts shorter and longer than top-k and than YaRN's original length."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (5, 40, 100, 17, 16, 130)]
