"""The token ids that indexers are trained on and judged by: a mix of kinds, drawn from a seed.

Training and held-out texts are drawn alike, from works of their own: see ``training_sources``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from dsakv.settings import cache_home
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.corpus import CorpusText
from dsakv.workloads.ruler.essay import Essay
from dsakv.workloads.ruler.generator import Generator
from dsakv.workloads.ruler.vocabulary import Vocabulary, load_vocabulary
from scripts import made_up_texts as made_up
from scripts.training_sources import Work

KINDS = ("prose", "code", "docs", "chat", "ruler", "needles", "records")
SHARES = (0.32, 0.13, 0.12, 0.19, 0.11, 0.07, 0.06)
LONG_SHARES = (0.25, 0.09, 0.09, 0.15, 0.22, 0.13, 0.07)
"""Of ``KINDS``, in chunks of the shortest length and in longer ones."""
RULER_TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "fwe"),
)
CHARACTERS_PER_TOKEN = 6
"""No kind has more on average; what is too much is cut."""
SECRETS = (
    "The access code of the {key} is {value}.",
    "Remember this: {key} = {value}.",
    "Note that the number stored for {key} was changed to {value}.",
    "The password for {key} is {value}.",
)
HELD_OUT_SECRETS = ("Whoever asks for the {key} has to say {value}.", "{key} has the phone number {value}.")


def default_folder() -> Path:
    return cache_home() / "training_texts"


@dataclass(frozen=True, slots=True)
class Text:
    kind: str
    ids: list[int]


class Texts:
    """Draws texts of a tokenizer from the works that are held out, or from the others."""

    def __init__(self, tokenizer: Tokenizer, works: list[Work], held_out: bool, seed: int) -> None:
        self.tokenizer, self.held_out, self.seed = tokenizer, held_out, seed
        self.words: Vocabulary = load_vocabulary()
        self._works: dict[str, dict[str, list[Work]]] = {}
        for work in works:
            if work.held_out == held_out:
                self._works.setdefault(work.kind, {}).setdefault(work.origin, []).append(work)

    def text(self, kind: str, length: int, index: int) -> Text:
        """The text ``index`` of a kind: ``length`` tokens, a few fewer where its end must not be cut off."""
        draw = random.Random(f"{self.seed}/{self.held_out}/{kind}/{length}/{index}")
        if kind == "chat":
            return Text(kind, self._chat(draw, length))
        if kind == "ruler":
            return self._ruler(draw, length)
        if kind == "needles":
            return Text(kind, self._needles(draw, length))
        if kind == "records":
            return Text(kind, self._records(draw, length))
        passage, _ = self._passage(draw, kind, length * CHARACTERS_PER_TOKEN)
        return Text(kind, self._encode(passage)[:length])

    def _encode(self, text: str) -> list[int]:
        """A text by itself, behind a BOS token where runs put one."""
        return self.tokenizer.encode_raw(text)

    def _end(self, ids: list[int], length: int) -> list[int]:
        """The last ``length`` tokens, the BOS token before them kept."""
        lead = len(self.tokenizer.encode_raw(""))
        return ids if len(ids) <= length else ids[:lead] + ids[len(ids) - length + lead :]

    def _passage(self, draw: random.Random, kind: str, characters: int) -> tuple[str, str]:
        """Text from a random place of a work on, and on from the begin of others where it is too short."""
        parts: list[str] = []
        labels: list[str] = []
        while characters > 0:
            # By the root of its size: else speeches would be nearly all prose.
            origins = list(self._works[kind].values())
            works = draw.choices(origins, [sum(len(work.text) for work in each) ** 0.5 for each in origins])[0]
            work = draw.choices(works, [len(each.text) for each in works])[0]
            start = 0 if parts else draw.randrange(len(work.text))
            start = work.text.find("\n", start) + 1 if start else 0  # 0 as well where no line follows
            parts.append(work.text[start : start + characters])
            labels.append(work.name)
            characters -= len(parts[-1])
        return "\n\n\n".join(parts), ", ".join(labels)

    def _chat(self, draw: random.Random, length: int) -> list[int]:
        """One conversation after the other; the last is cut."""
        ids: list[int] = []
        while len(ids) < length:
            messages: list[dict[str, str]] = []
            for asked, answer in self._turns(draw, length):
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            ids += self.tokenizer.encode_messages(messages[: -draw.randint(1, 2)])
        return ids[:length]

    def _turns(self, draw: random.Random, length: int) -> list[made_up.Turn]:
        turns: list[made_up.Turn] = []
        for _ in range(draw.randint(2, 5)):
            what = draw.choice(["passage", "passage", "function", "records", "sums", "words", "person"])
            if what == "passage":
                kind = draw.choice(["prose", "docs", "code"])
                passage, _ = self._passage(draw, kind, draw.randint(500, length * 2))
                turns += made_up.about_passage(draw, passage)
            elif what == "function":
                works = [each for origin in self._works["code"].values() for each in origin]
                found = made_up.about_functions(draw.choice(works).text)
                turns += draw.sample(found, min(len(found), draw.randint(1, 5)))
            elif what == "records":
                listed, questions = made_up.record_list(draw, self.words, draw.randint(4, 24), self.held_out)
                turns += [(f"{listed}\n\n{questions[0][0]}", questions[0][1]), *questions[1:]]
            elif what == "sums":
                turns += [made_up.arithmetic(draw) for _ in range(draw.randint(1, 4))]
            elif what == "words":
                turns.append(made_up.word_list(draw, self.words))
            else:
                turns += made_up.introduction(draw, self.words)
        return turns

    def _ruler(self, draw: random.Random, length: int) -> Text:
        """A RULER item with its answer."""
        passage, label = self._passage(draw, draw.choice(["prose", "prose", "docs"]), 60_000)
        essay = Essay.of(CorpusText(passage, label))
        generator = Generator(self.tokenizer, length, draw.randrange(2**32), self.words, essay)
        item = generator.item(draw.choice(RULER_TASKS), 0)
        answered = f"{item.answer_prefix} {', '.join(item.answers)}."
        ids = self.tokenizer.encode_prompt_with_offsets(item.text, answered).ids
        return Text("ruler", self._end(ids, length))

    def _needles(self, draw: random.Random, length: int) -> list[int]:
        """Facts of different wording hidden in a passage, then asked for in the user's message or below the text."""
        secrets = HELD_OUT_SECRETS if self.held_out else SECRETS
        facts = []
        for _ in range(draw.choice([1, 2, 4, 8, 16])):
            value = draw.choice([str(draw.randrange(10**4, 10**8)), self.words.compound(draw)])
            facts.append((draw.choice(secrets), self.words.compound(draw).replace("-", " "), value))
        asked = draw.sample(facts, min(len(facts), draw.randint(1, 3)))
        questions = [f"What was said about the {key}?" for _, key, _ in asked]
        answers = [form.format(key=key, value=value) for form, key, value in asked]
        tail = "\n".join(f"{question} {answer}" for question, answer in zip(questions, answers, strict=True))
        passage, _ = self._passage(draw, draw.choice(["prose", "docs", "code"]), length * CHARACTERS_PER_TOKEN)
        lines = self.tokenizer.decode(self._encode(passage)[: length - 60 - 50 * len(facts)]).split("\n")
        if len(lines) < 40:  # paragraphs of prose: between sentences, too
            lines = "\n".join(lines).replace(". ", ".\n").split("\n")
        for form, key, value in facts:
            lines.insert(draw.randint(0, len(lines)), form.format(key=key, value=value))
        text = "\n".join(lines)
        if draw.random() < 0.5 and self.tokenizer.has_chat_template:
            messages = [{"role": "user", "content": f"{text}\n\n{questions[0]}"}]
            for question, answer in zip(questions[1:], answers, strict=False):
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
            return self._end([*self.tokenizer.encode_messages(messages), *self.tokenizer.encode(answers[-1])], length)
        return self._end(self._encode(f"{text}\n\n{tail}"), length)

    def _records(self, draw: random.Random, length: int) -> list[int]:
        """Lists of records with questions and answers below each."""
        ids = self._encode("")
        while len(ids) < length:
            n = draw.randint(8, max(9, length // 16))
            listed, turns = made_up.record_list(draw, self.words, n, self.held_out)
            answered = "\n".join(f"{question} {answer}" for question, answer in turns)
            ids += self.tokenizer.encode(f"{listed}\n\n{answered}\n\n")
        return ids[:length]


@dataclass(frozen=True, slots=True)
class TrainingTexts:
    """The chunks of a training, in their order; ``source(i)`` gives the same ids each time."""

    texts: Texts
    chunks: int
    """Chunks of the whole training."""
    lengths: tuple[int, int, int] = (2048, 4096, 8192)
    """The usual one, that of every fifth chunk, and that of every twentieth."""
    long_from: float = 0.4
    """Share of the training after which the longer lengths begin."""

    def length(self, index: int) -> int:
        # In turn and not drawn: there are few of the longest, and they should come evenly.
        if index < self.long_from * self.chunks:
            return self.lengths[0]
        return self.lengths[2 if index % 20 == 10 else 1 if index % 5 == 3 else 0]

    def source(self, index: int) -> list[int]:
        length = self.length(index)
        shares = SHARES if length == self.lengths[0] else LONG_SHARES
        kind = random.Random(f"{self.texts.seed}/kind/{index}").choices(KINDS, shares)[0]
        return self.texts.text(kind, length, index).ids
