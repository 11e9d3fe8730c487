"""The table of parameter names, both ways, and how ranks divide them."""

from __future__ import annotations

import pytest

from dsakv.models.deepseek_v32 import DeepseekV32
from dsakv.models.deepseek_v32_names import Split, hf_name, own_name, split_of
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.options import ModelOptions
from dsakv.models.tiny import CONFIG
from tests.shapes import SMALL_SHAPE

MODEL = DeepseekV32(parse_shape(CONFIG | SMALL_SHAPE, "test"), ModelOptions())
NAMES = [name for name, _ in MODEL.named_parameters()]


def test_every_parameter_has_its_own_name_both_ways() -> None:
    theirs = [hf_name(name) for name in NAMES]
    assert len(set(theirs)) == len(NAMES)
    assert [own_name(name) for name in theirs] == NAMES


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "layers.3.attn.wkv_a.scale"),
        ("model.layers.3.self_attn.indexer.k_norm.bias", "layers.3.attn.indexer.k_norm.bias"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
        ("model.layers.60.mlp.experts.255.down_proj.weight_scale_inv", "layers.60.ffn.experts.255.w2.scale"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "layers.3.ffn.shared_experts.w3.weight"),
    ],
)
def test_known_names(theirs: str, ours: str) -> None:
    assert own_name(theirs) == ours
    assert hf_name(ours) == theirs


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.layers.3.self_attn.q_a_proj.bias",
        "model.layers.3.mlp.gate.bias",
        "model.layers.3.mlp.experts.x.up_proj.weight",
        "model.layers.3.mlp.experts.1.2.up_proj.weight",
        "model.layers.x.input_layernorm.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.indexer.wk.weight",
        "lm_head.bias",
        "model.norm",
        "",
    ],
)
def test_names_that_the_architecture_does_not_have(name: str) -> None:
    assert own_name(name) is None


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("embed.weight", Split(0)),
        ("head.weight", Split(0)),
        ("norm.weight", Split()),
        ("layers.0.attn.wq_a.weight", Split()),
        ("layers.0.attn.wq_b.scale", Split(0)),
        ("layers.0.attn.wkv_b.weight", Split(0)),
        ("layers.0.attn.wo.scale", Split(1)),
        ("layers.0.attn.indexer.wq_b.weight", Split()),
        ("layers.0.attn.indexer.weights_proj.weight", Split()),
        ("layers.0.ffn.w1.weight", Split(0)),
        ("layers.0.ffn.w2.weight", Split(1)),
        ("layers.1.ffn.gate.bias", Split()),
        ("layers.1.ffn.shared_experts.w3.weight", Split(0)),
        ("layers.1.ffn.experts.12.w2.weight", Split(expert=12)),
    ],
)
def test_how_ranks_divide(name: str, split: Split) -> None:
    assert split_of(name) == split
