"""ShareGPT: conversations of users with assistants, as requests.

A conversation is told by many hands: roles and fields have several names, parts of long ones begin with an answer,
messages are empty. What comes out is ``system``, ``user`` and ``assistant`` messages that alternate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from dsakv.config import Config
from dsakv.console import Console
from dsakv.errors import InputError
from dsakv.hub import sources
from dsakv.hub.json_rows import BAD_JSON, json_fault
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.base import Cut, fit_messages, prompt_room
from dsakv.workloads.rows import Row, fetched_file, from_hub, json_rows, regular_file

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
}
FETCHED = Path("data/sharegpt")
MOST_REASONS = 20
"""Why conversations were dropped, at most: roles may be anything."""
HINT = "a row is an object with `conversations` of {from, value}, or `messages` of {role, content}"

Message = dict[str, str]


@dataclass(slots=True)
class ShareGPT:
    """Conversations as requests: the last answer of each, or every user turn."""

    rows: Callable[[], Iterator[Row]]
    """Reads the conversations anew."""
    turn_mode: Literal["full", "per_user_turn"] = "full"
    limit: int = 64
    """Requests at most."""
    max_new_tokens: int = 64
    truncate: Cut = "middle"
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    name: str = field(default="sharegpt", init=False)
    score_groups: tuple[str, ...] = field(default=(), init=False)

    @classmethod
    def from_config(cls, config: Config) -> ShareGPT:
        return cls(
            rows=_source(config),
            turn_mode=config.sharegpt.turn_mode,
            limit=config.workload.limit,
            max_new_tokens=config.engine.max_new_tokens,
            truncate=config.workload.truncate,
        )

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        """See ``Workload.requests``. Raises InputError for a row that is no conversation, when it is reached."""
        self.dropped = Counter()
        tokenizer.check_chat_template()
        return self._requests(tokenizer, prompt_room(max_seq_len, self.max_new_tokens))

    def score(self, request: Request, text: str) -> None:
        """None: there are many good answers."""

    def _requests(self, tokenizer: Tokenizer, room: int) -> Iterator[Request]:
        number = 0
        for place, raw in self.rows():
            name, messages = read_conversation(place, raw)
            usable = alternating(messages)
            if isinstance(usable, str):
                known = usable in self.dropped or len(self.dropped) < MOST_REASONS
                self.dropped[usable if known else "other roles"] += 1
                continue
            turns = [i for i, message in enumerate(usable) if message["role"] == "user"]
            chosen = turns if self.turn_mode == "per_user_turn" else turns[-1:]
            for i in chosen:
                reply = usable[i + 1] if i + 1 < len(usable) else None
                try:
                    fitted = fit_messages(tokenizer, usable[: i + 1], room, self.truncate)
                except InputError:  # of this conversation: that there is a template was seen to
                    self.dropped["refused by the chat template"] += 1
                    continue
                if fitted is None:  # nor is there for the turns that follow
                    later = len(chosen) - chosen.index(i)
                    self.dropped["no room beside the chat template, or one that rewrites messages"] += later
                    break
                yield Request(
                    request_id=number,
                    prompt_token_ids=fitted.token_ids,
                    max_new_tokens=self.max_new_tokens,
                    source_id=place,
                    prompt="\n\n".join(f"{message['role']}: {message['content']}" for message in usable[: i + 1]),
                    truncated_tokens=fitted.truncated_tokens,
                    completion=reply["content"] if reply and reply["role"] == "assistant" else None,
                    metadata={
                        "conversation": name,
                        "turn": turns.index(i),
                        "turns": len(turns),
                        "mode": self.turn_mode,
                    },
                )
                number += 1
                if number == self.limit:
                    return


def read_conversation(place: str, raw: msgspec.Raw | bytes) -> tuple[str, list[tuple[str, str]]]:
    """A row's id, and its messages as (role as written, text). Raises InputError for a row that is no conversation."""
    try:
        row = msgspec.json.decode(raw)
    except BAD_JSON as error:
        raise InputError(f"{place}: no JSON: {json_fault(error, raw)}", HINT) from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: no object", HINT)
    listed = next((row[key] for key in ("conversations", "conversation", "messages", "items") if key in row), None)
    if not isinstance(listed, list):
        raise InputError(f"{place}: no `conversations` or `messages`", HINT)
    messages: list[tuple[str, str]] = []
    for message in listed:
        role, text = _first(message, "from", "role"), _first(message, "value", "content", "text")
        if not isinstance(role, str) or not isinstance(text, str | None):
            raise InputError(f"{place}: message {len(messages)} lacks a role, or its text is none", HINT)
        messages.append((role, text or ""))
    name = row.get("id", row.get("conversation_id", ""))
    return str(name), messages


def _first(message: Any, *keys: str) -> Any:
    return next((message[key] for key in keys if key in message), None) if isinstance(message, dict) else None


def alternating(messages: list[tuple[str, str]]) -> list[Message] | str:
    """System messages, then user and assistant in turn, none empty; or why nothing is left.

    Empty messages go, neighbours of one role become one, and answers before the first question, with which parts of
    split conversations begin, are left out.
    """
    found: list[Message] = []
    for written, text in messages:
        if not text.strip():
            continue
        role = ROLES.get(written.strip().lower())
        if role is None:
            return f"unknown role {written[:40]!r}"
        if found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n\n{text}"
        elif role != "assistant" or any(message["role"] == "user" for message in found):
            found.append({"role": role, "content": text})
    if not any(text.strip() for _, text in messages):
        return "empty conversation"
    return found if any(message["role"] == "user" for message in found) else "no user turn"


def _source(config: Config) -> Callable[[], Iterator[Row]]:
    """Where the conversations are: the file named, else what was fetched, else the hub."""
    chosen = config.sharegpt
    if chosen.json is not None:
        path: Path | None = regular_file(chosen.json, "--sharegpt-json")
    elif chosen.dataset == sources.SHAREGPT.repo:
        path = fetched_file(FETCHED, "sharegpt_train")
    else:
        return _streamed(chosen.dataset, chosen.split)
    if path is None:
        path = from_hub(sources.SHAREGPT, FETCHED, "--sharegpt-json")
    found = path
    return lambda: json_rows(found, "--sharegpt-json")


def _streamed(repo: str, split: str) -> Callable[[], Iterator[Row]]:
    from dsakv.hub.client import Hub
    from dsakv.hub.streamed import commit_of, streamed_rows

    commit = commit_of(repo, "main", Hub.from_environment(), Console())

    def rows() -> Iterator[Row]:
        for number, line in enumerate(streamed_rows(repo, commit, split)):
            yield f"{repo}@{commit[:12]}/{split}#{number}", line

    return rows
