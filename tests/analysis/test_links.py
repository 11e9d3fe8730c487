"""Links: the formula, what lies between its tables, files, and the fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsakv.analysis.links import Link, LinkProfile, Pool, at_size, load_links, profile_json, read_profile
from dsakv.analysis.links_fit import Batch, errors, fit_link
from dsakv.analysis.nominal_links import NOMINAL
from dsakv.errors import InputError

SIZES = (1536, 24576, 98304, 400_000)
LINK = Link(12.0, ((1536, 0.25),), ((1536, 2.0), (24576, 8.0), (400_000, 11.0)))
FINE: dict[str, Any] = {"batch_us": 1.0, "op_us": [[1, 0.5]], "gb_s": [[1, 2.0]]}


def batches(link: Link, noise: float = 0.0) -> list[Batch]:
    rng = np.random.default_rng(4)
    return [
        Batch(size, n, float(link.batches_us(np.array([n]), size)[0]) * float(np.exp(noise * rng.standard_normal())))
        for size in SIZES
        for n in (1, 2, 8, 32, 128)
    ]


def test_a_batch_pays_once_a_block_each_time_and_nothing_costs_nothing() -> None:
    link = Link(10.0, ((1, 0.5),), ((1, 2.0),))
    assert link.block_us(4000) == 0.5 + 2.0
    assert link.batches_us(np.array([0, 1, 7]), 4000).tolist() == [0.0, 12.5, 27.5]


def test_values_between_sizes_lie_on_a_line_over_the_logarithm_and_end_where_the_table_does() -> None:
    table = ((100, 1.0), (10_000, 3.0))
    assert [at_size(table, size) for size in (1, 100, 1000, 10_000, 1 << 30)] == pytest.approx([1, 1, 2, 3, 3])


def test_the_fit_finds_the_costs_again() -> None:
    link = Link(12.0, ((1536, 0.25),), tuple((size, 2.0 + place) for place, size in enumerate(SIZES)))
    found = fit_link(batches(link))
    assert found.batch_us == pytest.approx(12.0)
    for size in SIZES:
        assert found.block_us(size) == pytest.approx(link.block_us(size))
    assert abs(errors(found, batches(link))).max() < 1e-9


def test_the_fit_stands_noise_and_no_term_is_negative() -> None:
    found = fit_link(batches(LINK, noise=0.1))
    for size in SIZES:
        assert found.block_us(size) == pytest.approx(LINK.block_us(size), rel=0.15)
    # Batches that get cheaper than in proportion, down to less than nothing at none, have no cost of their own.
    odd = fit_link([Batch(4096, n, 3.0 * n - 2.0) for n in (1, 4, 16)])
    assert odd.batch_us == 0.0
    assert odd.block_us(4096) > 0


def test_the_fit_is_the_best_there_is() -> None:
    """No small change of what it found comes nearer."""
    seen = batches(LINK, noise=0.3)
    found = fit_link(seen)
    times = [found.block_us(size) for size in SIZES]

    def loss(batch_us: float, block_us: list[float]) -> float:
        told = [batch_us + one.blocks * block_us[SIZES.index(one.block_bytes)] for one in seen]
        return sum((t / one.us - 1) ** 2 for t, one in zip(told, seen, strict=True))

    best = loss(found.batch_us, times)
    for factor in (0.99, 1.01):
        assert loss(found.batch_us * factor, times) >= best
        for place in range(len(SIZES)):
            moved = [time * (factor if place == i else 1) for i, time in enumerate(times)]
            assert loss(found.batch_us, moved) >= best


def test_one_size_alone_can_be_fitted() -> None:
    found = fit_link([Batch(4096, n, 5.0 + 2.0 * n) for n in (1, 10, 100)])
    assert (found.batch_us, found.block_us(4096)) == pytest.approx((5.0, 2.0))
    with pytest.raises(ValueError, match="batches"):
        fit_link([])


def test_names_of_links() -> None:
    alone = load_links("pcie5")
    assert (alone.tiers, alone.measured) == (("local_pool",), False)
    both = load_links("pcie4+rdma-400g")
    assert both.tiers == ("local_pool", "remote_pool")
    assert both.pool("remote_pool") == NOMINAL["rdma-400g"]
    assert both.name == "pcie4+rdma-400g"


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = LinkProfile("mine", Pool(LINK, LINK), Pool(LINK, LINK), LINK, measured=True)
    path = tmp_path / "links.json"
    path.write_bytes(profile_json(profile, machine="here", points=[]))
    assert read_profile(path) == load_links(str(path)) == profile
    assert load_links(f"pcie5+{path}").pool("remote_pool") == profile.remote_pool


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pcie6", "there is no link profile pcie6"),
        ("pcie5+", "names no link"),
        ("a+b+c", "names no link"),
        ("missing.json", "cannot read link profile missing.json: No such file"),
    ],
)
def test_links_that_are_not(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        load_links(text)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "\xff",
        json.dumps({"name": "x"}),
        json.dumps({"name": "x", "local_pool": {"read": FINE}}),
        json.dumps({"name": "x", "local_pool": {"read": FINE, "write": FINE | {"batch_us": -1.0}}}),
        json.dumps({"name": "x", "local_pool": {"read": FINE, "write": FINE | {"gb_s": []}}}),
        json.dumps({"name": "x", "local_pool": {"read": FINE, "write": FINE | {"gb_s": [[1, 0.0]]}}}),
        json.dumps({"name": "x", "local_pool": {"read": FINE, "write": FINE | {"op_us": [[5, 1.0], [5, 1.0]]}}}),
        "[" * 100_000,
    ],
)
def test_files_that_are_no_profiles(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="is no link profile"):
        load_links(str(path))
