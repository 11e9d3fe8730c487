"""Compressed shards: the same as plain ones, or an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from dsakv.errors import InputError
from dsakv.trace.intake import Intake
from dsakv.trace.jsonl_reader import read_jsonl
from dsakv.trace.units import read_unit, to_units
from tests.trace.jsonl_oracle import actual

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LINES = [
    orjson.dumps(
        {
            "request_id": 0,
            "layer_id": 0,
            "step_idx": step,
            "seq_len_current": 90,
            "selected_token_pos": [step % 7, 7 + step * 5 % 83],
        }
    )
    + b"\n"
    for step in range(40)
]
CHECKSUM = {int(zstd.CompressionParameter.checksum_flag): 1}


def compress(data: bytes) -> bytes:
    return zstd.compress(data, options=CHECKSUM)


@pytest.mark.parametrize("frames", [1, 3, 40])
@pytest.mark.parametrize("cut", [0, 9])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_compressed_is_as_plain_in_any_number_of_frames(
    tmp_path: Path, frames: int, cut: int, chunk_bytes: int
) -> None:
    data = b"".join([b"{}\n", *LINES])
    data = data[: len(data) - cut]  # the text ends within a line, the compressed file does not
    size = -(-len(data) // frames)
    folders = [tmp_path / "plain", tmp_path / "compressed"]
    for folder in folders:
        folder.mkdir()
    plain, compressed = (folders[0] / "trace_steps.jsonl", folders[1] / "trace_steps.jsonl.zst")
    plain.write_bytes(data)
    compressed.write_bytes(b"".join(compress(data[i : i + size]) for i in range(0, len(data), size)))

    expected, found = actual(plain, "skip", {}), actual(compressed, "skip", {}, chunk_bytes)
    assert len(found.rows) == 40 - (cut > 0)
    assert (found.rows, found.rejected) == (expected.rows, expected.rejected)
    assert found.counts.rejected["missing_field"].places == ["trace_steps.jsonl.zst:1"]
    assert found.counts.unfinished == (["trace_steps.jsonl.zst:41"] if cut else [])
    assert found.counts.bytes == compressed.stat().st_size
    strict = actual(compressed, "strict", {}, chunk_bytes)
    assert strict.stopped == f'{compressed}:1: bad record: "request_id" is missing'


@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, on_error: Any) -> None:
    path = tmp_path / "trace_steps.jsonl.zst"
    first, second = compress(b"".join(LINES[:20])), compress(b"".join(LINES[20:]))
    for length in range(len(first + second)):
        if length == len(first):  # whole frames are a whole file
            continue
        path.write_bytes((first + second)[:length])
        intake = Intake(on_error)
        with pytest.raises(InputError, match=r"trace_steps\.jsonl\.zst is damaged or cut off"):
            list(read_jsonl(path, intake, chunk_bytes=1000))
        assert not intake.counts.unfinished


@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_a_changed_byte_is_an_error_or_changes_nothing(tmp_path: Path, on_error: Any) -> None:
    path = tmp_path / "trace_steps.jsonl.zst"
    whole = compress(b"".join(LINES))
    path.write_bytes(whole)
    right = actual(path, on_error, {}, chunk_bytes=1000)
    assert len(right.rows) == len(LINES)
    errors = 0
    for at in range(len(whole)):
        for mask in (1 << at % 8, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            found = actual(path, on_error, {}, chunk_bytes=1000)
            if found.stopped is None:
                assert found == right
            else:
                errors += 1
                assert found.stopped.startswith(f"{path} is damaged or cut off: ")
    assert errors > len(whole)


@pytest.mark.parametrize("data", [b"", b"x", b"".join(LINES), compress(LINES[0]) + b"more"])
def test_what_is_no_zstd_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace_steps.jsonl.zst"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged or cut off"):
        list(read_jsonl(path, Intake("skip")))


def test_bytes_add_up_to_the_size_on_disk_while_reading(tmp_path: Path) -> None:
    path = tmp_path / "trace_steps.jsonl.zst"
    path.write_bytes(compress(b"".join(LINES).replace(b'"step_idx":', b'"step_idx":1') * 3000))
    intake = Intake("skip")
    (unit,) = to_units([path])
    for _ in read_unit(unit, intake):
        assert 0 < intake.counts.bytes <= unit.bytes
    assert intake.counts.bytes == unit.bytes


def test_bytes_that_hold_no_records_count_too(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    path = tmp_path / "trace_steps.jsonl.zst"
    path.write_bytes(compress(LINES[0]) + skippable)
    intake = Intake("strict")
    assert sum(len(batch) for batch in read_jsonl(path, intake)) == 1
    assert intake.counts.bytes == path.stat().st_size
