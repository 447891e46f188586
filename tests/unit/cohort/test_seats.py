"""Who takes a lost node's place, and when."""

from __future__ import annotations

from dataclasses import replace

from gms_launch.cohort import seats
from gms_launch.cohort.records import NodeRecord, SeatRecord
from gms_launch.cohort.seats import Exchange, Seen

#: Three nodes and two spares.
NODES = {r: NodeRecord(r, f"n{r}", "", "", 1, 1, origin=r) for r in range(5)}
RULES = seats.Rules(serving=3, spares=2, wait=10.0, least=3.0)


def without(*ranks: int) -> dict[int, NodeRecord]:
    return {r: n for r, n in NODES.items() if r not in ranks}


def decide(
    nodes: dict[int, NodeRecord], known: dict[int, SeatRecord], seen: Seen, now: float, *down: int
) -> list[Exchange]:
    return seats.decide(nodes, known, RULES, seats.look(nodes, known, 3, seen, now), down, now)


def lost_at(moment: float, *ranks: int) -> Seen:
    return seats.look(without(*ranks), {}, 3, Seen.nothing(), moment)


def test_nobody_moves_while_all_are_there_and_none_before_the_wait_is_over() -> None:
    assert decide(NODES, {}, Seen.nothing(), 100.0) == []
    seen = lost_at(100.0, 1)
    assert decide(without(1), {}, seen, 109.9) == []
    assert seats.next_look(seen, RULES, (), 105.0) == 110.0
    (x,) = decide(without(1), {}, seen, 110.0)
    assert (x.node_rank, x.spare) == (1, 3)
    assert x.seats == (SeatRecord(1, 3, 1), SeatRecord(3, 1, 1)), "they change places"


def test_one_that_is_back_in_time_keeps_its_place() -> None:
    seen = seats.look(NODES, {}, 3, lost_at(100.0, 1), 105.0)
    assert seen == Seen.nothing() and decide(without(1), {}, seen, 112.0) == []


def test_one_that_the_scheduler_calls_down_is_not_waited_for_but_its_ranks_must_be_dead() -> None:
    seen = lost_at(100.0, 1)
    assert decide(without(1), {}, seen, 102.9, 1) == []
    assert seats.next_look(seen, RULES, (1,), 102.9) == 103.0
    assert [x.node_rank for x in decide(without(1), {}, seen, 103.0, 1)] == [1]


def test_two_lost_take_two_spares_and_the_third_waits() -> None:
    found = decide(without(1, 2), {}, lost_at(100.0, 1, 2), 110.0)
    assert [(x.node_rank, x.spare, x.seats[0].serial) for x in found] == [(1, 3, 1), (2, 4, 2)]
    assert [x.node_rank for x in decide(without(1, 2, 4), {}, lost_at(100.0, 1, 2), 110.0)] == [1]
    assert decide(without(1, 3, 4), {}, lost_at(100.0, 1), 110.0) == []


def test_the_first_node_leads_the_run_and_is_nobody_elses() -> None:
    assert decide(without(0), {}, lost_at(100.0, 0), 999.0) == []


def test_a_spare_that_is_lost_while_it_takes_over_is_followed_by_the_next() -> None:
    known = {1: SeatRecord(1, 3, 1), 3: SeatRecord(3, 1, 1)}
    seen = seats.look(without(1), {}, 3, Seen.nothing(), 100.0)
    seen = seats.look(without(1), known, 3, seen, 110.0)
    assert decide(without(1), known, seen, 115.0) == [], "it has its time to come to its place"
    assert seats.here(NODES, known, 3) is False, "what is in its old place is still its own record"
    (x,) = decide(without(1), known, seen, 120.0)
    assert x.seats == (SeatRecord(1, 4, 2), SeatRecord(4, 3, 2))
    assert x.before == (known[1], None), "else who has heard half of an exchange gives one spare two places"


def test_who_was_lost_and_is_back_as_a_spare_may_take_its_old_place_again() -> None:
    known = {1: SeatRecord(1, 3, 1), 3: SeatRecord(3, 1, 1)}
    there = {0: NODES[0], 2: NODES[2], 3: replace(NODES[1], node_rank=3)}
    seen = seats.look(there, known, 3, Seen.nothing(), 100.0)
    (x,) = decide(there, known, seen, 110.0)
    assert x.seats == (SeatRecord(1, 1, 2), SeatRecord(3, 3, 2)), "everybody sits in his own again"
    assert seats.seat_of({s.node_rank: s for s in x.seats}, 1) == 1


def test_a_spare_that_ends_takes_no_place() -> None:
    nodes = without(1) | {3: replace(NODES[3], stopping=True), 4: replace(NODES[4], failed="no model")}
    assert decide(nodes, {}, lost_at(100.0, 1), 110.0) == []
