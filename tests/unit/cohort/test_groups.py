"""Groups: who hears of what, and what the run's leader makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gms_launch.cohort import census
from gms_launch.cohort.failover import fold
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import EventRecord, RunRecord
from gms_launch.control.keys import Keys, Range

RECORD = RunRecord("r", "", "", "", 0.0)
SIZE = 8


def group(redundancy: str = "", failed: str = "", exit_code: int = 1) -> RunRecord:
    return replace(RECORD, redundancy=redundancy, failed=failed, exit_code=exit_code if failed else 0)


def covers(ranges: list[Range], key: str) -> int:
    """How often a change of a key is sent to one who follows these."""
    return sum(key == r.first if not r.end else r.first <= key < r.end for r in ranges)


def heard(groups: int) -> list[int]:
    """How many agents hear of each write of a failover in g1, in a run of so many groups of `SIZE` nodes."""
    run, names = Keys("r"), [f"g{k}" for k in range(groups)]
    agents = []
    for k, keys in enumerate(Keys("r", n) for n in names):
        for rank in range(SIZE):
            own = run.over_all() if k == rank == 0 else run.everywhere()
            agents.append(list(dict.fromkeys(own + (keys.led() if rank == 0 else keys.followed(2)))))
    g1 = Keys("r", "g1")
    written = [g1.life_ended(0, 1), *(g1.rank(0, r) for r in range(SIZE)), g1.cohort(0), g1.run, run.event(1, 9, 1)]
    return [sum(min(1, covers(a, key)) for a in agents) for key in written]


def test_a_failover_is_heard_of_by_its_own_group_however_many_there_are() -> None:
    few = heard(2)
    assert few[0] == SIZE, "that a life has ended, by every node of the group"
    assert few[1:9] == [SIZE, *[1] * (SIZE - 1)], "other records of ranks by its leader alone"
    assert heard(128) == few


def test_a_group_has_keys_of_its_own_and_a_run_without_those_of_before() -> None:
    assert Keys("r").cohort(1) == "/gms-launch/r/desired/cohorts/1" and Keys("r").run == "/gms-launch/r/run"
    a, b = Keys("r", "a"), Keys("r", "a1")
    assert not covers(a.led(), b.rank(0, 0)) and not covers(a.led(), b.run)
    assert a.events == Keys("r").events and a.peers == Keys("r").peers


@pytest.mark.parametrize(
    ("groups", "number", "expected"),
    [
        ({"a": group("full")}, 2, None),
        ({"a": group("full"), "b": group("none")}, 2, Redundancy.NONE),
        ({"a": group("full"), "b": group("full")}, 2, Redundancy.FULL),
        ({"a": group("full"), "b": group("full", "gone")}, 2, Redundancy.DOWN),
    ],
)
def test_a_run_is_as_redundant_as_its_worst_group(
    groups: dict[str, RunRecord], number: int, expected: Redundancy | None
) -> None:
    assert census.redundancy(groups, number) is expected


def test_a_run_ends_when_too_few_groups_are_left() -> None:
    groups = {"a": group("full"), "b": group(failed="node 3 was lost", exit_code=4), "c": group("full")}
    assert census.too_few(groups, 3, 1, up=True) == ("", 0)
    assert census.too_few(groups, 3, 2, up=True) == ("", 0)
    why, code = census.too_few(groups, 3, 3, up=True)
    assert code == 4 and why == "2 groups of 3 can still serve, and 3 must (--min-groups); group b: node 3 was lost"
    assert census.too_few(groups, 3, 1, up=False) == ("group b: node 3 was lost", 4), "a start that failed"
    assert census.too_few({"a": group("full")}, 3, 3, up=False) == ("", 0)


def event(time: float, kind: str, group: str, cohort: int, node: int = 0, **data: object) -> EventRecord:
    return EventRecord(time, node, kind, cohort, 1, data=data, group=group)


def test_two_groups_that_fail_over_at_once_are_told_apart() -> None:
    events = [
        event(0.0, "group_formed", "a", -1, nodes=1),
        event(0.0, "group_formed", "b", -1, nodes=2),
        event(1.0, "exit", "a", 0, role="primary"),
        event(1.1, "exit", "b", 0, role="primary"),
        event(1.2, "fenced", "a", 0),
        event(1.2, "fenced", "b", 0, 2),
        event(1.3, "lock", "b", 1),
        event(1.4, "lock", "a", 1),
        event(1.5, "first_token", "b", 1),
    ]
    a, b = fold(events, nnodes=4)
    assert (a.group, b.group) == ("a", "b") and a.victim == b.victim
    assert "fenced" in a.steps and "fenced" not in b.steps, "each by the nodes that it has"
    assert a.steps["lock"] == pytest.approx(0.4) and "first_token" not in a.steps
    assert b.steps["first_token"] == pytest.approx(0.4)


def test_a_group_is_over_whose_leading_node_stays_away() -> None:
    groups = {"a": replace(RECORD, leader=0), "b": replace(RECORD, leader=2), "c": replace(RECORD, leader=4)}
    assert census.orphans(groups, {2: 10.0, 3: 0.0}, 30.0, 39.9) == []
    assert census.orphans(groups, {2: 10.0, 3: 0.0}, 30.0, 40.0) == ["b"], "node 3 leads none"
    groups["b"] = replace(groups["b"], failed="why")
    assert census.orphans(groups, {2: 10.0}, 30.0, 40.0) == [], "it is known to be"


def test_what_says_that_a_group_is_over() -> None:
    assert census.says_over(replace(RECORD, failed="why").encode())
    assert not census.says_over(RECORD.encode()) and not census.says_over(None) and not census.says_over(b"x")
