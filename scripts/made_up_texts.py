"""Texts made from random draws: records of several formats with a question, and turns of conversations.

``held_out`` ones are of formats and questions that the others never have.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from dsakv.workloads.ruler.vocabulary import Vocabulary


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Amir Anna Ben Carla Chen Clara David Elena Emil Fatima Felix Grace Hana Hugo Ida Ivan Jonas Julia Kofi Lena "
    "Leo Lina Marco Maria Mei Nadia Nora Omar Oscar Paul Petra Ravi Rosa Sara Simon Tara Tom Vera Yusuf"
)
CITIES = _words(
    "Accra Athens Bergen Berlin Boston Cairo Chicago Dublin Geneva Hanoi Havana Kyoto Lagos Lima Lisbon Lyon Madrid "
    "Milan Nairobi Oslo Paris Perth Prague Quito Riga Rome Seoul Sofia Tunis Vienna Warsaw Zagreb"
)
JOBS = _words("teacher nurse baker pilot farmer lawyer painter plumber chemist translator carpenter librarian")

Turn = tuple[str, str]
"""What the user says and what the assistant answers."""


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    city: str
    job: str
    item: str
    code: int

    def fields(self) -> dict[str, str | int]:
        return {"name": self.name, "city": self.city, "job": self.job, "item": self.item, "code": self.code}


def records(draw: random.Random, words: Vocabulary, n: int) -> list[Record]:
    """Records of different names."""
    first = [f"{name} {noun.title()}" for name in NAMES for noun in draw.sample(words.nouns, -(-n // len(NAMES)))]
    return [
        Record(name, draw.choice(CITIES), draw.choice(JOBS), words.compound(draw), draw.randrange(1000, 100000))
        for name in draw.sample(first, n)
    ]


def _table(rows: list[Record]) -> str:
    head = "| name | city | job | item | code |\n|---|---|---|---|---|"
    return "\n".join([head, *("| " + " | ".join(map(str, row.fields().values())) + " |" for row in rows)])


def _csv(rows: list[Record]) -> str:
    return "\n".join(["name,city,job,item,code", *(",".join(map(str, row.fields().values())) for row in rows)])


def _json(rows: list[Record]) -> str:
    return json.dumps([row.fields() for row in rows], indent=2)


def _json_lines(rows: list[Record]) -> str:
    return "\n".join(json.dumps(row.fields()) for row in rows)


def _settings(rows: list[Record]) -> str:
    return "\n\n".join(
        f"[{row.name}]\n" + "\n".join(f"{key} = {value}" for key, value in row.fields().items()) for row in rows
    )


def _sentences(rows: list[Record]) -> str:
    return "\n".join(
        f"{row.name} is a {row.job} from {row.city} who owns a {row.item} and has the code {row.code}." for row in rows
    )


def _log(rows: list[Record]) -> str:
    return "\n".join(
        f"2024-03-{1 + i % 28:02} {i % 24:02}:{row.code % 60:02} INFO user={row.name!r} office={row.city} "
        f"role={row.job} bought={row.item} order={row.code}"
        for i, row in enumerate(rows)
    )


FORMATS: tuple[Callable[[list[Record]], str], ...] = (_table, _csv, _json, _settings, _sentences)
HELD_OUT_FORMATS = (_json_lines, _log)
QUESTIONS = (
    "What is the {field} of {name}?",
    "Look at the list above. Which {field} belongs to {name}?",
    "Tell me {name}'s {field}.",
    "I need the {field} for {name}, please.",
)
HELD_OUT_QUESTIONS = ("For {name}, which {field} is given?", "Find the entry of {name} and give me its {field}.")


def record_list(draw: random.Random, words: Vocabulary, n: int, held_out: bool) -> tuple[str, list[Turn]]:
    """A list of ``n`` records, and some questions about it."""
    rows = records(draw, words, n)
    questions = HELD_OUT_QUESTIONS if held_out else QUESTIONS
    turns = []
    for row in draw.sample(rows, min(n, draw.randint(1, 4))):
        field = draw.choice(["city", "job", "item", "code"])
        asked = draw.choice(questions).format(field=field, name=row.name)
        turns.append((asked, f"The {field} of {row.name} is {row.fields()[field]}."))
    return draw.choice(HELD_OUT_FORMATS if held_out else FORMATS)(rows), turns


def arithmetic(draw: random.Random) -> Turn:
    a, b, price = draw.randint(2, 90), draw.randint(2, 90), draw.randint(2, 30)
    return draw.choice(
        [
            (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
            (f"Calculate {a} * {price}.", f"{a} * {price} = {a * price}"),
            (
                f"I buy {a} apples and {b} pears at {price} cents each. What do I pay?",
                f"Let's go step by step.\n\n1. There are {a} + {b} = {a + b} pieces of fruit.\n2. Each costs {price} "
                f"cents, so that you pay {a + b} * {price} = {(a + b) * price} cents.\n\nThe answer is "
                f"{(a + b) * price} cents.",
            ),
        ]
    )


def word_list(draw: random.Random, words: Vocabulary) -> Turn:
    kind, source = draw.choice([("adjectives", words.adjectives), ("nouns", words.nouns), ("verbs", words.verbs)])
    letter = draw.choice("abcdefghlmprst")
    found = [word for word in source if word.startswith(letter)]
    chosen = draw.sample(found, min(len(found), draw.randint(5, 20)))
    listed = "\n".join(f"{i}. {word}" for i, word in enumerate(chosen, 1))
    return f"Give me {len(chosen)} {kind} that begin with {letter}.", f"Here are {len(chosen)} {kind}:\n\n{listed}"


def introduction(draw: random.Random, words: Vocabulary) -> list[Turn]:
    """Facts that the user gives and asks for again."""
    one, other = records(draw, words, 2)
    return [
        (
            f"Hello! My name is {one.name}. I live in {one.city} and work as a {one.job}. My friend {other.name} from "
            f"{other.city} is a {other.job}. Please remember that my locker has the number {one.code}.",
            f"Nice to meet you, {one.name}! I will remember that you are a {one.job} in {one.city}, that {other.name} "
            f"is a {other.job} from {other.city}, and that your locker has the number {one.code}. How can I help you?",
        ),
        ("Where does my friend live, and what is my number?", f"{other.name} lives in {other.city}: {one.code}."),
    ]


def about_passage(draw: random.Random, passage: str) -> list[Turn]:
    """Questions about a passage of some paragraphs that can be answered by quoting it."""
    paragraphs = [each for each in passage.split("\n\n") if each.strip()]
    first, last = paragraphs[0].strip(), paragraphs[-1].strip()
    asked = draw.choice(
        ["Read the following text:\n\n{}", "Here is a passage:\n\n{}\n\nTell me when you have read it.", "{}"]
    ).format(passage.strip())
    return [
        (asked, f'I have read the text. It has {len(paragraphs)} paragraphs and begins with: "{first[:200]}"'),
        ("How does it end?", f'It ends with: "{last[-300:]}"'),
        ("And what is the first paragraph?", first[:800]),
    ]


def about_functions(source: str) -> list[Turn]:
    """Questions about the documented functions of a Python source: what they do, and their code."""
    turns = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and len(doc) > 60:
            code = ast.get_source_segment(source, node) or ""
            turns.append((f"What does the Python function `{node.name}` do?", doc))
            if len(code) < 2500:
                turns.append((f"Show me how `{node.name}` is written.", f"```python\n{code}\n```"))
    return turns
