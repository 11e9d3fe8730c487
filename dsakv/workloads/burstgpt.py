"""BurstGPT: when requests came and how long they were, of the logs of a ChatGPT and GPT-4 service.

https://github.com/HPMLL/BurstGPT (Wang et al., 2024). The logs hold no text and nothing about shared prefixes. Prompts
here are real text of exactly the logged number of tokens; they share the chat template and no more, and whatever
prefix reuse is seen with them says nothing about the service. Azure's public LLM traces have the same three facts
under other names and are read too.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from dsakv.config import LARGEST, Config
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.corpus import Corpus, CorpusText, load_text
from dsakv.workloads.load import Load, Row
from dsakv.workloads.rows import regular_file

FETCHED = Path("data/burstgpt")
"""Where ``dsakv fetch-data burstgpt`` leaves the CSV files."""
HINT = "give a CSV file of BurstGPT with --burstgpt-csv"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_DATE = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?(?:\+00:00)?")


def _seconds(text: str) -> float:
    """Raises ValueError for anything but a finite number from 0 on."""
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is no number of seconds")
    return number


def _date(text: str) -> float:
    """Seconds since 1970. Raises ValueError for anything but a date and time of day."""
    match = _DATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no date and time")
    whole = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)
    return whole.timestamp() + float(match[2] or 0)


def _tokens(text: str) -> int:
    """Raises ValueError for anything but a whole number from 0 to ``LARGEST``."""
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    if number > LARGEST or number != int(number):
        raise ValueError(f"{text!r} is no number of tokens")
    return int(number)


class Columns(NamedTuple):
    """What a family of traces calls its columns."""

    time: str
    prompt: str
    response: str
    seconds: Callable[[str], float]


KNOWN = (
    Columns("Timestamp", "Request tokens", "Response tokens", _seconds),
    Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date),
)
FACTS = {"Model": "model", "Log Type": "log_type", "Session ID": "session_id"}
"""Further columns, not in every version, and their names in ``Request.metadata``."""


@dataclass(slots=True)
class BurstGPT:
    """Replays the first rows of a trace: arrival times and lengths are the trace's, the text is not."""

    load: Load
    max_new_tokens_cap: int = 64
    seed: int = 0
    corpus: CorpusText = field(default_factory=load_text)
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    name: str = field(default="burstgpt", init=False)
    score_groups: tuple[str, ...] = field(default=(), init=False)

    @classmethod
    def from_config(cls, config: Config) -> BurstGPT:
        """Reads the trace and the corpus: what is wrong with them is told before a model is loaded."""
        path = _fetched() if config.burstgpt.csv is None else regular_file(config.burstgpt.csv, "--burstgpt-csv")
        return cls(
            load=Load.read(path, read_csv(path), config.workload.limit),
            max_new_tokens_cap=config.workload.max_new_tokens_cap,
            seed=config.engine.seed,
            corpus=load_text(config.workload.corpus),
        )

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        """See ``Workload.requests``. A prompt that is too long for the model is cut, and counted."""
        self.dropped = Counter(self.load.dropped)
        self.load.check_room(max_seq_len, self.max_new_tokens_cap)
        return self._requests(Corpus.encode(self.corpus, tokenizer, self.seed), _frame(tokenizer), max_seq_len)

    def score(self, request: Request, text: str) -> None:
        """None: the trace knows no answers."""

    def _requests(self, corpus: Corpus, frame: tuple[list[int], list[int]], max_seq_len: int) -> Iterator[Request]:
        head, tail = frame
        for index, row in enumerate(self.load.rows):
            new_tokens = min(row.output_tokens, self.max_new_tokens_cap)
            length = min(row.prompt_tokens, max_seq_len - new_tokens)
            inside = length - len(head) - len(tail)
            framed = inside > 0  # shorter prompts are plain text: a cut template would be no template
            prompt = head + corpus.window(index, inside) + tail if framed else corpus.window(index, length)
            yield Request(
                request_id=index,
                prompt_token_ids=prompt,
                max_new_tokens=new_tokens,
                source_id=row.place,
                truncated_tokens=row.prompt_tokens - length,
                arrival_s=row.seconds,
                metadata={
                    **row.facts,
                    "request_tokens": row.prompt_tokens,
                    "response_tokens": row.output_tokens,
                    "corpus": corpus.label,
                },
            )


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time; columns are found by their names.

    Raises InputError for a file that cannot be read or holds no such trace, naming ``file:line`` for a bad row.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            columns = _columns(path, header)
            for values in lines:
                if values:
                    yield _row(f"{path}:{lines.line_num}", header, columns, values)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check --burstgpt-csv") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason}", HINT) from error
    except csv.Error as error:
        raise InputError(f"{path}:{lines.line_num}: not CSV: {error}", HINT) from error


def _columns(path: Path, header: list[str]) -> Columns:
    for columns in KNOWN:
        if {columns.time, columns.prompt, columns.response} <= set(header):
            return columns
    if not header:
        raise InputError(f"{path} is empty", HINT)
    best = max(KNOWN, key=lambda columns: len(set(columns[:3]) & set(header)))
    missing = ", ".join(repr(name) for name in best[:3] if name not in header)
    found = ", ".join(repr(name) for name in header[:12])
    raise InputError(f"{path} has no column {missing}", f"its first line has {found}; {HINT}")


def _row(place: str, header: list[str], columns: Columns, values: list[str]) -> Row:
    if len(values) != len(header):
        raise InputError(f"{place}: {len(values)} values where the first line names {len(header)}", "repair this line")
    named = {name: value.strip() for name, value in zip(header, values, strict=True)}
    try:
        seconds, prompt_tokens = columns.seconds(named[columns.time]), _tokens(named[columns.prompt])
        output_tokens = _tokens(named[columns.response])
    except ValueError as error:
        raise InputError(f"{place}: {error}", "repair or remove this line") from error
    facts = {key: named[name] or None for name, key in FACTS.items() if name in named}
    return Row(place, seconds, prompt_tokens, output_tokens, facts)


def _fetched() -> Path:
    """The one file that was fetched. Raises InputError where there is none, or several to choose from."""
    files = sorted(FETCHED.glob("*.csv"))
    if not files:
        raise InputError(
            f"no BurstGPT trace is given, and {FETCHED} holds none",
            "run dsakv fetch-data burstgpt, or name a file with --burstgpt-csv",
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{FETCHED} holds several traces: {names}", "name one with --burstgpt-csv")
    return files[0]


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the chat template puts before and behind a user's text."""
    framed = tokenizer.encode_prompt_with_offsets("x")
    return framed.ids[: framed.start], framed.ids[framed.stop :]
