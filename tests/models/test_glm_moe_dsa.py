"""GLM-5: what its config says, and a trace of layers that share a selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GlmMoeDsaConfig

from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.errors import InputError
from dsakv.jobs.model import load_model
from dsakv.models.deepseek_v32_names import unused
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.glm_moe_dsa import parse_shape
from dsakv.models.rope_scaling import Yarn
from dsakv.models.shapes import dsa_shape_of
from tests.models.checkpoints import GLM_MODELS, save

CONFIG: dict[str, Any] = json.loads((Path(__file__).parent / "glm_5.json").read_text())
SIX = CONFIG | {"num_hidden_layers": 6}
PERIODIC = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
"""How GLM-5.2 and 5.3 share."""
BOTH = ["full", "shared"]


def shape(config: dict[str, Any]) -> DsaShape:
    return parse_shape(config, "here.json")


def letters(found: DsaShape) -> str:
    return "".join("F" if i == source else "S" for i, source in enumerate(found.index_layer_ids))


def test_the_shape_of_glm_5() -> None:
    found = shape(CONFIG)
    assert (found.n_layers, found.n_dense_layers, found.index_n_heads, found.indexer_rope) == (78, 3, 32, "interleaved")
    assert (found.yarn, found.rope_theta, found.norm_eps, found.shared_layers) == (None, 1e6, 1e-5, ())
    defaults = GlmMoeDsaConfig(rope_parameters=CONFIG["rope_parameters"]).to_dict()
    assert shape(defaults) == found
    assert shape(defaults | {"rope_interleave": True, "indexer_rope_interleave": True}) == found


def test_glm_5_2_has_an_indexer_in_21_of_78_layers() -> None:
    found = shape(CONFIG | PERIODIC)
    assert letters(found) == "FFF" + "SSSF" * 18 + "SSS"
    assert found.index_layer_ids[2:8] == [2, 2, 2, 2, 6, 6]


@pytest.mark.parametrize(("keys", "expected"), GLM_MODELS.values())
def test_who_shares_is_read_as_transformers_reads_it(keys: dict[str, Any], expected: str) -> None:
    assert letters(shape(CONFIG | keys)) == expected


@settings(max_examples=100, deadline=None)
@given(freq=st.integers(-1, 6), offset=st.integers(-1, 9), n=st.integers(1, 12))
def test_any_period_is_that_of_transformers(freq: int, offset: int, n: int) -> None:
    period: dict[str, Any] = {"index_topk_freq": freq, "index_skip_topk_offset": offset, "num_hidden_layers": n}
    expected = "".join(mode[0].upper() for mode in GlmMoeDsaConfig(**period).indexer_types or [])
    if expected[0] == "F":
        assert letters(shape(CONFIG | period)) == expected
    else:
        with pytest.raises(InputError, match="index_skip_topk_offset has the first layer share"):
            shape(CONFIG | period)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"index_topk_pattern": "FSSFSS"} | PERIODIC, "FSSFSS"),
        ({"index_topk_pattern": BOTH * 3} | PERIODIC, "FSFSFS"),
        ({"indexer_types": BOTH * 3, "index_topk_pattern": "FFFFFF"}, "FSFSFS"),
        ({"indexer_types": None, "index_topk_pattern": None, "index_topk_freq": 1}, "FFFFFF"),
        ({"indexer_types": BOTH * 4}, "FSFSFS"),  # of a list that goes on for the prediction layer
        ({"index_topk_pattern": "FFSFFSF"}, "FFSFFS"),
    ],
)
def test_which_key_counts(keys: dict[str, Any], expected: str) -> None:
    assert letters(shape(SIX | keys)) == expected


def test_layer_types_count_before_the_number_of_dense_layers() -> None:
    types = {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 5}  # transformers saves a first_k_dense_replace of 3 then
    assert shape(SIX | types) == shape(SIX | {"first_k_dense_replace": 2})
    assert shape({key: SIX[key] for key in SIX if key != "first_k_dense_replace"} | types).n_dense_layers == 2


def test_yarn_would_be_read_as_deepseeks_is() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.0}
    assert shape(CONFIG | {"rope_parameters": scaling}).yarn == Yarn(4.0, 1024)


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"indexer_types": ["shared"] * 6}, "indexer_types has the first layer share", "the first layer needs"),
        ({"index_topk_pattern": "SFFFFF"}, "index_topk_pattern has the first layer share", ""),
        ({"indexer_types": BOTH}, "indexer_types names 2 of 6 layers", "name every layer"),
        ({"indexer_types": []}, "indexer_types names 0 of 6 layers", ""),
        ({"index_topk_pattern": ""}, "index_topk_pattern names 0 of 6 layers", ""),
        ({"index_topk_pattern": "FSXF"}, "index_topk_pattern holds 'X'", "F is full, S is shared"),
        ({"index_topk_pattern": ["F"] * 6}, "Invalid enum value 'F' - at `$.index_topk_pattern", "correct the value"),
        ({"indexer_types": ["full"] * 5 + ["half"]}, "Invalid enum value 'half' - at `$.indexer_types", ""),
        ({"indexer_types": "full"}, "$.indexer_types", "correct the value"),
        ({"index_topk_freq": "4"}, "Expected `int`, got `str` - at `$.index_topk_freq`", ""),
        ({"index_topk_freq": None}, "$.index_topk_freq", ""),
        ({"index_skip_topk_offset": 2.5}, "$.index_skip_topk_offset", ""),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types names 3 of 6 layers", "name every layer"),
        ({"mlp_layer_types": ["dense", "sparse"] * 3}, "mixes dense and sparse", "dense layers must come first"),
        ({"mlp_layer_types": ["moe"] * 6}, "Invalid enum value 'moe' - at `$.mlp_layer_types", ""),
        ({"attention_bias": True}, "attention_bias is True", "a glm_moe_dsa model has False"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave is False", "a glm_moe_dsa model has True"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear'", "a glm_moe_dsa model has 'default'"),
        ({"num_hidden_layers": 0}, "n_layers is 0", "at least 1"),
        ({"index_head_dim": 32}, "wider than index_head_dim 32", ""),
    ],
)
def test_what_is_no_shape(change: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        shape(SIX | change)
    assert caught.value.message.startswith("here.json: ")
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("key", sorted(CONFIG.keys() - {"model_type", "rope_parameters", "num_key_value_heads"}))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"here.json: '{key}' is missing") as caught:
        shape({name: value for name, value in CONFIG.items() if name != key})
    assert "glm_moe_dsa" in caught.value.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3000) | st.floats(-3, 3000) | st.sampled_from(["F", "FS", *BOTH]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_is_a_shape_or_an_input_error(data: st.DataObject, value: Any) -> None:
    further = ["indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "mlp_layer_types"]
    config = CONFIG | {"num_hidden_layers": 2, data.draw(st.sampled_from([*CONFIG, *further])): value}
    try:
        found: object = dsa_shape_of(config, "here.json")
    except InputError as error:
        found = error.message
    assert isinstance(found, DsaShape) or str(found).startswith("here.json: ")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, two of them with an indexer that two others each share."""
    directory = tmp_path_factory.mktemp("glm")
    save(directory, "glm pattern")
    return directory


def test_a_trace_names_the_layer_that_selected(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    ids = torch.randint(0, 256, (3, 70), generator=torch.Generator().manual_seed(5)).tolist()
    prompts.write_text("".join(json.dumps({"prompt_token_ids": prompt}) + "\n" for prompt in ids))
    options = f"--ckpt-path {checkpoint} --device cpu --dtype float32 --batch-size 2 --max-new-tokens 5 --json"
    trace = f"--trace-enable --trace-out {tmp_path / 'out'} --input-file {prompts}"
    assert run(["generate", *options.split(), *trace.split()]) == 0
    shards = sorted((tmp_path / "out" / "block64").glob("*.jsonl"))
    records = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    by_place = {(r["request_id"], r["step_idx"], r["layer_id"]): r for r in records}
    assert len(records) == len(by_place) == 3 * 4 * 6
    meta = json.loads((tmp_path / "out" / "block64" / "run_meta.json").read_text())
    row_bytes = meta["model"]["kv_bytes_per_token_layer"]
    own = set()
    for (request, step, layer), record in by_place.items():
        source = by_place[request, step, [0, 0, 0, 3, 4, 4][layer]]
        assert record["index_layer_id"] == source["layer_id"]
        assert record["selected_token_pos"] == source["selected_token_pos"]
        assert record["scores_stats"] == source["scores_stats"]
        assert record["kv_fetch"]["hbm"]["bytes_read"] == 16 * row_bytes  # read in every layer
        own.add((request, step, tuple(record["selected_token_pos"])))
    assert len(own) == 3 * 4 * 3  # three indexers, each of its own mind


def test_what_a_checkpoint_may_hold_beside_the_model(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    assert "model.layers.3.self_attn.indexer.wk.weight" in tensors
    assert "model.layers.5.self_attn.indexer.wk.weight" not in tensors
    extra = {
        "model.layers.5.self_attn.indexer.wk.weight": torch.ones(2),
        "model.layers.6.eh_proj.weight": torch.ones(2),
        "model.layers.6.self_attn.indexer.wk.weight": torch.ones(2),
    }
    config = json.loads((checkpoint / "config.json").read_text())
    found = shape(config)
    assert unused({*tensors, *extra}, found.n_layers, found.shared_layers) == set(extra)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | extra, tmp_path / "model.safetensors")
    model = load_model(ModelConfig(ckpt_path=str(tmp_path), device="cpu")).model
    assert model.index_layer_ids == [0, 0, 0, 3, 4, 4]
    save_file(tensors | {"model.layers.50.self_attn.indexer.wk.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds tensor model.layers.50.*no place for \(1 in all\)"):
        load_model(ModelConfig(ckpt_path=str(tmp_path), device="cpu"))
