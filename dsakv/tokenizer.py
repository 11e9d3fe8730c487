"""Text to token ids and back. Torch-free; transformers is imported when a tokenizer is loaded.

Text is always plain text here: a prompt that spells ``<|end|>`` gets the tokens of those seven characters,
never the special token. Only the chat template's own special tokens become special ids.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsakv.chat_templates import BYTE_CHAT_TEMPLATE, V32_CHAT_TEMPLATE, V32_TOKENS
from dsakv.errors import InputError

MAX_CHARACTER_BYTES = 4  # of a character in UTF-8
BYTE_SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model sees it, and where in it the user's text stands."""

    ids: list[int]
    start: int
    stop: int
    """Tokens ``ids[start:stop]`` come from the text alone; the rest is template and answer prefix."""
    offsets: list[tuple[int, int]]
    """Half-open character spans in the text, one for each of these tokens."""


@dataclass(frozen=True, slots=True)
class EncodedMessages:
    """A conversation as the model sees it, and where in it the contents stand."""

    ids: list[int]
    contents: list[tuple[int, int]]
    """Half-open token ranges that come from the contents alone, in order; none where the template rewrites one."""


class Tokenizer:
    """A checkpoint's tokenizer. Made by ``load_tokenizer``."""

    def __init__(self, hf: Any, eos_token_ids: frozenset[int]) -> None:
        from tokenizers import Tokenizer as Backend

        self._hf = hf
        self._backend = hf.backend_tokenizer
        self.eos_token_ids = eos_token_ids
        bos = hf.bos_token_id
        # "x" and not "": some post-processors leave an empty text alone.
        adds_bos = bos is not None and self._backend.encode("x").ids[:1] == [bos]
        self._lead = [int(bos)] if adds_bos else []
        # Templates bring their own special tokens, and a post-processor may trim spaces off the offsets.
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        state = json.loads(self._backend.to_str())
        self._added = {token["content"]: int(token["id"]) for token in state["added_tokens"]}
        self._special = {int(token["id"]) for token in state["added_tokens"] if token["special"]}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if self._added else None
        # Without added tokens: `encode_special_tokens` would still match those not marked special (<|User|>).
        self._plain = Backend.from_str(json.dumps({**state, "added_tokens": []}))

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def check_chat_template(self) -> None:
        """Raise InputError where there is no chat template, without which messages cannot be encoded."""
        if not self.has_chat_template:
            raise InputError(
                "the checkpoint has no chat template, so messages cannot be encoded",
                "give `prompt` or `prompt_token_ids`, or put a chat_template.jinja beside the tokenizer",
            )

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special token is added or recognised."""
        return list(_encode(self._plain, text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``encode``, with the half-open character span of each token. A token that holds a part of
        a character's bytes spans the whole character."""
        encoding = _encode(self._plain, text)
        return list(encoding.ids), list(encoding.offsets)

    def encode_raw(self, text: str) -> list[int]:
        """As ``encode``, behind a BOS token where the tokenizer puts one by default: a text to go on with."""
        return self._lead + self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: one user message in the chat template with the generation prompt behind it, or,
        without a template, the text behind a BOS token where the tokenizer puts one by default.

        Raises InputError where the template refuses or rewrites the message.
        """
        return self.encode_prompt_with_offsets(text).ids

    def encode_prompt_with_offsets(self, text: str, answer_prefix: str = "") -> EncodedPrompt:
        """As ``encode_prompt``; ``answer_prefix`` begins the answer, so it follows the generation prompt."""
        pieces = [(text, False)]
        if self.has_chat_template:
            pieces = self._render([{"role": "user", "content": text}])
            if len(pieces) == 1:
                raise InputError(
                    "the checkpoint's chat template changes the text of a user message",
                    "use a template that copies it (chat_template.jinja), or give prompt_token_ids",
                )
        text_at = len(pieces) - 2 if self.has_chat_template else 0
        begin = sum(len(piece) for piece, _ in pieces[:text_at])
        kept = pieces[text_at][0]  # a template may strip the ends
        ids, offsets = self._encode_pieces([*pieces, (answer_prefix, False)])
        start, stop = _inside(offsets, begin, begin + len(kept))
        shift = text.find(kept) - begin
        lead = [] if self.has_chat_template else self._lead
        return EncodedPrompt(
            ids=lead + ids,
            start=len(lead) + start,
            stop=len(lead) + stop,
            offsets=[(a + shift, b + shift) for a, b in offsets[start:stop]],
        )

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation of ``{"role", "content"}`` messages, the generation prompt behind it.

        Special tokens spelled in a content stay text, except where the template rewrites that content.
        Raises InputError without a chat template, or where the template refuses the messages.
        """
        return self.encode_messages_with_contents(messages).ids

    def encode_messages_with_contents(self, messages: list[dict[str, str]]) -> EncodedMessages:
        """As ``encode_messages``, with the tokens that come from each content."""
        self.check_chat_template()
        pieces = self._render(messages)
        ids, offsets = self._encode_pieces(pieces)
        contents = []
        begin = 0
        for text, trusted in pieces:
            if not trusted:
                contents.append(_inside(offsets, begin, begin + len(text)))
            begin += len(text)
        return EncodedMessages(ids, contents)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def is_special(self, token: int) -> bool:
        """Whether ``decode`` leaves this token out."""
        return token in self._special

    def _render(self, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        """The templated conversation as (text, from the template) pieces: template, content, template, ...

        A single piece where the template does something else to a content than copy or strip it.
        """
        rendered = self._apply_template(messages)
        contents = [message["content"] for message in messages]
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        frame = self._apply_template([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
        parts = re.split("\ue000[0-9]+\ue001", frame)
        if re.findall("\ue000[0-9]+\ue001", frame) == marks:
            for candidate in (contents, [content.strip() for content in contents]):
                pieces = [(parts[0], True)]
                for content, part in zip(candidate, parts[1:], strict=True):
                    pieces += [(content, False), (part, True)]
                if "".join(piece for piece, _ in pieces) == rendered:
                    return pieces
        return [(rendered, True)]

    def _apply_template(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: any of Python's own errors may come out
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the checkpoint's chat template refuses the messages: {reason}",
                "check the roles of the messages and their order",
            ) from error

    def _encode_pieces(self, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of (text, from the template) pieces and their spans in the joined text."""
        pattern = self._added_pattern
        if pattern is None or not any(pattern.search(text) for text, trusted in pieces if not trusted):
            encoding = _encode(self._backend, "".join(text for text, _ in pieces))
            return list(encoding.ids), list(encoding.offsets)
        runs: list[tuple[str, bool]] = []  # (text, is an added token); neighbouring plain texts are one run
        for text, trusted in pieces:
            for i, part in enumerate(pattern.split(text) if trusted else [text]):
                if i % 2 == 0 and runs and not runs[-1][1]:
                    runs[-1] = (runs[-1][0] + part, False)
                else:
                    runs.append((part, i % 2 == 1))
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for text, added in runs:
            if added:
                ids.append(self._added[text])
                offsets.append((begin, begin + len(text)))
            else:
                encoding = _encode(self._plain, text)
                ids += encoding.ids
                offsets += [(a + begin, b + begin) for a, b in encoding.offsets]
            begin += len(text)
        return ids, offsets


def _inside(offsets: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """The tokens whose characters all lie in ``[begin, end)``."""
    start = bisect_left(offsets, begin, key=lambda span: span[0])
    return start, max(start, bisect_right(offsets, end, key=lambda span: span[1]))


def _encode(backend: Any, text: str) -> Any:
    try:
        return backend.encode(text, add_special_tokens=False)
    except TypeError as error:
        raise InputError(
            "the text holds half of a surrogate pair (U+D800 to U+DFFF), which no encoding can carry",
            "repair or remove that character in the input",
        ) from error


class StreamDecoder:
    """Text of a growing completion, piece by piece; the pieces joined are ``tokenizer.decode`` of all tokens.

    Bytes at the end that may be the beginning of a character wait for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._fresh = 0  # the window's tokens from here on have not come out yet; those before are context
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """Text that this token completes."""
        if self._tokenizer.is_special(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        unfinished = text.endswith("\ufffd")
        if unfinished and len(self._window) - self._fresh < MAX_CHARACTER_BYTES:
            return ""
        # So many tokens would have finished a character: what is before the last U+FFFD is no UTF-8 and stays so.
        new = text[self._emitted : len(text) - unfinished]
        if unfinished:
            self._window, self._fresh = self._window[-MAX_CHARACTER_BYTES:], 0
        else:
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
        self._emitted = len(self._tokenizer.decode(self._window)) - unfinished
        return new

    def flush(self) -> str:
        """What is left at the end of the completion; the decoder is fresh afterwards."""
        rest = self._tokenizer.decode(self._window)[self._emitted :]
        self._window, self._fresh, self._emitted = [], 0, 0
        return rest


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory. Nothing is downloaded and no code of the checkpoint runs.

    Raises InputError where the directory holds no tokenizer or a broken one.
    """
    if not directory.is_dir():
        raise InputError(f"no such checkpoint directory: {directory}", "check --ckpt-path")
    hint = "copy tokenizer.json and tokenizer_config.json of the model into this directory"
    if not (directory / "tokenizer.json").is_file():
        raise InputError(f"no tokenizer.json in {directory}", hint)
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust part raises plain Exception
        reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise InputError(f"cannot load the tokenizer in {directory}: {reason}", hint) from error
    if not hf.chat_template and set(V32_TOKENS) <= hf.get_vocab().keys():
        hf.chat_template = V32_CHAT_TEMPLATE
    eos = generation_eos_ids(directory)
    if not eos and hf.eos_token_id is not None:
        eos = frozenset([int(hf.eos_token_id)])
    return Tokenizer(hf, eos)


def generation_eos_ids(directory: Path) -> frozenset[int]:
    """End-of-sequence ids in a checkpoint's ``generation_config.json``; empty without one.

    Where they are given they count alone, as in transformers' ``generate``. Raises InputError where the file is broken.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return frozenset(int(token) for token in ids)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} is broken: eos_token_id cannot be read", "restore or remove this file of the checkpoint"
        ) from error


def write_byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer of 256 bytes (id = byte) and ``BYTE_SPECIAL_TOKENS`` (256 to 259) as a checkpoint's files."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIAL_TOKENS])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(BYTE_CHAT_TEMPLATE, encoding="utf-8")


def _byte_level_alphabet() -> list[str]:
    """The visible character that stands for each byte in byte-level vocabularies (GPT-2's table): printable
    Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
