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
from pathlib import Path
from typing import Annotated

import msgspec

from dsakv.config import LARGEST, Config
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.corpus import Corpus, CorpusText, load_text
from dsakv.workloads.load import Load, Row, failure
from dsakv.workloads.rows import BAD_JSON

BLOCK = 512
"""Tokens of a hash id; the last one of a prompt may stand for fewer."""
HINT = "each line of a Mooncake trace is a JSON object with `timestamp`, `input_length`, `output_length`, `hash_ids`"
_FromZero = Annotated[int, msgspec.Meta(ge=0)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
_Time = Annotated[int, msgspec.Meta(ge=0, le=2**53)] | Annotated[float, msgspec.Meta(ge=0, le=2**53)]


class _Line(msgspec.Struct):
    timestamp: _Time
    """Milliseconds."""
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: list[_FromZero]


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
        return cls(
            load=read_jsonl(Path(config.mooncake.jsonl), config.workload.limit),
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
    """The ``BLOCK`` tokens of a hash id. They begin with its number, so no two ids have the same, however many."""
    number = tokenizer.encode(f"{hash_id}: ")
    return (number + corpus.window(hash_id, BLOCK))[:BLOCK]


def read_jsonl(path: Path, limit: int) -> Load:
    """The first ``limit`` requests of a file, which is read no further; empty lines are passed over.

    Raises InputError for a file that cannot be read, naming ``file:line`` for a bad row.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = _row(f"{path}:{number}", line)
                reason = failure(row.prompt_tokens, row.output_tokens)
                if reason is None:
                    rows.append(row)
                    if len(rows) == limit:
                        break
                else:
                    dropped[reason] += 1
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check --mooncake-jsonl") from error
    return Load.of(path, rows, dropped)


def _row(place: str, line: bytes) -> Row:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except BAD_JSON as error:
        raise InputError(f"{place}: not a row of a Mooncake trace: {error}", HINT) from error
    blocks = -(-found.input_length // BLOCK)
    if len(found.hash_ids) != blocks:
        raise InputError(
            f"{place}: {len(found.hash_ids)} hash_ids for {found.input_length} tokens, which are {blocks} blocks",
            f"a prompt has one hash id for every {BLOCK} tokens, the last of them for what is left",
        )
    seconds = found.timestamp / 1000
    return Row(place, seconds, found.input_length, found.output_length, {"hash_ids": found.hash_ids})
