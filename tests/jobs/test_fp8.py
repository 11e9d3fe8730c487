"""``--dtype fp8``: when it is taken, what it refuses and says, and what a rank loads of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.distributed import World
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import _precision, load_model
from dsakv.jobs.model_files import ModelFiles
from dsakv.kernels import tile
from dsakv.models.deepseek_v32_names import hf_name, split_of
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.dsa_shape import check_fp8
from dsakv.models.tiny import CONFIG
from dsakv.weights.layout import Layout
from tests.models.fp8_checkpoints import FP8_SHAPE, dequantize, write_fp8_checkpoint

ROW_BYTES = 256 + 2 * 4 + 64 * 2
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fp8")
    write_fp8_checkpoint(directory, seed=3)
    return directory


def load(directory: Path, world: World = World(), **options: Any) -> LoadedModel:  # noqa: B008 (frozen)
    return load_model(ModelConfig(ckpt_path=str(directory), **{"device": "cpu", "dtype": "fp8"} | options), world)


def stored_numbers(directory: Path) -> dict[str, Tensor]:
    """What the checkpoint holds, with the one projection that is not kept in float8 as bfloat16 numbers."""
    stored = load_file(directory / "model.safetensors")
    for name in [name for name in stored if name.endswith("kv_b_proj.weight")]:
        stored[name] = dequantize(stored[name], stored[f"{name}_scale_inv"]).bfloat16()
    return stored


def test_what_is_said_of_the_model(checkpoint: Path) -> None:
    loaded = load(checkpoint)
    said = loaded.describe()
    assert (said["dtype"], said["index_fp8"], said["kv_bytes_per_token_layer"]) == ("fp8", True, ROW_BYTES)
    assert loaded.model.dtype == torch.bfloat16
    assert isinstance(loaded.model, nn.Module)
    stored = stored_numbers(checkpoint)
    kept = dict(loaded.model.named_parameters())
    for name, parameter in kept.items():
        tensor = stored.pop(hf_name(name))
        wide = any(part in name for part in ("k_norm", "weights_proj", "gate.bias"))
        assert parameter.dtype == (torch.float32 if wide else tensor.dtype), name
        assert torch.equal(parameter.float(), tensor.float())  # bit by bit
    assert all(name.endswith("kv_b_proj.weight_scale_inv") for name in stored)


def test_what_auto_takes(checkpoint: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, fp8, small = Layout(hf_name), ModelFiles(checkpoint, "fp8"), ModelFiles(small_checkpoint, "small")
    for capability, taken in (((7, 5), "bfloat16"), ((8, 0), "fp8")):
        monkeypatch.setattr(tile, "capability", lambda device, known=capability: known)
        assert _precision("auto", CUDA, fp8, layout, has_fp8=True) == taken
        assert _precision("fp8", CUDA, fp8, layout, has_fp8=True) == "fp8"
    assert _precision("auto", CUDA, small, layout, has_fp8=True) == "bfloat16"
    for files in (fp8, small):
        assert _precision("auto", torch.device("cpu"), files, layout, has_fp8=True) == "float32"
        assert _precision("bfloat16", CUDA, files, layout, has_fp8=True) == "bfloat16"


def test_a_checkpoint_without_fp8_weights_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=f"--dtype fp8, but {small_checkpoint} holds no fp8 weights") as caught:
        load(small_checkpoint)
    assert "--dtype bfloat16" in (caught.value.hint or "")


def test_the_embedded_model_has_none_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSAKV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="holds no fp8 weights"):
        load_model(ModelConfig(name="tiny-random", device="cpu", dtype="fp8"))


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{O_PROJ}_scale_inv"), f"lacks tensor {O_PROJ}_scale_inv"),
        (lambda t: t.update({O_PROJ: t[O_PROJ].bfloat16()}), f"tensor {O_PROJ} in .* has dtype BF16"),
        (lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.float8_e5m2)}), "has dtype F8_E5M2"),
        (
            lambda t: t.update({f"{O_PROJ}_scale_inv": torch.ones(1, 4)}),
            r"has shape \[1, 4\], the model needs \[2, 4\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lacks tensor lm_head.weight_scale_inv, the scales of lm_head.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(InputError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "ranks", "problem"),
    [
        ({"dim": 320}, 1, "dim 320"),
        ({"q_lora_rank": 96}, 1, "q_lora_rank 96"),
        ({"kv_lora_rank": 32}, 1, "kv_lora_rank 32"),
        ({"moe_inter_dim": 64, "n_shared_experts": 8}, 1, "moe_inter_dim 64"),
        ({"moe_inter_dim": 64, "n_dense_layers": 3}, 1, None),
        ({"inter_dim": 192}, 1, "inter_dim 192"),
        ({"inter_dim": 192, "n_dense_layers": 0}, 1, None),
        ({"v_head_dim": 24}, 1, "n_heads * v_head_dim 192"),
        ({}, 1, None),
        ({}, 4, None),
        ({}, 8, "n_heads * v_head_dim 512"),
        ({"inter_dim": 640}, 2, "inter_dim 640"),
        ({"n_shared_experts": 1}, 2, "moe_inter_dim * n_shared_experts 128"),
        ({"qk_nope_head_dim": 48}, 1, None),  # outputs may end within a block
        ({"qk_nope_head_dim": 40}, 2, "n_heads * (qk_nope_head_dim + qk_rope_head_dim) 832"),
        ({"qk_nope_head_dim": 96, "v_head_dim": 80, "qk_rope_head_dim": 32, "n_heads": 16}, 2, None),
        ({"qk_nope_head_dim": 32, "v_head_dim": 80, "qk_rope_head_dim": 32}, 2, "n_heads * v_head_dim 640"),
    ],
)
def test_dimensions_that_are_no_blocks(change: dict[str, Any], ranks: int, problem: str | None) -> None:
    shape = msgspec.structs.replace(parse_shape(CONFIG | FP8_SHAPE, "shape"), **change)
    if problem is None:
        check_fp8(shape, ranks, "shape")
        return
    with pytest.raises(InputError) as caught:
        check_fp8(shape, ranks, "shape")
    assert caught.value.message.startswith(f"shape: {problem} ")
    assert "128" in caught.value.message
    assert ("fewer ranks" in (caught.value.hint or "")) == (ranks > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 576}, "inter_dim 576 makes no multiple of 128"),
        ({"index_head_dim": 96}, "--dtype fp8 rotates index keys by a Hadamard matrix, which has no size 96"),
    ],
)
def test_shapes_are_refused_before_a_weight_is_looked_at(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(CONFIG | FP8_SHAPE | change))
    with pytest.raises(InputError, match=message):
        load(checkpoint, config=str(shape))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_the_whole_between_them(checkpoint: Path, ranks: int) -> None:
    """Weights and scales, cut between blocks along the same dimension."""
    models = [load(checkpoint, World(rank, ranks)).model for rank in range(ranks)]
    parts = [dict(model.named_parameters()) for model in models if isinstance(model, nn.Module)]
    stored = stored_numbers(checkpoint)
    cut = set()
    for name in set().union(*parts):
        split, whole = split_of(name), stored[hf_name(name)].float()
        held = [part[name].float() for part in parts if name in part]
        if split.dim is None:
            assert all(torch.equal(part, whole) for part in held)
            assert len(held) == (ranks if split.expert is None else 1)
        else:
            assert torch.equal(torch.cat(held, split.dim), whole), name
            cut.add((name.rpartition(".")[2], split.dim))
    assert cut == {("weight", 0), ("weight", 1), ("scale", 0), ("scale", 1)}


def test_a_traced_run_tells_the_bytes_of_packed_rows(checkpoint: Path, tmp_path: Path) -> None:
    command = "generate --prompt aaaaaaaaaaaaaaaaaaaaaaa --trace-enable --max-new-tokens 3 --temperature 0 --device cpu"
    options = ["--dtype", "fp8", "--ckpt-path", str(checkpoint), "--trace-out", str(tmp_path / "run")]
    assert run([*command.split(), *options]) == 0
    folder = tmp_path / "run" / "block64"
    meta = json.loads((folder / "run_meta.json").read_text())
    assert (meta["model"]["dtype"], meta["model"]["kv_bytes_per_token_layer"]) == ("fp8", ROW_BYTES)
    assert meta["model"]["index_fp8"] is True
    records = [json.loads(line) for line in (folder / "trace_steps_0_4.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 3
    assert all(record["kv_fetch"]["hbm"]["bytes_read"] == 16 * ROW_BYTES for record in records)
