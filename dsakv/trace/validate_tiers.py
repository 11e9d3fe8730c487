"""What a trace says of the tiers, checked from the records alone: the part of :mod:`dsakv.trace.validate` on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from dsakv.request import TIERS
from dsakv.trace import schema

Check = Callable[[str, bool, str, str], None]
"""Counts a check by its name, or raises InputError: name, whether it is right, the place, what is wrong."""


class TierChecks:
    """``kv_fetch`` of every record and what follows from all of them."""

    def __init__(self, check: Check, block_size: int, store_block_ids: bool) -> None:
        self._check, self._block_size, self._store_block_ids = check, block_size, store_block_ids
        self._row_bytes: int | None = None
        self._totals: dict[str, Counter[str]] = {name: Counter() for name in TIERS}

    def record(self, place: str, record: dict[str, Any]) -> None:
        """The tiers share the record's rows and blocks among them; one that was not used says so."""
        tiers = record["kv_fetch"]
        fields = {**schema.TIER, "hit_block_ids": (list,)} if self._store_block_ids else schema.TIER
        self._check("kv_fetch", list(tiers) == list(TIERS), place, f"kv_fetch holds {list(tiers)}")
        for name, tier in tiers.items():
            where = f"{place}, {name}"
            schema.check(where, tier, fields)
            figures = ("hit_blocks", "bytes_read", "read_ops", "batch_size")
            numbers = [tier[key] for key in figures]
            self._totals[name].update({key: tier[key] for key in figures[:3]})
            if tier["hit_blocks"] == 0:
                unused = not any(numbers) and tier["latency_us"] is None
                self._check("kv_fetch", unused, where, "an unused tier has figures")
                continue
            used = min(numbers) > 0 and tier["latency_us"] is not None and tier["latency_us"] >= 0
            self._check("kv_fetch", used, where, "a used tier lacks figures")
            rows = tier["read_ops"]
            if name != "hbm":
                whole = tier["read_ops"] == tier["hit_blocks"]
                self._check("kv_fetch", whole, where, "read_ops are not the blocks found: whole blocks are moved")
                rows *= self._block_size
            self._row_bytes = self._row_bytes or tier["bytes_read"] // rows
            same = tier["bytes_read"] == rows * self._row_bytes
            self._check("kv_fetch", same, where, f"bytes_read is not {rows} rows of {self._row_bytes} bytes")
        blocks = sum(tier["hit_blocks"] for tier in tiers.values())
        self._check("kv_fetch", blocks == record["unique_blocks"], place, "hit_blocks are not the touched blocks")
        hbm = tiers["hbm"]
        elsewhere = record["unique_token_pos_count"] - hbm["read_ops"]  # selected rows in blocks of the pools
        for found, rows in ((hbm["hit_blocks"], hbm["read_ops"]), (blocks - hbm["hit_blocks"], elsewhere)):
            fits = found <= rows <= found * self._block_size
            self._check("kv_fetch", fits, place, f"read_ops: {rows} selected rows cannot lie in {found} blocks")
        if self._store_block_ids:
            self._block_ids(place, record)

    def _block_ids(self, place: str, record: dict[str, Any]) -> None:
        """Each touched block was found in one tier."""
        tiers = record["kv_fetch"]
        for name, tier in tiers.items():
            ids = tier["hit_block_ids"]
            right = all(type(block) is int for block in ids) and all(a < b for a, b in pairwise(ids))
            where = f"{place}, {name}"
            self._check("kv_fetch", right, where, "hit_block_ids are not ascending and unique integers")
            self._check("kv_fetch", len(ids) == tier["hit_blocks"], where, "hit_block_ids are not hit_blocks")
        found = sorted(block for tier in tiers.values() for block in tier["hit_block_ids"])
        same = found == record["selected_block_ids"]
        self._check("kv_fetch", same, place, "hit_block_ids are not the touched ones")

    def rows(self, place: str, record: dict[str, Any], per_block: Counter[int]) -> None:
        """The device's share of the selected rows, of which each touched block holds ``per_block``."""
        hbm = record["kv_fetch"]["hbm"]
        if self._store_block_ids:
            rows = sum(per_block[block] for block in hbm["hit_block_ids"])
            self._check("kv_fetch", rows == hbm["read_ops"], place, f"read_ops of hbm are not the {rows} rows there")
            return
        sizes = sorted(per_block.values())
        least, most = sum(sizes[: hbm["hit_blocks"]]), sum(sizes[len(sizes) - hbm["hit_blocks"] :])
        fits = least <= hbm["read_ops"] <= most
        self._check("kv_fetch", fits, place, "read_ops of hbm: no choice of the touched blocks holds so many rows")

    def summary(self, place: str, found: dict[str, Any] | None) -> None:
        """``kv_tiers``: ``records`` are those of the trace; ``transfers`` agree with themselves, as ``decode`` does."""
        blocks = sum(total["hit_blocks"] for total in self._totals.values())
        if found is None:
            alone = blocks == self._totals["hbm"]["hit_blocks"]
            self._check("summary", alone, place, "kv_tiers is missing, but blocks were found in other tiers than hbm")
            return
        schema.check(f"{place}, kv_tiers", found, schema.KV_TIERS, schema.KV_TIERS_OPTIONAL)
        figures = ("hit_blocks", "bytes_read", "read_ops")
        for name, total in self._totals.items():
            expected: dict[str, Any] = {figure: total[figure] for figure in figures}
            expected["hit_rate"] = total["hit_blocks"] / blocks if blocks else None
            right = found["records"].get(name) == expected
            self._check("summary", right, place, f"kv_tiers.records.{name} is not {expected}")
        self._check("summary", set(found["records"]) == set(TIERS), place, "kv_tiers.records holds other tiers")
        self._check(
            "summary", ("transfers" in found) == ("decode" in found), place, "kv_tiers lacks transfers or decode"
        )
        if "transfers" in found:
            self._transfers(place, dict(found["transfers"]), found["decode"])

    def _transfers(self, place: str, transfers: dict[str, Any], decode: dict[str, Any]) -> None:
        since = transfers.pop("since_resume", True)
        known = since is True and set(transfers) <= {"prefill", "warm_up", "scoring", "decode"}
        self._check("summary", known, place, f"kv_tiers.transfers holds {list(transfers)}")
        for phase, tiers in transfers.items():
            where = f"{place}, kv_tiers.transfers.{phase}"
            right = isinstance(tiers, dict) and set(tiers) <= set(TIERS)
            self._check("summary", right, where, "other tiers than there are")
            for name, tier in tiers.items():
                schema.check(f"{where}.{name}", tier, schema.TRANSFER)
                counts = all(value is None or value >= 0 for value in tier.values()) and tier["cold"] <= tier["hits"]
                self._check("summary", counts, f"{where}.{name}", "counts are negative, or cold ones more than all")
                for verb, size in (("read", "bytes_read"), ("write", "bytes_written")):
                    moved, ms, rate = tier[f"{verb}s"], tier[f"{verb}_ms"], tier[f"{verb}_gb_s"]
                    if moved and ms:
                        same = rate is not None and math.isclose(rate, tier[size] / ms / 1e6, rel_tol=1e-9)
                    else:
                        same = rate is None and (moved or not (tier[f"{verb}_ops"] or tier[size] or ms))
                    self._check("summary", bool(same), f"{where}.{name}", f"{verb}_gb_s is {rate}")
        schema.check(f"{place}, kv_tiers.decode", decode, schema.HIT_RATES)
        hits = Counter({name: tier["hits"] for name, tier in transfers.get("decode", {}).items()})
        cold = sum(tier["cold"] for tier in transfers.get("decode", {}).values())
        for rate, left_out in (("hit_rate", 0), ("hit_rate_without_cold", cold)):
            every = sum(hits.values()) - left_out
            expected = hits["hbm"] / every if every else None
            self._check("summary", decode[rate] == expected, place, f"kv_tiers.decode.{rate} is not {expected}")


def check_kv_blocks(check: Check, place: str, entry: dict[str, Any], block_size: int) -> None:
    """The blocks of a finished request hold all of its tokens; traces of older versions do not name them."""
    runs = entry.get("kv_blocks")
    if runs is None:
        return
    right = all(type(run) is list and len(run) == 2 and _counts(run) and run[1] > 0 for run in runs)
    check("requests", right, place, "kv_blocks does not hold pairs of a block and how many from it on")
    tokens, blocks = entry["prompt_tokens"] + entry["decode_steps"], sum(count for _, count in runs)
    enough = blocks * block_size >= tokens
    check("requests", enough, place, f"kv_blocks: {blocks} blocks do not hold {tokens} tokens")
    apart = all(a + count <= b for (a, count), (b, _) in pairwise(sorted(runs)))
    check("requests", apart, place, "kv_blocks names a block twice")


def _counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
