"""The models and the engine against transformers in float32: logits, selections, tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM

from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.jobs.model import load_model
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Model
from dsakv.request import Request
from tests.models.checkpoints import DEEPSEEK_MODELS, GLM_MODELS, save

Their = DeepseekV32ForCausalLM | GlmMoeDsaForCausalLM
NEW_TOKENS = 24
NEAR_TIE = 1e-5


@pytest.fixture(scope="module", params=[*DEEPSEEK_MODELS, *GLM_MODELS])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved-by-transformers")
    save(directory, request.param)
    return directory


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Their:
    model = cast(Their, AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    model.eval()  # type: ignore[no-untyped-call]
    return model


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> Model:
    return load_model(ModelConfig(ckpt_path=str(checkpoint), dtype="float32", device="cpu")).model


def their_forward(model: Their, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits ``[S, vocab]`` and, by layer, the positions ``[S, K]`` that it read in one dense pass."""
    picks: list[Tensor] = []
    shared = [kind == "shared" for kind in getattr(model.config, "indexer_types", [])]

    def note(_module: object, _inputs: object, output: Any) -> None:
        picks.append(output[2][0] if shared else output[0])

    hooks = [
        (layer.self_attn if shared else layer.self_attn.indexer).register_forward_hook(note)
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, picks


def our_forward(model: Model, ids: list[int], chunk: int) -> tuple[Tensor, list[list[list[int]]]]:
    """Logits ``[S, vocab]`` and the chosen positions by layer and query."""
    cache = PagedCache(
        n_layers=len(model.layers),
        n_blocks=-(-len(ids) // 8),
        block_size=8,
        row_dim=model.kv_row_dim,
        index_dim=model.index_key_dim,
        dtype=torch.float32,
        device=model.device,
    )
    table = BlockTable(range(-(-len(ids) // 8)), model.device)
    logits = []
    chosen: list[list[list[int]]] = [[] for _ in model.layers]
    with torch.inference_mode():
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            step = cache.bind([Span(table, start, len(part))], decode=False)
            hidden, rope = model.embed(torch.tensor(part)), model.rope(step.positions)
            selection = None
            for i, layer in enumerate(model.layers):
                hidden, selection = layer(hidden, rope, step.positions, step.layer(i), selection)
                assert selection is not None
                chosen[i] += [p[:n].tolist() for p, n in zip(selection.positions, selection.counts, strict=True)]
            logits.append(model.logits(hidden))
    return torch.cat(logits), chosen


def has_near_tie(model: Model, ids: list[int]) -> bool:
    """Whether any query's last chosen and first left-out score are too close for two correct programs to agree."""
    gaps: list[float] = []

    def measure(indexer: Any, inputs: Any, _output: object) -> None:
        kept = indexer.shape
        indexer.shape = replace(kept, top_k=kept.top_k + 1)
        selection = indexer.forward(*inputs)
        indexer.shape = kept
        lowest = selection.scores[selection.counts > kept.top_k].topk(2, dim=-1, largest=False).values
        gaps.extend((lowest[:, 1] - lowest[:, 0]).tolist())

    indexers = [layer.attn.indexer for layer in model.layers]  # type: ignore[attr-defined]
    hooks = [indexer.register_forward_hook(measure) for indexer in indexers if indexer is not None]
    our_forward(model, ids, len(ids))
    for hook in hooks:
        hook.remove()
    return min(gaps, default=1.0) < NEAR_TIE


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
def test_logits_and_selections(ours: Model, theirs: Their, prompts: list[list[int]], chunk: int) -> None:
    comparable = [ids for ids in prompts if not has_near_tie(ours, ids)]
    assert len(comparable) >= len(prompts) - 2
    for ids in comparable:
        expected, picks = their_forward(theirs, ids)
        logits, chosen = our_forward(ours, ids, chunk)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        for mine, reference in zip(chosen, picks, strict=True):
            for query, positions in enumerate(mine):
                assert positions == sorted(p for p in reference[query].tolist() if p <= query)


def greedy(model: Their, ids: list[int], eos: int | None = None) -> list[int]:
    # The mask is given because transformers otherwise takes every pad token in a random prompt for padding.
    prompt = torch.tensor([ids])
    out = cast(Any, model).generate(  # its annotations do not fit its own class
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(ids) :]]


@pytest.mark.parametrize(("batch_size", "chunk", "block_size"), [(1, 512, 64), (6, 512, 8), (3, 13, 5), (2, 1, 1)])
def test_greedy_tokens_and_recorded_selections(
    ours: Model,
    theirs: Their,
    prompts: list[list[int]],
    batch_size: int,
    chunk: int,
    block_size: int,
) -> None:
    options = EngineOptions(batch_size=batch_size, prefill_chunk=chunk, block_size=block_size, record=True)
    tokens: dict[int, list[int]] = {}
    records: dict[tuple[int, int, int], list[int]] = {}
    for step in Engine(ours, options).run([Request(i, ids, NEW_TOKENS) for i, ids in enumerate(prompts)]):
        tokens |= {completion.request_id: completion.token_ids for completion in step.finished}
        if step.records is None:
            continue
        for b, request in enumerate(step.records.request_id.tolist()):
            for layer, positions in enumerate(step.records.positions[:, b, : step.records.counts[b]]):
                key = (request, layer, int(step.records.step_idx[b]))
                assert key not in records
                records[key] = positions.tolist()
    assert len(records) == len(prompts) * len(ours.layers) * (NEW_TOKENS - 1)
    comparable = {i: ids for i, ids in enumerate(prompts) if not has_near_tie(ours, ids + tokens[i])}
    assert len(comparable) >= len(prompts) - 2
    for i, ids in comparable.items():
        assert tokens[i] == greedy(theirs, ids)
        _, picks = their_forward(theirs, ids + tokens[i])
        for layer, reference in enumerate(picks):
            for step_idx in range(NEW_TOKENS - 1):
                query = len(ids) + step_idx
                assert records[i, layer, step_idx] == sorted(p for p in reference[query].tolist() if p <= query)


def test_the_command_line_gives_the_same_tokens(
    checkpoint: Path,
    ours: Model,
    theirs: Their,
    prompts: list[list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    comparable = [ids for ids in prompts if not has_near_tie(ours, ids + greedy(theirs, ids))]
    assert len(comparable) >= len(prompts) - 2
    stop = greedy(theirs, comparable[0])[5]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    prompt_file = tmp_path / "prompts.jsonl"
    prompt_file.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in comparable))
    options = f"--ckpt-path {checkpoint} --dtype float32 --device cpu --temperature 0 --batch-size 3 --json"
    arguments = ["generate", *options.split(), "--max-new-tokens", str(NEW_TOKENS), "--input-file", str(prompt_file)]
    assert run(arguments) == 0
    lines = {line["request_id"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    for i, ids in enumerate(comparable):
        tokens = greedy(theirs, ids, stop)
        stopped = tokens[-1] == stop
        assert lines[i]["token_ids"] == (tokens[:-1] if stopped else tokens)
        assert lines[i]["finish_reason"] == ("stop" if stopped else "length")
        assert lines[i]["text"] is None
    assert lines[0]["finish_reason"] == "stop"

    assert run(["generate", "--ckpt-path", str(checkpoint), "--device", "cpu", "--prompt", "text"]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
