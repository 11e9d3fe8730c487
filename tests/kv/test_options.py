"""Sizes as users give them, and what they come to."""

from __future__ import annotations

from typing import Any

import pytest

from dsakv.errors import InputError
from dsakv.kv.options import Amount, TierOptions


def parse(text: str) -> Amount:
    return Amount.parse(text, "--kv-hot-capacity")


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("1", 1),
        ("64", 64),
        ("5000", 100),  # no more than there are
        ("0.25", 25),
        ("1.0", 100),
        ("0.001", 1),
        ("12000B", 3),
        ("12kB", 3),
        ("1MiB", 100),
        ("16 KiB", 4),
        ("0.02 MB", 5),
    ],
)
def test_sizes_in_blocks_of_a_layer(text: str, blocks: int) -> None:
    """Of 100 blocks of 1,000 bytes in each of 4 layers."""
    assert parse(text).blocks(100, 1000, 4, "--kv-hot-capacity") == blocks


@pytest.mark.parametrize(
    "text", ["", "many", "-1", "0.5.5", "1.5", "2.0", "10 blocks", "5%", "1PB", "0.0", "nan", "1e3", "9" * 400, "٤"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--kv-hot-capacity"):
        parse(text)


@pytest.mark.parametrize("text", ["0", "3999B", "0MB"])
def test_a_tier_without_room_for_a_block_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="less than a block in each layer"):
        parse(text).blocks(100, 1000, 4, "--kv-hot-capacity")


@pytest.mark.parametrize(
    ("options", "local", "home"),
    [
        ({}, 100, "local_pool"),
        ({"local": parse("100")}, 100, "local_pool"),
        ({"remote": "redis://h"}, 0, "remote_pool"),
        ({"remote": "redis://h", "local": parse("0.1")}, 10, "remote_pool"),
    ],
)
def test_what_host_memory_holds(options: dict[str, Any], local: int, home: str) -> None:
    tiers = TierOptions(hot=parse("0.5"), **options).resolve(100, 1000, 4)
    assert (tiers.hot_blocks, tiers.local_blocks, tiers.home) == (50, local, home)


def test_a_host_that_cannot_hold_all_needs_a_remote_pool() -> None:
    with pytest.raises(InputError, match=r"--kv-local 0\.5 holds 50 blocks of each layer; 100 may be in use"):
        TierOptions(hot=parse("0.5"), local=parse("0.5")).resolve(100, 1000, 4)
