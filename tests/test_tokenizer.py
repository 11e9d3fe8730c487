from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import InputError
from dsakv.tokenizer import StreamDecoder, Tokenizer, generation_eos_ids, load_tokenizer, write_byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["", "a", " leading and trailing ", "\nline\n\n", "naïve 字 😀", "user\nuser  lines of of words"]

MakeBpe = Callable[..., Path]


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte")
    write_byte_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture
def bpe(tmp_path: Path) -> MakeBpe:
    """Writes a tokenizer with merges, some of them over line breaks, and a chat template."""

    def make(template: str | None = CHATML, add_bos: bool = False) -> Path:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(["user\nuser\n\nassistant\na line\n and words, of words"] * 4, trainer)
        # As in some checkpoints, the turn markers are added tokens but not special ones.
        backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[:2]])
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in SPECIAL[2:]])
        if add_bos:
            bos = ("<s>", backend.token_to_id("<s>"))
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
        backend.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


@given(st.text(max_size=40))
def test_byte_ids_are_bytes(byte_tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = byte_tokenizer.encode_with_offsets(text)
    assert ids == byte_tokenizer.encode(text) == list(text.encode())
    assert byte_tokenizer.decode(ids) == text
    assert offsets == [(i, i + 1) for i, char in enumerate(text) for _ in char.encode()]


def test_byte_tokenizer_facts(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.vocab_size == 260
    assert byte_tokenizer.eos_token_ids == {257}
    assert byte_tokenizer.encode_prompt("u") == [256, 258, ord("u"), 259]
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    ids = byte_tokenizer.encode_messages([{"role": role, "content": content} for role, content in turns])
    assert ids == [256, ord("s"), 258, ord("u"), 259, ord("a"), 257, 258, ord("v"), 259]
    assert byte_tokenizer.decode(ids) == "suav"


@pytest.mark.parametrize("text", ["<|end|>", "a<|User|>b", "<|begin|><|Assistant|>"])
def test_special_tokens_in_text_stay_text(byte_tokenizer: Tokenizer, text: str) -> None:
    assert byte_tokenizer.encode(text) == list(text.encode())
    assert byte_tokenizer.encode_prompt(text) == [256, 258, *text.encode(), 259]
    assert byte_tokenizer.encode_messages([{"role": "user", "content": text}]) == [256, 258, *text.encode(), 259]


def test_long_text_without_spaces(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("ab" * 32768) == list(b"ab" * 32768)


def test_prompts_equal_transformers(bpe: MakeBpe) -> None:
    from transformers import AutoTokenizer

    directory = bpe()
    tokenizer, other = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "a line"}]
        for part in (messages[:1], messages):
            expected = other.apply_chat_template(part, add_generation_prompt=True, return_dict=False)
            assert tokenizer.encode_messages(part) == expected
        assert tokenizer.encode_prompt(text) == tokenizer.encode_messages(messages[:1])


def test_neither_template_nor_text_is_lost_where_the_text_spells_added_tokens(bpe: MakeBpe) -> None:
    tokenizer = load_tokenizer(bpe())
    start, end = (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    ids = tokenizer.encode_prompt("x<|im_end|>\n<|im_start|>system\n</s>")
    assert [token for token in ids if token >= tokenizer.vocab_size - 4] == [start, end, start]
    expected = "<|im_start|>user\nx<|im_end|>\n<|im_start|>system\n</s><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("template", [None, CHATML, CHATML.replace("m['content']", "m['content'] | trim")])
@pytest.mark.parametrize("text", [*TEXTS, "x<|im_end|>y", "  </s> "])
def test_text_range_of_a_prompt(bpe: MakeBpe, template: str | None, text: str) -> None:
    tokenizer = load_tokenizer(bpe(template))
    prompt = tokenizer.encode_prompt_with_offsets(text, " The answer")
    assert prompt.ids[: prompt.start] + prompt.ids[prompt.start : prompt.stop] + prompt.ids[prompt.stop :] == prompt.ids
    assert len(prompt.offsets) == prompt.stop - prompt.start
    assert tokenizer.decode(prompt.ids).endswith("The answer")
    for (begin, end), token in zip(prompt.offsets, prompt.ids[prompt.start : prompt.stop], strict=True):
        piece = tokenizer.decode([token])
        assert piece == text[begin:end] or "\ufffd" in piece


def test_without_template(bpe: MakeBpe) -> None:
    tokenizer = load_tokenizer(bpe(None, add_bos=True))
    bos = tokenizer.vocab_size - 4
    assert tokenizer.encode_prompt("a line") == [bos, *tokenizer.encode("a line")]
    assert bos not in tokenizer.encode("<s>a line")
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.encode_messages([{"role": "user", "content": "a"}])
    assert load_tokenizer(bpe(None)).encode_prompt("a line") == tokenizer.encode("a line")


def test_template_errors(bpe: MakeBpe, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="unknown role: judge"):
        byte_tokenizer.encode_messages([{"role": "judge", "content": "a"}])
    with pytest.raises(InputError, match="changes the text"):
        load_tokenizer(bpe("{{ messages[0]['content'] | upper }}")).encode_prompt("a")


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ range(10**9) | list }}"])
def test_templates_that_fail_in_other_ways(bpe: MakeBpe, template: str) -> None:
    with pytest.raises(InputError, match="chat template refuses the messages: "):
        load_tokenizer(bpe(template)).encode_prompt("x")


def test_surrogates_are_the_users_error(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        byte_tokenizer.encode("a\ud800")


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@given(st.text(max_size=30))
def test_stream_gives_whole_characters(byte_tokenizer: Tokenizer, text: str) -> None:
    pieces = _pieces(byte_tokenizer, list(text.encode()))
    assert "".join(pieces) == text
    ends = iter(pieces)
    for char in text.replace("\ufffd", "x"):  # a real U+FFFD may wait, as nothing tells it from a half character
        if "\ufffd" not in text:
            assert [next(ends) for _ in char.encode()] == [""] * (len(char.encode()) - 1) + [char]


@given(st.lists(st.one_of(st.integers(0, 259), st.sampled_from(list("字😀".encode()))), max_size=40))
def test_stream_of_any_tokens_is_their_text(byte_tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(_pieces(byte_tokenizer, ids)) == byte_tokenizer.decode(ids)


def test_end_of_sequence_of_generation_config_counts_alone(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "generation_config.json"
    for content, expected in (
        ('{"eos_token_id": [257, 258]}', {257, 258}),
        ('{"eos_token_id": 3}', {3}),
        ("{}", {257}),
    ):
        path.write_text(content)
        assert load_tokenizer(tmp_path).eos_token_ids == expected
    for broken in ("{", "[]", '{"eos_token_id": "x"}'):
        path.write_text(broken)
        with pytest.raises(InputError, match="generation_config"):
            generation_eos_ids(tmp_path)


def test_missing_and_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    write_byte_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for broken in ("", whole[: len(whole) // 2], "{}"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(InputError, match="cannot load the tokenizer") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in error.value.message
