"""The config of a Llama model, as Hugging Face would write it, from the metadata of its GGUF file."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, TypeVar

from dsakv.errors import InputError
from dsakv.gguf.header import GgufHeader, read_header

Number = TypeVar("Number", int, float)

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of numbers by which Llama 3.1 and later divide the frequencies of RoPE."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The same in every Llama 3 model; GGUF keeps what follows from them, and not themselves."""


END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")
"""Of Llama 3 and of ChatML."""


def gguf_config(path: Path) -> dict[str, Any]:
    """The keys of ``config.json`` that a Llama model needs, from the GGUF file ``path``.

    Raises InputError where the file is no complete GGUF file, is no dense Llama model, or lacks metadata.
    """
    return config_of(read_header(path))


def config_of(header: GgufHeader) -> dict[str, Any]:
    """As :func:`gguf_config`, of a header that was read."""
    _check_architecture(header)

    def number(key: str) -> int:
        return _positive(header, f"{ARCHITECTURE}.{key}", header.need(f"{ARCHITECTURE}.{key}", int))

    hidden, n_heads = number("embedding_length"), number("attention.head_count")
    kv_key, theta_key = f"{ARCHITECTURE}.attention.head_count_kv", f"{ARCHITECTURE}.rope.freq_base"
    n_kv_heads, theta = header.find(kv_key, int), header.find(theta_key, float)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": _vocab_size(header),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads if n_kv_heads is None else _positive(header, kv_key, n_kv_heads),
        "head_dim": _head_dim(header, hidden, n_heads),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": header.need(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": 10000.0 if theta is None else _positive(header, theta_key, theta),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    config["rope_scaling"] = _rope_scaling(header, config["head_dim"], config["rope_theta"])
    config["bos_token_id"] = header.find("tokenizer.ggml.bos_token_id", int)
    ids = eos_ids(header)
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
    return config


def eos_ids(header: GgufHeader) -> list[int]:
    """Tokens that end an answer, ascending: the end of text, and that of a turn, by key or, as older files, by name."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    found = {token for key in keys if (token := header.find(key, int)) is not None}
    tokens = header.find("tokenizer.ggml.tokens", list) or []
    return sorted(found | {tokens.index(name) for name in END_OF_TURN if name in tokens})


def _positive(header: GgufHeader, key: str, value: Number) -> Number:
    if not 0 < value < math.inf:
        raise InputError(f"{header.path}: {key} is {value}", "its metadata is wrong: take another file of the model")
    return value


def _check_architecture(header: GgufHeader) -> None:
    architecture = header.need("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise InputError(
            f"{header.path} is of architecture {architecture}",
            "of GGUF files only the Llama architecture is read; name a folder of safetensors instead",
        )
    if header.find(f"{ARCHITECTURE}.expert_count", int):
        raise InputError(f"{header.path} is a mixture of experts", "of Llama GGUF files only dense ones are read")


def _vocab_size(header: GgufHeader) -> int:
    """Rows of the embedding: ``llama.vocab_size`` need not be there."""
    if (embedding := header.tensors.get("token_embd.weight")) is None:
        raise InputError(f"{header.path} lacks tensor token_embd.weight", "take a complete GGUF file of the model")
    return embedding.shape[0]


def _head_dim(header: GgufHeader, hidden: int, n_heads: int) -> int:
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {size for name in names if (size := header.find(f"{ARCHITECTURE}.{name}", int))}
    if len(sizes) > 1:
        raise InputError(
            f"{header.path}: {', '.join(names)} differ", "heads must be of one size, and RoPE must turn all of it"
        )
    if not sizes and hidden % n_heads:
        raise InputError(f"{header.path}: {hidden} does not divide among {n_heads} heads", "its metadata is wrong")
    return sizes.pop() if sizes else hidden // n_heads


def _rope_scaling(header: GgufHeader, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = header.find(f"{ARCHITECTURE}.rope.scaling.type", str) or "none"
    if kind != "none" or f"{ARCHITECTURE}.rope.scale_linear" in header.metadata:
        raise InputError(
            f"{header.path} scales RoPE in the way {kind if kind != 'none' else 'linear'!r}",
            "of GGUF files only RoPE without scaling and that of Llama 3 are read",
        )
    if ROPE_FACTORS not in header.tensors:
        return None
    stored = _floats(header, ROPE_FACTORS)
    factor = float(f"{max(stored, default=1.0):.6g}")
    if len(stored) == head_dim // 2 and 1 <= factor < math.inf:
        if all(value == 1 for value in stored):
            return None
        expected = _llama3_factors(head_dim, theta, factor)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(stored, expected, strict=True)):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise InputError(
        f"{header.path}: {ROPE_FACTORS} holds other factors than those of Llama 3",
        "take a folder of safetensors, whose config.json names how RoPE is scaled",
    )


def _llama3_factors(head_dim: int, theta: float, factor: float) -> list[float]:
    """What Llama 3 divides each frequency by: fast turns stay, slow ones are ``factor`` times slower, and those between
    go over smoothly. Shape (head_dim / 2)."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    found = []
    for i in range(head_dim // 2):
        turns = _LLAMA3["original_max_position_embeddings"] * theta ** (-2 * i / head_dim) / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - share) / factor + share))
    return found


def _floats(header: GgufHeader, name: str) -> list[float]:
    tensor = header.tensors[name]
    if tensor.encoding != 0:
        raise InputError(f"{header.path}: {name} is not F32", "take another GGUF file of the model")
    with open(header.path, "rb") as file:
        file.seek(tensor.start)
        return list(struct.unpack(f"<{tensor.n_bytes // 4}f", file.read(tensor.n_bytes)))
