"""The weights of a Llama model in a GGUF file, under the names and in the order of rows of Hugging Face."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from dsakv.errors import InputError
from dsakv.gguf.config import ROPE_FACTORS, config_of
from dsakv.gguf.header import GgufHeader, GgufTensor, read_header
from dsakv.weights.checkpoint import WHOLE, Located, Part, Stored

_WHOLE_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TURNED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""Projections whose heads RoPE turns, and the config's key for how many there are."""
_FLOATS = {
    GGMLQuantizationType.F32: ("F32", torch.float32),
    GGMLQuantizationType.F16: ("F16", torch.float16),
    GGMLQuantizationType.BF16: ("BF16", torch.bfloat16),
}
"""Types that are read as they are stored; all others become F32."""


class GgufCheckpoint:
    """The tensors of a GGUF file of the Llama architecture, as :class:`Checkpoint` has those of safetensors files.

    Use as a context manager. Quantised tensors become float32 when they are read, one at a time; others are views of
    the mapped file, or copies where the rows are put in order. Writing to either does not reach the file.

    Raises InputError on entry where the file is no GGUF file of a dense Llama model, is truncated, or holds a tensor
    with an unknown name or quantisation.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path
        """The place that errors name: here the file."""
        self.tensors: dict[str, Stored] = {}
        self._found: dict[str, GgufTensor] = {}
        self._heads: dict[str, int] = {}
        self._data: npt.NDArray[np.uint8] | None = None

    def __enter__(self) -> GgufCheckpoint:
        header = read_header(self.directory)
        config = config_of(header)
        _check_quantisations(header)
        in_order = sorted(header.tensors.items(), key=lambda item: item[1].start)
        for position, (name, tensor) in enumerate(in_order):
            if name == ROPE_FACTORS:
                continue
            if (known := hf_name(name)) is None:
                raise InputError(
                    f"{self.directory} holds tensor {name}, which no Llama model has", "take another file of the model"
                )
            if heads := _TURNED.get(known.split(".")[-2]):
                self._heads[known] = _check_heads(self.directory, name, tensor, config[heads], config["head_dim"])
            plain = GGMLQuantizationType(tensor.encoding) in _FLOATS
            kind = _FLOATS[GGMLQuantizationType(tensor.encoding)][0] if plain else "F32"
            self._found[known] = tensor
            self.tensors[known] = Stored(kind, tensor.shape, (0, position), plain and known not in self._heads)
        # Copy on write: torch has no tensors that cannot be written to.
        self._data = np.memmap(self.directory, dtype=np.uint8, mode="c")
        return self

    def __exit__(self, *exc: object) -> None:
        self._data = None

    def read(self, name: str, part: Part = WHOLE) -> torch.Tensor:
        """A tensor, or what of it ``part`` picks, in the shape and dtype that ``tensors`` tells.

        The whole tensor is in memory meanwhile where it is quantised.
        """
        tensor = self._decoded(self._found[name])
        if name in self._heads:
            tensor = half_split(tensor, self._heads[name])
        if part.dim is None:
            return tensor
        size = tensor.shape[part.dim] // part.total
        return tensor.narrow(part.dim, part.number * size, size)

    def locate(self) -> dict[str, Located]:
        """Raises InputError: blocks of quantised numbers cannot be read in place."""
        raise InputError(
            f"{self.directory.name} is a GGUF file, whose weights cannot be read while the model runs",
            "leave the budget out, or run a model of safetensors files: --ckpt-path FOLDER, or --model tiny-random",
        )

    def _decoded(self, found: GgufTensor) -> torch.Tensor:
        if self._data is None:
            raise RuntimeError(f"{self.directory} is not open")
        raw = np.asarray(self._data[found.start : found.start + found.n_bytes])
        encoding = GGMLQuantizationType(found.encoding)
        if encoding in _FLOATS:
            return torch.from_numpy(raw).view(_FLOATS[encoding][1]).view(found.shape)
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        rows = raw.reshape(*found.shape[:-1], found.shape[-1] // block * block_bytes)
        return torch.from_numpy(dequantize(rows, encoding))


def hf_name(name: str) -> str | None:
    """Hugging Face's name of a Llama tensor that GGUF calls ``name``; None for names that GGUF's Llama has not."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if stem in _WHOLE_MODEL:
        return f"{_WHOLE_MODEL[stem]}.{leaf}"
    match = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)", stem)
    if match is None or match[2] not in _LAYER:
        return None
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{leaf}"


def half_split(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows (or a bias) of the q or k projection in the order of Hugging Face; shape (n_heads * head_dim, ...).

    GGUF's Llama turns neighbouring rows of a head together, Hugging Face's the rows i and i + head_dim / 2.
    """
    by_pairs = tensor.reshape(n_heads, -1, 2, *tensor.shape[1:])
    return by_pairs.transpose(1, 2).reshape(tensor.shape)


def _check_heads(path: Path, name: str, tensor: GgufTensor, n_heads: int, head_dim: int) -> int:
    """``n_heads``; InputError where the tensor does not have the rows of so many."""
    if tensor.shape[0] != n_heads * head_dim or head_dim % 2:
        raise InputError(
            f"{path}: {name} has {tensor.shape[0]} rows, not those of {n_heads} heads of {head_dim}",
            "its metadata is wrong: take another file of the model",
        )
    return n_heads


def _check_quantisations(header: GgufHeader) -> None:
    """Raise InputError for a quantisation that cannot be undone, before any tensor is read."""
    for name, tensor in header.tensors.items():
        encoding = GGMLQuantizationType(tensor.encoding)
        if encoding in _FLOATS:
            continue
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[encoding][1]), dtype=np.uint8), encoding)
        except NotImplementedError:
            raise InputError(
                f"{header.path}: tensor {name} is in {encoding.name}, which cannot be dequantised here",
                "take another quantisation of the model, such as Q4_K_M, Q8_0 or F16",
            ) from None
