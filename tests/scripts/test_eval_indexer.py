"""The figures on a tiny Llama's selections: brute force, bounds, and what is printed is what is written."""

from __future__ import annotations

import io
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console as Terminal
from torch import Tensor
from transformers import LlamaForCausalLM

from dsakv.config import ModelConfig
from dsakv.console import Console
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import load_model
from dsakv.models.llama import DecoderLayer, Llama
from scripts.eval_indexer import evaluate, main, parse_options
from scripts.indexer_training import dense_layers, mass_on
from scripts.quality_report import checks, tables
from scripts.selection_quality import (
    BLOCKS,
    METHODS,
    STEPS,
    attention_mass,
    judged_rows,
    read,
    scores_of,
    step_jaccard,
    tied_rows,
    variants,
)
from scripts.training_sources import Work
from tests.models.llamas import N_LAYERS, TOP_K, save_indexers, save_llama

LENGTH = 160


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_llama(directory, "tied")
    save_indexers(directory / "indexer")
    return directory


def load(checkpoint: Path, top_k: int = 0) -> LoadedModel:
    path, indexer = str(checkpoint), str(checkpoint / "indexer")
    return load_model(ModelConfig(ckpt_path=path, indexer=indexer, index_topk=top_k, device="cpu"))


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> dict[str, Llama]:
    return variants(_llama(checkpoint, 0), 0)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    draw = random.Random(4)
    return [draw.randrange(256) for _ in range(LENGTH)]


def works() -> list[Work]:
    prose = "Winter came late. The fields were full of people who had come from the town to see it.\n\n"
    code = (
        'def area(width, height):\n    """The area of a rectangle of that width and height."""\n    return width\n\n\n'
    )
    texts = {"prose": prose, "code": code, "docs": '"Winter"\n\nA season of the year.\n\n'}
    return [Work(kind, cast(Any, kind), "made up", "none", True, text * 60) for kind, text in texts.items()]


def test_no_selection_captures_more_than_the_oracle(models: dict[str, Llama], ids: list[int]) -> None:
    found = attention_mass(models, ids, 40)
    for shares in (found.captured, found.recall):
        for method in METHODS:
            assert all(a <= b + 1e-6 for a, b in zip(shares[method], shares["oracle"], strict=True))
    assert found.recall["oracle"] == pytest.approx([1.0] * N_LAYERS)
    assert found.captured["indexer"] != found.captured["random"]


def test_mass_is_what_brute_force_finds(models: dict[str, Llama], ids: list[int]) -> None:
    """From the attention of single heads, the indexers' formula, and sets of positions."""
    found = attention_mass(models, ids, 40)
    rows = judged_rows(LENGTH, TOP_K, 40)
    assert rows[0] >= TOP_K
    assert rows[-1] == LENGTH - 1
    rope = models["indexer"].rope(torch.arange(LENGTH))
    for i, (x, _) in enumerate(dense_layers(models["dense"], ids, rows)):
        layer = cast(DecoderLayer, models["indexer"].layers[i])
        q, k, _ = layer.attn.qkv(x, rope.attention)
        indexer = cast(Any, layer.attn.indexer)
        index_q, weights = indexer.query(x, x, rope.indexer)
        index_k = indexer.key(x, rope.indexer)
        sums = dict.fromkeys(("oracle", "indexer", "recent", "beside", "recall"), 0.0)
        for row in rows.tolist():
            per_head = [torch.softmax(q[row, h] @ k[: row + 1, h // 3].T * 8**-0.5, -1) for h in range(6)]
            p = torch.stack(per_head).mean(0).tolist()
            scores = (weights[row] @ (index_q[row] @ index_k[: row + 1].T).relu()).tolist()
            best = set(sorted(range(row + 1), key=lambda s, p=p: -p[s])[:TOP_K])  # type: ignore[misc]
            chosen = set(sorted(range(row + 1), key=lambda s, scores=scores: -scores[s])[:TOP_K])  # type: ignore[misc]
            window = {*range(4), *range(row + 5 - TOP_K, row + 1)}
            sums["oracle"] += sum(p[s] for s in best)
            sums["indexer"] += sum(p[s] for s in chosen)
            sums["recent"] += sum(p[s] for s in window)
            sums["beside"] += sum(p[s] for s in chosen - {0}) / (1 - p[0])
            sums["recall"] += len(best & chosen) / TOP_K
        for method in ("oracle", "indexer", "recent"):
            assert found.captured[method][i] == pytest.approx(sums[method] / len(rows), abs=1e-4)
        assert found.beside_sink["indexer"][i] == pytest.approx(sums["beside"] / len(rows), abs=1e-4)
        assert found.recall["indexer"][i] == pytest.approx(sums["recall"] / len(rows), abs=1e-4)


def test_scores_are_those_that_a_run_selects_by(models: dict[str, Llama], ids: list[int]) -> None:
    """In the first layer, whose input no selection has touched."""
    model = models["indexer"]
    layer = cast(DecoderLayer, model.layers[0])
    with torch.inference_mode():
        x = layer.attn_norm(model.embed(torch.tensor(ids)))
    assert layer.attn.indexer is not None
    rope, rows = model.rope(torch.arange(LENGTH)).indexer, torch.arange(40, 60)
    scores = scores_of(layer.attn.indexer, x, rope, rows)
    assert bool((scores[0, 41:] == -torch.inf).all())
    assert tied_rows(scores, TOP_K) == 0
    scores[3] = 0.0
    assert tied_rows(scores, TOP_K) == 1


def test_all_keys_have_all_attention(models: dict[str, Llama], ids: list[int]) -> None:
    rows = judged_rows(LENGTH, TOP_K, 40)
    for _, attention in dense_layers(models["dense"], ids, rows):
        everything = mass_on(attention, torch.arange(LENGTH).expand(len(rows), LENGTH))
        torch.testing.assert_close(everything, torch.ones(len(rows)))


def test_a_selection_of_everything_predicts_as_the_dense_model(checkpoint: Path, ids: list[int]) -> None:
    for top_k, alike in ((LENGTH, True), (TOP_K, False)):
        of = {method: read(model, ids, 0).nats for method, model in variants(_llama(checkpoint, top_k), 0).items()}
        for method in METHODS:
            assert (of[method] == pytest.approx(of["dense"], rel=1e-5)) == alike


def _llama(checkpoint: Path, top_k: int) -> Llama:
    return cast(Llama, load(checkpoint, top_k).model)


def test_predictions_are_those_of_the_second_half(checkpoint: Path, models: dict[str, Llama], ids: list[int]) -> None:
    theirs = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs.eval()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits[0]
    half = LENGTH // 2
    expected = torch.nn.functional.cross_entropy(logits[half - 1 : -1], torch.tensor(ids[half:]), reduction="sum")
    found = read(models["dense"], ids, 0)
    assert found.nats == pytest.approx(float(expected), rel=1e-5)
    assert found.predictions == half
    assert not found.captured


def test_the_first_layer_of_a_sparse_model_captures_what_the_dense_states_do(
    models: dict[str, Llama], ids: list[int]
) -> None:
    """What it sees no selection has touched; further layers see something else."""
    expected = attention_mass(models, ids, 40).captured
    for method in METHODS:
        found = read(models[method], ids, 40).captured
        assert found[0] == pytest.approx(expected[method][0], abs=1e-4)
        assert found[1:] != pytest.approx(expected[method][1:], abs=1e-4)


def chosen_at_random(steps: int) -> Tensor:
    draw = random.Random(1)
    return torch.tensor([sorted(draw.sample(range(100), 12)) for _ in range(steps)])


@pytest.mark.parametrize("block", [1, 7, 16, 64, 128])
def test_jaccard_is_that_of_the_sets(block: int) -> None:
    chosen = chosen_at_random(9)
    sets = [{position // block for position in row} for row in chosen.tolist()]
    expected = [len(a & b) / len(a | b) for a, b in pairwise(sets)]
    assert step_jaccard(chosen, 100, block) == pytest.approx(sum(expected) / len(expected))


def test_a_window_moves_by_a_token_a_step(models: dict[str, Llama], ids: list[int]) -> None:
    found = read(models["recent"], ids, 20).jaccard
    assert found[1] == pytest.approx([(TOP_K - 1) / (TOP_K + 1)] * N_LAYERS)
    assert set(found) == set(BLOCKS)


def test_a_text_must_be_longer_than_what_is_selected() -> None:
    with pytest.raises(InputError, match="too short to select 100"):
        judged_rows(100 + STEPS, 100, 10)


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> dict[str, Any]:
    line = "--lengths 256 --sparse-lengths 768 --texts 3 --sparse-texts 2 --items 3 --compare-items 1 --rows 20"
    return evaluate(load(checkpoint), works(), Console(stderr=io.StringIO()), parse_options(line.split()))


def test_the_tables_show_what_the_json_has(result: dict[str, Any]) -> None:
    written = json.loads(json.dumps(result))
    assert set(written) == {"about", "mass", "ties", "perplexity", "jaccard", "needles", "checks"}
    out = io.StringIO()
    for table in tables(result):
        Terminal(file=out, width=160).print(table)
    shown = out.getvalue()
    mass = written["mass"]["256"]
    assert set(mass["kinds"]) == {"prose", "code", "docs"}
    for shares in (mass["captured"], mass["beside_sink"], mass["recall"], *mass["kinds"].values()):
        assert all(f"{shares[method]:.1%}" in shown for method in METHODS)
    assert all(f"{share:.1%}" in shown for layers in mass["layers"].values() for share in layers)
    for of in written["perplexity"]["768"].values():
        assert f"{of['perplexity']:.3f}" in shown
    for of in written["jaccard"]["768"].values():
        assert all(f"{of[str(block)]:.3f}" in shown for block in BLOCKS)
    assert {method: of["items"] for method, of in written["needles"]["768"].items()} == {
        "dense": 3,
        "indexer": 3,
        "oracle": 1,
        "recent": 1,
    }
    assert all(check["what"] in shown for check in written["checks"])


def test_the_same_seed_gives_the_same_figures(checkpoint: Path) -> None:
    line = "--parts mass,perplexity --lengths 256 --sparse-lengths 256 --texts 1 --sparse-texts 1 --rows 8"
    options = parse_options(line.split())
    first, second = (evaluate(load(checkpoint), works(), Console(stderr=io.StringIO()), options) for _ in range(2))
    assert first == second
    assert set(first) == {"about", "mass", "perplexity", "checks"}


def test_what_must_be_reached() -> None:
    figures = {
        "mass": {4096: {"captured": {"indexer": 0.89}}, 1024: {"captured": {"indexer": 0.1}}},
        "ties": {4096: {"share": 0.0004}},
        "perplexity": {4096: {"indexer": {"ratio": 1.04}}},
        "needles": {
            4096: {"dense": {"found": 11}, "indexer": {"found": 10, "items": 12}},
            8192: {"dense": {"found": 11}, "indexer": {"found": 9, "items": 12}},
        },
    }
    assert [(check["what"], check["passed"]) for check in checks(figures)] == [
        ("attention mass at 4096", False),
        ("queries with a tie at 4096", True),
        ("perplexity at 4096 over dense", True),
        ("needles found at 4096", True),
        ("needles found at 8192", False),
    ]


def test_an_unknown_part_and_a_missing_indexer_are_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--parts", "mass,speed"])
    assert "no part speed" in capsys.readouterr().err
    assert main(["--ckpt-path", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert "comes without indexers" in said
    assert [line.split(":")[0] for line in said.splitlines()] == ["error", "hint"]
