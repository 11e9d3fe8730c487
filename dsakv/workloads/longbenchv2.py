"""LongBench v2: questions with four choices on long documents (Bai et al., 2024, https://arxiv.org/abs/2412.15204)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from dsakv.config import Config
from dsakv.errors import InputError
from dsakv.hub import sources
from dsakv.hub.json_rows import BAD_JSON, json_fault
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.base import Cut, fit_prompt, prompt_room
from dsakv.workloads.rows import fetched_file, from_hub, json_rows, regular_file

FETCHED = Path("data/longbenchv2")
HINT = "a row has _id, domain, sub_domain, difficulty, length, question, choice_A to choice_D, answer and context"

# The zero-shot prompt of the benchmark, prompts/0shot.txt of https://github.com/THUDM/LongBench.
TEMPLATE = """\
Please read the following text and answer the question below.

<text>
$DOC$
</text>

What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

Format your response as follows: "The correct answer is (insert answer here)"."""


class Item(msgspec.Struct, frozen=True):
    """One question."""

    id: str = msgspec.field(name="_id")
    domain: str
    sub_domain: str
    difficulty: str
    length: str
    question: str
    choice_A: str  # noqa: N815 (the data set's name)
    choice_B: str  # noqa: N815
    choice_C: str  # noqa: N815
    choice_D: str  # noqa: N815
    answer: Literal["A", "B", "C", "D"]
    context: str

    @property
    def prompt(self) -> str:
        """The filled template: in one pass, for a document may spell a placeholder."""
        values = {
            "$DOC$": self.context,
            "$Q$": self.question,
            "$C_A$": self.choice_A,
            "$C_B$": self.choice_B,
            "$C_C$": self.choice_C,
            "$C_D$": self.choice_D,
        }
        return re.sub(r"\$(?:DOC|Q|C_[ABCD])\$", lambda found: values[found[0]].strip(), TEMPLATE)


@dataclass(slots=True)
class LongBenchV2:
    """The questions in the order of the file."""

    path: Path
    limit: int = 64
    max_new_tokens: int = 64
    truncate: Cut = "middle"
    """Where to cut. The benchmark cuts the middle of the whole prompt; question and choices stand at its end."""
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    name: str = field(default="longbenchv2", init=False)
    score_groups: tuple[str, ...] = field(default=("length", "difficulty"), init=False)

    @classmethod
    def from_config(cls, config: Config) -> LongBenchV2:
        return cls(
            path=_find(config.longbenchv2.data),
            limit=config.workload.limit,
            max_new_tokens=config.engine.max_new_tokens,
            truncate=config.workload.truncate,
        )

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        """See ``Workload.requests``. Raises InputError for a row that is no such question, when it is reached."""
        self.dropped = Counter()
        return self._requests(tokenizer, prompt_room(max_seq_len, self.max_new_tokens))

    def score(self, request: Request, text: str) -> float:
        """1 where the right letter was chosen."""
        return float(chosen(text) == request.answers[0])

    def _requests(self, tokenizer: Tokenizer, room: int) -> Iterator[Request]:
        number = 0
        for place, raw in json_rows(self.path, "--longbenchv2-data"):
            try:
                item = msgspec.json.decode(raw, type=Item)
            except BAD_JSON as error:
                raise InputError(f"{place}: no question of LongBench v2: {json_fault(error, raw)}", HINT) from error
            text = item.prompt
            fitted = fit_prompt(tokenizer, text, room, self.truncate)
            if fitted is None:
                self.dropped["no room beside the chat template"] += 1
                continue
            yield Request(
                request_id=number,
                prompt_token_ids=fitted.token_ids,
                max_new_tokens=self.max_new_tokens,
                source_id=item.id,
                prompt=text,
                truncated_tokens=fitted.truncated_tokens,
                answers=(item.answer,),
                completion=f"The correct answer is ({item.answer})",
                metadata={
                    "place": place,
                    "domain": item.domain,
                    "sub_domain": item.sub_domain,
                    "difficulty": item.difficulty,
                    "length": item.length,
                    "context_characters": len(item.context),
                },
            )
            number += 1
            if number == self.limit:
                return


def chosen(text: str) -> str | None:
    """The letter that a completion settles on, found as the benchmark does: in parentheses, else without; None where
    it names none.
    """
    plain = text.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if found := re.search(pattern, plain):
            return found[1]
    return None


def _find(given: str | None) -> Path:
    """The file named, else what was fetched, else the hub's."""
    if given is not None:
        return regular_file(given, "--longbenchv2-data")
    fetched = fetched_file(FETCHED, "longbenchv2_train")
    return from_hub(sources.LONGBENCH_V2, FETCHED, "--longbenchv2-data") if fetched is None else fetched
