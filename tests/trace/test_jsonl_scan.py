"""The scanner takes what the tracer writes, and never makes anything else of a line than orjson does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.trace.formats import shard_paths
from dsakv.trace.jsonl_scan import BLOCK_SIZE, DONE, ENGINE_STEP, FULL, ODD, make_columns, scan
from dsakv.trace.selfcheck import selfcheck
from tests.trace.jsonl_oracle import Options, assert_same

EVERYTHING: Options = {"engine_steps": True, "block_sizes": True}
_UNUSED = {"hit_blocks": 0, "bytes_read": 0, "latency_us": None}
RECORD: dict[str, Any] = {
    "event": "dsa_topk",
    "request_id": 3,
    "layer_id": 1,
    "index_layer_id": 0,
    "step_idx": 10000,
    "engine_step": 17,
    "seq_len_current": 400,
    "block_size_tokens": 64,
    "touched_block_ratio": 0.5,
    "kv_fetch": {"hbm": {**_UNUSED, "latency_us": 12.5, "hit_block_ids": [0, 5]}, "local_pool": _UNUSED},
    "prefix": {"prefix_cache_hit": True, "prefix_key": "9f\u0020a", "seq_len_current": -1, "empty": [[], {}]},
    "scores_stats": {"min": -1.1e-05, "mean": 1e16, "max": 2.5e38},
    "selected_token_pos": [0, 7, 31, 399],
}

KEYS = [
    "layer_id",
    "request_id",
    "seq_len_current",
    "engine_step",
    "block_size_tokens",
    "event",
    "selected_token_pos",
    "x",
]


def compact(record: dict[str, Any]) -> bytes:
    return orjson.dumps(record)


def spaced(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()


def at_step(line: bytes, step: int) -> bytes:
    """The same line, as long as before, with a step of its own."""
    return line.replace(b"10000", b"%05d" % (10000 + step))


def shard(folder: Path, data: bytes) -> Path:
    path = folder / "trace_steps.jsonl"
    path.write_bytes(data)
    return path


def scanned(data: bytes, wanted: int = 1 << ENGINE_STEP | 1 << BLOCK_SIZE) -> tuple[int, int, int]:
    return scan(np.frombuffer(bytearray(data), dtype=np.uint8), 0, make_columns(4096, 1 << 16), 0, wanted)


@pytest.mark.parametrize("write", [compact, spaced])
def test_lines_as_they_are_written_are_taken(write: Any) -> None:
    lines = [at_step(write(RECORD), step) for step in range(3)]
    lines += [write({**RECORD, "step_idx": -2, "scores_topk": [0.25, -3.5e-7, 1.0, 5]})]
    lines += [write({**RECORD, "selected_token_pos": positions}) for positions in ([], [399, 0, 77], [8])]
    lines += [write({key: RECORD[key] for key in RECORD if key not in ("event", "selected_token_pos")})]
    data = b"".join(line + end for line in lines for end in (b"\n", b" \r\n"))
    assert scanned(data) == (len(data), 2 * len(lines), DONE)


def test_what_the_tracer_writes_is_taken(tmp_path: Path) -> None:
    for path in shard_paths(selfcheck(tmp_path / "run").trace_dir):
        data = path.read_bytes()
        assert scanned(data) == (len(data), data.count(b"\n"), DONE)
        assert assert_same(path, EVERYTHING).counts.accepted == data.count(b"\n")


def test_a_scan_stops_before_what_it_leaves_and_when_it_is_full(tmp_path: Path) -> None:
    good, odd = compact(RECORD) + b"\n", compact(RECORD | {"request_id": "a"}) + b"\n"
    text = np.frombuffer(bytearray(good * 2 + odd + good * 3), dtype=np.uint8)
    columns = make_columns(4, 9)
    assert scan(text, 0, columns, 0, 0) == (2 * len(good), 2, ODD)
    behind = 2 * len(good) + len(odd)
    assert scan(text, behind, columns, 2, 0) == (behind, 2, FULL)  # for its positions
    assert scan(text, behind, make_columns(4, 99), 2, 0) == (behind + 2 * len(good), 4, FULL)  # for its rows
    assert scan(text, behind, make_columns(4, 3), 0, 0) == (behind, 0, ODD)


DOUBTFUL = [
    *({**RECORD, "request_id": name} for name in ("a", None, 1.0, True, [1], 10**15, -(10**15))),
    *({**RECORD, "layer_id": layer} for layer in (10**9, 2.0, "1", None)),
    *({**RECORD, "selected_token_pos": row} for row in ([1, 1], [2, 1, 2], [400], [-1], [1.0], None, [5, 3 << 20])),
    *({**RECORD, "event": name} for name in ("dsa", "dsa_topk2", None)),
    *({**RECORD, "block_size_tokens": size} for size in (0, -64, 64.0)),
    *({**RECORD, "x": value} for value in ("\\", '"', "\n", "é", 1e100, 10**18, json.loads("[" * 34 + "]" * 34))),
    *({key: RECORD[key] for key in RECORD if key != name} for name in ("request_id", "seq_len_current", "engine_step")),
]


@pytest.mark.parametrize("record", DOUBTFUL)
def test_doubtful_records_are_left(record: dict[str, Any]) -> None:
    assert scanned(compact(record) + b"\n") == (0, 0, ODD)


@pytest.mark.parametrize("more", [f'"{key}":{json.dumps(RECORD[key])}' for key in RECORD if key in KEYS])
def test_a_key_twice_is_doubtful(more: str) -> None:
    assert scanned(compact(RECORD)[:-1] + f",{more}}}\n".encode()) == (0, 0, ODD)


def test_minus_zero_is_doubtful() -> None:
    assert scanned(compact(RECORD).replace(b'"layer_id":1', b'"layer_id":-0') + b"\n") == (0, 0, ODD)


BYTES = [*b'\n\r\t "\\,:[]{}0123456789-+.eEaN', 0, 0x1F, 0x7F, 0x80, 0xC3, 0xFF]


@pytest.mark.parametrize("write", [compact, spaced])
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_any_byte_in_the_place_of_any_other(tmp_path: Path, write: Any, options: Options) -> None:
    line = write(RECORD)
    lines: list[bytes] = []
    for at in range(len(line)):
        for byte in BYTES:
            mine = at_step(line, len(lines))
            lines.append(mine[:at] + bytes([byte]) + mine[at + 1 :] + b"\n")
    found = assert_same(shard(tmp_path, b"".join(lines)), options)
    assert found.rows
    assert len(found.rejected) > 1000


@pytest.mark.parametrize("write", [compact, spaced])
def test_any_byte_more_or_less(tmp_path: Path, write: Any) -> None:
    line = write(RECORD)
    lines: list[bytes] = []
    for at in range(len(line)):
        for more in (b"", *(bytes([byte]) for byte in BYTES)):
            mine = at_step(line, len(lines))
            lines.append(mine[:at] + more + mine[at + (not more) :] + b"\n")
    assert_same(shard(tmp_path, b"".join(lines)), EVERYTHING)


def test_every_cut(tmp_path: Path) -> None:
    line = compact(RECORD)
    assert_same(shard(tmp_path, b"".join(line[:length] + b"\n" for length in range(len(line)))), EVERYTHING)
    for length in range(len(line) + 1):
        found = assert_same(shard(tmp_path, at_step(line, 1) + b"\n" + line[:length]))
        assert (len(found.rows), len(found.counts.unfinished)) == (
            1 + (length == len(line)) * 0,
            0 < length < len(line),
        )


def with_value(key: str, value: str) -> str:
    """The record as text, with ``value`` as it stands for ``key``, which comes last."""
    rest = {name: RECORD[name] for name in RECORD if name != key}
    return f'{json.dumps(rest)[:-1]}, "{key}": {value}}}'


words = str.split
NUMBERS = [
    *words("0 7 -0 -1 00 01 -01 +1 1. .5 1.0 -0.0 1e2 1E+2 1e-2 1e 1e+ 1.5e3 1e99 1e308 1e309 1e999 0e999"),
    *words("0x1 1_0 - NaN Infinity -Infinity tru nulll"),
    *("", "1 0"),
    *(f"{sign}{2**digits - less}" for sign in ("", "-") for digits in (31, 32, 53, 63, 64) for less in (0, 1)),
    *(digit * count for digit in "19" for count in (7, 8, 9, 10, 15, 16, 18, 19, 20, 40, 308, 309, 400)),
]
VALUES = [
    *words(r'true false null "1" "dsa_topk" "dsa_topk "dsa_topl" "dsa_topkk" "dsa\u005ftopk" "\u0041" "" "é"'),
    *words("[] {} [1,] [,1] [1 [1} [[1]] [1,[2]] [-0] [-1] [01] [0] [00] [1,1] [2,1,2] [399,400] [3,2,1] [1,,2]"),
    *words('["1"] [true] [null] [1.0] [1,2,3,4,5,06] [1,2,3,4,5,6 [1,2,3,4,5,6]] [9,10,99,100] [100,99,10,9] [1;2]'),
    *words('{"a":1} {"a":1,} {a:1} {"a":1,"a":2} {"a":{"b":[{}]}} [1,2:3] [12a]'),
    *("[1 2]", " [ 1 ,\t2\r, 3 ] ", "[1\x0b]", '{"a" 1}', '"\t"', '"\x7f"', '"a\\"'),
    *(f"[1,2,{number}]" for number in NUMBERS),
    *("[" * depth + "]" * depth for depth in (1, 31, 32, 33, 34, 1025)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (31, 32, 33, 34)),
    "[" * 16 + '{"a":' * 16 + "1" + "}" * 16 + "]" * 16,
    "[" * 16 + '{"a":' * 16 + "1" + "]" * 16 + "}" * 16,
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_odd_values(tmp_path: Path, key: str, options: Options) -> None:
    lines: list[bytes] = []
    for value in (*NUMBERS, *VALUES):
        for text in (
            with_value(key, value),
            with_value(key, value).replace(", ", "\r\t ,  "),
            with_value(key, value + " x"),
        ):
            lines.append(at_step(text.encode(), len(lines)) + b"\n")
    assert_same(shard(tmp_path, b"".join(lines)), options)


@pytest.mark.parametrize("key", [*KEYS, "step_idx"])
def test_odd_keys(tmp_path: Path, key: str) -> None:
    base = spaced(RECORD).decode()
    value = json.dumps(RECORD.get(key, 1))
    texts = [
        base.replace(f'"{key}"', f'"{key[:-1]}\\u{ord(key[-1]):04x}"'),
        base.replace(f'"{key}"', f'"{key}\\u0000"'),
        base.replace(f'"{key}"', f'"{key} "'),
        base.replace(f'"{key}"', f'"{key.upper()}"'),
        base.replace(f'"{key}"', f'"other": {{"{key}": 1}}, "{key}"'),
        *(f'{{"{key}": {other}, {base[1:]}' for other in (value, "1", "null", "[5]")),
        *(f'{base[:-1]}, "{key}": {other}}}' for other in (value, "1", "null", "[5]")),
        json.dumps({name: RECORD[name] for name in RECORD if name != key}),
        json.dumps({"nested": RECORD}),
        f"[{base}]",
        f"{base}{base}",
        f"{base},",
        f" \t\r{base} \t\r",
        f"\x0c{base}",
        f"\ufeff{base}",
        *("", " ", "{}", "[]", "null", "1", '"a"', "{", "}"),
    ]
    lines = [at_step(text.encode(), step) + end for step, text in enumerate(texts) for end in (b"\n", b"\r\n")]
    for options in ({}, EVERYTHING, {"request_order": True}):
        assert_same(shard(tmp_path, b"".join(lines)), options)


@pytest.mark.parametrize("write", [compact, spaced])
def test_chunks_end_anywhere(tmp_path: Path, write: Any) -> None:
    lines = [at_step(write(RECORD), step) for step in range(3)]
    lines[1:1] = [b"", b'{"request_id": "a"}', b"nonsense", write({**RECORD, "selected_token_pos": []})]
    path = shard(tmp_path, b"\n".join(lines))
    for chunk_bytes in range(1, path.stat().st_size + 2):
        assert_same(path, EVERYTHING, chunk_bytes)


def test_very_many_tiny_lines(tmp_path: Path) -> None:
    lines = [
        b'{"request_id":0,"layer_id":0,"step_idx":%d,"seq_len_current":9,"selected_token_pos":[%d]}'
        % (i - i % 500 // 499, i % 9)
        for i in range(20_000)
    ]
    lines[7000:7000] = [b""] * 700
    found = assert_same(shard(tmp_path, b"\n".join(lines)))
    assert found.counts.accepted == 20_000 - 40


def test_records_with_very_many_positions(tmp_path: Path) -> None:
    sizes = [400_000, 300_000, 400_000, (1 << 20) + 1, 5]
    lines = [
        compact({**RECORD, "step_idx": step, "seq_len_current": 1 << 21, "selected_token_pos": list(range(size))})
        + b"\n"
        for step, size in enumerate(sizes)
    ]
    found = assert_same(shard(tmp_path, b"".join(lines)), EVERYTHING)
    assert [len(row[-1]) for row in found.rows] == sizes


positions = st.lists(
    st.integers(0, 99) | st.integers(0, 1 << 17) | st.integers(0, 1 << 22) | st.integers(0, 1 << 31), max_size=40
)


@given(st.lists(positions, min_size=1, max_size=8), st.booleans(), st.sampled_from([",", ", ", " ,"]))
def test_positions_in_any_order(rows: list[list[int]], unique: bool, comma: str) -> None:
    lines = []
    for row in rows:
        text = comma.join(map(str, dict.fromkeys(row) if unique else row))
        lines.append(with_value("selected_token_pos", f"[{text}]").replace("400", str(1 << 31)).encode())
    with tempfile.TemporaryDirectory() as folder:
        data = b"".join(at_step(line, step) + b"\n" for step, line in enumerate(lines))
        assert_same(shard(Path(folder), data), EVERYTHING)


edits = st.tuples(
    st.integers(0, 1500),
    st.integers(0, 4),
    st.lists(st.sampled_from(BYTES), max_size=4).map(bytes)
    | st.binary(max_size=4)
    | st.sampled_from([compact(RECORD)]),
)


@given(
    st.lists(st.tuples(st.sampled_from([compact, spaced]), st.lists(edits, max_size=3)), min_size=1, max_size=6),
    st.fixed_dictionaries({name: st.booleans() for name in ("engine_steps", "block_sizes", "request_order")}),
    st.integers(1, 3000),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
)
def test_lines_edited_at_random(
    lines: list[Any], options: Options, chunk_bytes: int, newline: bytes, last: bool
) -> None:
    data = b""
    for step, (write, changes) in enumerate(lines):
        line = at_step(write(RECORD), step)
        for at, removed, more in changes:
            at %= len(line) + 1
            line = line[:at] + more + line[at + removed :]
        data += line + newline
    with tempfile.TemporaryDirectory() as folder:
        assert_same(shard(Path(folder), data if last else data.rstrip()), options, chunk_bytes)


number_text = st.sampled_from(NUMBERS) | st.integers(-3, 500).map(str)
value_text = st.recursive(
    number_text | st.sampled_from(VALUES) | st.just('"dsa_topk"'),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
        | st.dictionaries(st.sampled_from([*KEYS, "a"]), inner, max_size=3).map(
            lambda items: "{" + ",".join(f'"{key}":{value}' for key, value in items.items()) + "}"
        )
    ),
    max_leaves=8,
)


@given(st.lists(st.tuples(st.sampled_from(KEYS), value_text), max_size=3), st.permutations(sorted(RECORD)))
def test_members_in_any_order_with_any_value(extra: list[tuple[str, str]], order: list[str]) -> None:
    members = [(key, json.dumps(RECORD[key])) for key in order]
    replaced = dict(members) | dict(extra[:1])  # one takes the place of its key, the others come on top
    text = ",".join(f'"{key}" :{value}' for key, value in [*replaced.items(), *extra[1:]])
    with tempfile.TemporaryDirectory() as folder:
        assert_same(shard(Path(folder), f"{{{text}}}\n".encode()), EVERYTHING)
