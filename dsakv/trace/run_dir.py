"""The folder of one run.

::

    outputs/ruler_20261122T031500/
      config.json  requests.jsonl
      block64/  run_meta.json  summary.json  trace_steps_0_4.jsonl  trace_steps_4_8.jsonl ...

How an interrupted run goes on in it is in :mod:`dsakv.trace.resume`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import orjson

from dsakv import __version__
from dsakv.config import SECTIONS, Config, TraceConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace.files import default_path, disk_error, leftovers, locked, replacing, write_json
from dsakv.trace.formats import shard_paths
from dsakv.trace.resume import keep_finished
from dsakv.trace.schema import SCHEMA_VERSION

_MAY_DIFFER = ("trace.resume", "trace.out", "kv.timeout")
"""``--trace-out`` names the folder itself, by another path perhaps; a slow remote pool may need more time."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """An output folder, ready to be written to. Made by :meth:`create` or :meth:`resume`."""

    path: Path
    block_size: int
    finished: frozenset[int] = frozenset()
    """Requests that are complete on disk: not to be run again."""
    engine_steps: int = 0
    """Steps of the engine that the records on disk go up to: numbering goes on from here."""

    @property
    def trace_dir(self) -> Path:
        return self.path / f"block{self.block_size}"

    @property
    def requests_path(self) -> Path:
        return self.path / "requests.jsonl"

    @staticmethod
    def check_free(out: str | Path | None) -> None:
        """Raise DsakvError where ``out`` holds a run already. Asked before a model is loaded, and by ``create``."""
        if out is not None and Path(out).is_dir() and _holds_run(Path(out)):
            raise DsakvError(
                f"{out} holds a run already",
                "name another folder with --trace-out; an interrupted trace goes on with --resume",
            )

    @classmethod
    def create(cls, out: str | Path | None, workload: str, block_size: int, config_json: bytes) -> RunDir:
        """Start a run in ``out``, by default ``outputs/<workload>_<time>``.

        Raises:
            DsakvError: ``out`` holds a run already, or cannot be written.
        """
        run = cls(Path(out) if out is not None else default_path(workload), block_size)
        hint = "name another folder with --trace-out"
        try:
            cls.check_free(run.path)
            made = [p for p in (run.trace_dir, *run.trace_dir.parents) if not p.exists()]
            try:
                run.trace_dir.mkdir(parents=True, exist_ok=True)
                with replacing(run.path / "config.json") as file:
                    file.write(config_json)
            except OSError:
                with suppress(OSError):  # another process may be at work here; the first error is the one to tell
                    for folder in made:
                        folder.rmdir()
                raise
        except OSError as error:
            raise disk_error(error, run.path, hint) from None
        return run

    @staticmethod
    def check_resumable(out: str | Path | None, config_json: bytes, **facts: Any) -> Path:
        """The folder of the run to go on with. Changes nothing; asked before a model is loaded, and by ``resume``.

        ``facts`` are fields of ``run_meta.json`` as they would be written now: where the machine, the checkpoint or
        the data have changed, a run must not go on. Raises InputError where there is no run, or one with another
        configuration, other facts or without positions.
        """
        if out is None:
            raise InputError("--resume does not know which run to go on with", "name its folder with --trace-out")
        path = Path(out)
        try:
            stored = orjson.loads((path / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} holds no run to go on with: {error}",
                "start a new one in another --trace-out, without --resume",
            ) from None
        _same_config(path, stored, orjson.loads(config_json))
        for meta_path in path.glob("block*/run_meta.json"):
            meta = orjson.loads(meta_path.read_bytes())
            digests = {source["requests_digest"] for source in (meta, facts) if "requests_digest" in source}
            if len(digests) > 1:  # older runs have none
                raise InputError(
                    f"the run in {path} was begun with other requests: the data has changed",
                    "give it what it began with, or start a new run in another --trace-out",
                )
            for name, value in facts.items():
                if name != "requests_digest" and meta.get(name) != value:
                    raise InputError(
                        f"the run in {path} has another {name}: {_shown(meta.get(name))}, now {_shown(value)}",
                        "start a new run in another --trace-out",
                    )
        return path

    @classmethod
    def resume(cls, out: str | Path | None, block_size: int, config_json: bytes, **facts: Any) -> RunDir:
        """Go on with the run in ``out``: drop the records of unfinished requests and keep the others.

        A request whose records are not all there counts as unfinished. Killed on the way, it can be called again.

        Raises:
            InputError: no run there, one with another configuration or without positions, or a damaged file.
            DsakvError: ``out`` cannot be written, or another process is writing it.
        """
        path = cls.check_resumable(out, config_json, **facts)
        run = cls(path, block_size)
        try:
            with locked(path):
                run.trace_dir.mkdir(exist_ok=True)
                for temp in (*leftovers(path), *leftovers(run.trace_dir)):
                    temp.unlink()
                (run.trace_dir / "summary.json").unlink(missing_ok=True)  # it describes records that go
                finished, engine_steps = keep_finished(run.requests_path, run.trace_dir)
        except OSError as error:
            raise disk_error(error, path, "make the folder writable and free some space, then --resume again") from None
        return cls(path, block_size, finished, engine_steps)

    def write_meta(
        self,
        *,
        dataset: str,
        model: dict[str, Any],
        seed: int,
        options: TraceConfig,
        inputs: dict[str, Any],
        requests_digest: str | None = None,
        kv_tiers: dict[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Write ``run_meta.json``; a resumed run keeps the one that it has.

        ``model`` describes the model: name, whether its weights are random, layers, top-k, KV bytes a token and
        layer. ``inputs`` is ``{"kept": n, "truncated": n, "dropped": {reason: n}}``. ``requests_digest`` tells whether
        requests are the same when the run goes on. ``kv_tiers`` says what tiers KV lives in, where it is not all on
        the device.

        Raises:
            DsakvError: the disk is full or not writable.
        """
        path = self.trace_dir / "run_meta.json"
        if path.exists():
            return
        meta = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "dsakv_version": __version__,
            "dataset": dataset,
            "model": model,
            "block_size_tokens": self.block_size,
            "rank": rank,
            "world_size": world_size,
            "seed": seed,
            "trace": msgspec.to_builtins(options),
            "inputs": inputs,
        }
        if requests_digest is not None:
            meta["requests_digest"] = requests_digest
        if kv_tiers is not None:
            meta["kv_tiers"] = kv_tiers
        try:
            write_json(path, meta)
        except OSError as error:
            raise disk_error(error, path, "free some space or name another folder with --trace-out") from None

    def update_inputs(self, inputs: dict[str, Any]) -> None:
        """Put ``inputs`` into ``run_meta.json``: a chat knows them at its end only.

        Raises:
            DsakvError: the disk is full or not writable.
        """
        path = self.trace_dir / "run_meta.json"
        try:
            write_json(path, orjson.loads(path.read_bytes()) | {"inputs": inputs})
        except OSError as error:
            raise disk_error(error, path, "free some space or name another folder with --trace-out") from None


def _holds_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "requests.jsonl")) or any(
        (folder / "run_meta.json").exists() or shard_paths(folder) for folder in path.glob("block*") if folder.is_dir()
    )


def _same_config(path: Path, stored: Any, given: Any) -> None:
    """``stored`` may come from a version that lacked some keys: these count as their defaults."""
    sections = {name for command, names in SECTIONS.items() if command.startswith("trace ") for name in names}
    old, new = (dict(_leaves(_with_defaults(path, tree), "")) for tree in (stored, given))
    differing = [
        key for key in sorted(new) if key.split(".")[0] in sections and key not in _MAY_DIFFER and old[key] != new[key]
    ]
    if differing:
        raise InputError(
            f"the run in {path} was started with another configuration: {', '.join(differing)}",
            "repeat its command with --resume (config.json has the values), or start a new run in another --trace-out",
        )
    if not new["trace.store_token_pos"]:
        raise InputError(
            f"the run in {path} keeps no positions, so its summary cannot be made again",
            "start it over in another --trace-out",
        )


def _with_defaults(path: Path, tree: Any) -> Any:
    try:
        return msgspec.to_builtins(msgspec.convert(tree, Config))
    except msgspec.ValidationError as error:
        raise InputError(
            f"{path / 'config.json'} is not the configuration of a run: {error}",
            "start a new run in another --trace-out",
        ) from None


def _shown(value: Any) -> str:
    return orjson.dumps(value).decode()


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    else:
        yield key, value
