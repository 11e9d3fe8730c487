"""A tokenizer and a text for the workloads that make prompts up."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsakv.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token a byte; the frame of its chat template is ``<|begin|><|User|>`` ... ``<|Assistant|>``."""
    directory = tmp_path_factory.mktemp("byte")
    write_byte_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(f"Line {i} says {i * i} things and then stops." for i in range(200)), encoding="utf-8")
    return path
