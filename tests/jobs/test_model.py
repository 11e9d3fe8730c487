"""A model ready to run: device, precision, length, the cache folder, and where a shape is looked up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsakv.config import ModelConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import _find_config, load_model
from dsakv.request import Request
from dsakv.settings import cache_home


def load(checkpoint: Path, **options: Any) -> LoadedModel:
    return load_model(ModelConfig(ckpt_path=str(checkpoint), **{"device": "cpu"} | options))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"DSAKV_HOME": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"DSAKV_HOME": "", "XDG_CACHE_HOME": "/b"}, Path("/b/dsakv")),
        ({"XDG_CACHE_HOME": ""}, Path("~/.cache/dsakv").expanduser()),
        ({"DSAKV_HOME": "~/x"}, Path("~/x").expanduser()),
    ],
)
def test_the_cache_folder(environ: dict[str, str], expected: Path) -> None:
    assert cache_home(environ) == expected


@pytest.mark.parametrize(("name", "dtype"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_precision_on_the_cpu(small_checkpoint: Path, name: str, dtype: str) -> None:
    loaded = load(small_checkpoint, dtype=name)
    model = loaded.model
    assert isinstance(model, nn.Module)
    assert str(model.dtype) == f"torch.{dtype}"
    kept_wide = ("indexer.k_norm", "indexer.weights_proj", "gate.bias")
    for parameter_name, parameter in model.named_parameters():
        wide = any(part in parameter_name for part in kept_wide)
        assert parameter.dtype == (torch.float32 if wide else model.dtype), parameter_name
        assert parameter.device == model.device == torch.device("cpu")
    described = loaded.describe()
    assert (described["dtype"], described["device"]) == (dtype, "cpu")
    assert described["kv_bytes_per_token_layer"] == (32 + 16) * model.dtype.itemsize


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"index_fp8": True}, {"dtype": "bfloat16", "index_fp8": True}]
)
def test_other_precisions_run(small_checkpoint: Path, prompts: list[list[int]], options: dict[str, Any]) -> None:
    loaded = load(small_checkpoint, **options)
    requests = [Request(i, ids, 4) for i, ids in enumerate(prompts)]
    steps = list(Engine(loaded.model, EngineOptions(batch_size=3, record=True)).run(requests))
    assert sorted(c.request_id for step in steps for c in step.finished) == list(range(len(prompts)))
    assert loaded.describe()["index_fp8"] is options.get("index_fp8", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the missing device")
def test_a_device_that_is_not_there(small_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        load(small_checkpoint, device="cuda")
    assert load(small_checkpoint, device="auto").model.device == torch.device("cpu")


def test_the_longest_sequence(small_checkpoint: Path) -> None:
    assert load(small_checkpoint).max_seq_len == 512
    shorter = load(small_checkpoint, max_seq_len=100)
    assert shorter.max_seq_len == shorter.describe()["max_seq_len"] == 100
    assert load(small_checkpoint, max_seq_len=512).max_seq_len == 512
    with pytest.raises(InputError, match="--max-seq-len 513 is more than the model's 512"):
        load(small_checkpoint, max_seq_len=513)
    with pytest.raises(InputError, match="exceeds the limit of 100"):
        Engine(shorter.model, EngineOptions()).check([Request(0, [1] * 90, 11)])


def test_a_model_is_named_after_its_folder(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_checkpoint, tmp_path / "some-model")
    monkeypatch.chdir(tmp_path / "some-model")
    assert load(Path(".")).name == "some-model"


def test_a_shape_by_its_bare_name(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file here comes before configs/ here, and that before the package's own."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no model config config_other"):
        load(small_checkpoint, config="config_other")
    assert json.loads(_find_config("config_671B_v3.2").read_text())["n_layers"] == 61
    (tmp_path / "configs").mkdir()
    shutil.copy(small_checkpoint / "config.json", tmp_path / "configs" / "config_671B_v3.2.json")
    assert load(small_checkpoint, config="config_671B_v3.2").describe()["n_layers"] == 3
    (tmp_path / "config_671B_v3.2").write_text("{")
    with pytest.raises(InputError, match="cannot read model config config_671B"):
        load(small_checkpoint, config="config_671B_v3.2")
    with pytest.raises(InputError, match="no model config folder/config_671B"):  # a path is only a path
        load(small_checkpoint, config="folder/config_671B_v3.2")


def test_a_shape_needs_a_checkpoint() -> None:
    with pytest.raises(InputError, match="--config without --ckpt-path"):
        load_model(ModelConfig(config="config_671B_v3.2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "lacks tensor model.layers.3."),
        ({"num_hidden_layers": 1}, r"holds tensor model.layers.1.* that the model has no place for"),
        ({"num_hidden_layers": 2}, r"holds tensor model.layers.2.* that the model has no place for"),
        ({"hidden_size": 32}, r"has shape \[260, 64\], the model needs \[260, 32\]"),
        ({"vocab_size": 300}, r"has shape \[260, 64\], the model needs \[300, 64\]"),
        ({"n_routed_experts": 12}, "tensor model.layers.1.mlp"),
    ],
)
def test_a_shape_that_is_not_the_checkpoints(
    small_checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((small_checkpoint / "config.json").read_text())
    (tmp_path / "shape.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load(small_checkpoint, config=str(tmp_path / "shape.json"))


def test_the_layer_of_multi_token_prediction_is_left_out(small_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "with-prediction"
    shutil.copytree(small_checkpoint, checkpoint)
    extra = {f"model.layers.3.{name}.weight": torch.zeros(2) for name in ("eh_proj", "enorm", "self_attn.o_proj")}
    save_file(extra, checkpoint / "prediction.safetensors")
    assert len(load(checkpoint).model.layers) == 3
