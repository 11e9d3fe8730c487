"""ShareGPT: every way to tell a conversation comes to the same requests, and nothing is lost uncounted."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsakv.chat_templates import V32_CHAT_TEMPLATE, V32_TOKENS
from dsakv.config import Config, EngineConfig, SharegptConfig, WorkloadConfig
from dsakv.errors import InputError
from dsakv.prefix import PrefixIndex
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from dsakv.workloads import build
from dsakv.workloads.sharegpt import ShareGPT, alternating

CHAT = [("human", "Hi."), ("gpt", "Hello!"), ("human", "Who are you?"), ("gpt", "A model."), ("human", "Bye.")]


def sharegpt(messages: list[tuple[str, str]], name: str = "c") -> dict[str, Any]:
    return {"id": name, "conversations": [{"from": role, "value": text} for role, text in messages]}


def workload(path: Path, rows: list[Any], mode: Any = "full", **options: Any) -> ShareGPT:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        sharegpt=SharegptConfig(json=str(path), turn_mode=mode),
        workload=WorkloadConfig(**options),
        engine=EngineConfig(max_new_tokens=4),
    )
    found = build("sharegpt", config)
    assert isinstance(found, ShareGPT)
    return found


def drawn(found: ShareGPT, tokenizer: Tokenizer, max_seq_len: int = 4096) -> list[Request]:
    return list(found.requests(tokenizer, max_seq_len))


FORMS = [
    sharegpt(CHAT),
    {"id": "c", "messages": [{"role": r.replace("human", "user"), "content": t} for r, t in CHAT]},
    {"conversation_id": "c", "conversation": [{"role": r.replace("gpt", "assistant"), "content": t} for r, t in CHAT]},
    {"id": "c", "items": [{"from": r.replace("gpt", "chatgpt"), "value": t, "markdown": None} for r, t in CHAT]},
    sharegpt([("GPT", "the end of a part"), ("human", ""), *CHAT[:1], ("bing", "Hello!"), ("bard", " "), *CHAT[2:]]),
]


@pytest.mark.parametrize("layout", ["lines", "array", "pretty"])
def test_forms_of_one_conversation(byte_tokenizer: Tokenizer, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "chats.json"
    found = workload(path, FORMS)
    if layout != "lines":
        path.write_text("\n " + json.dumps(FORMS, indent=2 if layout == "pretty" else None))
    first, *others = drawn(found, byte_tokenizer)
    assert byte_tokenizer.decode(first.prompt_token_ids) == "Hi.Hello!Who are you?A model.Bye."
    expected = [{"role": "assistant" if role == "gpt" else "user", "content": text} for role, text in CHAT]
    assert first.prompt_token_ids == byte_tokenizer.encode_messages(expected)
    assert len(others) == len(FORMS) - 1
    for request in others:
        assert request.prompt_token_ids == first.prompt_token_ids
        assert request.metadata == {"conversation": "c", "turn": 2, "turns": 3, "mode": "full"}
    places = [f"{path}:{i + 1}" if layout == "lines" else f"{path}#{i}" for i in range(len(FORMS))]
    assert [request.source_id for request in (first, *others)] == places


def test_what_a_conversation_comes_to() -> None:
    user, assistant = {"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}
    system = {"role": "system", "content": "s"}
    assert alternating([("system", "s"), ("gpt", "x"), ("user", "a"), ("human", "b"), ("model", "c")]) == [
        system,
        user,
        assistant,
    ]
    assert alternating([("human", "a"), ("gpt", "\n "), ("human", "b")]) == [user]
    assert alternating([]) == "empty conversation"
    assert alternating([("gpt", "c"), ("human", "")]) == "no user turn"
    assert alternating([("gpt", " "), ("tool", "")]) == "empty conversation"
    assert alternating([("human", "a"), ("tool", "")]) == [{"role": "user", "content": "a"}]
    assert alternating([("human", "a"), ("tool", "b")]) == "unknown role 'tool'"


def test_what_is_left_out_is_counted(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [sharegpt([]), sharegpt([("gpt", "x")]), sharegpt(CHAT), sharegpt([("critic", "x")]), sharegpt(CHAT)]
    found = workload(tmp_path / "chats", rows)
    assert len(drawn(found, byte_tokenizer)) == 2
    assert found.dropped == Counter({"empty conversation": 1, "no user turn": 1, "unknown role 'critic'": 1})
    assert drawn(found, byte_tokenizer, 4 + 7) == []
    assert sum(found.dropped.values()) == len(rows)


def test_full_asks_for_the_last_answer(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [sharegpt(CHAT[:4]), sharegpt(CHAT)]
    answered, open_ended = drawn(workload(tmp_path / "chats", rows), byte_tokenizer)
    assert byte_tokenizer.decode(answered.prompt_token_ids) == "Hi.Hello!Who are you?"
    assert answered.completion == "A model."
    assert open_ended.completion is None
    assert answered.prompt == "user: Hi.\n\nassistant: Hello!\n\nuser: Who are you?"


@pytest.fixture(scope="module")
def v32_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, DeepSeek-V3.2's special tokens, and no template of its own."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    directory = tmp_path_factory.mktemp("v32")
    write_byte_tokenizer(directory)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in V32_TOKENS])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").unlink()
    return load_tokenizer(directory)


def test_v32_has_its_chat_format_without_a_template(v32_tokenizer: Tokenizer, byte_tokenizer: Tokenizer) -> None:
    bos, eos, user, assistant, think = range(260, 265)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompt = [bos, *b"s", user, *b"u", assistant, think]
    assert v32_tokenizer.encode_messages(messages) == prompt
    more = [*messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": V32_TOKENS[1]}]
    spelled = list(V32_TOKENS[1].encode())
    assert v32_tokenizer.encode_messages(more) == [*prompt, *b"a", eos, user, *spelled, assistant, think]
    assert V32_TOKENS[2] in V32_CHAT_TEMPLATE
    assert byte_tokenizer.encode_messages(messages) == [256, *b"s", 258, *b"u", 259]


@pytest.mark.parametrize("kind", ["byte", "v32"])
def test_turns_share_their_prefix(
    byte_tokenizer: Tokenizer, v32_tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    tokenizer = byte_tokenizer if kind == "byte" else v32_tokenizer
    chat = [(role, text * 9) for role, text in CHAT]
    found = workload(tmp_path / "chats", [sharegpt(chat, "x"), sharegpt(chat[:2], "y")], "per_user_turn")
    requests = drawn(found, tokenizer)
    assert [(r.metadata["conversation"], r.metadata["turn"], r.metadata["turns"]) for r in requests] == [
        ("x", 0, 3),
        ("x", 1, 3),
        ("x", 2, 3),
        ("y", 0, 1),
    ]
    assert [r.completion for r in requests] == ["Hello!" * 9, "A model." * 9, None, "Hello!" * 9]
    index = PrefixIndex(8)
    for earlier, later in pairwise(requests[:3]):
        index.add(earlier.prompt_token_ids, earlier.request_id)
        ids = earlier.prompt_token_ids
        assert later.prompt_token_ids[: len(ids)] == ids
        assert index.lookup(later.prompt_token_ids)[-1] == (earlier.request_id, len(ids) // 8 * 8)


@pytest.mark.parametrize("cut", ["head", "tail", "middle"])
def test_a_long_conversation_loses_contents_alone(byte_tokenizer: Tokenizer, tmp_path: Path, cut: Any) -> None:
    found = workload(tmp_path / "chats", [sharegpt(CHAT)], truncate=cut)
    (whole,) = drawn(found, byte_tokenizer)
    template = [t for t in whole.prompt_token_ids if t >= 256]
    contents = [t for t in whole.prompt_token_ids if t < 256]
    for room in range(len(template) + 1, len(whole.prompt_token_ids)):
        (request,) = drawn(found, byte_tokenizer, room + 4)
        ids, kept = request.prompt_token_ids, room - len(template)
        assert len(ids) == room
        assert [t for t in ids if t >= 256] == template
        head = {"head": 0, "tail": kept, "middle": kept - kept // 2}[cut]
        assert [t for t in ids if t < 256] == contents[:head] + contents[len(contents) - kept + head :]
        assert request.truncated_tokens == len(whole.prompt_token_ids) - room


def test_the_limit_counts_requests(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats"
    found = workload(path, [sharegpt(CHAT), sharegpt(CHAT)], "per_user_turn", limit=4)
    path.write_text(path.read_text() + "broken, and never read\n")
    assert [r.metadata["turn"] for r in drawn(found, byte_tokenizer)] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "chats#0: no object"),
        ('{"text": "x"}', "no `conversations` or `messages`"),
        ('{"conversations": {"from": "human"}}', "no `conversations`"),
        ('{"conversations": ["x"]}', "message 0 lacks a role"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": ["b"]}]}', "message 1"),
        ('{"messages": [{"content": "a"}]}', "message 0 lacks a role"),
        ('[{"conversations": []}, {"conv', "is no JSON"),
    ],
)
def test_bad_rows(byte_tokenizer: Tokenizer, tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "chats"
    found = workload(path, [])
    path.write_text(row + "\n")
    with pytest.raises(InputError, match=message):
        drawn(found, byte_tokenizer)
    path.write_bytes(b'{"conversations": [{"from": "human", "value": "\xff"}]}\n')
    with pytest.raises(InputError, match="chats:1: no JSON"):
        drawn(found, byte_tokenizer)


def test_where_the_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file: gone"):
        build("sharegpt", Config(sharegpt=SharegptConfig(json="gone")))
    folder = Path("data/sharegpt")
    folder.mkdir(parents=True)
    for limit in (5, 6):
        (folder / f"sharegpt_train_limit{limit}.jsonl").write_text(json.dumps(sharegpt(CHAT)))
    with pytest.raises(InputError, match="holds several files"):
        build("sharegpt", Config())
    (folder / "sharegpt_train.jsonl").write_text(json.dumps(sharegpt(CHAT)))
    found = build("sharegpt", Config())
    assert isinstance(found, ShareGPT)
    assert [place for place, _ in found.rows()] == ["data/sharegpt/sharegpt_train.jsonl:1"]


def test_a_system_message_is_no_answer(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [sharegpt([("human", "a"), ("system", "b"), ("gpt", "c")])]
    (request,) = drawn(workload(tmp_path / "chats", rows), byte_tokenizer)
    assert request.completion is None


def test_reasons_are_not_endless(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [sharegpt([(f"role {i}" + "x" * 100, "text")]) for i in range(100)]
    found = workload(tmp_path / "chats", rows)
    assert drawn(found, byte_tokenizer) == []
    assert sum(found.dropped.values()) == 100
    assert len(found.dropped) == 21
    assert max(map(len, found.dropped)) < 60


def test_a_conversation_that_the_template_refuses_is_counted(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    strict = "{%- if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{%- endif %}{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text(strict)
    found = workload(tmp_path / "chats", [sharegpt(CHAT), sharegpt([("system", "s"), *CHAT])])
    assert len(drawn(found, load_tokenizer(tmp_path))) == 1
    assert found.dropped == {"refused by the chat template": 1}
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        drawn(found, load_tokenizer(tmp_path))


def test_a_byte_order_mark_is_passed_over(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats"
    found = workload(path, [])
    for text in (json.dumps([sharegpt(CHAT)]), json.dumps(sharegpt(CHAT)), "[]"):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(drawn(found, byte_tokenizer)) == (text != "[]")


@pytest.mark.parametrize("row", ['{"conversations": ' + "[" * 100_000, "[" * 100_000])
def test_nesting_without_end(byte_tokenizer: Tokenizer, tmp_path: Path, row: str) -> None:
    path = tmp_path / "chats"
    found = workload(path, [])
    path.write_text(row)
    with pytest.raises(InputError, match="no JSON"):
        drawn(found, byte_tokenizer)
