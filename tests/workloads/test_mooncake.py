"""Mooncake: prompts share exactly the prefixes that the hash ids name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import Config, MooncakeConfig, WorkloadConfig
from dsakv.errors import InputError
from dsakv.prefix import PrefixIndex
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads import Workload, build
from dsakv.workloads.corpus import Corpus, load_text
from dsakv.workloads.load import NO_ANSWER, NO_PROMPT
from dsakv.workloads.mooncake import BLOCK, block


def row(timestamp: float, input_length: int, hash_ids: list[int], output_length: int = 9) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": hash_ids,
    }


def workload(path: Path, rows: list[dict[str, Any]], limit: int = 64) -> Workload:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return build("mooncake", Config(mooncake=MooncakeConfig(jsonl=str(path)), workload=WorkloadConfig(limit=limit)))


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """A made-up trace: a request goes on with the whole blocks of an earlier one, or begins anew."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    unused = 0
    for i in range(count):
        before = rng.choice(rows)["hash_ids"] if rows and rng.random() < 0.8 else []
        shared = before[: rng.randint(0, len(before))]
        fresh = rng.randint(1, 3)
        length = (len(shared) + fresh) * BLOCK - rng.randrange(BLOCK)
        rows.append(row(1000 * i, length, [*shared, *range(unused, unused + fresh)]))
        unused += fresh
    return rows


def shared_tokens(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Leading tokens that two rows have in common, by their hash ids."""
    same = 0
    while same < min(len(a["hash_ids"]), len(b["hash_ids"])) and a["hash_ids"][same] == b["hash_ids"][same]:
        same += 1
    return min(same * BLOCK, int(a["input_length"]), int(b["input_length"]))


@pytest.mark.parametrize("block_size", [16, 64, 512])
@pytest.mark.parametrize("seed", range(3))
def test_prompts_share_what_the_hash_ids_say(
    byte_tokenizer: Tokenizer, tmp_path: Path, seed: int, block_size: int
) -> None:
    rows = conversations(40, seed)
    index = PrefixIndex(block_size)
    hits = 0
    for i, request in enumerate(workload(tmp_path / "m.jsonl", rows).requests(byte_tokenizer, 1 << 20)):
        assert len(request.prompt_token_ids) == rows[i]["input_length"]
        expected = max((shared_tokens(rows[i], rows[j]) for j in range(i)), default=0)
        blocks = min(expected, rows[i]["input_length"] - 1) // block_size
        assert [tokens for _, tokens in index.lookup(request.prompt_token_ids)][-1:] == [blocks * block_size] * (
            blocks > 0
        )
        hits += blocks > 0
        index.add(request.prompt_token_ids, i)
    assert 10 < hits < 40


def test_each_id_has_a_text_of_its_own(byte_tokenizer: Tokenizer) -> None:
    source = load_text()
    corpus = Corpus.encode(source, byte_tokenizer, 0)
    ids = [*range(1200), 12345, 123456, 2**63, 2**64 - 1]
    blocks = [bytes(block(i, corpus, byte_tokenizer)) for i in ids]
    assert len(set(blocks)) == len(ids)
    ring = (source.text * 2).encode()
    for i, made in zip(ids[::50], blocks[::50], strict=True):
        assert len(made) == BLOCK
        assert made.startswith(f"{i}: ".encode())
        assert made.split(b": ", 1)[1] in ring


def test_requests(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = [
        row(5000, 600, [7, 8], output_length=3),
        row(5000.5, 1, [9]),
        row(6000, 0, []),
        row(6000, 10, [1], output_length=0),
        row(4000, 512, [7], output_length=100),
    ]
    found = workload(path, rows)
    requests = list(found.requests(byte_tokenizer, 4096))
    assert [len(request.prompt_token_ids) for request in requests] == [512, 600, 1]
    assert [request.max_new_tokens for request in requests] == [64, 3, 9]
    assert [request.arrival_s for request in requests] == pytest.approx([0, 1, 1.0005])
    assert [request.source_id for request in requests] == [f"{path}:{line}" for line in (5, 1, 2)]
    assert requests[1].prompt_token_ids[:512] == requests[0].prompt_token_ids
    assert found.dropped == {NO_PROMPT: 1, NO_ANSWER: 1}
    assert requests[1].metadata == {"input_length": 600, "output_length": 3, "corpus": load_text().label}
    assert requests == list(found.requests(byte_tokenizer, 4096))
    assert requests == list(workload(path, rows).requests(byte_tokenizer, 4096))


def test_a_prompt_that_is_too_long_loses_its_tail(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row(0, 2000, [1, 2, 3, 4]), row(1, 900, [1, 2])]
    whole = list(workload(tmp_path / "m.jsonl", rows).requests(byte_tokenizer, 4096))
    found = workload(tmp_path / "m.jsonl", rows)
    cut: list[Request] = list(found.requests(byte_tokenizer, 1009))
    assert cut[0].prompt_token_ids == whole[0].prompt_token_ids[:1000]
    assert (cut[0].truncated_tokens, cut[1].truncated_tokens) == (1000, 0)
    with pytest.raises(InputError, match="leave no room"):
        found.requests(byte_tokenizer, 9)


def test_the_limit_counts_requests_and_reading_stops_there(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row(0, 0, []), row(0, 5, [1]), row(1, 6, [2]), {"bad": 1}]
    found = workload(tmp_path / "m.jsonl", rows, limit=2)
    assert [len(request.prompt_token_ids) for request in found.requests(byte_tokenizer, 100)] == [5, 6]


def test_a_byte_order_mark_is_passed_over(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    plain = list(workload(path, [row(0, 600, [1, 2])]).requests(byte_tokenizer, 4096))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    config = Config(mooncake=MooncakeConfig(jsonl=str(path)))
    assert list(build("mooncake", config).requests(byte_tokenizer, 4096)) == plain
