"""Requests of one's own, from a file of JSON lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from dsakv.config import LARGEST, Config
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.base import Cut, FittedPrompt, fit_messages, fit_prompt, fit_tokens, prompt_room
from dsakv.workloads.prompt_lines import PromptLine, parse_line
from dsakv.workloads.rows import json_rows, regular_file


class RequestLine(PromptLine, frozen=True, kw_only=True):
    """A prompt, with what else is known of the request."""

    completion: str | None = None
    arrival_s: Annotated[float, Meta(ge=0, le=LARGEST)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=LARGEST)] | None = None
    id: Any = None


@dataclass(slots=True)
class FileRequests:
    """The lines of a file, in their order."""

    path: Path
    limit: int = 64
    max_new_tokens: int = 64
    """Of lines that do not say it."""
    truncate: Cut = "middle"
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    name: str = field(default="file", init=False)
    score_groups: tuple[str, ...] = field(default=(), init=False)

    @classmethod
    def from_config(cls, config: Config) -> FileRequests:
        """Reads the whole file once: a bad line is told of before a model is loaded."""
        hint = "dsakv trace file PATH reads JSON lines with prompt, messages or prompt_token_ids"
        if config.file.path is None:
            raise InputError("no file is named", hint)
        path = regular_file(config.file.path, "PATH")
        requests = cls(
            path=path,
            limit=config.workload.limit,
            max_new_tokens=config.engine.max_new_tokens,
            truncate=config.workload.truncate,
        )
        for _ in requests._lines():
            pass
        return requests

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        """See ``Workload.requests``. Times are those of the file, less the first of them."""
        self.dropped = Counter()
        return self._requests(tokenizer, max_seq_len)

    def score(self, request: Request, text: str) -> None:
        """None: what a good answer is, the file does not say."""

    def _lines(self) -> Iterator[tuple[str, RequestLine]]:
        for place, raw in islice(json_rows(self.path, "PATH"), self.limit):
            yield place, parse_line(place, bytes(raw), RequestLine)

    def _requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        begin = min((line.arrival_s for _, line in self._lines() if line.arrival_s is not None), default=0.0)
        number = 0
        for place, line in self._lines():
            new_tokens = line.max_new_tokens or self.max_new_tokens
            try:
                fitted = self._fit(line, tokenizer, prompt_room(max_seq_len, new_tokens))
            except InputError as error:
                raise InputError(f"{place}: {error.message}", error.hint) from error
            if fitted is None:
                self.dropped["no room beside the chat template, or one that rewrites messages"] += 1
                continue
            yield Request(
                request_id=number,
                prompt_token_ids=fitted.token_ids,
                max_new_tokens=new_tokens,
                source_id=str(next((name for name in (line.request_id, line.id) if name not in (None, "")), place)),
                prompt=line.prompt,
                truncated_tokens=fitted.truncated_tokens,
                arrival_s=None if line.arrival_s is None else line.arrival_s - begin,
                completion=line.completion,
                metadata={"place": place},
            )
            number += 1

    def _fit(self, line: RequestLine, tokenizer: Tokenizer, room: int) -> FittedPrompt | None:
        if line.prompt is not None:
            return fit_prompt(tokenizer, line.prompt, room, self.truncate)
        if line.messages is not None:
            return fit_messages(tokenizer, line.chat(), room, self.truncate)
        ids = line.prompt_token_ids or []
        fitted = fit_tokens(ids, [(0, len(ids))], room, self.truncate)
        return None if fitted is None else FittedPrompt(fitted[0], (), len(ids) - len(fitted[0]))
