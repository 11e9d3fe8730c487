"""Generated RULER items: they fill their length, and their gold is what the prompt says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import InputError
from dsakv.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from dsakv.workloads.corpus import load_text
from dsakv.workloads.ruler import Ruler, templates
from dsakv.workloads.ruler.draft import largest_fit
from dsakv.workloads.ruler.essay import Essay
from dsakv.workloads.ruler.generator import GENERATED, IN_TEXT, Generator
from dsakv.workloads.ruler.niah import DEPTHS, NEEDLE_TASKS
from dsakv.workloads.ruler.templates import ANSWER_TOKENS, TASKS
from dsakv.workloads.ruler.vocabulary import Vocabulary, load_vocabulary
from dsakv.workloads.ruler.words import zipf_counts

MakeGenerator = Callable[..., Generator]


def _write_bpe(directory: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [text for name, text in vars(templates).items() if name.isupper() and isinstance(text, str)]
    backend.train_from_iterator([" ".join(load_vocabulary().nouns[::5])] + texts * 20, trainer)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    byte, bpe = tmp_path_factory.mktemp("byte"), tmp_path_factory.mktemp("bpe")
    write_byte_tokenizer(byte)
    _write_bpe(bpe)
    return {"byte": load_tokenizer(byte), "bpe": load_tokenizer(bpe)}


@pytest.fixture(scope="session")
def generate(tokenizers: dict[str, Tokenizer]) -> MakeGenerator:
    vocabulary, essay = load_vocabulary(), Essay.of(load_text())
    return lambda length, seed=0: Generator(tokenizers["byte"], length, seed, vocabulary, essay)


CASES = [
    *(("byte", task, length) for task in GENERATED for length in (2048, 4096, 8192)),
    *(("bpe", task, length) for task in GENERATED for length in (1024, 4096) if (task, length) != ("cwe", 1024)),
    *(("bpe", task, 256) for task in ("niah_single_1", "fwe")),
]


@pytest.mark.parametrize(("kind", "task", "length"), CASES)
def test_items_fill_their_length_and_spans_hold_the_needles(
    tokenizers: dict[str, Tokenizer], kind: str, task: str, length: int
) -> None:
    tokenizer = tokenizers[kind]
    workload = Ruler(tasks=(task,), context_length=length, limit=2, seed=3)
    for request in workload.requests(tokenizer, length + workload.max_new_tokens):
        used = len(request.prompt_token_ids) + ANSWER_TOKENS[task.split("_")[0]]
        assert used <= length
        if length >= 2048:
            assert used >= 0.9 * length
        assert request.truncated_tokens == 0
        assert tokenizer.decode(request.prompt_token_ids).endswith(request.metadata["answer_prefix"])
        needles = [tokenizer.decode(request.prompt_token_ids[a:b]) for a, b in request.needle_spans]
        if task.startswith("niah"):
            assert len(needles) == len(request.answers) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
            assert all(needle.strip().startswith("One of the special magic ") for needle in needles)
            assert {needle.rpartition(" is: ")[2] for needle in needles} == {f"{gold}." for gold in request.answers}
        elif task == "vt":
            assert len(needles) == len(request.answers) == 5
            for needle, name in zip(needles, request.answers, strict=True):
                assert needle.strip().startswith(f"VAR {name} = ")
        else:
            assert not needles
        assert len(needles) == len(request.metadata["needle_depths"])
        assert request.metadata["haystack"] == (load_text().label if task in IN_TEXT else None)
    assert not workload.dropped


@pytest.mark.parametrize("task", GENERATED)
def test_one_more_unit_of_haystack_would_not_fit(generate: MakeGenerator, task: str) -> None:
    generator = generate(2500, seed=1)
    text = generator.item(task, 5).text
    draft, _ = generator._draft(task, 5)
    n = next(n for n in range(draft.smallest, 2500) if draft.prompt(n) == text)
    larger = next(n for n in range(n + 1, 2500) if draft.prompt(n) != text)
    assert generator._size(draft, larger) + ANSWER_TOKENS[task.split("_")[0]] > 2500


def test_a_length_that_is_too_small_is_an_error_whose_hint_helps(generate: MakeGenerator) -> None:
    with pytest.raises(InputError, match="too short") as error:
        generate(256).check(GENERATED, 11)
    assert all(task in error.value.message for task in GENERATED)
    for tasks in (GENERATED, ("fwe",), ("vt",)):
        with pytest.raises(InputError, match="too short") as error:
            generate(256).check(tasks, 12)
        advised = re.search("--context-length ([0-9]+)", error.value.hint)
        assert advised is not None
        assert len(list(generate(int(advised[1])).items(tasks, 12))) == 12
        with pytest.raises(InputError, match="too short"):
            generate(256).item(tasks[0], 0)


def test_a_length_that_is_too_small_for_some_items_is_an_error_before_the_first(generate: MakeGenerator) -> None:
    needs = [generate(4096)._draft("niah_single_1", index)[1] for index in range(9)]
    assert max(needs) > needs[0]
    length = max(needs) - 1
    generate(length).check(("niah_single_1",), needs.index(max(needs)))
    with pytest.raises(InputError, match="too short"):
        generate(length).check(("niah_single_1",), 9)
    generate(length + 1).check(("niah_single_1",), 9)


def test_a_length_that_outgrows_the_words_is_an_error(tokenizers: dict[str, Tokenizer]) -> None:
    words = tuple(f"word{i}" for i in range(100))
    with pytest.raises(InputError, match="runs out of words"):
        Generator(tokenizers["byte"], 16384, 0, Vocabulary(words, words, words)).item("cwe", 0)


def test_items_depend_on_seed_task_and_index_alone(generate: MakeGenerator) -> None:
    every = list(generate(2304).items(GENERATED, 24))
    assert [item.task for item in every] == [GENERATED[i % 11] for i in range(24)]
    assert every == list(generate(2304).items(GENERATED, 24))
    assert len({item.text for item in every}) == 24
    for task in GENERATED:
        mine = [item for item in every if item.task == task]
        assert mine == list(generate(2304).items((task,), len(mine)))
        assert mine[0].text != generate(2304, seed=1).item(task, 0).text
        assert mine[0].answers == generate(4096).item(task, 0).answers or task == "cwe"


def test_a_task_named_twice_counts_once(tokenizers: dict[str, Tokenizer]) -> None:
    workload = Ruler(tasks=("vt", "all", "vt"), context_length=2304, limit=12)
    tasks = [request.metadata["task"] for request in workload.requests(tokenizers["byte"], 2304 + 64)]
    assert tasks == ["vt", *(task for task in TASKS if task not in ("vt", "qa_1", "qa_2")), "vt"]


@pytest.mark.parametrize("index", range(3))
def test_gold_is_what_the_prompt_says(generate: MakeGenerator, index: int) -> None:
    def gold(task: str, length: int = 4096) -> tuple[str, tuple[str, ...]]:
        item = generate(length, seed=7).item(task, index)
        return item.text, item.answers

    for task, kind in NEEDLE_TASKS.items():
        text, answers = gold(task)
        (asked,) = re.findall(r"What (?:is the|are all the) special magic \w+ for (.*) mentioned", text)
        keys = re.split(r", and |, ", asked)
        needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
        assert len(keys) == kind.queries
        assert sorted(value for key in keys for name, value in needles if name == key) == sorted(answers)
        assert len(answers) == kind.queries * kind.values
        assert len({value for _, value in needles}) == len(needles)
        if kind.haystack != "needles":
            assert len(needles) == kind.keys * kind.values
        # each key's values follow each other in the gold, keys in the order of the question
        owners = [name for value in answers for name, held in needles if held == value]
        assert owners == [key for key in keys for _ in range(kind.values)]

    text, answers = gold("vt")
    values: dict[str, str] = {}
    for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|([0-9]+))", text):
        values[name] = number or values[source]
    asked = re.findall(r"assigned the value ([0-9]+) in the text", text)[-1]
    assert [name for name, value in values.items() if value == asked] == list(answers)

    for length in (2560, 8192):
        text, answers = gold("cwe", length)
        counts = Counter(re.findall(r"[0-9]+\. (\S+)", text.rsplit("Memorize the ones", 1)[1]))
        assert {word for word, _ in counts.most_common(10)} == set(answers)
        assert min(counts[word] for word in answers) > counts.most_common(11)[10][1]

    text, answers = gold("fwe", 2048)
    counts = Counter(text.split("coded words. ")[1].split("\nQuestion")[0].split(" "))
    assert [word for word, _ in counts.most_common(4)] == ["...", *answers]
    assert counts[answers[2]] > counts.most_common(5)[4][1]


def test_needles_stand_at_forty_depths(generate: MakeGenerator) -> None:
    places = set()
    for index in range(400):
        draft, _ = generate(2048)._draft("niah_single_1", index)
        lines = draft.prompt(100).split("\n")[1:-1]
        (place,) = [i for i, line in enumerate(lines) if line != templates.NOISE]
        places.add(place)
    assert places == set(DEPTHS)
    assert (len(DEPTHS), min(DEPTHS), max(DEPTHS)) == (40, 0, 100)


@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    smallest=st.integers(0, 5),
    budget=st.integers(0, 600),
    bounded=st.booleans(),
)
def test_largest_fit_is_the_largest_that_fits(steps: list[int], smallest: int, budget: int, bounded: bool) -> None:
    def size(n: int) -> int:
        return sum(steps[: n - smallest + 1]) + 7 * max(0, n - smallest + 1 - len(steps))

    largest = smallest + len(steps) if bounded else None
    fits = [n for n in range(smallest, (largest or 700) + 1) if size(n) <= budget]
    assert largest_fit(size, budget, smallest, largest) == (fits[-1] if fits else None)


def test_frequent_words_never_tie_at_the_boundary() -> None:
    for n in range(27, 3000):
        counts = zipf_counts(n)
        assert counts == sorted(counts, reverse=True)
        assert [*counts, 0][3] > [*counts, 0, 0][4]
    assert zipf_counts(1933)[:6] == [1175, 293, 130, 73, 47, 32]
