"""A virtual clock counts work alone; a wall clock waits."""

from __future__ import annotations

import pytest

from dsakv.engine.clock import VirtualClock, WallClock
from tests.engine.fakes import FakeTime


def test_a_virtual_clock_jumps_and_stands_still_while_paused() -> None:
    time = FakeTime()
    clock = VirtualClock(ticks=time)
    time.seconds += 2
    assert clock.now() == 2
    clock.wait_until(10)
    assert clock.now() == 10
    clock.wait_until(4)
    assert clock.now() == 10
    clock.pause()
    time.seconds += 100
    assert clock.now() == 10
    clock.resume()
    time.seconds += 1
    assert clock.now() == 11
    assert time.seconds == 103  # nobody waited


def test_a_jump_arrives_whatever_is_rounded() -> None:
    for begin in (0.1, 12345.678, 1e9 / 3):
        for target in (1e-9, 1 / 3, 1e9 - 1e-7, 1e15 / 7):
            time = FakeTime()
            time.seconds = begin
            clock = VirtualClock(ticks=time)
            clock.wait_until(target)
            assert clock.now() >= target


def test_no_sleep_is_longer_than_systems_take() -> None:
    time = FakeTime()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        time.sleep(seconds)

    WallClock(ticks=time, sleep=sleep).wait_until(10_000)
    assert max(naps) == 3600
    assert sum(naps) == 10_000


def test_a_clock_may_start_later() -> None:
    time = FakeTime()
    for clock in (VirtualClock(40, time), WallClock(40, time, time.sleep)):
        time.seconds += 1
        assert clock.now() == 41
        time.seconds -= 1


def test_a_wall_clock_sleeps_until_it_is_time() -> None:
    time = FakeTime()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        time.sleep(min(seconds, 3))  # a sleep may end early

    clock = WallClock(ticks=time, sleep=sleep)
    time.seconds += 1
    clock.wait_until(8)
    assert clock.now() == 8
    assert naps == pytest.approx([7, 4, 1])
    clock.pause()
    time.seconds += 5
    clock.resume()
    clock.wait_until(9)
    assert clock.now() == 13
