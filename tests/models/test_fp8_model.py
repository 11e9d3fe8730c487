"""fp8 models against an oracle that rounds at the same places, and against the same model without any rounding.

The program and the oracle differ by 1e-7, which now and then tips a number over the middle between two that float8
holds; such a row is then off by up to a step of that number. So layers are compared one by one, each with the same
input and reading the same cache, and nearly all rows must agree tightly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dsakv.config import ModelConfig
from dsakv.jobs.model import load_model
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Model, Selection
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.shapes import dsa_shape_of, read_config
from dsakv.models.tiny import CONFIG
from tests.models.fp8_checkpoints import FP8_SHAPE, convert, write_dequantized, write_fp8_checkpoint
from tests.models.fp8_oracle import Kept, Oracle

DEEPSEEK: dict[str, Any] = CONFIG | FP8_SHAPE
GLM: dict[str, Any] = {key: value for key, value in DEEPSEEK.items() if key != "rope_scaling"} | {
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    "n_group": 1,
    "topk_group": 1,
    "indexer_types": ["full", "shared", "full"],
}
DENSE: dict[str, Any] = DEEPSEEK | {"index_topk": 512, "num_hidden_layers": 2, "first_k_dense_replace": 2}
TOKENS = 60


class Case(NamedTuple):
    directory: Path
    shape: DsaShape
    model: Model


def make(directory: Path, config: dict[str, Any], scale_fmt: str | None, seed: int = 0) -> Case:
    write_fp8_checkpoint(directory, config, seed=seed, scale_fmt=scale_fmt)
    loaded = load_model(ModelConfig(ckpt_path=str(directory), device="cpu", dtype="fp8"))
    return Case(
        directory, dsa_shape_of(read_config(directory / "config.json"), "test"), convert(loaded.model, torch.float32)
    )


@pytest.fixture(
    scope="module",
    params=[(DEEPSEEK, "ue8m0"), (DEEPSEEK, None), (GLM, None), (GLM, "ue8m0")],
    ids=["deepseek ue8m0", "deepseek", "glm", "glm ue8m0"],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(tmp_path_factory.mktemp("fp8"), *request.param)


class Pass(NamedTuple):
    """What went into each layer, came out, and was read: ``[L][T, dim]`` and ``[L][T, T]``."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    chosen: list[Tensor]
    kept: list[Kept]
    rope: tuple[Tensor, Tensor]
    logits: Tensor


@torch.inference_mode()
def forward(model: Model, ids: Tensor, chunk: int) -> Pass:
    n, n_blocks = len(ids), -(-len(ids) // 8)
    cache = PagedCache(
        n_layers=len(model.layers),
        n_blocks=n_blocks,
        block_size=8,
        row_dim=model.kv_row_dim,
        index_dim=model.index_key_dim,
        dtype=model.dtype,
        device=model.device,
        fp8=model.kv_fp8,
    )
    table = BlockTable(range(n_blocks), model.device)
    states: list[list[Tensor]] = [[] for _ in range(len(model.layers) + 1)]
    chosen = torch.zeros(len(model.layers), n, n, dtype=torch.bool)
    for start in range(0, n, chunk):
        part = ids[start : start + chunk]
        step = cache.bind([Span(table, start, len(part))], decode=False)
        hidden, rope = model.embed(part), model.rope(step.positions)
        states[0].append(hidden)
        selection: Selection | None = None
        for i, layer in enumerate(model.layers):
            hidden, selection = layer(hidden, rope, step.positions, step.layer(i), selection)
            states[i + 1].append(hidden)
            assert selection is not None
            for row, (positions, count) in enumerate(zip(selection.positions, selection.counts, strict=True)):
                chosen[i, start + row, positions[: int(count)]] = True
    kept = []
    for i in range(len(model.layers)):
        view = step.layer(i)
        rows = view.sequence(0)[:n]
        own = view.index_keys(0) if model.index_layer_ids[i] == i else None
        keys = None if own is None else own.values.float() * (1.0 if own.scale is None else own.scale.unsqueeze(1))
        kept.append(Kept(rows, keys))
    whole = [torch.cat(parts) for parts in states]
    turn = model.rope(torch.arange(n)).attention
    return Pass(whole[:-1], whole[1:], list(chosen), kept, turn, model.logits(whole[-1]))


def tokens(n: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed))


class Off(NamedTuple):
    """How far a layer is off an oracle's."""

    rows: Tensor  # [T] share of what the layer added
    same: Tensor  # [T] bool, where both read the same keys
    kept: list[Tensor]  # [T] each, share of the rows and keys in the cache


def errors(oracle: Oracle, done: Pass, *, read_kept: bool) -> list[Off]:
    """By layer; ``read_kept`` lets the oracle read what the program has in its cache."""
    found = []
    chosen: Tensor | None = None
    for i, (before, after) in enumerate(zip(done.inputs, done.outputs, strict=True)):
        previous = chosen if i in oracle.shape.shared_layers else None
        expected, chosen = oracle.layer(i, before, done.rope, previous, done.kept[i] if read_kept else None)
        pairs = [(a, b) for a, b in zip(done.kept[i], oracle.own, strict=True) if a is not None and b is not None]
        found.append(
            Off(
                rows=(after - expected).norm(dim=1) / (expected - before).norm(dim=1),
                same=(chosen == done.chosen[i]).all(1),
                kept=[(a - b).norm(dim=1) / b.norm(dim=1) for a, b in pairs],
            )
        )
        assert len(pairs) == (1 if i in oracle.shape.shared_layers else 2)
    return found


@pytest.mark.parametrize("chunk", [TOKENS, 7])
def test_every_layer_is_the_oracles(case: Case, chunk: int) -> None:
    done = forward(case.model, tokens(TOKENS), chunk)
    oracle = Oracle(case.directory, case.shape)
    for off in errors(oracle, done, read_kept=True):
        assert off.rows.median() < 2e-6
        assert (off.rows < 2e-5).float().mean() > 0.85
        assert off.rows[off.same].max() < 0.1
        assert off.same.float().mean() > 0.9
        for share in off.kept:
            assert (share < 2e-6).float().mean() > 0.9
            assert share.max() < 0.05
    torch.testing.assert_close(done.logits, oracle.logits(done.outputs[-1]), atol=1e-5, rtol=1e-5)


def test_without_rounding_no_row_would_agree(case: Case) -> None:
    """That the agreement above comes from rounding at the right places, each of which moves every row."""
    done = forward(case.model, tokens(TOKENS), TOKENS)
    for off in errors(Oracle(case.directory, case.shape, rounding=False), done, read_kept=False):
        assert off.rows.min() > 0.01
        assert all(share.min() > 0.01 for share in off.kept)


def test_where_nothing_is_chosen_it_is_near_the_unrounded_model(tmp_path: Path) -> None:
    """Dense attention and no experts: nothing can tip over, and float8's 3 bits of mantissa leave a few percent."""
    case = make(tmp_path / "fp8", DENSE, "ue8m0")
    write_dequantized(case.directory, tmp_path / "wide")
    wide = load_model(ModelConfig(ckpt_path=str(tmp_path / "wide"), device="cpu", dtype="float32")).model
    ids = tokens(TOKENS)
    rounded, exact = forward(case.model, ids, TOKENS), forward(wide, ids, TOKENS)
    for one, other in zip(rounded.outputs, exact.outputs, strict=True):
        off = (one - other).norm(dim=1) / other.norm(dim=1)
        assert 0.005 < off.median() < 0.1
        assert off.max() < 0.2
    assert (rounded.logits - exact.logits).norm() < 0.15 * exact.logits.norm()


def test_in_bfloat16_it_is_the_float32_emulation_but_for_bfloat16(tmp_path: Path) -> None:
    case = make(tmp_path, DENSE, "ue8m0")
    short = load_model(ModelConfig(ckpt_path=str(tmp_path), device="cpu", dtype="fp8")).model
    assert short.dtype == torch.bfloat16
    ids = tokens(TOKENS)
    one, other = forward(short, ids, 13), forward(case.model, ids, 13)
    for a, b in zip(one.outputs, other.outputs, strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a.float() - b).norm(dim=1) / b.norm(dim=1)).max() < 0.1


def test_what_is_quantised_and_what_is_not(case: Case) -> None:
    assert isinstance(case.model, nn.Module)
    held = {name: parameter.dtype for name, parameter in case.model.named_parameters()}
    float8 = {name.removesuffix(".weight") for name, dtype in held.items() if dtype == torch.float8_e4m3fn}
    assert float8 == {name.removesuffix(".scale") for name in held if name.endswith(".scale")}
    attention = {f"attn.{name}" for name in ("wq_a", "wq_b", "wkv_a", "wo")}
    indexer = {"attn.indexer.wq_b", "attn.indexer.wk"}
    mlps = ["ffn", "ffn.shared_experts", *(f"ffn.experts.{i}" for i in range(8))]
    for layer_id in range(case.shape.n_layers):
        expected = attention | (set() if layer_id in case.shape.shared_layers else indexer)
        expected |= {f"{mlp}.{w}" for mlp in (mlps[:1] if layer_id == 0 else mlps[1:]) for w in ("w1", "w2", "w3")}
        prefix = f"layers.{layer_id}."
        assert {name.removeprefix(prefix) for name in float8 if name.startswith(prefix)} == expected
    assert all(name.startswith("layers.") for name in float8)
