"""Indexers of a tiny model learn, a stopped training ends like one that was not, and texts depend on the seed alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dsakv.errors import InputError
from dsakv.models.indexer import IndexerShape
from dsakv.models.layers import RotaryEmbedding
from dsakv.models.llama import Learned, Llama
from dsakv.models.llama_shape import LlamaShape
from dsakv.models.options import ModelOptions
from dsakv.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from dsakv.weights.indexer_file import IndexerFile, read_indexer_file, write_indexers
from scripts.indexer_training import (
    HIDDEN,
    Recipe,
    Training,
    attention_of,
    captured_mass,
    choose_rows,
    divergence,
    fresh_indexers,
    index_scores,
    observe,
)
from scripts.made_up_texts import about_functions
from scripts.train_indexer import THETA, named
from scripts.training_sources import Kind, Package, Work, as_markdown, fetch
from scripts.training_texts import KINDS, Texts, TrainingTexts

RECIPE = Recipe(steps=12, rows=48, last_rows=4, ring=3, warmup=2)
INDEXER = IndexerShape(dim=32, query_dim=32, n_heads=4, head_dim=16, rope_dim=8, top_k=16)
TURN = RotaryEmbedding(INDEXER.rope_dim, THETA, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def model() -> Llama:
    shape = LlamaShape(
        vocab_size=64,
        dim=32,
        inter_dim=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_theta=10000.0,
        scaling=None,
        tied=True,
        max_seq_len=256,
    )
    made = Llama(shape, ModelOptions()).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:  # wide enough for an attention with something to learn
            nn.init.normal_(parameter, std=1.3 * parameter.shape[1] ** -0.5, generator=generator)
    return made


def chunk(index: int) -> list[int]:
    draw = random.Random(index)
    return [draw.randrange(64) for _ in range(96)]


def training_of(model: Llama, recipe: Recipe = RECIPE) -> Training:
    return Training(model, fresh_indexers(model, INDEXER, 0), TURN, recipe, chunk)


def weights(training: Training) -> dict[str, Tensor]:
    training.swap_average()
    return {
        f"{i}.{name}": value for i, each in enumerate(training.indexers) for name, value in each.state_dict().items()
    }


def test_a_training_lowers_the_loss_and_captures_more(model: Llama) -> None:
    training = training_of(model, replace(RECIPE, steps=90))
    probe = observe(model, chunk(99), torch.arange(16, 96), torch.float32)
    before = sum(captured_mass(training.indexers, TURN, probe, 16))
    losses = list(training.run())
    assert len(losses) == 90
    assert sum(losses[-12:]) < 0.92 * sum(losses[:12])
    training.swap_average()
    assert sum(captured_mass(training.indexers, TURN, probe, 16)) > before + 0.15
    assert training.tokens == 30 * 96


def test_a_stopped_training_ends_with_the_same_bits(model: Llama, tmp_path: Path) -> None:
    whole = training_of(model)
    list(whole.run())
    first = training_of(model)
    for _ in zip(range(7), first.run(), strict=False):
        pass
    first.save(tmp_path / "state.safetensors")
    second = training_of(model)
    second.load(tmp_path / "state.safetensors")
    assert second.step == first.step
    list(second.run())
    expected = weights(whole)
    assert all(value.equal(expected[name]) for name, value in weights(second).items())


def test_a_state_of_other_settings_is_refused(model: Llama, tmp_path: Path) -> None:
    training_of(model).save(tmp_path / "state.safetensors")
    other = Training(model, fresh_indexers(model, INDEXER, 0), TURN, Recipe(steps=13), chunk)
    with pytest.raises(InputError, match="other settings"):
        other.load(tmp_path / "state.safetensors")


@torch.no_grad()
def test_scores_are_those_of_the_formula(model: Llama) -> None:
    indexer = fresh_indexers(model, INDEXER, 1)[0]
    x, rows = torch.randn(10, 32, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 9])
    scores = index_scores(indexer, x, TURN(torch.arange(10)), rows)
    q, weight = indexer.query(x, x, TURN(torch.arange(10)))
    key = indexer.key(x, TURN(torch.arange(10)))
    for i, row in enumerate(rows.tolist()):
        expected = [sum(float(weight[row, h] * (q[row, h] @ key[s]).relu()) for h in range(4)) for s in range(row + 1)]
        torch.testing.assert_close(scores[i, : row + 1], torch.tensor(expected))
        assert bool((scores[i, row + 1 :] == HIDDEN).all())


def test_attention_is_the_mean_over_heads_of_each_query() -> None:
    draw = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 4, 8, generator=draw), torch.randn(6, 2, 8, generator=draw)
    rows = torch.tensor([2, 5])
    attention = attention_of(q, k, rows)
    for i, row in enumerate(rows.tolist()):
        shares = [torch.softmax(q[i, h] @ k[: row + 1, h // 2].T * 8**-0.5, -1) for h in range(4)]
        torch.testing.assert_close(attention[i, : row + 1], torch.stack(shares).mean(0))
        assert not attention[i, row + 1 :].any()


def test_the_divergence_is_zero_for_the_attention_itself_and_counts_both_parts() -> None:
    attention = torch.tensor([[0.7, 0.1, 0.2]])
    assert float(divergence(attention.log(), attention)) == pytest.approx(0, abs=1e-6)
    scores = torch.tensor([[0.5, -1.0, 0.3]])
    both = 0.0
    for p, s in ((attention, scores), (attention[:, 1:] / 0.3, scores[:, 1:])):
        both += float((p * (p.log() - s.log_softmax(-1))).sum())
    assert float(divergence(scores, attention)) == pytest.approx(both, rel=1e-5)


def test_rows_are_spread_and_hold_the_last_ones() -> None:
    rows = choose_rows(Recipe(rows=64, last_rows=8), 1024, 5).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == 64
    assert rows[-8:] == list(range(1016, 1024))
    assert rows[0] >= 64
    assert rows == choose_rows(Recipe(rows=64, last_rows=8), 1024, 5).tolist()


def test_replays_are_of_the_ring() -> None:
    recipe = Recipe(steps=60, ring=4)
    for step in range(60):
        newest = step // 3
        used = recipe.chunk_of(step)
        assert used == newest if step % 3 == 0 else max(0, newest - 3) <= used <= newest
    assert recipe.rate(19) == pytest.approx(recipe.lr)
    assert recipe.rate(59) < 0.05 * recipe.lr


def test_the_file_is_one_that_the_model_takes(model: Llama, tmp_path: Path) -> None:
    path = tmp_path / "indexer.safetensors"
    write_indexers(path, named(fresh_indexers(model, INDEXER, 0)), IndexerFile(INDEXER, THETA, "tiny"))
    assert read_indexer_file(path, n_layers=2, dim=32) == IndexerFile(INDEXER, THETA, "tiny")
    selecting = Llama(model.shape, ModelOptions(), Learned(INDEXER, THETA))
    expected = {name for name, _ in selecting.named_parameters() if ".indexer." in name}
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == expected
        assert {file.get_tensor(name).dtype for name in expected} == {torch.bfloat16}


CODE = '''
def area(width, height):
    """The area of a rectangle of the given width and the given height, in square metres."""
    return width * height
'''


def works() -> list[Work]:
    made = []
    for held_out in (False, True):
        for kind, text in _texts(held_out):
            made += [Work(f"{kind} {i}", kind, "made up", "none", held_out, text * 40) for i in range(2)]
    return made


def _texts(held_out: bool) -> list[tuple[Kind, str]]:
    word = "Winter" if held_out else "Summer"
    prose = f"{word} came late. The fields were full of people who had come from the town to see it.\n\n"
    return [("prose", prose), ("code", f"{CODE}# {word}\n"), ("docs", f'"{word}"\n\nA season of the year.\n\n')]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_depend_on_the_seed_alone_and_held_out_works_stay_out(tokenizer: Tokenizer, kind: str) -> None:
    trained, again, held = (Texts(tokenizer, works(), held_out, 3) for held_out in (False, False, True))
    ids = trained.text(kind, 4096, 7).ids
    assert 1024 < len(ids) <= 4096
    assert ids == again.text(kind, 4096, 7).ids
    assert ids != trained.text(kind, 4096, 8).ids
    assert "Winter" not in tokenizer.decode(ids)
    assert "Summer" not in tokenizer.decode(held.text(kind, 4096, 7).ids)


def test_longer_chunks_come_late_and_in_their_shares(tokenizer: Tokenizer) -> None:
    chunks = TrainingTexts(Texts(tokenizer, works(), False, 0), 100)
    lengths = [chunks.length(i) for i in range(100)]
    assert set(lengths[:40]) == {2048}
    assert lengths.count(4096) == 12
    assert lengths.count(8192) == 3


def test_the_list_of_texts_names_sources_and_licences() -> None:
    listed = as_markdown(works())
    trained, held = listed.split("## Held out")
    assert "| prose | made up | none |" in trained
    assert "| prose | made up | none |" in held
    assert about_functions(CODE)[0][0] == "What does the Python function `area` do?"


def test_a_package_that_is_another_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(b"something else")
    with pytest.raises(InputError, match="is not the npm a"):
        fetch(Package("a.tgz", ("npm", "pack", "a"), "0" * 64, "npm a", "MIT"), tmp_path)


def test_a_missing_client_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no-such-client is needed"):
        fetch(Package("b.tgz", ("no-such-client", "pack", "b"), "0" * 64, "npm b", "MIT"), tmp_path)
