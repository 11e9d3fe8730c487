"""Llama against transformers in float32, dense and over selections, which brute force checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.errors import InputError
from dsakv.jobs.model import load_model
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Model, Selection
from dsakv.models.selection import SINKS
from tests.models.llamas import DIM, MODELS, N_LAYERS, SHAPE, TOP_K, save_indexers, save_llama

Load = Callable[..., Model]
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_llama(directory, request.param)
    save_indexers(directory / "indexer")
    return directory


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    model.eval()  # type: ignore[no-untyped-call]
    return model


@pytest.fixture(scope="module")
def load(checkpoint: Path) -> Load:
    def load(selection: Literal["indexer", "oracle", "recent", "dense"], top_k: int = 0) -> Model:
        indexer = None if selection == "dense" else str(checkpoint / "indexer")
        config = ModelConfig(
            ckpt_path=str(checkpoint), device="cpu", selection=selection, index_topk=top_k, indexer=indexer
        )
        return load_model(config).model

    return load


def forward(model: Model, prompts: list[list[int]], chunk: int) -> tuple[list[Tensor], list[list[list[list[int]]]]]:
    """By prompt: logits ``[S, vocab]``, and the chosen positions by layer and query. Prompts go side by side."""
    blocks = [-(-len(ids) // 8) for ids in prompts]
    cache = PagedCache(
        n_layers=len(model.layers),
        n_blocks=sum(blocks),
        block_size=8,
        row_dim=model.kv_row_dim,
        index_dim=model.index_key_dim,
        dtype=model.dtype,
        device=model.device,
    )
    # The last block first, so that no sequence lies in one piece.
    tables = [BlockTable([sum(blocks[: i + 1]) - 1 - b for b in range(n)], model.device) for i, n in enumerate(blocks)]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    chosen: list[list[list[list[int]]]] = [[[] for _ in model.layers] for _ in prompts]
    with torch.inference_mode():
        for start in range(0, max(map(len, prompts)), chunk):
            live = [i for i, ids in enumerate(prompts) if len(ids) > start]
            parts = [prompts[i][start : start + chunk] for i in live]
            step = cache.bind(
                [Span(tables[i], start, len(part)) for i, part in zip(live, parts, strict=True)], decode=False
            )
            hidden = model.embed(torch.tensor([token for part in parts for token in part]))
            rope, selection = model.rope(step.positions), None
            for layer_id, layer in enumerate(model.layers):
                hidden, selection = layer(hidden, rope, step.positions, step.layer(layer_id), selection)
                for i, segment in zip(live, step.segments, strict=True):
                    chosen[i][layer_id] += positions_of(selection, segment.rows)
            out = model.logits(hidden)
            for i, segment in zip(live, step.segments, strict=True):
                logits[i].append(out[segment.rows])
    return [torch.cat(parts) for parts in logits], chosen


def positions_of(selection: Selection | None, rows: slice) -> list[list[int]]:
    if selection is None:
        return []
    return [p[:n].tolist() for p, n in zip(selection.positions[rows], selection.counts[rows], strict=True)]


def their_logits(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return cast(Tensor, model(torch.tensor([ids])).logits[0])


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_dense_logits(theirs: LlamaForCausalLM, load: Load, prompts: list[list[int]], chunk: int) -> None:
    logits, _ = forward(load("dense"), prompts, chunk)
    for ids, ours in zip(prompts, logits, strict=True):
        torch.testing.assert_close(ours, their_logits(theirs, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("selection", ["indexer", "oracle", "recent"])
def test_a_selection_of_everything_is_dense(
    theirs: LlamaForCausalLM, load: Load, prompts: list[list[int]], selection: str
) -> None:
    logits, _ = forward(load(selection, 500), prompts, 32)
    for ids, ours in zip(prompts, logits, strict=True):
        torch.testing.assert_close(ours, their_logits(theirs, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("selection", ["indexer", "oracle", "recent"])
def test_chunks_and_neighbours_change_nothing(load: Load, prompts: list[list[int]], selection: str) -> None:
    model = load(selection)
    whole, chosen = zip(*(forward(model, [ids], 512) for ids in prompts), strict=True)
    for chunk in (1, 7):
        logits, again = forward(model, prompts, chunk)
        for alone, ours in zip(whole, logits, strict=True):
            torch.testing.assert_close(ours, alone[0], atol=1e-4, rtol=0)
        assert again == [one[0] for one in chosen]


def sparse_by_hand(model: LlamaForCausalLM, ids: list[int], chosen: list[list[list[int]]]) -> Tensor:
    """Logits of transformers' model where each layer's queries see only ``chosen`` keys."""
    masks = torch.full((N_LAYERS, len(ids), len(ids)), -torch.inf)
    for layer_id, rows in enumerate(chosen):
        for row, positions in enumerate(rows):
            masks[layer_id, row, positions] = 0
    hooks = []
    for layer_id, layer in enumerate(model.model.layers):

        def mask(_module: object, args: Any, kwargs: dict[str, Any], layer_id: int = layer_id) -> Any:
            return args, kwargs | {"attention_mask": masks[layer_id][None, None]}

        hooks.append(layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True))
    logits = their_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("selection", ["indexer", "oracle", "recent"])
def test_sparse_logits_are_those_of_a_masked_dense_model(
    theirs: LlamaForCausalLM, load: Load, prompts: list[list[int]], selection: str
) -> None:
    logits, chosen = forward(load(selection), prompts, 7)
    for ids, ours, positions in zip(prompts, logits, chosen, strict=True):
        expected = sparse_by_hand(theirs, ids, positions)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    different = torch.cat(logits) - torch.cat([their_logits(theirs, ids) for ids in prompts])
    assert different.abs().max() > 0.1  # else the selection would not matter


def test_the_oracle_takes_the_largest_shares(theirs: LlamaForCausalLM, load: Load, prompts: list[list[int]]) -> None:
    """In the first layer, whose input no selection has touched."""
    _, chosen = forward(load("oracle"), prompts, 7)
    for ids, positions in zip(prompts, chosen, strict=True):
        with torch.inference_mode():
            shares = theirs(torch.tensor([ids]), output_attentions=True).attentions[0][0].double().sum(0)  # [S, S]
        for query, found in enumerate(positions[0]):
            assert len(found) == min(TOP_K, query + 1)
            assert found == sorted(set(found))
            assert found[-1] <= query
            best = shares[query].topk(len(found)).values.sum()
            assert shares[query, found].sum() >= best - 1e-5


def test_the_indexer_takes_the_best_scores(load: Load, checkpoint: Path, prompts: list[list[int]]) -> None:
    """In the first layer, against the formula in float64."""
    model = load("indexer")
    _, chosen = forward(model, prompts, 7)
    layer = cast(Any, model.layers[0])
    indexer = layer.attn.indexer
    for ids, positions in zip(prompts, chosen, strict=True):
        with torch.inference_mode():
            x = layer.attn_norm(model.embed(torch.tensor(ids))).double()
        angles = torch.outer(torch.arange(len(ids)).double(), 10000.0 ** (-torch.arange(0, 16, 2).double() / 16))

        def turn(part: Tensor, angles: Tensor = angles) -> Tensor:
            first, second, rest = part.split([8, 8, 16], dim=-1)
            cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

        key = x @ indexer.wk.weight.double().T
        key = torch.nn.functional.layer_norm(
            key, [32], indexer.k_norm.weight.double(), indexer.k_norm.bias.double(), 1e-6
        )
        q = turn((x @ indexer.wq_b.weight.double().T).view(len(ids), SHAPE.n_heads, 32))
        weights = x @ indexer.weights_proj.weight.double().T * (SHAPE.n_heads * 32) ** -0.5
        dots = torch.einsum("thd,sd->ths", q, turn(key.unsqueeze(1)).squeeze(1)).relu()
        scores = torch.einsum("th,ths->ts", weights, dots)
        for query, found in enumerate(positions[0]):
            assert len(found) == min(TOP_K, query + 1)
            lowest = scores[query, found].min()
            left_out = sorted(set(range(query + 1)) - set(found))
            assert not left_out or scores[query, left_out].max() <= lowest + 1e-5


def test_a_window_with_the_first_tokens(load: Load) -> None:
    (_,), (chosen,) = forward(load("recent"), [list(range(60))], 7)
    for positions in chosen:
        for query, found in enumerate(positions):
            if query < TOP_K:
                assert found == list(range(query + 1))
            else:
                assert found == [*range(SINKS), *range(query + 1 - (TOP_K - SINKS), query + 1)]


@pytest.mark.parametrize("batch", [1, 6])
def test_greedy_tokens_through_the_command(
    theirs: LlamaForCausalLM,
    checkpoint: Path,
    prompts: list[list[int]],
    batch: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in prompts))
    options = f"--ckpt-path {checkpoint} --device cpu --temperature 0 --max-new-tokens {NEW_TOKENS} --json"
    assert run(["generate", "--input-file", str(file), "--batch-size", str(batch), *options.split()]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for ids, line in zip(prompts, sorted(lines, key=lambda line: int(line["request_id"])), strict=True):
        with torch.inference_mode():
            out = cast(Any, theirs).generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        expected = out[0, len(ids) :].tolist()
        assert line["token_ids"] == (expected[:-1] if expected[-1] == 257 else expected)


def trace(directory: Path, *options: str) -> int:
    command = "trace ruler --tasks niah_single_1 --limit 1 --context-length 768 --max-new-tokens 3 --device cpu"
    return run([*command.split(), "--ckpt-path", str(directory), *options])


def test_what_a_trace_says_of_the_selection(checkpoint: Path, tmp_path: Path) -> None:
    for i, (options, by, top_k, heads) in enumerate(
        (
            (["--indexer", str(checkpoint / "indexer")], "indexer", TOP_K, SHAPE.n_heads),
            (["--indexer", str(checkpoint / "indexer"), "--index-topk", "20"], "indexer", 20, SHAPE.n_heads),
            (["--indexer", str(checkpoint / "indexer"), "--selection", "oracle"], "oracle", TOP_K, 0),
            (["--selection", "recent"], "recent", 256, 0),
        )
    ):
        out = tmp_path / str(i)
        assert trace(checkpoint, *options, "--trace-out", str(out)) == 0
        model = json.loads((out / "block64" / "run_meta.json").read_text())["model"]
        assert (model["selection"], model["index_topk"], model["index_n_heads"]) == (by, top_k, heads)
        assert model["caveat"]
        (shard,) = (out / "block64").glob("trace_steps_*.jsonl")
        first = json.loads(shard.read_text().splitlines()[0])
        assert len(first["selected_token_pos"]) == top_k


def test_a_dense_model_has_nothing_to_trace(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trace(checkpoint, "--trace-out", str(tmp_path / "run")) == 2
    assert "is dense: there is no selection to trace" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "indexer"}, "comes without indexers"),
        ({"indexer": "absent"}, "no indexer file at absent"),
        ({"indexer": "config.json"}, "cannot be read"),
        ({"indexer": "model.safetensors"}, "is no file of indexers"),
        ({"indexer": "other layers"}, "is for 2 layers of width 48, the model has 3 of 48"),
        ({"indexer": "other width"}, "is for 3 layers of width 40, the model has 3 of 48"),
        ({"indexer": "indexer", "selection": "recent", "index_fp8": True}, "no indexer selects"),
        ({"dtype": "fp8"}, "which Llama models do not have"),
        ({"selection": "dense", "index_topk": 3}, "a dense model reads all tokens"),
    ],
)
def test_what_does_not_go_together(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(checkpoint)
    save_indexers(Path("other layers"), n_layers=2)
    shape = SHAPE.__class__(**vars(SHAPE) | {"dim": 40, "query_dim": 40})
    save_indexers(Path("other width"), shape)
    with pytest.raises(InputError, match=message):
        load_model(ModelConfig(ckpt_path=str(checkpoint), device="cpu", **options))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wq_b.weight", lambda t: t.fill_(float("nan")), "numbers that are not finite"),
        ("wk.weight", lambda t: t.to(torch.float8_e4m3fn), "holds F8_E4M3"),
        ("wk.weight", lambda t: t[0, 0].clone(), "is for 3 layers of width 0"),
        ("k_norm.bias", lambda t: t[:3].clone(), "lacks tensors, or has others"),
    ],
    ids=["nan", "float8", "scalar", "short"],
)
def test_damaged_indexers(
    tmp_path: Path, checkpoint: Path, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    file = tmp_path / "indexer.safetensors"
    tensors = load_file(checkpoint / "indexer")
    tensors[f"layers.0.attn.indexer.{name}"] = change(tensors[f"layers.0.attn.indexer.{name}"])
    with safe_open(checkpoint / "indexer", framework="pt") as original:
        save_file(tensors, file, metadata=original.metadata())
    with pytest.raises(InputError, match=message) as raised:
        load_model(ModelConfig(ckpt_path=str(checkpoint), device="cpu", indexer=str(file)))
    assert str(file) in raised.value.message


def test_a_model_with_indexers_takes_no_others(small_checkpoint: Path, checkpoint: Path) -> None:
    for options in ({"selection": "recent"}, {"indexer": str(checkpoint / "indexer")}):
        with pytest.raises(InputError, match="indexers of its own"):
            load_model(ModelConfig(ckpt_path=str(small_checkpoint), device="cpu", **cast(dict[str, Any], options)))
    model = load_model(ModelConfig(ckpt_path=str(small_checkpoint), device="cpu", index_topk=5)).model
    assert model.top_k == 5
    assert SHAPE.dim == DIM


def test_several_ranks_are_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--prompt", "x", "--ckpt-path", str(checkpoint), "--model-parallel", "2"]) == 2
    assert "a Llama model runs on one rank" in capsys.readouterr().err
