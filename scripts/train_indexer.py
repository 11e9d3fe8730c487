"""Train a lightning indexer for every layer of a Llama model, which itself stays as it is.

The model runs densely over texts, and each indexer learns to rank tokens as the layer's own attention does (the dense
warm-up of DeepSeek-V3.2). On two cores SmolLM2-135M-Instruct takes about 35 minutes. A training that was
stopped goes on where its last state was written, and gives the same weights as one that was not.

    python -m scripts.train_indexer --out outputs/indexer --minutes 45

The folder --out gets ``indexer.safetensors`` (bfloat16), ``indexer_texts.md`` with the sources of all texts and their
licences, and ``state.safetensors``, which is of no use afterwards. The texts come from packages, for which npm and
apt-get are needed once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from dsakv.threads import wait_briefly

wait_briefly(os.environ)  # before torch is imported

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from torch import Tensor  # noqa: E402

from dsakv.config import ModelConfig  # noqa: E402
from dsakv.errors import DsakvError, InputError  # noqa: E402
from dsakv.jobs.default_model import NAME as DEFAULT  # noqa: E402
from dsakv.jobs.loaded import LoadedModel  # noqa: E402
from dsakv.jobs.model import load_model  # noqa: E402
from dsakv.models.indexer import Indexer, IndexerShape  # noqa: E402
from dsakv.models.layers import RotaryEmbedding  # noqa: E402
from dsakv.models.llama import Llama  # noqa: E402
from dsakv.tokenizer import Tokenizer  # noqa: E402
from dsakv.weights.indexer_file import IndexerFile, write_indexers  # noqa: E402
from scripts.indexer_training import Chunk, Recipe, Training, captured_mass, fresh_indexers, observe  # noqa: E402
from scripts.training_sources import Work, as_markdown, load_works  # noqa: E402
from scripts.training_texts import Texts, TrainingTexts, default_folder  # noqa: E402

TOP_K = 256
THETA = 10000.0
PROBE = (("prose", 2048), ("chat", 2048), ("ruler", 4096))
SAY_EVERY = 30.0
"""Seconds between two lines where stderr is no terminal."""


def main() -> None:
    options = parse_options()
    try:
        train(options)
    except DsakvError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:
        print(f"error: {error}\nhint: --out names a folder that can be written to", file=sys.stderr)
        sys.exit(1)


def parse_options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt-path", type=Path, help=f"folder or GGUF file of a Llama model; default: {DEFAULT}")
    parser.add_argument("--base", help="name of the model for the weights' header; default: the checkpoint's")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, state and list of texts")
    parser.add_argument("--texts", type=Path, default=default_folder(), help="folder of the packages with texts")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="of the whole training")
    parser.add_argument("--minutes", type=float, help="stop after these, with the state written, if not done by then")
    parser.add_argument("--save-every", type=float, default=3.0, help="minutes between two states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=4, help="of an indexer")
    parser.add_argument("--head-dim", type=int, default=64, help="of an indexer")
    parser.add_argument("--rope-dim", type=int, default=32, help="leading dimensions that turn with the position")
    parser.add_argument("--probe-every", type=int, default=60, help="steps between two looks at held-out texts")
    return parser.parse_args()


def train(options: Any) -> None:
    begin = time.monotonic()
    out: Path = options.out
    if not (0 < options.rope_dim <= options.head_dim and options.rope_dim % 2 == 0 and options.heads > 0):
        raise InputError(f"--rope-dim {options.rope_dim} of --head-dim {options.head_dim}", "it is even and not wider")
    model, loaded = load_base(options.ckpt_path)
    tokenizer = loaded.tokenizer
    works = load_works(options.texts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "indexer_texts.md").write_text(as_markdown(works), encoding="utf-8")
    recipe = Recipe(steps=options.steps, seed=options.seed)
    shape = IndexerShape(model.shape.dim, model.shape.dim, options.heads, options.head_dim, options.rope_dim, TOP_K)
    indexers = fresh_indexers(model, shape, options.seed)
    turn = RotaryEmbedding(shape.rope_dim, THETA, None, torch.device("cpu"))
    texts = TrainingTexts(Texts(tokenizer, works, False, options.seed), recipe.chunks)
    base = options.base or (loaded.name if options.ckpt_path else DEFAULT)
    digest = hashlib.sha256("\0".join(work.text for work in works).encode()).hexdigest()
    training = Training(model, indexers, turn, recipe, texts.source, {"base": base, "texts": digest})
    state = out / "state.safetensors"
    if state.exists():
        training.load(state)
    probe = observe_probe(model, tokenizer, works)
    run(training, probe, state, begin, options)
    training.save(state)
    if training.step < recipe.steps:
        print(f"stopped at step {training.step} of {recipe.steps}; the same command goes on", file=sys.stderr)
        return
    training.swap_average()
    write_indexers(out / "indexer.safetensors", named(indexers), IndexerFile(shape, THETA, base))
    print(out / "indexer.safetensors")


def run(training: Training, probe: list[Chunk], state: Path, begin: float, options: Any) -> None:
    """Do steps until the training or its time is at an end; shows how it goes, and writes the state now and then."""
    console = Console(stderr=True)
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    started, first, tokens_before = time.monotonic(), training.step, training.tokens
    said = saved = started
    loss_mean: float | None = None
    mass = ""
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=training.recipe.steps, completed=training.step)
        for loss in training.run():
            now = time.monotonic()
            loss_mean = loss if loss_mean is None else 0.9 * loss_mean + 0.1 * loss
            last = training.step == training.recipe.steps
            if training.step % options.probe_every == 0 or last:
                mass = "  captured " + " ".join(f"{100 * share:.1f}%" for share in look(training, probe))
            speed = (training.tokens - tokens_before) / (now - started)
            line = f"loss {loss_mean:.3f}{mass}  {speed:.0f} tokens/s"
            bar.update(task, completed=training.step, description=line)
            if not console.is_terminal and (now - said > SAY_EVERY or last):
                left = (now - started) / (training.step - first) * (training.recipe.steps - training.step)
                console.print(f"step {training.step}/{training.recipe.steps}  {line}  {left / 60:.0f} min left")
                said = now
            if now - saved > 60 * options.save_every:
                training.save(state)
                saved = now
            if options.minutes and now - begin > 60 * options.minutes:
                return


def load_base(ckpt_path: Path | None) -> tuple[Llama, LoadedModel]:
    """The dense model in bfloat16. Raises InputError for what is no Llama checkpoint."""
    path = None if ckpt_path is None else str(ckpt_path)
    loaded = load_model(ModelConfig(ckpt_path=path, device="cpu", dtype="bfloat16", selection="dense"))
    assert isinstance(loaded.model, Llama), "only Llama models can be dense"
    return loaded.model, loaded


def observe_probe(model: Llama, tokenizer: Tokenizer, works: list[Work]) -> list[Chunk]:
    """One held-out text of each kind in ``PROBE``; every sixteenth query that has tokens to leave out."""
    texts = Texts(tokenizer, works, True, 0)
    chunks = []
    for kind, length in PROBE:
        ids = texts.text(kind, length, 0).ids
        chunks.append(observe(model, ids, torch.arange(TOP_K, len(ids), 16)))
    return chunks


def look(training: Training, probe: list[Chunk]) -> list[float]:
    """Mean captured attention of the averaged indexers on each text of the probe, 0 to 1."""
    training.swap_average()
    found = []
    for chunk in probe:
        shares = captured_mass(training.indexers, training.turn, chunk, TOP_K)
        found.append(sum(shares) / len(shares))
    training.swap_average()
    return found


def named(indexers: list[Indexer]) -> dict[str, Tensor]:
    """The indexers' tensors by their names in the model."""
    return {
        f"layers.{i}.attn.indexer.{name}": value
        for i, indexer in enumerate(indexers)
        for name, value in indexer.state_dict().items()
    }


if __name__ == "__main__":
    main()
