"""Records come out of the store as they went in, and a failover's steps are read from its events."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from gms_launch.cohort.failover import fold
from gms_launch.cohort.model import Phase
from gms_launch.cohort.records import (
    DesiredCohort,
    EventRecord,
    GmsStatus,
    NodeRecord,
    RankRecord,
    RecordError,
    Wanted,
)
from gms_launch.observe import views

NODE = NodeRecord(0, "h", "127.0.0.1", "b", 1, 2, ("GPU-x",), gms=(GmsStatus(0, "GPU-x", "weights", "RO"),))
RANK = RankRecord(0, 0, 1, Phase.ACTIVE, 10, 10, 99, 5.0, leftovers=(7,))


@pytest.mark.parametrize(
    "record", [NODE, RANK, DesiredCohort(0, 1, Wanted.DEAD, 1), EventRecord(1.5, 0, "x", data={"a": 1})]
)
def test_records_survive_the_store(record: object) -> None:
    assert type(record).decode(record.encode()) == record  # type: ignore[attr-defined]


def test_a_newer_writers_fields_are_passed_over() -> None:
    assert RankRecord.decode(RANK.encode()[:-1] + b',"colour":"red"}') == RANK


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"x", "RankRecord: JSON is malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `cohort_id`"),
        (
            b'{"cohort_id":"0","node_rank":0,"incarnation":1,"phase":"active"}',
            "Expected `int`, got `str` - at `.\\.cohort_id`",
        ),
        (b'{"cohort_id":0,"node_rank":0,"incarnation":1,"phase":"flying"}', "Invalid enum value 'flying'"),
    ],
)
def test_garbage_is_named(data: bytes, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        RankRecord.decode(data)


def test_zero_is_the_earliest_sign_of_the_fault() -> None:
    killed_outside = [
        event(1.0, "lock", 0, 1),
        event(10.0, "lock", 1, 1),
        event(10.04, "awake", 1, 1),
        event(10.2, "exit", 0, 1, role="primary"),
        event(10.3, "dead", 0, 1),
        event(10.5, "first_token", 1, 1, token_after=7.5),
    ]
    (found,) = fold(killed_outside)
    assert (found.zero, found.time) == ("lock", 10.0), "it had the lock before the death was seen: nothing is cut to 0"
    assert {k: round(v, 3) for k, v in found.steps.items()} == {
        "detected": 0.2,
        "dead": 0.3,
        "lock": 0.0,
        "awake": 0.04,
        "first_token": 0.5,
    }
    assert found.silence == 3.0 and found.to_json()["silence_at_most"] == 3.0
    direct = found.killed_at(9.9)
    assert (direct.zero, direct.time) == ("kill", 9.9) and round(direct.steps["first_token"], 3) == 0.6
    for impossible in (10.1, 3.0, 9.9 - 3600):
        assert found.killed_at(impossible) is found, "the clock of whoever killed is another one"
    seen_first = [*killed_outside[:1], event(9.9, "exit", 0, 1, role="primary"), *killed_outside[1:3]]
    (found,) = fold(seen_first)
    assert (found.zero, found.silence) == ("exit", None) and found.to_json()["silence_at_most"] is None
    (found,) = fold([*killed_outside[:1], event(9.8, "kill", 0, 1, role="primary"), *killed_outside[1:]])
    assert found.zero == "kill" and round(found.steps["detected"], 3) == 0.4
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(views.failover(found))
    assert "0 ms: gms-launch sent SIGKILL\n" in console.export_text()
    console.print(views.failover(replace(found, kind="node_lost")))
    assert "SIGKILL; nothing had been heard of the node for its lease by then" in console.export_text()


def test_a_failover_while_the_agent_stood_still_tells_no_gap() -> None:
    events = [
        event(30.0, "exit", 0, 1, role="primary"),
        event(30.04, "lock", 1, 1),
        event(30.4, "first_token", 1, 1),
        event(30.5, "hold_over", 0, 1, connections=3, moves=2, lost=0),
        event(50.0, "parked", 0, 2),
    ]
    (well,) = fold(events)
    assert well.gap is not None and well.lost == 0 and well.to_json()["agent_stood_still"] is None
    (found,) = fold([*events, event(30.01, "stood_still", -1, 0, seconds=20.0)])
    assert found.gap is None and found.lost is None and found.held == 3
    assert found.to_json()["agent_stood_still"] == {"seconds": 20.0, "until": 30.01}
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(views.failover(found))
    text = console.export_text()
    assert (
        "stood still for 20 s until" in text and "next token" not in text and "lost, by the frontend: not known" in text
    )
    for until, seconds in ((29.9 - 1, 8.0), (49.9, 10.0), (50.1, 10.0)):
        (other,) = fold([*events, event(until, "stood_still", -1, 0, seconds=seconds)])
        assert other.stood_still is None, "before it, or in the start of the next life"


def event(
    time: float, kind: str, cohort: int, life: int, node: int = 0, detail: str = "", **data: object
) -> EventRecord:
    return EventRecord(time, node, kind, cohort, life, detail, data=data)


def test_a_failover_from_its_events() -> None:
    events = [
        event(1.0, "lock", 0, 1),
        event(10.0, "kill", 0, 1, role="primary"),
        event(10.01, "exit", 0, 1, role="primary"),
        event(10.02, "dead", 0, 1),
        event(10.1, "lock", 1, 1),
        event(10.03, "fenced", 0, 1),
        event(10.2, "awake", 1, 1),
        event(10.3, "registered", 1, 1),
        event(10.4, "first_token", 1, 1),
        event(11.0, "parked", 0, 2),
        event(20.0, "exit", 0, 2, role="shadow"),
    ]
    (found,) = fold(events)
    assert found.victim == (0, 1) and found.promoted == (1, 1) and found.complete
    expected = {"detected": 0.01, "dead": 0.02, "fenced": 0.03, "lock": 0.1, "awake": 0.2, "first_token": 0.4}
    assert {k: round(found.steps[k], 6) for k in expected} == expected
    assert round(found.steps["rearmed"], 6) == 1.0


def test_a_lock_that_was_seen_before_the_death() -> None:
    events = [
        event(1.0, "lock", 0, 1),
        event(2.0, "parked", 1, 1),
        event(9.999, "lock", 1, 1),
        event(10.0, "exit", 0, 1, role="primary"),
        event(10.2, "first_token", 1, 1),
        event(10.5, "parked", 0, 2),
        event(11.0, "exit", 1, 1, role="primary"),
        event(11.1, "lock", 0, 2),
    ]
    first, second = fold(events)
    assert first.promoted == (1, 1) and first.complete
    assert first.steps["lock"] == 0.0
    assert second.promoted == (0, 2)


def test_a_kill_that_followed_from_another_is_not_the_cause_although_it_bears_the_earlier_time() -> None:
    followed = event(10.0, "kill", 0, 1, role="primary", detail="a rank of the same life ended: rank 2")
    for kind, why, is_ in (("kill", "drill", "drill"), ("kill", "hung: no answer", "hung"), ("exit", "code 7", "exit")):
        root = event(10.01, kind, 0, 1, node=2, role="", detail=why)
        elsewhere = event(10.005, "exit", 0, 1, node=1, role="", detail="killed by SIGKILL")
        (found,) = fold([followed, elsewhere, root])
        assert (found.cause, found.kind, found.time) == (why, is_, 10.0)


def test_dead_is_when_the_last_node_says_so() -> None:
    events = [event(0.0, "exit", 0, 1, role="primary"), event(0.1, "dead", 0, 1), event(0.3, "dead", 0, 1, node=1)]
    (found,) = fold(events, nnodes=2)
    assert found.steps["dead"] == 0.3
    (half,) = fold(events[:2], nnodes=2)
    assert "dead" not in half.steps
