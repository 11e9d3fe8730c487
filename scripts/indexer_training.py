"""Lightning indexers for a frozen Llama: what they learn from, their loss, and a training that can go on after a stop.

The loss is the dense warm-up of DeepSeek-V3.2: KL(p || softmax(I)) where p is the attention of a query summed over the
heads and normalised, and I are the index scores. Much of p lies on token 0, whatever the query, so that the same
divergence without token 0 is added: the rest of the attention is what the indexers have to tell apart.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsakv.errors import InputError
from dsakv.kernels import reference
from dsakv.models.contracts import Turn
from dsakv.models.indexer import Indexer, IndexerShape
from dsakv.models.layers import RotaryEmbedding
from dsakv.models.llama import DecoderLayer, Llama
from dsakv.models.options import ModelOptions

HIDDEN = -1e9
"""Score of a key that a query must not see: finite, as 0 * -inf is no number."""

ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of a parameter."""

ChunkSource = Callable[[int], list[int]]
"""Token ids of chunk ``i`` of the training, the same ones each time."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the trained weights depend on besides base model and texts."""

    steps: int = 720
    seed: int = 0
    lr: float = 6e-3
    warmup: int = 20
    """Steps in which the learning rate rises linearly; it falls to ``final_lr`` of itself along a cosine after."""
    final_lr: float = 0.02
    ema: float = 0.98
    rows: int = 256
    """Queries that are learnt from in a chunk."""
    last_rows: int = 24
    """Of these the chunk's last ones: where the answers of a question behind a long text are."""
    ring: int = 36
    """Last chunks that replays choose from."""
    replays: int = 2
    """Behind each fresh chunk: running the model costs several times as much as a step of the indexers."""

    @property
    def chunks(self) -> int:
        """Chunks of the whole training."""
        return -(-self.steps // (1 + self.replays))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))

    def chunk_of(self, step: int) -> int:
        """The chunk that a step learns from: a fresh one, or the replay of one of the ring."""
        newest, replay = divmod(step, 1 + self.replays)
        if replay == 0 or newest == 0:
            return newest
        return random.Random(f"{self.seed}/replay/{step}").randrange(max(0, newest - self.ring + 1), newest)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One text as the indexers see it; lists have one tensor a layer."""

    inputs: list[Tensor]
    """Normed hidden states ``[T, dim]``."""
    attention: list[Tensor]
    """Of ``rows``, the mean over the heads ``[R, T]``."""
    rows: Tensor
    """Positions ``[R]`` of the queries, ascending."""


def fresh_indexers(model: Llama, shape: IndexerShape, seed: int) -> list[Indexer]:
    """One for each layer, in float32, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    indexers = []
    for _ in range(model.shape.n_layers):
        indexer = Indexer(shape, ModelOptions()).to_empty(device="cpu")
        for name, parameter in indexer.named_parameters():
            if name.startswith("k_norm"):
                nn.init.constant_(parameter, float(name.endswith("weight")))
            else:
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        indexers.append(indexer)
    return indexers


def observe(model: Llama, ids: list[int], rows: Tensor, dtype: torch.dtype = torch.bfloat16) -> Chunk:
    """Run the model densely over ``ids``; attention is kept as ``dtype``."""
    inputs, attention = [], []
    for x, shares in dense_layers(model, ids, rows):
        inputs.append(x)
        attention.append(shares.to(dtype))
    return Chunk(inputs, attention, rows)


@torch.no_grad()
def dense_layers(model: Llama, ids: list[int], rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the model densely over ``ids``, a layer at a time.

    Yields each layer's normed input ``[T, dim]``, and the attention ``[R, T]`` float32 of ``rows``.
    """
    rope = model.rope(torch.arange(len(ids)))
    hidden = model.embed(torch.tensor(ids))  # [T, dim]
    for i, layer in enumerate(cast(list[DecoderLayer], model.layers)):
        x = layer.attn_norm(hidden)
        q, k, v = layer.attn.qkv(x, rope.attention)  # [T, H, d], [T, G, d], [T, G, d]
        yield x, attention_of(q[rows], k, rows)
        if i + 1 < len(model.layers):
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
            q, k, v = (each.transpose(0, 1).contiguous()[None] for each in (q, k, v))  # [1, H, T, d]
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]  # [H, T, d]
            [hidden] = layer.feed([hidden + layer.attn.wo(mixed.transpose(0, 1).flatten(1))])


def attention_of(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Attention ``[R, T]`` float32 of the queries ``q`` ``[R, H, d]`` at ``rows``, the mean over the heads."""
    shares = torch.empty(len(rows), len(k))
    later = _unseen(rows, len(k))
    reference.attention_shares(q, k, q.shape[-1] ** -0.5, lambda logits: logits.masked_fill_(later, -torch.inf), shares)
    return shares / q.shape[1]


def index_scores(indexer: Indexer, x: Tensor, rope: Turn, rows: Tensor) -> Tensor:
    """Scores ``[R, T]`` of the queries at ``rows`` for all keys, ``HIDDEN`` for later ones. ``x`` ``[T, dim]``."""
    key = indexer.key(x, rope)  # [T, D]
    q, weights = indexer.query(x[rows], x[rows], (rope[0][rows], rope[1][rows]))  # [R, H, D], [R, H]
    dots = (q.flatten(0, 1) @ key.t()).view(len(rows), -1, len(key))  # [R, H, T]
    scores = torch.bmm(weights.unsqueeze(1), dots.relu()).squeeze(1)  # [R, T]
    return scores.masked_fill(_unseen(rows, len(key)), HIDDEN)


def divergence(scores: Tensor, attention: Tensor) -> Tensor:
    """Mean over the rows of KL(p || softmax(scores)), with token 0 and without it, summed, in nats."""
    p = attention.float()
    p = p / p.sum(-1, keepdim=True)
    rest = p.clone()
    rest[:, 0] = 0
    rest = rest / rest.sum(-1, keepdim=True)
    log_q = scores.log_softmax(-1)
    cross = -((p + rest) * log_q).sum(-1) + torch.log1p(-log_q[:, 0].exp().clamp(max=1 - 1e-6))
    entropy = -(torch.xlogy(p, p) + torch.xlogy(rest, rest)).sum(-1)
    return (cross - entropy).mean()


def _unseen(rows: Tensor, length: int) -> Tensor:
    return torch.arange(length) > rows.unsqueeze(1)  # [R, T]


def choose_rows(recipe: Recipe, length: int, index: int) -> Tensor:
    """Ascending positions of the queries that are learnt from: spread evenly, each at a random place of its part.

    The first sixteenth is left out: it sees few keys, and short contexts are not selected from.
    """
    draw = random.Random(f"{recipe.seed}/rows/{index}")
    first, last = max(1, length // 16), length - min(recipe.last_rows, length // 4)
    n = min(recipe.rows - (length - last), last - first)
    parts = (range(first + (last - first) * i // n, first + (last - first) * (i + 1) // n) for i in range(n))
    return torch.tensor([*(draw.choice(part) for part in parts), *range(last, length)])


def captured_mass(indexers: list[Indexer], turn: RotaryEmbedding, chunk: Chunk, k: int) -> list[float]:
    """Share of the attention on the ``k`` best-scored keys, one a layer; mean over the rows that have more keys."""
    rope = turn(torch.arange(len(chunk.inputs[0])))
    wide = chunk.rows >= k
    shares = []
    with torch.no_grad():
        for indexer, x, attention in zip(indexers, chunk.inputs, chunk.attention, strict=True):
            chosen = index_scores(indexer, x.float(), rope, chunk.rows[wide]).topk(k, dim=-1).indices
            shares.append(float(mass_on(attention[wide].float(), chosen).mean()))
    return shares


def mass_on(attention: Tensor, chosen: Tensor) -> Tensor:
    """Share ``[R]`` of the attention ``[R, T]`` on the tokens ``chosen`` ``[R, K]``."""
    return attention.gather(1, chosen).sum(-1)


class Training:
    """The indexers of all layers with optimizer and moving average; ``save`` and ``load`` let it go on."""

    def __init__(
        self,
        model: Llama,
        indexers: list[Indexer],
        turn: RotaryEmbedding,
        recipe: Recipe,
        chunks: ChunkSource,
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``turn`` is the indexers' RoPE; ``model`` is dense; ``about`` names what else a state must agree with."""
        settings = {"recipe": asdict(recipe), "indexer": asdict(indexers[0].shape), **about}
        self._settings = json.dumps(settings, sort_keys=True)
        self.model, self.indexers, self.turn, self.recipe, self.chunks = model, indexers, turn, recipe, chunks
        self.step = 0
        self.tokens = 0
        """Fresh tokens seen."""
        self._parameters = [each for indexer in indexers for each in indexer.parameters()]
        self._average = [each.detach().clone() for each in self._parameters]
        self._optimizer = torch.optim.Adam(self._parameters, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
        self._seen: dict[int, Chunk] = {}

    def run(self) -> Iterator[float]:
        """Do the steps that are left; each yields its loss, the mean over the layers."""
        while self.step < self.recipe.steps:
            yield self._one_step()

    def _one_step(self) -> float:
        index = self.recipe.chunk_of(self.step)
        chunk = self._chunk(index)
        length = len(chunk.inputs[0])
        if self.step % (1 + self.recipe.replays) == 0:
            self.tokens += length
        rope = self.turn(torch.arange(length))
        self._optimizer.zero_grad()
        total = 0.0
        for indexer, x, attention in zip(self.indexers, chunk.inputs, chunk.attention, strict=True):
            loss = divergence(index_scores(indexer, x.float(), rope, chunk.rows), attention)
            loss.backward()
            total += loss.item()
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self._optimizer.step()
        torch._foreach_lerp_(self._average, [each.detach() for each in self._parameters], 1 - self.recipe.ema)
        self.step += 1
        return total / len(self.indexers)

    def _chunk(self, index: int) -> Chunk:
        """From the ring, else computed: after a resume the ring fills again as replays ask for its chunks."""
        if index not in self._seen:
            for old in [each for each in self._seen if each <= index - self.recipe.ring]:
                del self._seen[old]
            ids = self.chunks(index)
            self._seen[index] = observe(self.model, ids, choose_rows(self.recipe, len(ids), index))
        return self._seen[index]

    def swap_average(self) -> None:
        """Exchange the parameters with their moving averages, which is what is measured and kept; twice is none."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._average, strict=True):
                parameter.data, average.data = average.data, parameter.data

    def save(self, path: Path) -> None:
        """Write all that ``load`` needs, in one move, so that a kill leaves the old file or the new one."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, average) in enumerate(zip(self._parameters, self._average, strict=True)):
            tensors |= {f"parameter.{i}": parameter.detach(), f"average.{i}": average}
            tensors |= {f"{key}.{i}": value for key, value in self._optimizer.state[parameter].items()}
        about = {"settings": self._settings, "step": str(self.step), "tokens": str(self.tokens)}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata=about)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on where ``save`` was; raises InputError for a damaged state, or one of another training."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read: {error}", "delete it to begin anew") from error
        if about.get("settings") != self._settings:
            raise InputError(
                f"{path} is of a training with other settings: {about.get('settings')}", "give those, or delete it"
            )
        self.step, self.tokens = int(about["step"]), int(about["tokens"])
        with torch.no_grad():
            for i, (parameter, average) in enumerate(zip(self._parameters, self._average, strict=True)):
                parameter.copy_(tensors[f"parameter.{i}"])
                average.copy_(tensors[f"average.{i}"])
                moments = {key: tensors[f"{key}.{i}"] for key in ADAM if f"{key}.{i}" in tensors}
                if moments:  # none before the first step
                    self._optimizer.state[parameter] = moments
