"""The tokenizer in a GGUF file's metadata: byte-level BPE, as the model's own tokenizer.json has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dsakv.errors import InputError
from dsakv.gguf.config import eos_ids
from dsakv.gguf.header import GgufHeader, read_header
from dsakv.tokenizer import Tokenizer, load_tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""Where Llama 3 cuts a text: contractions, words, up to three digits, signs, line ends, spaces."""


class _Style(NamedTuple):
    """How a family of tokenizers treats text before its merges."""

    split: str | None = None
    """Where to cut; None for GPT-2's places."""
    single_digits: bool = False
    ignore_merges: bool = False
    """Whether a piece that is a token is that token, whatever its merges say."""
    adds_bos: bool = False
    """Whether a text begins with BOS where the file does not say."""


_LLAMA3 = _Style(_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True)
_STYLES = {
    "gpt-2": _Style(),
    "smollm": _Style(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
}
"""By llama.cpp's names."""


def has_tokenizer(path: Path) -> bool:
    """Whether the GGUF file ``path`` holds a tokenizer, or has one beside it."""
    beside = (path.parent / "tokenizer.json").is_file()
    return beside or read_header(path).find("tokenizer.ggml.model", str) is not None


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the GGUF file ``path``; a ``tokenizer.json`` beside the file counts in its place.

    Raises InputError where the file is no GGUF file, holds no tokenizer or a broken one, or one of an unknown kind.
    """
    if (path.parent / "tokenizer.json").is_file():
        return load_tokenizer(path.parent)
    from transformers import PreTrainedTokenizerFast

    header = read_header(path)
    style, tokens = _style(header), _tokens(header)
    bos, eos = (_token(header, tokens, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    hf = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_backend(header, style, tokens, bos),
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
    hf.chat_template = header.find("tokenizer.chat_template", str)
    return Tokenizer(hf, frozenset(eos_ids(header)))


def _unknown(header: GgufHeader, what: str) -> InputError:
    return InputError(
        f"{header.path}: {what}", "put the model's tokenizer.json and tokenizer_config.json beside the file"
    )


def _style(header: GgufHeader) -> _Style:
    model = header.find("tokenizer.ggml.model", str)
    if model is None:
        raise _unknown(header, "it holds no tokenizer")
    if model != "gpt2":
        raise _unknown(header, f"its tokenizer is of kind {model}, dsakv knows byte-level BPE (gpt2)")
    name = header.find("tokenizer.ggml.pre", str)
    if name not in _STYLES:
        how = "does not say how it cuts texts" if name is None else f"cuts texts in the way of {name}"
        raise _unknown(header, f"its tokenizer {how}, dsakv knows {', '.join(_STYLES)}")
    return _STYLES[name]


def _tokens(header: GgufHeader) -> list[str]:
    """Texts of all tokens, by id."""
    tokens = _texts(header, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise _unknown(header, "two of its tokens are the same text")
    return tokens


def _texts(header: GgufHeader, key: str) -> list[str]:
    texts = header.need(key, list)
    if not all(isinstance(text, str) for text in texts):
        raise _unknown(header, f"{key} is no list of texts")
    return texts


def _token(header: GgufHeader, tokens: list[str], key: str) -> str | None:
    number = header.find(key, int)
    if number is not None and not 0 <= number < len(tokens):
        raise _unknown(header, f"{key} is {number}, and it has {len(tokens)} tokens")
    return None if number is None else tokens[number]


def _backend(header: GgufHeader, style: _Style, tokens: list[str], bos: str | None) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    types = header.find("tokenizer.ggml.token_type", list) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise _unknown(header, f"it has {len(tokens)} tokens, and types of {len(types)}")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges: list[Any] = [tuple(merge.split(" ")) for merge in _texts(header, "tokenizer.ggml.merges")]
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=style.ignore_merges))
    except Exception as error:  # the Rust part raises plain Exception
        raise _unknown(header, f"tokenizer.ggml.merges are broken: {' '.join(str(error).split())}") from error
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if style.single_digits else []
    if style.split:
        cuts.append(pre_tokenizers.Split(Regex(style.split), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    # In order of ids, so that each keeps the one that it has in the vocabulary.
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    adds_bos = header.find("tokenizer.ggml.add_bos_token", bool)
    if bos is not None and (style.adds_bos if adds_bos is None else adds_bos):
        ahead = [(bos, vocab[bos])]
        try:
            backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ahead)
        except ValueError as error:  # a name with a space or a colon means something else there
            raise _unknown(header, f"the BOS token {bos!r} cannot be put before texts") from error
    return backend
