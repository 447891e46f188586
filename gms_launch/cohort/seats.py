"""Who has which node rank, and when a spare takes that of a lost node: the run's leader alone decides. Pure.

A node rank is a seat. An agent is known by the rank that it was started with, its origin; as long as nothing is lost,
everybody sits in his own. The ranks behind those that engines run on are the spares'. When one of the others has been
lost for long enough, the agent in it and a spare change places, and each finds out from the record of its seat. So a
lost node that comes back finds itself a spare, and whatever it wanted to write under its old rank is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gms_launch.cohort.records import NodeRecord, SeatRecord


@dataclass(frozen=True)
class Rules:
    """The ranks below `serving` have work, the `spares` behind them wait. One that is lost for `wait` seconds is given
    to a spare; one whose node the scheduler calls down, after `least`. The first `members` have a member of etcd each.
    """

    serving: int
    spares: int
    wait: float
    least: float
    members: int = 0


@dataclass(frozen=True)
class Exchange:
    """The agents of `node_rank`, which is lost, and of the rank `spare` change places; `seats` are the new records, and
    `before` what they were when that was decided: of an exchange before it, not all may have been heard.
    """

    node_rank: int
    spare: int
    seats: tuple[SeatRecord, SeatRecord]
    before: tuple[SeatRecord | None, SeatRecord | None]


def owner(seats: Mapping[int, SeatRecord], node_rank: int) -> int:
    """The origin of the agent whose that node rank is."""
    seat = seats.get(node_rank)
    return node_rank if seat is None else seat.origin


def seat_of(seats: Mapping[int, SeatRecord], origin: int) -> int:
    """The node rank of the agent of that origin."""
    return next((rank for rank, seat in seats.items() if seat.origin == origin), origin)


def here(nodes: Mapping[int, NodeRecord], seats: Mapping[int, SeatRecord], node_rank: int) -> bool:
    """Whether the agent whose that rank is now has come to it. One that is to leave may not have gone yet."""
    node = nodes.get(node_rank)
    return node is not None and node.origin == owner(seats, node_rank)


@dataclass(frozen=True)
class Seen:
    """What the run's leader remembers: since when (seconds) each rank is without its agent, and under which serial."""

    absent: Mapping[int, tuple[float, int]]

    @classmethod
    def nothing(cls) -> Seen:
        return cls({})


def look(
    nodes: Mapping[int, NodeRecord],
    seats: Mapping[int, SeatRecord],
    serving: int,
    seen: Seen,
    now: float,
    first: int = 1,
) -> Seen:
    """What is to be remembered now of ranks from `first` on. Whoever is given a rank anew has its time anew to come to
    it. Rank 0 is nobody else's where the run's leader role is bound to it, and is looked at (`first` 0) where it moves.
    """
    absent = {}
    for rank in range(first, serving):
        if not here(nodes, seats, rank):
            serial = seats[rank].serial if rank in seats else 0
            before = seen.absent.get(rank)
            absent[rank] = before if before is not None and before[1] == serial else (now, serial)
    return Seen(absent)


def decide(
    nodes: Mapping[int, NodeRecord],
    seats: Mapping[int, SeatRecord],
    rules: Rules,
    seen: Seen,
    down: Collection[int],
    now: float,
) -> list[Exchange]:
    """Which spares take whose places now; `down` are the ranks whose nodes the scheduler calls so."""
    free = [
        rank
        for rank in range(rules.serving, rules.serving + rules.spares)
        if here(nodes, seats, rank) and not nodes[rank].stopping and not nodes[rank].failed
    ]
    serial = max((seat.serial for seat in seats.values()), default=0)
    found = []
    for rank, (since, _) in sorted(seen.absent.items()):
        if rank in nodes or now - since < (rules.least if rank in down else rules.wait) or not free:
            continue  # a lost one's key goes with its lease, and not before that
        others = sum(r != rank and _votes(nodes, seats, r) for r in range(rules.members))
        if rank < rules.members and 2 * others <= rules.members:
            continue  # its member would have to go for that of the spare, which most of them must agree to
        spare = free.pop(0)
        serial += 1
        pair = SeatRecord(rank, owner(seats, spare), serial), SeatRecord(spare, owner(seats, rank), serial)
        found.append(Exchange(rank, spare, pair, (seats.get(rank), seats.get(spare))))
    return found


def _votes(nodes: Mapping[int, NodeRecord], seats: Mapping[int, SeatRecord], node_rank: int) -> bool:
    """Whether the member of etcd of a rank is there and has its vote."""
    return here(nodes, seats, node_rank) and bool(nodes[node_rank].etcd)


def next_look(seen: Seen, rules: Rules, down: Collection[int], now: float) -> float | None:
    """When `decide` might say something else although nothing happened; None for never."""
    times = [since + (rules.least if rank in down else rules.wait) for rank, (since, _) in seen.absent.items()]
    return min((t for t in times if t > now), default=None)
