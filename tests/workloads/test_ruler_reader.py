"""RULER's files: rows, tasks, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import Config, EngineConfig, RulerConfig, WorkloadConfig
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from dsakv.workloads import Workload, build
from dsakv.workloads.ruler import Ruler

NEEDLES = (
    "Filler. One of the special magic numbers for big-cat is: 111. More filler. "
    "One of the special magic numbers for odd-dog is: 222. The code 111 again."
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte")
    write_byte_tokenizer(directory)
    return load_tokenizer(directory)


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _workload(data: Path, *tasks: str, limit: int = 64) -> Workload:
    ruler = RulerConfig(data=str(data), tasks=tasks or ("all",))
    return build(
        "ruler", Config(ruler=ruler, workload=WorkloadConfig(limit=limit), engine=EngineConfig(max_new_tokens=9))
    )


def test_row_becomes_request(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"index": 5, "input": NEEDLES, "outputs": ["111"], "answer_prefix": " It is", "question": "?", "length": 9}
    path = _write(tmp_path / "niah_single_2.jsonl", row)
    (request,) = _workload(path).requests(tokenizer, 1064)
    assert tokenizer.decode(request.prompt_token_ids) == NEEDLES + " It is"
    assert request.prompt_token_ids[-7:] == [259, *b" It is"]
    assert (request.answers, request.max_new_tokens, request.source_id) == (("111",), 9, f"{path}:1")
    assert (request.metadata["task"], request.metadata["index"]) == ("niah_single_2", 5)
    ((a, b),) = request.needle_spans
    assert tokenizer.decode(request.prompt_token_ids[a:b]) == "One of the special magic numbers for big-cat is: 111."


def test_older_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(
        tmp_path / "qa_1.jsonl",
        {"input": "Documents. Who?", "answer": "Ann", "question": "Who?"},
        {"input": "Documents. What?", "answer": ["a", "b"], "outputs": None},
    )
    path.write_text(path.read_text().replace("\n", "\n\n"))  # empty lines are passed over
    first, second = _workload(path).requests(tokenizer, 1064)
    assert (first.prompt, first.answers, first.metadata["answer_prefix"]) == ("Documents. Who?", ("Ann",), "")
    assert (second.answers, second.source_id, second.needle_spans) == (("a", "b"), f"{path}:3", ())


def test_directories_take_their_tasks_in_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def rows(name: str, n: int) -> list[dict[str, Any]]:
        return [{"input": f"{name}{i}", "outputs": ["x"]} for i in range(n)]

    _write(tmp_path / "4096" / "vt" / "validation.jsonl", *rows("v", 1))
    _write(tmp_path / "8192" / "vt" / "validation_8192.jsonl", *rows("w", 2))
    _write(tmp_path / "cwe.jsonl", *rows("c", 2))

    def prompts(*tasks: str, limit: int = 64) -> list[str | None]:
        return [r.prompt for r in _workload(tmp_path, *tasks, limit=limit).requests(tokenizer, 1064)]

    assert prompts() == ["v0", "c0", "w0", "c1", "w1"]
    assert prompts(limit=3) == ["v0", "c0", "w0"]
    assert prompts("cwe") == ["c0", "c1"]
    with pytest.raises(InputError, match="'fwe'") as error:
        prompts("fwe")
    assert "did you mean cwe?" in error.value.hint
    assert "vt, cwe" in error.value.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a RULER row"),
        (b"[]", "not a RULER row"),
        (b'{"outputs": ["a"]}', "`input`"),
        (b'{"input": 3, "outputs": ["a"]}', "input"),
        (b'{"input": "a", "outputs": [1]}', "outputs"),
        (b'{"input": "a"}', "no gold answer"),
        (b'{"input": "a", "outputs": []}', "no gold answer"),
        (b'{"input": "a", "outputs": [""]}', "no gold answer"),
        (b'{"input": "", "outputs": ["a"]}', "`input` is empty"),
        (b'{"input": "\xff", "outputs": ["a"]}', "not a RULER row"),
    ],
)
def test_a_bad_row_stops_before_the_first_request(
    tokenizer: Tokenizer, tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "vt.jsonl"
    path.write_bytes(b'{"input": "a", "outputs": ["b"]}\n' + line + b"\n")
    with pytest.raises(InputError, match=message) as error:
        _workload(path).requests(tokenizer, 1064)
    assert f"{path}:2: " in error.value.message
    assert len(list(_workload(path, limit=1).requests(tokenizer, 1064))) == 1


def test_missing_files_and_tasks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        _workload(tmp_path / "none").requests(tokenizer, 1064)
    with pytest.raises(InputError, match=r"no \.jsonl file"):
        _workload(tmp_path).requests(tokenizer, 1064)
    for task, message in (("qa_1", "cannot be generated"), ("niah_singel_1", "unknown RULER task")):
        with pytest.raises(InputError, match=message) as error:
            build("ruler", Config(ruler=RulerConfig(tasks=(task,)))).requests(tokenizer, 1064)
        assert "niah_single_1" in error.value.hint
    with pytest.raises(InputError, match="no RULER task is chosen"):
        build("ruler", Config(ruler=RulerConfig(tasks=()))).requests(tokenizer, 1064)


def test_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(
        tmp_path / "niah_single_1.jsonl",
        {"input": "short", "outputs": ["x"]},
        {"input": NEEDLES, "outputs": ["111", "222"]},
        {"input": "short", "outputs": ["x"], "answer_prefix": "long" * 30},
    )
    workload = _workload(path)
    first, second = workload.requests(tokenizer, 100 + 9)
    assert [request.truncated_tokens > 0 for request in (first, second)] == [False, True]
    assert workload.dropped == {"no room beside template and answer prefix": 1}
    assert (first.truncated_tokens, second.truncated_tokens) == (0, len(NEEDLES) - 97)
    assert second.needle_spans == ()
    assert len(second.metadata["needle_depths"]) == 2


def test_score_is_the_share_of_gold_strings() -> None:
    def score(task: str, text: str) -> float | None:
        request = Request(0, [1], 1, answers=("Alpha", "beta"), metadata={"task": task})
        return Ruler().score(request, text)

    assert score("cwe", "ALPHA and beta.") == 1.0
    assert score("cwe", "alphabet") == 0.5
    assert score("vt", "") == 0.0
    assert score("qa_2", "the Beta") == 1.0
    assert score("qa_2", "gamma") == 0.0
