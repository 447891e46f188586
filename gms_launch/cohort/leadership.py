"""Who leads the run, where etcd has several members: whose agent takes the role, and when. Pure.

The role is a key on its holder's lease, which it names (`LeadRecord`): etcd gives a lease out once, so the record is
the holder's token. What it decides is written only as long as the key says that, so what an earlier holder still wants
is refused. Whoever hears of a record with the lease that is its own has the role, whatever came of its asking. Etcd
gives the key to the first who asks; here is said who asks when, so that not all do at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from gms_launch.cohort import seats
from gms_launch.cohort.records import LeadRecord, NodeRecord, SeatRecord

#: How long the next in order waits for the one before (seconds): more than a request to etcd takes.
TURN = 0.5


def heirs(nodes: Mapping[int, NodeRecord], taken: Mapping[int, SeatRecord], members: int) -> list[int]:
    """The node ranks whose agents may take the role, in the order in which they do: those with a member of etcd that
    has its vote. They know the run whoever else is lost, and are not about to end.
    """
    return [
        rank
        for rank in range(members)
        if seats.here(nodes, taken, rank)
        and nodes[rank].etcd
        and not (nodes[rank].stopping or nodes[rank].stopped or nodes[rank].failed)
    ]


def vacant_since(lead: LeadRecord | None, before: float | None, now: float) -> float | None:
    """Since when (seconds) nobody is known to have the role; None while somebody has it."""
    if lead is not None:
        return None
    return now if before is None else before


def claim_at(
    me: int, vacant: float | None, nodes: Mapping[int, NodeRecord], taken: Mapping[int, SeatRecord], members: int
) -> float | None:
    """When (seconds) the agent of node rank `me` is to ask for the role; None when it is not, as things are."""
    found = heirs(nodes, taken, members)
    if vacant is None or me not in found:
        return None
    return vacant + TURN * found.index(me)
