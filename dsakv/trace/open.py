"""Where traces are: directories that hold ``trace_steps*`` shards, found below whatever the user names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dsakv.errors import DsakvError, InputError

_SHARD = re.compile(r"(trace_steps(?:_.*)?)\.(?:jsonl(?:\.zst)?|parquet)")
_UNREAD = re.compile(r"trace_steps(_.*)?\.jsonl\.gz")


@dataclass(frozen=True, slots=True)
class TraceDir:
    """One trace: the records of one run for one rank."""

    path: Path
    shards: tuple[Path, ...]
    """Its files in numeric order."""
    run_meta: dict[str, Any] | None
    """``run_meta.json`` as it stands; None where there is none."""


def find_traces(root: Path) -> list[TraceDir]:
    """Every trace at or below ``root``, in natural order of the path.

    Raises:
        InputError: nothing there, no trace below it, one in a format that is not read, a shard that is there in two
            formats, or a damaged ``run_meta.json``.
        DsakvError: a directory that cannot be read.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}", "name a trace directory, a run directory, or a directory of runs")
    traces = []
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders.sort(key=_natural)
        unread = sorted(name for name in files if _UNREAD.fullmatch(name))
        if unread:
            raise InputError(
                f"{Path(folder, unread[0])}: this trace format cannot be read",
                "only .jsonl, .jsonl.zst and .parquet can: decompress .gz with gzip -d",
            )
        shards = sorted((name for name in files if _SHARD.fullmatch(name)), key=_natural)
        if shards:
            path = Path(folder)
            _require_once(path, shards)
            for name in shards:
                _require_regular(path / name)
            traces.append(TraceDir(path, tuple(path / name for name in shards), _load_run_meta(path)))
    if not traces:
        raise InputError(
            f"no trace in {root}",
            "trace_steps_* files (.jsonl, .jsonl.zst, .parquet) are looked for in it and below it",
        )
    return traces


def requests_file(trace_dir: Path) -> Path | None:
    """``requests.jsonl`` of the run that a trace belongs to: in the folder above ``block<N>``, else beside the shards.

    Raises:
        InputError: there is something of that name, but no file.
    """
    path = (trace_dir.parent if trace_dir.name.startswith("block") else trace_dir) / "requests.jsonl"
    _require_regular(path)
    return path if path.exists() else None


def _require_regular(path: Path) -> None:
    """Reading from anything but a file may wait for ever. What is not there is for its reader to tell."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file", "put a file in its place, or move it away")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode(errors="backslashreplace").decode()
        raise InputError(f"{shown}: the name is no UTF-8", "rename it: results name their files") from None


def _require_once(folder: Path, names: list[str]) -> None:
    """No shard may be there in two formats: its records would count twice."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(_stem(name), name)
        if other is not name:
            raise InputError(f"{folder} holds one shard twice: {other} and {name}", "move one of them away")


def newest_run(outputs: Path) -> Path:
    """The directory in ``outputs`` whose trace was written to last.

    Raises:
        InputError: no trace there.
    """
    if not outputs.is_dir():
        raise InputError(f"there is no {outputs}/ to take the newest run from", "name the trace with --input")
    try:
        written = [
            (path.stat().st_mtime_ns, run)
            for run in outputs.iterdir()
            if run.is_dir()
            for path in run.rglob("trace_steps*")
            if path.is_file()
        ]
    except OSError as error:
        raise _cannot_read(outputs, error) from error
    if not written:
        raise InputError(f"no run in {outputs}/ holds a trace", "name the trace with --input")
    return max(written)[1]


def _load_run_meta(trace_dir: Path) -> dict[str, Any] | None:
    path = trace_dir / "run_meta.json"
    _require_regular(path)
    try:
        meta = orjson.loads(path.read_bytes())
        orjson.dumps(meta)  # results quote it
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _cannot_read(path, error) from error
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise InputError(f"{path} is not JSON: {error}", "repair it, or move it away and give --block-size") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path} holds no JSON object", "repair it, or move it away and give --block-size")
    return meta


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key that compares runs of digits as numbers; a name comes before its own continuation."""
    parts = re.split(r"([0-9]+)", _stem(name))
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


def _stem(name: str) -> str:
    """The name of a shard without its format, any other name as it is."""
    shard = _SHARD.fullmatch(name)
    return shard[1] if shard else name


def _unreadable(error: OSError) -> None:
    raise _cannot_read(Path(error.filename), error) from error


def _cannot_read(path: Path, error: OSError) -> DsakvError:
    return DsakvError(f"cannot read {path}: {error.strerror}", "check the path and its permissions")


def caveat_of(run_meta: dict[str, Any] | None) -> str | None:
    """What the traced selections are not, where the run says so."""
    model = (run_meta or {}).get("model")
    caveat = model.get("caveat") if isinstance(model, dict) else None
    return caveat if isinstance(caveat, str) else None


def has_random_weights(run_meta: dict[str, Any] | None) -> bool:
    """Whether the traced selections are those of random weights, and their locality means nothing."""
    model = (run_meta or {}).get("model")
    return isinstance(model, dict) and model.get("random_weights") is True
