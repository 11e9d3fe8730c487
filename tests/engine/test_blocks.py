"""Every block belongs to one owner at a time, whatever comes and goes."""

from __future__ import annotations

import random

import pytest

from dsakv.engine.blocks import BlockManager, blocks_for


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_never_shared_and_never_lost(seed: int) -> None:
    rng = random.Random(seed)
    manager = BlockManager(40)
    held: list[list[int]] = []
    for _ in range(300):
        if held and rng.random() < 0.5:
            manager.release(held.pop(rng.randrange(len(held))))
            continue
        count = rng.randint(1, 12)
        used = sum(map(len, held))
        blocks = manager.allocate(count)
        if blocks is None:
            assert count > 40 - used
            continue
        assert len(blocks) == count
        held.append(blocks)
        owned = [block for group in held for block in group]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(40))
    for group in held:
        manager.release(group)
    assert manager.allocate(40) == list(range(40))


def test_adjacent_blocks_come_first() -> None:
    manager = BlockManager(10)
    first, second = manager.allocate(2), manager.allocate(3)
    assert second == [2, 3, 4]
    assert first is not None
    manager.release(first)  # free: 0 1 5 6 7 8 9
    assert manager.allocate(4) == [5, 6, 7, 8]
    assert manager.allocate(3) == [0, 1, 9]


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
