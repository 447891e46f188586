"""When a service's connections are gone through for those of other users."""

from __future__ import annotations

import os
import time

import pytest

from gms_launch.process import listener
from gms_launch.process.listener import TakeError
from gms_launch.services import crowd
from gms_launch.services.crowd import AGAIN, CROWD, Crowd


def test_who_comes_again_is_turned_out_again_and_ones_own_are_not_gone_through_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, theirs, looks = [0], [0], [0]

    def turn_out(pid: int, ports: object) -> int:
        looks[0] += 1
        return theirs[0]

    monkeypatch.setattr(listener, "turn_out", turn_out)
    monkeypatch.setattr(crowd, "_descriptors", lambda _: held[0])
    one = Crowd("x", (1,))
    held[0] = CROWD - 1
    assert one.look(os.getpid()) == "" and looks == [0]
    held[0], theirs[0] = 4000, 2000  # and as many of the service's own beside them, which go with them
    assert one.look(os.getpid()) == "2000 connections of other users of this machine to port 1 ended"
    assert one.look(os.getpid()) == "" and looks == [2], "again, and told a moment ago"
    theirs[0] = 0
    for _ in range(3):
        one.look(os.getpid())
    assert looks == [3], "these are our own"
    held[0], theirs[0] = 8000, 4000
    one.look(os.getpid())
    assert looks == [4]


def test_a_crowd_that_the_service_ended_itself_at_that_very_moment_is_found_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, theirs = [1000.0], [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(listener, "turn_out", lambda pid, ports: theirs[0])
    monkeypatch.setattr(crowd, "_descriptors", lambda _: 400)
    one = Crowd("x", (1,))
    assert one.look(os.getpid()) == ""
    theirs[0] = 390
    now[0] += AGAIN
    assert one.look(os.getpid()).startswith("390 connections of other users")


def test_a_look_that_failed_is_not_the_last_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails: list[Exception] = [TakeError("process 7: No such process"), TimeoutError("timed out")]

    def turn_out(pid: int, ports: object) -> int:
        if fails:
            raise fails.pop(0)
        return 1

    monkeypatch.setattr(listener, "turn_out", turn_out)
    monkeypatch.setattr(crowd, "_descriptors", lambda _: CROWD)
    one = Crowd("x", (1,))
    assert [one.look(os.getpid()) for _ in range(2)] == ["", ""]
    assert one.look(os.getpid()) == "1 connection of other users of this machine to port 1 ended"
    assert [record.getMessage() for record in caplog.records] == [
        "x: connections of other users cannot be ended: process 7: No such process"
    ]
