"""LongBench v2: the official prompt, cut in the middle, and the official reading of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import Config, EngineConfig, Longbenchv2Config, WorkloadConfig
from dsakv.errors import InputError
from dsakv.tokenizer import Tokenizer
from dsakv.workloads import Workload, build
from dsakv.workloads.longbenchv2 import chosen

ITEM = {
    "_id": "66f3",
    "domain": "Single-Document QA",
    "sub_domain": "Financial",
    "difficulty": "easy",
    "length": "short",
    "question": " What of $DOC$ and $C_A$? ",
    "choice_A": "one",
    "choice_B": "$Q$",
    "choice_C": "three\\1",
    "choice_D": "four",
    "answer": "B",
    "context": "\nA document that costs $Q$ and names $C_D$.\n",
}
PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n"
    "A document that costs $Q$ and names $C_D$.\n</text>\n\n"
    "What is the correct answer to this question: What of $DOC$ and $C_A$?\nChoices:\n"
    "(A) one\n(B) $Q$\n(C) three\\1\n(D) four\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)


def workload(path: Path, *rows: Any, **options: Any) -> Workload:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        longbenchv2=Longbenchv2Config(data=str(path)),
        workload=WorkloadConfig(**options),
        engine=EngineConfig(max_new_tokens=8),
    )
    return build("longbenchv2", config)


def test_the_prompt_is_filled_in_one_pass(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (request,) = workload(tmp_path / "data.json", ITEM).requests(byte_tokenizer, 4096)
    assert request.prompt == PROMPT
    assert request.prompt_token_ids == byte_tokenizer.encode_prompt(PROMPT)
    assert (request.source_id, request.answers, request.max_new_tokens) == ("66f3", ("B",), 8)
    assert request.completion == "The correct answer is (B)"
    assert {name: request.metadata[name] for name in ("domain", "difficulty", "length")} == {
        name: ITEM[name] for name in ("domain", "difficulty", "length")
    }


def test_the_middle_goes_and_the_question_stays(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = ITEM | {"context": "x" * 5000}
    (request,) = workload(tmp_path / "data.json", long).requests(byte_tokenizer, 1000)
    text = byte_tokenizer.decode(request.prompt_token_ids)
    whole = PROMPT.replace("A document that costs $Q$ and names $C_D$.", "x" * 5000)
    kept = len(text)
    assert text == whole[: kept - kept // 2] + whole[-(kept // 2) :]
    assert len(request.prompt_token_ids) == 992
    assert request.truncated_tokens == len(whole) - kept
    assert text.endswith(PROMPT[-200:])


def test_rows_of_an_array_and_the_limit(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    found = workload(path, limit=2)
    path.write_text(json.dumps([ITEM | {"_id": str(i)} for i in range(5)], indent=1))
    requests = list(found.requests(byte_tokenizer, 4096))
    assert [r.source_id for r in requests] == ["0", "1"]
    assert [r.metadata["place"] for r in requests] == [f"{path}#0", f"{path}#1"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (C)", "C"),
        ("So: **The correct answer is (A).** The correct answer is (B)", "A"),
        ("The correct answer is D.", "D"),
        ("The correct answer is B, or rather: The correct answer is (A)", "A"),
        ("The correct answer is (E)", None),
        ("the correct answer is (A)", None),
        ("(A)", None),
        ("", None),
    ],
)
def test_answers_are_read_as_the_benchmark_reads_them(
    byte_tokenizer: Tokenizer, tmp_path: Path, text: str, letter: str | None
) -> None:
    assert chosen(text) == letter
    found = workload(tmp_path / "data.json", ITEM)
    (request,) = found.requests(byte_tokenizer, 4096)
    assert found.score(request, text) == float(letter == "B")
    assert set(found.score_groups) <= request.metadata.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, r"data:1: no question of LongBench v2: .*context"),
        ({"answer": "E"}, "answer"),
        ({"question": 5}, "question"),
    ],
)
def test_bad_rows(byte_tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(workload(tmp_path / "data", ITEM | change).requests(byte_tokenizer, 4096))


def test_a_row_without_context_and_a_missing_file(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    short = {name: value for name, value in ITEM.items() if name != "context"}
    with pytest.raises(InputError, match="missing required field `context`"):
        list(workload(tmp_path / "data", short).requests(byte_tokenizer, 4096))
    with pytest.raises(InputError, match="no such file: gone"):
        build("longbenchv2", Config(longbenchv2=Longbenchv2Config(data="gone")))
