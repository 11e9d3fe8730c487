"""Mooncake: when requests came, how long they were, and which prefixes they shared.

https://github.com/kvcache-ai/Mooncake (Qin et al., FAST 2025). The traces name every 512 tokens of a prompt by a hash
id that also covers what stands before: equal ids are equal prefixes. Here each id stands for one block of real text,
the same in every prompt, so that prompts share exactly the prefixes that the ids say. They are ids without a chat
template, which would shift the blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from dsakv.config import LARGEST, Config
from dsakv.errors import InputError
from dsakv.hub.json_rows import BAD_JSON, json_fault
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.corpus import Corpus, CorpusText, load_text
from dsakv.workloads.load import Load, Row
from dsakv.workloads.rows import json_rows, regular_file

BLOCK = 512
"""Tokens of a hash id; the last one of a prompt may stand for fewer."""
FLAG = "--mooncake-jsonl"
HINT = "each line of a Mooncake trace is a JSON object with `timestamp`, `input_length`, `output_length`, `hash_ids`"
_HashId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
_Time = Annotated[int, msgspec.Meta(ge=0, le=2**53)] | Annotated[float, msgspec.Meta(ge=0, le=2**53)]


class _Line(msgspec.Struct):
    timestamp: _Time
    """Milliseconds."""
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: list[_HashId]


@dataclass(slots=True)
class Mooncake:
    """Replays the first rows of a trace: times, lengths and shared prefixes are the trace's, the text is not."""

    load: Load
    """Rows whose ``facts["hash_ids"]`` are the blocks of the prompt."""
    max_new_tokens_cap: int = 64
    seed: int = 0
    corpus: CorpusText = field(default_factory=load_text)
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    name: str = field(default="mooncake", init=False)
    score_groups: tuple[str, ...] = field(default=(), init=False)

    @classmethod
    def from_config(cls, config: Config) -> Mooncake:
        """Reads the trace and the corpus: what is wrong with them is told before a model is loaded."""
        if config.mooncake.jsonl is None:
            raise InputError(
                "no Mooncake trace is given",
                "name a .jsonl file of github.com/kvcache-ai/Mooncake with --mooncake-jsonl",
            )
        path = regular_file(config.mooncake.jsonl, FLAG)
        rows = (_row(place, line) for place, line in json_rows(path, FLAG))
        return cls(
            load=Load.read(path, rows, config.workload.limit),
            max_new_tokens_cap=config.workload.max_new_tokens_cap,
            seed=config.engine.seed,
            corpus=load_text(config.workload.corpus),
        )

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        """See ``Workload.requests``. A prompt too long for the model loses its tail, so that prefixes stay shared."""
        self.dropped = Counter(self.load.dropped)
        self.load.check_room(max_seq_len, self.max_new_tokens_cap)
        return self._requests(Corpus.encode(self.corpus, tokenizer, self.seed), tokenizer, max_seq_len)

    def score(self, request: Request, text: str) -> None:
        """None: the trace knows no answers."""

    def _requests(self, corpus: Corpus, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        for index, row in enumerate(self.load.rows):
            new_tokens = min(row.output_tokens, self.max_new_tokens_cap)
            length = min(row.prompt_tokens, max_seq_len - new_tokens)
            prompt: list[int] = []
            for hash_id in row.facts["hash_ids"][: -(-length // BLOCK)]:
                prompt += block(hash_id, corpus, tokenizer)
            yield Request(
                request_id=index,
                prompt_token_ids=prompt[:length],
                max_new_tokens=new_tokens,
                source_id=row.place,
                truncated_tokens=row.prompt_tokens - length,
                arrival_s=row.seconds,
                metadata={
                    "input_length": row.prompt_tokens,
                    "output_length": row.output_tokens,
                    "corpus": corpus.label,
                },
            )


def block(hash_id: int, corpus: Corpus, tokenizer: Tokenizer) -> list[int]:
    """The ``BLOCK`` tokens of a hash id. They begin with its number, so no two ids have the same."""
    number = tokenizer.encode(f"{hash_id}: ")
    return (number + corpus.window(hash_id, BLOCK))[:BLOCK]


def _row(place: str, line: msgspec.Raw | bytes) -> Row:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except BAD_JSON as error:
        raise InputError(f"{place}: not a row of a Mooncake trace: {json_fault(error, line)}", HINT) from error
    blocks = -(-found.input_length // BLOCK)
    if len(found.hash_ids) != blocks:
        raise InputError(
            f"{place}: {len(found.hash_ids)} hash_ids for {found.input_length} tokens, which are {blocks} blocks",
            f"a prompt has one hash id for every {BLOCK} tokens, the last of them for what is left",
        )
    seconds = found.timestamp / 1000
    return Row(place, seconds, found.input_length, found.output_length, {"hash_ids": found.hash_ids})
