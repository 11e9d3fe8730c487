"""How well the tokens that a Llama selects stand for all of them: attention mass, perplexity, steadiness.

What is true is the model's own dense attention. A selection of k tokens captures the share of it that lies on them;
the oracle, which takes the k largest shares, is the most that any selection captures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dsakv.errors import InputError
from dsakv.kernels import reference
from dsakv.kv.paged import PagedCache, StepCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Turn
from dsakv.models.indexer import Indexer
from dsakv.models.llama import DecoderLayer, Learned, Llama, Oracle, Recent, Selecting
from dsakv.models.options import ModelOptions
from dsakv.models.selection import select_recent
from scripts.indexer_training import attention_of, dense_layers, fresh_indexers, mass_on

METHODS = ("indexer", "oracle", "recent", "random")
"""``recent`` is a window with the first tokens, ``random`` an indexer of random weights."""
BLOCKS = (1, 16, 64)
"""Tokens of the blocks that steps are compared by."""
STEPS = 64
"""Decode steps that are compared, each with the one before."""
LAST_ROWS = 16
"""Queries at the end of a text that always count: where the answers of a question behind a long text are."""
LOGIT_ROWS = 512


def variants(model: Llama, seed: int) -> dict[str, Llama]:
    """The model, which has indexers, as ``dense`` one and with every method; all share its weights."""
    own = cast(DecoderLayer, model.layers[0]).attn.selecting
    assert isinstance(own, Learned)
    weights = model.state_dict()
    drawn = {
        f"layers.{i}.attn.indexer.{name}": value.to(weights[f"layers.{i}.attn.indexer.{name}"].dtype)
        for i, indexer in enumerate(fresh_indexers(model, own.shape, seed))
        for name, value in indexer.state_dict().items()
    }
    return {
        "dense": _sharing(model, weights, None),
        "indexer": model,
        "oracle": _sharing(model, weights, Oracle(own.top_k)),
        "recent": _sharing(model, weights, Recent(own.top_k)),
        "random": _sharing(model, weights | drawn, own),
    }


def _sharing(model: Llama, weights: Mapping[str, Tensor], selecting: Selecting | None) -> Llama:
    made = Llama(model.shape, ModelOptions(model.dtype, model.device), selecting)
    made.load_state_dict({name: weights[name] for name in made.state_dict()}, assign=True)
    made.max_seq_len = model.max_seq_len
    return made


def judged_rows(length: int, k: int, count: int) -> Tensor:
    """About ``count`` queries of a text that have more than ``k`` keys, evenly spread, and the last ones; ascending."""
    if length <= k + STEPS:
        raise InputError(
            f"a text of {length} tokens is too short to select {k} of them", "use longer --lengths, or fewer tokens"
        )
    spread = torch.linspace(k, length - 1, count).long()
    rows: Tensor = torch.cat((spread, torch.arange(max(k, length - LAST_ROWS), length))).unique()
    return rows


@torch.no_grad()
def scores_of(indexer: Indexer, x: Tensor, rope: Turn, rows: Tensor) -> Tensor:
    """Scores ``[R, T]`` of the queries ``rows`` as a run computes them, ``-inf`` for later keys. ``x`` ``[T, dim]``."""
    q, weights = indexer.query(x[rows], x[rows], (rope[0][rows], rope[1][rows]))
    scores = torch.empty(len(rows), len(x))
    indexer.kernels.index_scores(q, weights, indexer.key(x, rope), None, scores)
    return scores.masked_fill_(torch.arange(len(x)) > rows.unsqueeze(1), -torch.inf)


def tied_rows(scores: Tensor, k: int) -> int:
    """Rows whose k-th and next best score are equal, so that not the scores decide what is selected."""
    best = scores.topk(k + 1, dim=-1).values
    return int((best[:, k - 1] == best[:, k]).sum())


@dataclass(slots=True)
class Mass:
    """Shares of one text, mean over its rows; lists have one figure a layer."""

    captured: dict[str, list[float]]
    """By method."""
    beside_sink: dict[str, list[float]]
    """Of the attention that is not on token 0."""
    recall: dict[str, list[float]]
    """Share of the oracle's tokens."""
    rows: int
    """Queries, of which each layer has as many."""
    tied: list[int]
    """Of these, by layer, those whose k-th and next best score of the indexer are equal."""


def attention_mass(models: Mapping[str, Llama], ids: list[int], count: int) -> Mass:
    """What every method selects of a text for about ``count`` queries, where all layers see what the dense model has.

    Layers come one after the other, so that memory holds the attention of one.
    """
    k = models["indexer"].top_k
    rows = judged_rows(len(ids), k, count)
    rope = models["indexer"].rope(torch.arange(len(ids))).indexer
    window = select_recent(rows, _one_step(models["dense"], len(ids)).layer(0), k).positions
    captured, beside_sink, recall = ({method: list[float]() for method in METHODS} for _ in range(3))
    tied = []
    for i, (x, attention) in enumerate(dense_layers(models["dense"], ids, rows)):
        chosen = {"oracle": reference.top_k(attention, k), "recent": window}
        for method in ("indexer", "random"):
            indexer = cast(DecoderLayer, models[method].layers[i]).attn.indexer
            assert indexer is not None
            scores = scores_of(indexer, x, rope, rows)
            chosen[method] = reference.top_k(scores, k)
            if method == "indexer":
                tied.append(tied_rows(scores, k))
        rest = attention.clone()
        rest[:, 0] = 0
        rest /= rest.sum(-1, keepdim=True)
        best = torch.zeros(attention.shape).scatter_(1, chosen["oracle"], 1 / k)
        for method in METHODS:
            for kind, of in ((captured, attention), (beside_sink, rest), (recall, best)):
                kind[method].append(float(mass_on(of, chosen[method]).mean()))
    return Mass(captured, beside_sink, recall, len(rows), tied)


@dataclass(slots=True)
class Reading:
    """What came of reading one text; lists have one figure a layer, and none of the dense model."""

    nats: float
    """Sum over the predictions of minus the log of what the text's own next token got."""
    predictions: int
    jaccard: dict[int, list[float]]
    """By block, mean over the last steps."""
    captured: list[float]
    """Of the attention over this model's own states."""


@torch.inference_mode()
def read(model: Llama, ids: list[int], count: int) -> Reading:
    """Read a text as a prompt is read, and predict the tokens of its second half.

    The last queries are what decode steps would be that are forced to this text. Mass is of about ``count`` queries;
    0 measures the predictions alone.
    """
    step = _one_step(model, len(ids))
    rope = model.rope(step.positions)
    rows = judged_rows(len(ids), model.top_k, count) if count else None
    jaccard: dict[int, list[float]] = {block: [] for block in BLOCKS}
    captured = []
    hidden = model.embed(torch.tensor(ids))  # [T, dim]
    for layer in cast(list[DecoderLayer], model.layers):
        out = layer(hidden, rope, step.positions, step.layer(0))
        if out.selection is not None and rows is not None:
            chosen = out.selection.positions
            for block in BLOCKS:
                jaccard[block].append(step_jaccard(chosen[-STEPS - 1 :], len(ids), block))
            q, keys, _ = layer.attn.qkv(layer.attn_norm(hidden), rope.attention)
            captured.append(float(mass_on(attention_of(q[rows], keys, rows), chosen[rows]).mean()))
        hidden = out.hidden
    nats, first = 0.0, len(ids) // 2
    for start in range(first, len(ids), LOGIT_ROWS):  # logits of a whole text would be the largest tensor by far
        targets = torch.tensor(ids[start : start + LOGIT_ROWS])
        logits = model.logits(hidden[start - 1 : start - 1 + len(targets)])  # [t, vocab]
        nats += float(F.cross_entropy(logits, targets, reduction="sum"))
    return Reading(nats, len(ids) - first, jaccard, captured)


def _one_step(model: Llama, length: int) -> StepCache:
    """The cache of a single layer at a time: what one has read no other needs."""
    numbers: dict[str, Any] = {"row_dim": model.kv_row_dim, "index_dim": model.index_key_dim, "dtype": model.dtype}
    cache = PagedCache(n_layers=1, n_blocks=1, block_size=length, device=model.device, **numbers)
    return cache.bind([Span(BlockTable([0], model.device), 0, length)], decode=False)


def step_jaccard(chosen: Tensor, length: int, block: int) -> float:
    """Mean over the steps of |A and B| / |A or B|, where A and B are the blocks that a step and the one before select.

    ``chosen`` ``[steps + 1, K]`` positions below ``length``.
    """
    held = torch.zeros(len(chosen), -(-length // block), dtype=torch.bool).scatter_(1, chosen // block, True)
    both, either = (held[1:] & held[:-1]).sum(-1), (held[1:] | held[:-1]).sum(-1)
    return float((both / either).mean())
