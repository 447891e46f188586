"""Who asks for the run's leader role, and when."""

from __future__ import annotations

from dataclasses import replace

from gms_launch.cohort.leadership import TURN, claim_at, heirs, vacant_since
from gms_launch.cohort.records import LeadRecord, NodeRecord, SeatRecord

LEAD = LeadRecord(0, 0, "node1", 7)


def node(rank: int, etcd: str = "https://there", origin: int = -1) -> NodeRecord:
    return NodeRecord(rank, "", "", "", 1, 1, etcd=etcd, origin=rank if origin < 0 else origin)


NODES = {r: node(r) for r in (0, 1, 2)} | {3: node(3, "")}


def test_members_of_etcd_may_lead_in_the_order_of_their_ranks() -> None:
    assert heirs(NODES, {}, 3) == [0, 1, 2]
    assert heirs({1: NODES[1], 2: NODES[2], 3: NODES[3]}, {}, 3) == [1, 2]
    assert heirs(NODES | {0: node(0, "")}, {}, 3) == [1, 2], "whose member has no vote yet is none"
    for end in ({"stopping": True}, {"stopped": True}, {"failed": "why"}):
        assert heirs(NODES | {1: replace(NODES[1], **end)}, {}, 3) == [0, 2]  # type: ignore[arg-type]


def test_who_is_to_leave_its_rank_leads_nothing() -> None:
    seats = {0: SeatRecord(0, 4, 1), 4: SeatRecord(4, 0, 1)}
    assert heirs(NODES, seats, 3) == [1, 2]
    assert heirs(NODES | {0: node(0, origin=4)}, seats, 3) == [0, 1, 2]


def test_the_next_in_order_waits_for_the_one_before() -> None:
    left = {r: NODES[r] for r in (1, 2, 3)}
    assert [claim_at(r, 10.0, left, {}, 3) for r in (1, 2, 3)] == [10.0, 10.0 + TURN, None]
    assert claim_at(1, None, left, {}, 3) is None, "somebody has the role"


def test_since_when_nobody_has_it() -> None:
    assert vacant_since(LEAD, 3.0, 5.0) is None
    assert vacant_since(None, None, 5.0) == 5.0
    assert vacant_since(None, 5.0, 9.0) == 5.0
