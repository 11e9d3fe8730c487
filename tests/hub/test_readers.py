"""What is read from the files of the hub: archives, JSON arrays, CSV."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import DsakvError, InputError
from dsakv.hub.archive import members, reading
from dsakv.hub.csv_rows import csv_rows
from dsakv.hub.json_rows import array_rows

WANTED = "data/ruler/vt/validation_4096.jsonl"
BODY = b'{"input": "x"}\n' * 1000


def member(
    name: str, body: bytes = BODY, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(body) if kind == tarfile.REGTYPE else 0
    return info, body


def archive(path: Path, entries: Sequence[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, body in entries:
            tar.addfile(info, io.BytesIO(body) if info.isreg() else None)
    return path


def read(path: Path, wanted: Sequence[str] = (WANTED,)) -> tuple[dict[str, bytes], list[str], int]:
    """Contents by member, warnings, and bytes of the archive that were read."""
    sizes: list[int] = []
    warnings: list[str] = []
    found = {}
    for place, content in members(path, wanted, "the.tgz", sizes.append, warnings.append):
        with reading("the.tgz"):
            found[place] = content.read()
    return found, warnings, sum(sizes)


@pytest.mark.parametrize("name", [WANTED, f"./{WANTED}", WANTED.replace("/vt", "//./vt")])
def test_a_wanted_member_is_found(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tgz", [member("data/other", b"o"), member(name)])
    assert read(path)[:2] == ({WANTED: BODY}, [])


def test_reading_stops_with_the_last_one_wanted(tmp_path: Path) -> None:
    noise = [member(f"noise{i}", random.Random(i).randbytes(200_000)) for i in range(20)]
    path = archive(tmp_path / "a.tgz", [member(WANTED), *noise])
    found, _, size = read(path)
    assert found == {WANTED: BODY}
    assert size < path.stat().st_size / 4


@pytest.mark.parametrize(
    ("entry", "warning"),
    [
        (member(f"../{WANTED}"), "leads out of the archive"),
        (member(f"data/../{WANTED}"), "leads out of the archive"),
        (member(f"/{WANTED}"), "leads out of the archive"),
        (member(WANTED, kind=tarfile.SYMTYPE, link="/etc/passwd"), "is no regular file"),
        (member(WANTED, kind=tarfile.LNKTYPE, link="other"), "is no regular file"),
        (member(WANTED, kind=tarfile.CHRTYPE), "is no regular file"),
        (member(WANTED, kind=tarfile.FIFOTYPE), "is no regular file"),
        (member(WANTED, kind=tarfile.DIRTYPE), "is no regular file"),
        (member(f"{WANTED}x"), None),
        (member(f"x{WANTED}"), None),
        (member(WANTED.upper()), None),
    ],
)
def test_what_only_looks_wanted_is_passed_over(
    entry: tuple[tarfile.TarInfo, bytes], warning: str | None, tmp_path: Path
) -> None:
    path = archive(tmp_path / "a.tgz", [entry, member(WANTED)])
    found, warnings, _ = read(path)
    assert found == {WANTED: BODY}
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]
    with pytest.raises(InputError, match=f"the.tgz has no {WANTED}"):
        read(archive(tmp_path / "b.tgz", [entry]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tgz", "b.tgz"]


def test_a_missing_member_is_told_with_what_there_is(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tgz", [member(f"data/{task}/v_{n}") for task in ("vt", "qa") for n in (9, 10)])
    with pytest.raises(InputError, match=f"has no {WANTED}") as caught:
        read(path)
    assert caught.value.hint == "it holds v_9, v_10 in data/qa, data/vt"


@given(data=st.data())
def test_a_damaged_archive_gives_nothing_else(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever happens to it: what is wanted, or an error in two lines, never another exception."""
    folder = tmp_path_factory.mktemp("damage")
    whole = archive(folder / "a.tgz", [member("data/other", b"o"), member(WANTED)]).read_bytes()
    plain = data.draw(st.booleans(), label="below the compression")
    bad = bytearray(gzip.decompress(whole) if plain else whole)
    if data.draw(st.booleans(), label="cut"):
        del bad[data.draw(st.integers(0, len(bad) - 1)) :]
    else:
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    path = folder / "b.tgz"
    path.write_bytes(gzip.compress(bad) if plain else bad)
    # A byte of the content may differ unnoticed: that is what the checksum of the archive is for.
    with suppress(DsakvError):
        assert set(read(path)[0]) == {WANTED}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5), indent=st.none() | st.integers(0, 2))
def test_rows_of_an_array(
    rows: list[dict[str, object]], indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    # Half of a surrogate pair is no text that a file can hold.
    text = json.dumps(rows, indent=indent, ensure_ascii=False).encode("utf-8", "ignore")
    path.write_bytes(text)
    lines = list(array_rows(path, "a.json"))
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    assert [json.loads(line) for line in lines] == json.loads(text)


def test_values_stay_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[ {"a" : 1.0e400, "a": 12345678901234567890123, "b": "\\u00e9 \\ud83d\\ude00"} ]')
    assert list(array_rows(path, "a.json")) == [
        b'{"a":1.0e400,"a":12345678901234567890123,"b":"\\u00e9 \\ud83d\\ude00"}\n'
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.json is empty"),
        (b'{"a": 1}', "a.json is no JSON array: Expected `array`, got `object`"),
        (b'[{"a": 1}', "a.json is no JSON array: Input data was truncated"),
        (b'[{"a": 1}] more', "a.json is no JSON array"),
        (b'{"a": 1}\n{"a": 2}\n', "a.json is no JSON array"),
        (b'[{"a": 1}, 2]', "a.json: row 1 is no JSON object"),
        (b'[{"a": "\xff"}]', "a.json: row 0 is no UTF-8"),
    ],
)
def test_what_is_no_array_of_objects(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(array_rows(tmp_path / "a.json", "a.json"))
    assert caught.value.message.startswith(message)


COLUMNS = ("Timestamp", "Request tokens")
HEADER = b"Timestamp,Model,Request tokens\n"


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (HEADER + b"5,GPT-4,12\n6,x,3\n", [HEADER, b"5,GPT-4,12\n", b"6,x,3\n"]),
        (b"\xef\xbb\xbf" + HEADER + b"5,GPT-4,12", [HEADER, b"5,GPT-4,12\n"]),
        (HEADER + b'5,"a\nb,c",12\n\n6,x,3\n', [HEADER, b'5,"a\nb,c",12\n', b"6,x,3\n"]),
        (HEADER.replace(b"\n", b"\r\n") + b"5,a,1\r\n", [HEADER.replace(b"\n", b"\r\n"), b"5,a,1\r\n"]),
        (HEADER, [HEADER]),
    ],
    ids=["plain", "mark and no end", "quoted and empty lines", "other line ends", "no rows"],
)
def test_rows_of_csv(content: bytes, rows: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert list(csv_rows(tmp_path / "a.csv", "a.csv", COLUMNS)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.csv has no column Timestamp, Request tokens; its first line is nothing"),
        (b"5,ChatGPT,472\n", "a.csv has no column Timestamp, Request tokens; its first line is 5,ChatGPT,472"),
        (HEADER + b"5,a\n", "a.csv:2: 2 fields where the header has 3"),
        (HEADER + b'5,"a,1\n', "a.csv is no CSV"),
        (HEADER + b"5,\xff,1\n", "a.csv is no CSV"),
    ],
)
def test_what_is_no_csv(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(csv_rows(tmp_path / "a.csv", "a.csv", COLUMNS))
    assert caught.value.message.startswith(message)
