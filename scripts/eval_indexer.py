"""Judge how trained indexers select, on texts that no training saw.

  mass        share of the dense model's attention on the selected tokens, beside an oracle, a window and random weights
  ties        queries whose k-th and next best score are equal
  perplexity  of the second half of texts, every layer sparse from the first token on, as users run it
  jaccard     what consecutive decode steps select alike, by tokens and by blocks
  needles     RULER's, answered by the sparse model

Mass and ties are measured at all --lengths. The others run the sparse model, 5 to 8 ms a token on two cores, and take
--sparse-lengths. Figures that indexers must reach are printed with pass or fail; exit code 1 where one fails. With the
defaults all takes 20 to 25 minutes on two cores.

    python -m scripts.eval_indexer --json outputs/indexer_quality.json

It is a learned selection of a small dense model: its figures are not those of DeepSeek-V3.2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsakv.threads import wait_briefly

wait_briefly(os.environ)  # before torch is imported

from dsakv.config import ModelConfig  # noqa: E402
from dsakv.console import Console  # noqa: E402
from dsakv.errors import DsakvError, InputError  # noqa: E402
from dsakv.jobs.loaded import LoadedModel  # noqa: E402
from dsakv.jobs.model import load_model  # noqa: E402
from dsakv.models.llama import Llama  # noqa: E402
from scripts.needle_quality import Answer, answer, needle_items  # noqa: E402
from scripts.quality_report import Found, checks, headline, summary, tables  # noqa: E402
from scripts.selection_quality import STEPS, attention_mass, read, variants  # noqa: E402
from scripts.training_sources import Work, load_works  # noqa: E402
from scripts.training_texts import KINDS, Text, Texts, default_folder  # noqa: E402

PARTS = ("mass", "ties", "perplexity", "jaccard", "needles")
READ_KINDS = ("prose", "code", "docs", "chat")
"""Of the texts that perplexity is of: what people write, but for the framing of chats."""
SPARSE_COST = 3
"""A sparse token's time, in that of a dense one: for the time left that the progress tells."""


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = Console()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # now, and not after the work
    try:
        loaded = load_model(
            ModelConfig(
                ckpt_path=options.ckpt_path,
                indexer=options.indexer,
                index_topk=options.index_topk,
                dtype=options.dtype,
                selection="indexer",
                device="cpu",
            )
        )
        result = evaluate(loaded, load_works(options.folder), console, options)
    except DsakvError as error:
        console.info(f"error: {error.message}\nhint: {error.hint}")
        return 2  # 1 is for figures that are not good enough
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print_data(headline(result["about"]))
    for table in tables(result):
        console.print_table(table)
    return int(not all(check["passed"] for check in result["checks"]))


def parse_options(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt-path", help="folder or GGUF file of a Llama model; default: the default model")
    parser.add_argument("--indexer", help="file of indexers; default: those of the default model")
    parser.add_argument("--index-topk", type=int, default=0, metavar="K", help="tokens to select; default: the file's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"comma-separated, of {','.join(PARTS)}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens of texts for mass")
    parser.add_argument("--sparse-lengths", type=int, nargs="+", default=[4096], help="tokens of texts for the rest")
    parser.add_argument("--texts", type=int, default=len(KINDS), help="texts a length for mass, of all kinds in turn")
    parser.add_argument("--sparse-texts", type=int, default=4, help=f"texts a length to read: {', '.join(READ_KINDS)}")
    parser.add_argument("--items", type=int, default=12, help="needle items a length, for dense model and indexers")
    parser.add_argument("--compare-items", type=int, default=3, help="of these, for oracle and window")
    parser.add_argument("--rows", type=int, default=256, help="queries of a text that mass is measured for")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="of the packages with texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return parser.parse_args(arguments)


def _parts(given: str) -> tuple[str, ...]:
    parts = tuple(given.split(","))
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    return parts


def evaluate(loaded: LoadedModel, works: list[Work], console: Console, options: Any) -> dict[str, Any]:
    """All figures; see ``quality_report.summary``. Raises InputError for what is no Llama, or too long for it."""
    model = loaded.model
    if not isinstance(model, Llama):
        raise InputError(f"{loaded.name} is no Llama model", "--ckpt-path names one")
    looked, read = {"mass", "ties"} & set(options.parts), {"perplexity", "jaccard"} & set(options.parts)
    for length in [*(options.lengths if looked else []), *(options.sparse_lengths if read else [])]:
        if length <= model.top_k + STEPS:
            raise InputError(f"a length of {length} is too short to select {model.top_k} tokens", "use longer ones")
    longest = max([*options.lengths, *options.sparse_lengths])
    if longest > loaded.max_seq_len:
        raise InputError(f"a length of {longest} is more than the model's {loaded.max_seq_len}", "use shorter ones")
    about = {
        "model": loaded.name,
        "caveat": loaded.caveat,
        "indexer": options.indexer or "default",
        "index_topk": model.top_k,
        "dtype": loaded.precision,
        "seed": options.seed,
        "parts": list(options.parts),
    }
    work = Evaluation(variants(model, options.seed), loaded, works, options)
    with console.progress(work.total, "evaluating", "tokens") as advance:
        work.run(advance)
    found = summary(work.found, options.parts)
    return {"about": about, **found, "checks": checks(found)}


class Evaluation:
    """The passes over texts that the wanted parts need; each serves all parts that it can."""

    def __init__(self, models: dict[str, Llama], loaded: LoadedModel, works: list[Work], options: Any) -> None:
        self.models, self.loaded, self.works, self.options = models, loaded, works, options
        self.texts = Texts(loaded.tokenizer, works, True, options.seed)
        self.found = Found({}, {}, {})
        parts = set(options.parts)
        self.mass = bool(parts & {"mass", "ties"})
        self.readers = [  # without random weights where only perplexity is wanted
            *(["dense"] if "perplexity" in parts else []),
            *(["indexer", "oracle", "recent"] if parts & {"perplexity", "jaccard"} else []),
        ]
        self.untrained = "jaccard" in parts
        few = min(options.compare_items, options.items)
        needles = {"dense": options.items, "indexer": options.items, "oracle": few, "recent": few}
        self.needles = {method: n for method, n in needles.items() if n} if "needles" in parts else {}

    @property
    def total(self) -> int:
        """Tokens to read, those of sparse models counted as many times as they take longer."""
        costs = [_cost(method) * self.options.sparse_texts for method in self.readers]
        costs += [_cost(method) * n for method, n in self.needles.items()] + [SPARSE_COST * self.untrained]
        dense = self.mass * self.options.texts * sum(self.options.lengths)
        return int(dense + sum(costs) * sum(self.options.sparse_lengths))

    def run(self, advance: Callable[[int], None]) -> None:
        for length in self.options.lengths if self.mass else []:
            for text in self._texts(KINDS, length, self.options.texts):
                one = attention_mass(self.models, text.ids, self.options.rows)
                self.found.mass.setdefault(length, []).append((text.kind, one))
                advance(length)
        for length in self.options.sparse_lengths if self.readers else []:
            for i, text in enumerate(self._texts(READ_KINDS, length, self.options.sparse_texts)):
                # Random weights differ little from text to text.
                for method in [*self.readers, *(["random"] if self.untrained and i == 0 else [])]:
                    reading = read(self.models[method], text.ids, self.options.rows)
                    self.found.readings.setdefault(length, {}).setdefault(method, []).append(reading)
                    advance(length * _cost(method))
        for length in self.options.sparse_lengths if self.needles else []:
            ruler, requests = needle_items(self.loaded, self.works, length, self.options.items, self.options.seed)
            for method, count in self.needles.items():
                answers = self.found.answers.setdefault(length, {})
                answers[method] = self._answer(method, ruler, requests[:count], advance)

    def _texts(self, kinds: tuple[str, ...], length: int, count: int) -> list[Text]:
        return [self.texts.text(kinds[i % len(kinds)], length, i // len(kinds)) for i in range(count)]

    def _answer(self, method: str, ruler: Any, requests: Any, advance: Callable[[int], None]) -> list[Answer]:
        return answer(self.models[method], self.loaded, ruler, requests, lambda n: advance(n * _cost(method)))


def _cost(method: str) -> int:
    return 1 if method == "dense" else SPARSE_COST


if __name__ == "__main__":
    sys.exit(main())
