"""Prompts of one's own: a JSON object for each, as ``generate --input-file`` and ``trace file`` take them."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from dsakv.errors import InputError
from dsakv.hub.json_rows import BAD_JSON, json_fault
from dsakv.tokenizer import Tokenizer


class Message(Struct, frozen=True):
    role: str
    content: str


class PromptLine(Struct, frozen=True, kw_only=True):
    """Exactly one of the three prompts must be there; keys that are not listed are left alone."""

    prompt: str | None = None
    messages: list[Message] | None = None
    prompt_token_ids: list[int] | None = None
    request_id: Any = None
    """What the source calls the request."""

    def chat(self) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in self.messages or []]

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The text as the model sees it. Raises InputError where the tokenizer or its template refuses it."""
        return tokenizer.encode_messages(self.chat()) if self.prompt is None else tokenizer.encode_prompt(self.prompt)


Line = TypeVar("Line", bound=PromptLine)
_PROMPTS = ("prompt", "messages", "prompt_token_ids")


def parse_line(place: str, text: bytes, kind: type[Line]) -> Line:
    """A line at ``place``. Raises InputError where it is not what it should be, or its prompt is empty."""
    try:
        line = msgspec.json.decode(text, type=kind)
    except BAD_JSON as error:
        raise InputError(
            f"{place}: {json_fault(error, text)}", "a line is a JSON object with prompt, messages or prompt_token_ids"
        ) from error
    given = [name for name in _PROMPTS if getattr(line, name) is not None]
    if len(given) != 1:
        raise InputError(
            f"{place} has {' and '.join(given) or 'none'} of prompt, messages and prompt_token_ids", "give one of them"
        )
    if not getattr(line, given[0]):
        raise InputError(f"{place}: the prompt is empty", "remove the line or fill it")
    return line
