"""BurstGPT: lengths and times are the trace's, prompts are real text of exactly these lengths."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dsakv.config import BurstgptConfig, Config, EngineConfig, WorkloadConfig
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads import build
from dsakv.workloads.burstgpt import BurstGPT
from dsakv.workloads.corpus import load_text
from dsakv.workloads.load import NO_ANSWER, NO_PROMPT

FRAME = 3  # <|begin|> <|User|> text <|Assistant|>
VERSION_1 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,3,230,233,API log
118,GPT-4,4,276,280,API log
185,ChatGPT,0,0,0,Conversation log

186,ChatGPT,90,0,90,Conversation log
187,ChatGPT,0,7,7,Conversation log
150.5,ChatGPT,1360,2,1362,Conversation log
"""
VERSION_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log
19440161.0,1722ac82,,,36,29,65,Conversation log
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.0319600,396,109
2024-02-29 00:00:00.5+00:00,20,1
"""


def draw(
    path: Path, text: str, tokenizer: Tokenizer, *, limit: int = 64, max_seq_len: int = 4096, seed: int = 0
) -> tuple[list[Request], Counter[str]]:
    path.write_text(text, encoding="utf-8")
    config = Config(
        burstgpt=BurstgptConfig(csv=str(path)), engine=EngineConfig(seed=seed), workload=WorkloadConfig(limit=limit)
    )
    workload = build("burstgpt", config)
    return list(workload.requests(tokenizer, max_seq_len)), workload.dropped


def test_version_1(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    requests, dropped = draw(path, VERSION_1, byte_tokenizer)
    assert [len(request.prompt_token_ids) for request in requests] == [472, 3, 4, 1360]
    assert [request.max_new_tokens for request in requests] == [18, 64, 64, 2]
    assert [request.arrival_s for request in requests] == [0, 40, 113, 145.5]
    assert [request.source_id for request in requests] == [f"{path}:{line}" for line in (2, 3, 4, 9)]
    assert dropped == {NO_ANSWER: 2, NO_PROMPT: 1}
    label = load_text().label
    assert requests[1].metadata == {
        "model": "GPT-4",
        "log_type": "API log",
        "request_tokens": 3,
        "response_tokens": 230,
        "corpus": label,
    }


def test_prompts_are_text_in_the_chat_template(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    requests, _ = draw(tmp_path / "b.csv", VERSION_1, byte_tokenizer)
    text = load_text().text.encode()
    ring = text + text
    for request in requests:
        ids = request.prompt_token_ids
        if len(ids) > FRAME:
            assert (ids[:2], ids[-1]) == ([256, 258], 259)
            ids = ids[2:-1]
        assert bytes(ids) in ring
    assert len({bytes(request.prompt_token_ids[2:-1]) for request in requests}) == len(requests)


def test_version_3_and_azure(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    requests, _ = draw(tmp_path / "b.csv", VERSION_3, byte_tokenizer)
    assert [(r.arrival_s, len(r.prompt_token_ids), r.max_new_tokens) for r in requests] == [(0, 906, 64), (51, 36, 29)]
    assert [(r.metadata["session_id"], r.metadata["model"]) for r in requests] == [
        ("1722ac82", "GPT-4"),
        ("1722ac82", None),
    ]
    requests, _ = draw(tmp_path / "a.csv", AZURE, byte_tokenizer)
    assert [(len(r.prompt_token_ids), r.max_new_tokens) for r in requests] == [(374, 44), (396, 64), (20, 1)]
    assert [r.arrival_s for r in requests] == pytest.approx([0, 0.052, 9006176.52004], abs=1e-6)


def test_a_byte_order_mark_and_the_order_of_columns_do_not_matter(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    header, *rows = (line.split(",")[::-1] for line in VERSION_1.splitlines())
    reordered = "\ufeff" + "\r\n".join(",".join(row) for row in [header, *rows]) + "\r\n"
    found, _ = draw(tmp_path / "b.csv", reordered, byte_tokenizer)
    expected, _ = draw(tmp_path / "b.csv", VERSION_1, byte_tokenizer)
    assert found == expected


def test_the_same_file_gives_the_same_requests(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, _ = draw(tmp_path / "b.csv", VERSION_1, byte_tokenizer)
    again, _ = draw(tmp_path / "b.csv", VERSION_1, byte_tokenizer)
    other, _ = draw(tmp_path / "b.csv", VERSION_1, byte_tokenizer, seed=1)
    assert first == again
    assert all(a.prompt_token_ids != b.prompt_token_ids for a, b in zip(first, other, strict=True))
    assert [a.arrival_s for a in first] == [b.arrival_s for b in other]


def test_the_limit_counts_requests_and_reading_stops_there(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = VERSION_1.replace("5,ChatGPT,472,18", "5,ChatGPT,0,0") + "this line is not reached\n"
    requests, dropped = draw(tmp_path / "b.csv", text, byte_tokenizer, limit=3)
    assert [len(request.prompt_token_ids) for request in requests] == [3, 4, 1360]
    assert dropped == {NO_ANSWER: 3, NO_PROMPT: 1}


def test_a_prompt_that_is_too_long_is_cut_and_counted(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    requests, _ = draw(tmp_path / "b.csv", VERSION_1, byte_tokenizer, max_seq_len=100)
    assert [len(request.prompt_token_ids) for request in requests] == [82, 3, 4, 98]
    assert [request.truncated_tokens for request in requests] == [390, 0, 0, 1262]
    assert [requests[0].prompt_token_ids[i] for i in (0, 1, -1)] == [256, 258, 259]
    with pytest.raises(InputError, match="64 new tokens leave no room") as error:
        draw(tmp_path / "b.csv", VERSION_1, byte_tokenizer, max_seq_len=64)
    assert "--max-new-tokens-cap" in error.value.hint


def test_the_fetched_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus_file: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(workload=WorkloadConfig(corpus=str(corpus_file)))
    with pytest.raises(InputError, match="no BurstGPT trace is given") as error:
        BurstGPT.from_config(config)
    assert "dsakv fetch-data burstgpt" in error.value.hint
    folder = tmp_path / "data" / "burstgpt"
    folder.mkdir(parents=True)
    (folder / "one.csv").write_text(VERSION_1)
    workload = BurstGPT.from_config(config)
    assert len(workload.load.rows) == 4
    assert workload.corpus.label.startswith("corpus.txt")
    (folder / "two.csv").write_text(VERSION_3)
    with pytest.raises(InputError, match=r"several traces: one\.csv, two\.csv"):
        BurstGPT.from_config(config)
