"""Both forms of a model config come to the same shape, and what is no shape is an InputError."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsakv
from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.errors import InputError
from dsakv.jobs.model import load_model
from dsakv.models.deepseek_v32_names import unused
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.rope_scaling import Yarn
from dsakv.models.shapes import dsa_shape_of, read_config
from dsakv.models.tiny import CONFIG
from tests.shapes import SMALL_SHAPE

CONFIGS = Path(dsakv.__file__).parent.parent / "configs"

YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

HF_671B: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"type": "yarn"},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""The same model as ``configs/config_671B_v3.2.json``, in the keys of a Hugging Face ``config.json``."""

DEEPSEEK_671B: dict[str, Any] = json.loads((CONFIGS / "config_671B_v3.2.json").read_text())


def shape(config: dict[str, Any]) -> DsaShape:
    return parse_shape(config, "here.json")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_both_forms_of_the_671b_model_are_the_same_shape() -> None:
    ours = shape(DEEPSEEK_671B)
    assert ours == shape(HF_671B)
    assert ours.yarn == Yarn(40.0, 4096, 32.0, 1.0, rope_scale=1.0, softmax_scale=(0.1 * math.log(40) + 1) ** 2)
    assert (ours.max_seq_len, ours.index_topk, ours.scale_fmt) == (163840, 2048, "ue8m0")


def test_deepseeks_form_extends_the_context_only_beyond_the_original_length() -> None:
    assert shape(DEEPSEEK_671B | {"max_seq_len": 4096}).yarn is None
    assert shape(DEEPSEEK_671B | {"max_seq_len": 4096}).max_seq_len == 4096
    longer = shape(DEEPSEEK_671B | {"max_seq_len": 4097})
    assert longer.yarn == shape(HF_671B).yarn
    assert longer.max_seq_len == 4097


def test_keys_of_deepseeks_demo_that_say_nothing_about_the_model_are_known() -> None:
    assert shape(DEEPSEEK_671B | {"max_batch_size": 4, "dtype": "bf16"}) == shape(DEEPSEEK_671B)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": YARN | {"rope_type": "yarn"}, "rope_theta": 10000},
        {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000}},
        {"rope_parameters": YARN | {"type": "yarn"}, "rope_theta": 10000.0},
        {"rope_parameters": YARN | {"rope_type": "yarn"}},
        {"rope_parameters": YARN | {"rope_type": "yarn", "factor": None}},
        {"rope_parameters": {}, "rope_scaling": YARN | {"type": "yarn"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN | {"type": "yarn"}},
        {"rope_parameters": YARN | {"rope_type": "yarn", "attention_factor": 1.0}},
    ],
)
def test_spellings_of_the_same_yarn(rope: dict[str, Any]) -> None:
    assert shape(without(HF_671B, "rope_scaling", "rope_theta") | rope) == shape(HF_671B)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": None},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_plain_rope(rope: dict[str, Any]) -> None:
    plain = shape(without(HF_671B, "rope_scaling", "rope_theta") | rope)
    assert plain.yarn is None
    assert plain.rope_theta == ((rope.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    assert msgspec.structs.replace(plain, yarn=shape(HF_671B).yarn, rope_theta=10000.0) == shape(HF_671B)


def test_yarn_without_mscale_scales_the_rotation_and_not_the_logits() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert shape(without(HF_671B, "rope_scaling") | {"rope_parameters": scaling}).yarn == Yarn(
        4.0, 1024, 32.0, 1.0, rope_scale=0.1 * math.log(4) + 1, softmax_scale=1.0
    )


def test_the_theta_of_the_rope_parameters_counts() -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500}, "rope_theta": 9, "rope_scaling": None}
    assert shape(HF_671B | rope).rope_theta == 500.0


@pytest.mark.parametrize("dense", [3, 61, 70])
def test_a_list_of_layer_types_must_agree(dense: int) -> None:
    types = (["dense"] * dense + ["sparse"] * 61)[:61]
    config = HF_671B | {"first_k_dense_replace": dense}
    assert shape(config | {"mlp_layer_types": types}) == shape(config)
    with pytest.raises(InputError, match="mixes dense and sparse"):
        shape(config | {"mlp_layer_types": ["sparse", *types[1:]]})


@pytest.mark.parametrize(
    ("config", "change", "message", "hint"),
    [
        (DEEPSEEK_671B, {"n_head": 3}, "unknown key 'n_head'", "did you mean n_heads?"),
        (DEEPSEEK_671B, {"zzz": 3}, "unknown key 'zzz'", "known keys: vocab_size,"),
        (DEEPSEEK_671B, {"dim": None}, "Expected `int`, got `null` - at `$.dim`", "config_671B"),
        (DEEPSEEK_671B, {"score_func": "softmax"}, "Invalid enum value 'softmax' - at `$.score_func`", ""),
        (DEEPSEEK_671B, {"dtype": "int4"}, "$.dtype", ""),
        (DEEPSEEK_671B, {"n_expert_groups": 7}, "256 routed experts do not divide into 7 groups", ""),
        (DEEPSEEK_671B, {"n_limited_groups": 9}, "9 of 8 expert groups", ""),
        (DEEPSEEK_671B, {"n_activated_experts": 129}, "129 experts activated", ""),
        (DEEPSEEK_671B, {"n_expert_groups": 256}, "256 expert groups of fewer than 2 experts", ""),
        (DEEPSEEK_671B, {"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 is odd", ""),
        (DEEPSEEK_671B, {"index_head_dim": 32}, "wider than index_head_dim 32", ""),
        (DEEPSEEK_671B, {"n_layers": 0}, "n_layers is 0", "at least 1"),
        (DEEPSEEK_671B, {"rope_factor": 0.0}, "max_seq_len is 0", "at least 1"),
        (DEEPSEEK_671B, {"rope_factor": -1.0, "max_seq_len": 5000}, "YaRN's factor is -1.0", "more than 0"),
        (DEEPSEEK_671B, {"beta_fast": 0.0}, "YaRN's beta_fast is 0.0", "more than 0"),
        (DEEPSEEK_671B, {"rope_theta": 0.0}, "rope_theta is 0.0", "more than 0"),
        (HF_671B, {"rope_theta": 1}, "rope_theta is 1", ""),
        (HF_671B, {"rms_norm_eps": 0}, "norm_eps is 0.0", "more than 0"),
        (HF_671B, {"hidden_size": "7168"}, "Expected `int`, got `str`", "correct the value"),
        (HF_671B, {"norm_topk_prob": 1}, "Expected `bool`, got `int`", "correct the value"),
        (HF_671B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'", "'silu'"),
        (HF_671B, {"topk_method": "greedy"}, "topk_method is 'greedy'", "'noaux_tc'"),
        (HF_671B, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'", "'yarn'"),
        (HF_671B, {"rope_scaling": {"type": "yarn"}}, "YaRN without original_max_position_embeddings", "pretrained"),
        (HF_671B, {"rope_scaling": YARN | {"type": "yarn", "factor": "40"}}, "$.rope_scaling.factor", "correct"),
        (HF_671B, {"rope_scaling": "yarn"}, "$.rope_scaling", "correct"),
        (HF_671B, {"quantization_config": "fp8"}, "$.quantization_config", "correct"),
    ],
)
def test_what_is_no_shape(config: dict[str, Any], change: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        shape(config | change)
    assert caught.value.message.startswith("here.json: ")
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("key", ["vocab_size", "dim", "n_layers", "q_lora_rank", "n_routed_experts"])
def test_a_missing_key_of_deepseeks_form_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"here.json: Object missing required field `{key}`"):
        shape(without(DEEPSEEK_671B, key))


@pytest.mark.parametrize("key", ["num_hidden_layers", "index_topk", "rms_norm_eps", "first_k_dense_replace"])
def test_a_missing_key_of_hugging_faces_form_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"here.json: '{key}' is missing"):
        shape(without(HF_671B, key))


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", [], 3])
def test_an_unknown_model_type_is_named(kind: Any) -> None:
    with pytest.raises(InputError, match=r"model_type .* is not supported"):
        dsa_shape_of(HF_671B | {"model_type": kind}, "here.json")


def test_deepseeks_form_names_no_model_type() -> None:
    assert dsa_shape_of(DEEPSEEK_671B, "here.json") == shape(HF_671B)
    with pytest.raises(InputError, match="model_type None"):
        dsa_shape_of({"dim": 3}, "here.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3000) | st.floats(-3, 3000) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_is_a_shape_or_an_input_error(data: st.DataObject, value: Any) -> None:
    config = json.loads(json.dumps(data.draw(st.sampled_from([HF_671B, DEEPSEEK_671B]))))
    further = ["mlp_layer_types", "rope_parameters", "rope_factor", "beta_fast", "original_seq_len", "max_seq_len"]
    key = data.draw(st.sampled_from([*config, *further]))
    if isinstance(config.get(key), dict) and data.draw(st.booleans()):
        config[key][data.draw(st.sampled_from([*config[key], "attention_factor"]))] = value
    else:
        config[key] = value
    try:
        found: object = dsa_shape_of(config, "here.json")
    except InputError as error:
        found = error.message
    assert isinstance(found, DsaShape) or str(found).startswith("here.json: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'"x"', b"[" * 100_000, b'{"a": NaN}'])
def test_a_config_that_is_no_json_object(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model config .*config\.json"):
        read_config(path)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model config at"):
        read_config(tmp_path / "config.json")
    with pytest.raises(InputError, match="cannot read model config"):
        read_config(tmp_path)


def deepseek_form(hf: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's JSON of the model that a Hugging Face config describes."""
    scaling = hf["rope_scaling"]
    assert hf["norm_topk_prob"]  # DeepSeek's form has no key for it
    return {
        "vocab_size": hf["vocab_size"],
        "dim": hf["hidden_size"],
        "inter_dim": hf["intermediate_size"],
        "moe_inter_dim": hf["moe_intermediate_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_dense_layers": hf["first_k_dense_replace"],
        "n_heads": hf["num_attention_heads"],
        "n_routed_experts": hf["n_routed_experts"],
        "n_shared_experts": hf["n_shared_experts"],
        "n_activated_experts": hf["num_experts_per_tok"],
        "n_expert_groups": hf["n_group"],
        "n_limited_groups": hf["topk_group"],
        "route_scale": hf["routed_scaling_factor"],
        "score_func": "sigmoid",
        "q_lora_rank": hf["q_lora_rank"],
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_nope_head_dim": hf["qk_nope_head_dim"],
        "qk_rope_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "index_n_heads": hf["index_n_heads"],
        "index_head_dim": hf["index_head_dim"],
        "index_topk": hf["index_topk"],
        "max_seq_len": hf["max_position_embeddings"],
        "original_seq_len": scaling["original_max_position_embeddings"],
        "rope_theta": hf["rope_theta"],
        "rope_factor": scaling["factor"],
        "beta_fast": scaling["beta_fast"],
        "beta_slow": scaling["beta_slow"],
        "mscale": scaling["mscale"],
    }


def test_a_checkpoint_runs_the_same_under_either_form(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = json.loads((small_checkpoint / "config.json").read_text())
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(deepseek_form(hf)))
    monkeypatch.delenv("CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)  # a bare name is looked up in configs/, with and without .json

    def tokens(*config: str) -> list[int]:
        prompt = "a prompt of more tokens than the indexer selects, and than the original context " * 2
        command = ["generate", "--ckpt-path", str(small_checkpoint), *config, "--prompt", prompt]
        assert run([*command, "--max-new-tokens", "24", "--temperature", "0", "--json", "--device", "cpu"]) == 0
        out: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return out

    expected = tokens()
    assert len(expected) == 24
    for name in ("small", "small.json", "configs/small.json", str(folder / "small.json")):
        assert tokens("--config", name) == expected
    shapes = [
        load_model(ModelConfig(ckpt_path=str(small_checkpoint), config=config, device="cpu")).describe()
        for config in (None, "small")
    ]
    assert shapes[0] == shapes[1]


def test_a_prediction_layer_is_passed_over_and_a_forgotten_one_is_not() -> None:
    shape = parse_shape(CONFIG | SMALL_SHAPE, "small")
    rope = "model.layers.0.self_attn.rotary_emb.inv_freq"
    prediction = {"model.layers.3.eh_proj.weight", "model.layers.3.self_attn.o_proj.weight"}
    others = {"model.layers.2.mlp.gate.weight", "model.layers.30.eh_proj.weight"}
    assert unused(prediction | others | {rope}, shape.n_layers, ()) == prediction | {rope}
    assert unused({"model.layers.3.self_attn.o_proj.weight"}, shape.n_layers, ()) == set()
