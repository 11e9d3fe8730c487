"""The embedded model: small, the same everywhere, of the promised shape, and marked as random."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.jobs.model import load_model
from dsakv.models import tiny
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.rope_scaling import Yarn
from dsakv.models.tiny import ensure_tiny_model


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DSAKV_HOME", str(home))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home") / "not made yet"
    ensure_tiny_model(home)
    return home


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_shape_is_the_promised_one() -> None:
    assert parse_shape(tiny.CONFIG, "embedded") == DsaShape(
        vocab_size=260,
        dim=256,
        inter_dim=1024,
        moe_inter_dim=128,
        n_layers=4,
        n_dense_layers=1,
        n_heads=8,
        n_routed_experts=8,
        n_shared_experts=1,
        n_activated_experts=2,
        n_expert_groups=2,
        n_limited_groups=1,
        route_scale=1.0,
        norm_topk_prob=True,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        index_n_heads=8,
        index_head_dim=128,
        index_topk=512,
        scale_fmt=None,
        norm_eps=1e-6,
        rope_theta=10000.0,
        yarn=Yarn(16.0, 4096, 32.0, 1.0, rope_scale=1.0, softmax_scale=(0.1 * 2.772588722239781 + 1) ** 2),
        max_seq_len=65536,
    )


def test_it_is_small_and_holds_every_tensor_of_the_model(home: Path) -> None:
    directory = ensure_tiny_model(home)
    assert sum(len(data) for data in contents(directory).values()) <= 30e6
    assert {path.name for path in directory.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert directory.stat().st_mode & 0o777 == 0o755  # others who share the cache folder can read it
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
    loaded = load_model(ModelConfig(name="tiny-random", device="cpu"))
    assert loaded.max_seq_len == 65536
    assert loaded.describe()["random_weights"] is True
    assert loaded.describe()["kv_bytes_per_token_layer"] == (128 + 32) * 4
    assert all(not parameter.is_meta for parameter in loaded.model.parameters())  # type: ignore[attr-defined]


def test_two_processes_make_the_same_bytes_at_the_same_time(home: Path, tmp_path: Path) -> None:
    script = "import sys, pathlib; from dsakv.models.tiny import ensure_tiny_model as e; e(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    models = list((tmp_path / "models").iterdir())  # no leftovers of the one that came second
    assert [model.name for model in models] == [f"{tiny.NAME}-{tiny.RECIPE}"]
    assert contents(models[0]) == contents(ensure_tiny_model(home))


def test_losing_the_race_takes_the_other_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_meanwhile(staging: Path) -> None:
        (staging / "mine").touch()
        other = tmp_path / "models" / f"{tiny.NAME}-{tiny.RECIPE}"
        other.mkdir()
        (other / "theirs").touch()

    monkeypatch.setattr(tiny, "write_checkpoint", made_meanwhile)
    directory = ensure_tiny_model(tmp_path)
    assert [path.name for path in directory.iterdir()] == ["theirs"]
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(staging: Path) -> None:
        (staging / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_tiny_model(tmp_path)
    assert not list((tmp_path / "models").iterdir())


def test_every_output_says_that_the_weights_are_random(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "trace ruler --model tiny-random --tasks niah_single_1 --limit 1 --context-length 700 --max-new-tokens 2 "
        "--device cpu"
    )
    assert run([*command.split(), "--trace-out", str(tmp_path / "run")]) == 0
    caught = capsys.readouterr()
    assert "warning: the model's weights are random" in caught.err
    assert "random weights" in caught.out
    meta = json.loads((tmp_path / "run" / "block64" / "run_meta.json").read_text())
    assert meta["model"]["random_weights"] is True
    assert meta["model"]["name"] == "tiny-random (embedded)"
    assert run(["analyze", "--input", str(tmp_path / "run"), "--report", str(tmp_path / "report.html")]) == 0
    assert "random" in capsys.readouterr().out
    assert "random" in (tmp_path / "report.html").read_text()


def test_the_mark_stays_with_the_weights_whatever_config_names_their_shape(
    small_checkpoint: Path, tmp_path: Path, home: Path
) -> None:
    config = json.loads((small_checkpoint / "config.json").read_text())
    del config["dsakv_random_weights"]
    other = tmp_path / "shape.json"
    other.write_text(json.dumps(config))
    assert load_model(ModelConfig(ckpt_path=str(small_checkpoint), config=str(other), device="cpu")).random_weights
    copy = tmp_path / "copy"
    shutil.copytree(small_checkpoint, copy)
    shutil.copy(other, copy / "config.json")
    assert not load_model(ModelConfig(ckpt_path=str(copy), device="cpu")).random_weights
