"""The shape of a model with DeepSeek Sparse Attention, whatever file it is read from."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from dsakv.errors import InputError
from dsakv.models.deepseek_v32_names import BLOCK
from dsakv.models.rope_scaling import Yarn

LARGEST = 2**31
"""Of every dimension."""
MOST_LAYERS = 100_000


class DsaShape(Struct, frozen=True, kw_only=True):
    """Dimensions and constants, under DeepSeek's names, and where families differ."""

    vocab_size: int
    dim: int
    inter_dim: int
    moe_inter_dim: int
    n_layers: int
    n_dense_layers: int
    n_heads: int
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    route_scale: float
    norm_topk_prob: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    scale_fmt: str | None
    norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    max_seq_len: int
    indexer_rope: Literal["halves", "interleaved"] = "halves"
    """Which dimensions of the indexer's queries and keys turn together; in attention it is always neighbours."""
    shared_layers: tuple[int, ...] = ()
    """Layers without an indexer of their own: they read what the last layer before them that has one selected."""

    @property
    def index_layer_ids(self) -> list[int]:
        """For each layer, the layer whose indexer makes its selection."""
        ids: list[int] = []
        shared = set(self.shared_layers)
        for layer_id in range(self.n_layers):
            ids.append(ids[-1] if layer_id in shared else layer_id)
        return ids


def check(shape: DsaShape, source: str) -> None:
    """Raise InputError for dimensions that no model can have."""
    for name in shape.__struct_fields__:
        value = getattr(shape, name)
        if type(value) is int and not (0 if name == "n_dense_layers" else 1) <= value <= LARGEST:
            raise InputError(f"{source}: {name} is {value}", f"it must be at least 1, at most {LARGEST}")
    if shape.n_layers > MOST_LAYERS:
        raise InputError(f"{source}: n_layers is {shape.n_layers}", f"it must be at least 1, at most {MOST_LAYERS}")
    constants = {name: getattr(shape, name) for name in ("route_scale", "norm_eps", "rope_theta")}
    if shape.yarn:
        constants |= {f"YaRN's {name}": value for name, value in vars(shape.yarn).items()}
    for name, value in constants.items():
        if not 0 < value < math.inf:
            raise InputError(f"{source}: {name} is {value}", "it must be more than 0")
    experts, groups = shape.n_routed_experts, shape.n_expert_groups
    rules = [
        (experts % groups == 0, f"{experts} routed experts do not divide into {groups} groups"),
        (groups == 1 or experts // groups >= 2, f"{groups} expert groups of fewer than 2 experts"),
        (shape.n_limited_groups <= groups, f"{shape.n_limited_groups} of {groups} expert groups chosen"),
        (
            shape.n_activated_experts <= experts // groups * shape.n_limited_groups,
            f"{shape.n_activated_experts} experts activated, more than the chosen groups hold",
        ),
        (shape.rope_theta != 1, "rope_theta is 1, which turns nothing"),
        (shape.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {shape.qk_rope_head_dim} is odd"),
        (
            shape.qk_rope_head_dim <= shape.index_head_dim,
            f"qk_rope_head_dim {shape.qk_rope_head_dim} is wider than index_head_dim {shape.index_head_dim}",
        ),
    ]
    for holds, problem in rules:
        if not holds:
            raise InputError(f"{source}: {problem}", "correct the dimensions in the file")


def check_fp8(shape: DsaShape, n_ranks: int, source: str) -> None:
    """Raise InputError where a rank's part of the fp8 projections does not consist of whole blocks.

    Inputs are rounded in blocks of 128. Outputs may end within a block, but ranks can only be cut between two. To be
    called after :func:`check_ranks`.
    """
    moe, dense = shape.n_dense_layers < shape.n_layers, shape.n_dense_layers > 0
    whole = {"dim": shape.dim, "q_lora_rank": shape.q_lora_rank, "kv_lora_rank": shape.kv_lora_rank}
    whole |= {"moe_inter_dim": shape.moe_inter_dim} if moe else {}
    divided = {"n_heads * v_head_dim": shape.n_heads * shape.v_head_dim}
    divided |= {"inter_dim": shape.inter_dim} if dense else {}
    divided |= {"moe_inter_dim * n_shared_experts": shape.moe_inter_dim * shape.n_shared_experts} if moe else {}
    if n_ranks > 1:
        nope = shape.qk_nope_head_dim
        divided["n_heads * (qk_nope_head_dim + qk_rope_head_dim)"] = shape.n_heads * (nope + shape.qk_rope_head_dim)
    for name, value in whole.items():
        if value % BLOCK:
            problem = f"{source}: {name} {value} is no multiple of {BLOCK}, the block that shares an fp8 scale"
            raise InputError(problem, "use --dtype bfloat16")
    for name, value in divided.items():
        if value % (BLOCK * n_ranks):
            share = f" on each of {n_ranks} ranks" if n_ranks > 1 else ""
            raise InputError(
                f"{source}: {name} {value} makes no multiple of {BLOCK}, the block that shares an fp8 scale,{share}",
                "use fewer ranks, or --dtype bfloat16" if n_ranks > 1 else "use --dtype bfloat16",
            )


def check_ranks(shape: DsaShape, n_ranks: int, source: str) -> None:
    """Raise InputError where ``n_ranks`` ranks cannot divide the model evenly."""
    divided = {
        "n_routed_experts": shape.n_routed_experts if shape.n_dense_layers < shape.n_layers else 0,
        "n_heads": shape.n_heads,
        "vocab_size": shape.vocab_size,
        "inter_dim": shape.inter_dim if shape.n_dense_layers else 0,
        "moe_inter_dim * n_shared_experts": shape.moe_inter_dim * shape.n_shared_experts,
    }
    for name, value in divided.items():
        if value % n_ranks:
            raise InputError(f"{source}: {name} {value} does not divide among {n_ranks} ranks", "use fewer ranks")
