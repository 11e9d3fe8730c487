"""The tokenizer of a GGUF file gives the ids of the tokenizer.json that the file was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsakv.errors import InputError
from dsakv.gguf.tokenizer import load_gguf_tokenizer
from dsakv.tokenizer import load_tokenizer, write_byte_tokenizer
from tests.gguf.files import write

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "In 2024, 3.14159 and 1000000; x2y33",
    "def f(x):\n\tif x:\n\t\treturn  x**2  # it's I'LL\r\n\r\n",
    "   lead and trail   \n\n\n",
    "naïve café — ½ ² ③ 日本語 ٣٤٥ 😀👩‍👩‍👧 \u00a0\u2003.",
    "<|im_start|>not a token<|im_end|>",
    "",
]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: dict[str, Any] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def trained(cuts: Any) -> Tokenizer:
    """A tokenizer of 500 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = cuts
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = Path(__file__).read_text(encoding="utf-8")
    backend.train_from_iterator([source, *TEXTS * 3], trainer)
    return backend


def describe(backend: Tokenizer, pre: str | None) -> Callable[[gguf.GGUFWriter], None]:
    """Write a tokenizer as llama.cpp's converter does."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)

    return add


@pytest.fixture(scope="module")
def backends() -> dict[str, Tokenizer]:
    return {pre: trained(cuts) for pre, cuts in CUTS.items()}


@pytest.mark.parametrize("pre", CUTS)
def test_ids_are_those_of_the_original(pre: str, backends: dict[str, Tokenizer], tmp_path: Path) -> None:
    backend = backends[pre]
    tokenizer = load_gguf_tokenizer(write(tmp_path / "m.gguf", {}, describe=describe(backend, pre)))
    assert tokenizer.vocab_size == 500
    assert tokenizer.eos_token_ids == {2}
    assert [token for token in range(500) if tokenizer.is_special(token)] == [0, 1, 2]

    @given(st.text())
    def same(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        plain = text.replace("<", "")  # the original takes a spelled special token for that token
        assert tokenizer.encode(plain) == backend.encode(plain).ids

    for text in TEXTS:
        same.hypothesis.inner_test(text)  # type: ignore[attr-defined]
    same()


def test_digits_stand_alone_where_they_do_in_the_model(backends: dict[str, Tokenizer], tmp_path: Path) -> None:
    def pieces(pre: str) -> list[str]:
        tokenizer = load_gguf_tokenizer(write(tmp_path / f"{pre}.gguf", {}, describe=describe(backends["gpt-2"], pre)))
        return [tokenizer.decode([token]) for token in tokenizer.encode("1000000")]

    assert pieces("smollm") == list("1000000")
    assert len(pieces("gpt-2")) < 7


def test_the_chat_template_is_used(backends: dict[str, Tokenizer], tmp_path: Path) -> None:
    backend = backends["smollm"]
    tokenizer = load_gguf_tokenizer(write(tmp_path / "m.gguf", {}, describe=describe(backend, "smollm")))
    expected = backend.encode("<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n").ids
    assert tokenizer.encode_prompt("How are you?") == expected
    assert {1, 2}.isdisjoint(tokenizer.encode("<|im_start|>"))


def test_bos_where_the_model_has_one(backends: dict[str, Tokenizer], tmp_path: Path) -> None:
    def first(pre: str, says: bool | None) -> int:
        def add(writer: gguf.GGUFWriter) -> None:
            describe(backends[pre], pre)(writer)
            del writer.kv_data[0]["tokenizer.chat_template"]
            if says is not None:
                writer.add_add_bos_token(says)

        return load_gguf_tokenizer(write(tmp_path / "m.gguf", {}, describe=add)).encode_prompt("x")[0]

    assert first("llama-bpe", None) == 1
    assert first("llama-bpe", False) != 1
    assert first("smollm", None) != 1
    assert first("smollm", True) == 1


def test_the_end_of_a_turn_ends_an_answer(backends: dict[str, Tokenizer], tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        describe(backends["smollm"], "smollm")(writer)
        writer.add_eot_token_id(0)

    assert load_gguf_tokenizer(write(tmp_path / "m.gguf", {}, describe=add)).eos_token_ids == {0, 2}


def test_a_tokenizer_beside_the_file_counts(backends: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {}, describe=describe(backends["smollm"], "unheard-of"))
    write_byte_tokenizer(tmp_path)
    assert load_gguf_tokenizer(path).encode("1000") == load_tokenizer(tmp_path).encode("1000")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda kv: kv.pop("tokenizer.ggml.model"), "holds no tokenizer"),
        (lambda kv: setattr(kv["tokenizer.ggml.model"], "value", "llama"), "of kind llama"),
        (lambda kv: setattr(kv["tokenizer.ggml.pre"], "value", "qwen2"), "in the way of qwen2"),
        (lambda kv: kv.pop("tokenizer.ggml.pre"), "does not say how"),
        (lambda kv: kv.pop("tokenizer.ggml.merges"), "tokenizer.ggml.merges is missing"),
        (lambda kv: kv["tokenizer.ggml.merges"].value.append("no such"), "merges are broken"),
        (lambda kv: kv["tokenizer.ggml.merges"].value.append("one"), "merges are broken"),
        (lambda kv: kv["tokenizer.ggml.tokens"].value.append("a"), "the same text"),
        (lambda kv: kv["tokenizer.ggml.token_type"].value.append(1), "500 tokens, and types of 501"),
        (lambda kv: setattr(kv["tokenizer.ggml.eos_token_id"], "value", 500), "eos_token_id is 500"),
        (lambda kv: setattr(kv["tokenizer.ggml.tokens"], "value", [1, 2]), "no list of texts"),
    ],
)
def test_what_cannot_be_read_is_said(
    edit: Callable[[dict[str, Any]], Any], words: str, backends: dict[str, Tokenizer], tmp_path: Path
) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        describe(backends["smollm"], "smollm")(writer)
        edit(writer.kv_data[0])

    with pytest.raises(InputError) as caught:
        load_gguf_tokenizer(write(tmp_path / "m.gguf", {}, describe=add))
    assert words in caught.value.message
