"""What `generate` and `trace` have in common: the engine as configured, and the trace of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich import filesize

from dsakv.config import Config, KvConfig
from dsakv.console import Console
from dsakv.distributed import World
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.kv.options import Amount, TierOptions
from dsakv.prefix import PrefixIndex, prefix_key
from dsakv.report.text import plural
from dsakv.request import Request
from dsakv.settings import keys
from dsakv.trace.records import PrefixFacts
from dsakv.weights.placement import WeightsPlan

if TYPE_CHECKING:  # it brings pyarrow along
    from dsakv.trace.run_dir import RunDir

RANDOM_WEIGHTS = "the model's weights are random: its text and its locality figures mean nothing"


def make_engine(config: Config, loaded: LoadedModel, world: World, *, record: bool, ignore_eos: bool = False) -> Engine:
    """The engine that the configuration describes, on a loaded model.

    With ``ignore_eos`` an end of sequence is a token like any other, so that every request gets all its new tokens; all
    ranks must be told alike. Raises InputError where selections are to be recorded of a model that makes none.
    """
    if record and not loaded.model.top_k:
        raise InputError(
            f"{loaded.name} is dense: there is no selection to trace",
            "leave --selection dense out"
            if config.model.selection == "dense"
            else "give --indexer FILE, or --selection oracle or recent; without --ckpt-path a model with indexers runs",
        )
    options = EngineOptions(
        batch_size=config.engine.batch_size,
        block_size=config.engine.kv_block_size,
        prefill_chunk=config.engine.prefill_chunk,
        temperature=config.engine.temperature,
        top_p=config.engine.top_p,
        seed=config.engine.seed,
        eos_token_ids=frozenset() if ignore_eos else loaded.eos_token_ids,
        admission=config.serving.admission,
        max_concurrency=config.serving.max_concurrency,
        prefix_cache=config.serving.prefix_cache,
        kv_blocks=config.serving.kv_blocks,
        tiers=tier_options(config.kv),
        record=record,
        record_prefill_tail=config.trace.prefill_tail,
        sync=config.trace.sync_cuda,
    )
    return Engine(loaded.model, options, world, loaded.weights)


def check_kv(config: Config) -> None:
    """Raise InputError for options of KV tiers that do not work, or do nothing."""
    kv = config.kv
    tier_options(kv)
    if kv.hot_capacity is None:
        given = [key for key in keys("kv") if getattr(kv, key.name) != key.default]
        if given:
            raise InputError(
                f"{given[0].flag} does nothing while all KV is on the device", "give --kv-hot-capacity, such as 0.25"
            )
    elif kv.timeout != KvConfig().timeout and not (kv.remote or "").startswith("redis"):
        raise InputError("--kv-timeout does nothing without a server", "give --kv-remote redis://..., or leave it out")
    elif kv.policy == "sink_recent" and (
        kv.scope == "shared" or config.engine.batch_size > 1 or config.serving.prefix_cache
    ):
        raise InputError(
            "--kv-policy sink_recent goes by positions, which requests and layers do not share",
            "use --batch-size 1 without --kv-scope shared and --prefix-cache, or another policy",
        )


def tier_options(kv: KvConfig) -> TierOptions | None:
    """The tiers that the configuration describes. Raises InputError for sizes that are none."""
    if kv.hot_capacity is None:
        return None
    return TierOptions(
        hot=Amount.parse(kv.hot_capacity, "--kv-hot-capacity"),
        policy=kv.policy,
        scope=kv.scope,
        local=Amount.parse(kv.local, "--kv-local") if kv.local else None,
        remote=kv.remote,
        write=kv.write,
        start=kv.start,
        timeout_s=kv.timeout,
    )


def announce(loaded: LoadedModel, console: Console) -> None:
    """Say which model runs, and whether its output means anything."""
    facts = loaded.describe()
    selects = f"top-k {facts['index_topk']}" if loaded.model.top_k else "dense"
    by = f" by {loaded.selection}" if loaded.selection in ("oracle", "recent") else ""
    console.info(
        f"model {loaded.name}: {facts['n_layers']} layers, {selects}{by}, {facts['dtype']} on {facts['device']}"
    )
    if loaded.streamer is not None:
        console.info(_streamed(loaded.streamer.plan))
        if loaded.streamer.plan.reads and not loaded.streamer.direct:
            console.warn("the file system refuses direct reads: weights come through the page cache and may stay in it")
    if loaded.slow:
        console.warn(loaded.slow)
    if loaded.random_weights:
        console.warn(RANDOM_WEIGHTS)
    if loaded.caveat:
        console.info(f"note: {loaded.caveat}")


def _streamed(plan: WeightsPlan) -> str:
    """What stays of weights under a budget, and what moves."""
    held = f"{filesize.decimal(plan.host_bytes)} of host memory"
    if plan.device_bytes:
        held += f" and {filesize.decimal(plan.device_bytes)} on the device"
    moved = f"{plural(plan.pass_units, 'unit')} ({filesize.decimal(plan.pass_disk_bytes)}) read in each step"
    if plan.n_experts:
        moved += f", and experts, of which {plan.expert_slots:,} of {plan.n_experts:,} are kept"
    return f"weights by the {plan.unit} in {held}: {moved}"


def how_to_analyze(run: RunDir) -> str:
    """The next command, ready to be pasted into a shell."""
    return f"next: dsakv analyze --input {shlex.quote(str(run.path))}"


class PrefixLog:
    """Prefix facts of requests in the order in which they are run."""

    def __init__(self, block_size: int, key_tokens: int) -> None:
        self._index = PrefixIndex(block_size)
        self._key_tokens = key_tokens

    def facts(self, request: Request) -> PrefixFacts:
        """What earlier requests already held of this prompt; the prompt counts for those that follow."""
        ids = request.prompt_token_ids
        facts = PrefixFacts.of(prefix_key(ids, self._key_tokens), self._index.lookup(ids), self._index.block_size)
        self._index.add(ids, request.request_id)
        return facts


def prefix_facts(requests: Iterable[Request], config: Config) -> dict[int, PrefixFacts]:
    """Prefix facts by request id, each against all requests before it."""
    log = PrefixLog(config.engine.kv_block_size, config.trace.prefix_key_tokens)
    return {request.request_id: log.facts(request) for request in requests}


def inputs(kept: int, truncated: int = 0, dropped: dict[str, int] | None = None) -> dict[str, Any]:
    """What became of the inputs, as ``summary.json`` and ``run_meta.json`` hold it."""
    return {"kept": kept, "truncated": truncated, "dropped": dropped or {}}
