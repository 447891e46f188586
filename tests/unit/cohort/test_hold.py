"""When a dead primary's requests are held, handed on and given up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gms_launch.cohort.hold import QUIET, TURNING, Act, Around, judge
from gms_launch.process.listener import advertised

DEAD = Around(begun=100.0, now=100.0, promotion_timeout=20.0)
SHADOW = replace(DEAD, candidate=True)
TAKEN = replace(SHADOW, successor=True, successor_since=101.0, now=101.0)


def test_held_until_the_shadow_is_there_or_late() -> None:
    verdict = judge(SHADOW)
    assert verdict.act is Act.HOLD and verdict.look_at == 120.0
    assert judge(replace(SHADOW, now=119.9)).act is Act.HOLD
    late = judge(replace(SHADOW, now=120.0))
    assert late.act is Act.CLOSE and "20 s (promotion_timeout)" in late.why


def test_a_promotion_that_fails_gives_the_next_shadow_its_own_time() -> None:
    verdict = judge(replace(SHADOW, now=125.0, candidate_since=118.0))
    assert verdict.act is Act.HOLD and verdict.look_at == 138.0


def test_nothing_is_held_for_nobody() -> None:
    verdict = judge(DEAD)
    assert verdict.act is Act.CLOSE and verdict.why == "no shadow is parked"


def test_a_cold_start_is_waited_for_as_long_as_one_wants() -> None:
    cold = replace(DEAD, cold_start=5.0)
    assert judge(cold).act is Act.HOLD and judge(cold).look_at == 105.0
    assert judge(replace(cold, now=103.0, candidate=True)).act is Act.HOLD, "it has parked meanwhile"
    late = judge(replace(cold, now=105.0))
    assert late.act is Act.CLOSE and "5 s (hold_cold_start)" in late.why


def test_the_dead_lease_stands_until_every_frontend_was_seen_to_ask_the_successor() -> None:
    verdict = judge(replace(TAKEN, now=101.0 + 10 * QUIET))
    assert verdict.act is Act.TURN_AWAY and not verdict.forget, "one has not, however quiet it is"
    seen = replace(TAKEN, now=111.0, seen=111.0)
    assert judge(seen).act is Act.TURN_AWAY and judge(seen).forget
    assert judge(replace(seen, now=111.0 + QUIET)).act is Act.CLOSE
    assert judge(replace(seen, now=111.0 + QUIET, knocked=111.5)).act is Act.TURN_AWAY, "it had been on its way"


def test_a_frontend_that_never_sees_the_successor_is_not_waited_for_for_ever() -> None:
    assert judge(replace(TAKEN, now=100.9 + TURNING, knocked=100.9 + TURNING)).act is Act.TURN_AWAY
    verdict = judge(replace(TAKEN, now=101.0 + TURNING, knocked=101.0 + TURNING))
    assert verdict.act is Act.CLOSE and verdict.forget


def test_the_next_one_dies_while_they_are_turned_away() -> None:
    """What it was sent is held by its own hold; this one waits again for a successor."""
    assert judge(replace(TAKEN, successor=False)).act is Act.HOLD


@pytest.mark.parametrize("around", [SHADOW, TAKEN, replace(DEAD, cold_start=5.0)])
def test_a_run_that_stops_holds_nobody(around: Around) -> None:
    assert judge(replace(around, stopping=True)).act is Act.CLOSE


@pytest.mark.parametrize(
    ("record", "where"),
    [
        (b'{"transport": {"tcp": "10.0.0.1:37203/bb5a/generate"}}', ("10.0.0.1", 37203)),
        (b'{"transport": {"tcp": "[fd00::1]:37203/bb5a/generate"}}', ("fd00::1", 37203)),
        (b'{"transport": {"nats_tcp": "subject"}}', None),
        (b'{"transport": {"tcp": "10.0.0.1"}}', None),
        (b'{"transport": {"tcp": "10.0.0.1:port/x"}}', None),
        (b"[]", None),
        (b"\xff", None),
    ],
)
def test_where_an_instance_takes_requests(record: bytes, where: tuple[str, int] | None) -> None:
    assert advertised(record) == where
