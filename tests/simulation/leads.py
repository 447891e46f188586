"""The run's leader role in miniature: agents, some with a member of etcd and some spares, and the store they share.

Which of them asks for the role when is `cohort.leadership`'s word, and which spare takes whose rank `cohort.seats`'s.
An agent decides on what it has heard, and what it decides is written later: it may have been stopped, cut off and
followed by another in between. The store answers who reaches a majority of its members, ends leases by its own clock,
and writes what the leader wants only under its token. Invariants are looked at with every write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gms_launch.cohort import leadership, seats
from gms_launch.cohort.records import LeadRecord, NodeRecord, SeatRecord
from gms_launch.cohort.seats import Exchange, Seen
from tests.simulation.world import Broken, through

#: How long an agent takes its lease for good, and how long it is (seconds): see `control.terms`.
SILENCE, GRANTED = 4.0, 5.0
WAIT, LEAST = 10.0, 3.0


@dataclass(eq=False)
class Agent:
    """`rank`: which it takes for its own. `side`: whom it reaches. `token` is 0 without the role. `wants`: what it has
    decided and not written yet, each with the token of that moment.
    """

    origin: int
    rank: int
    up: bool = True
    stopped: bool = False
    lost: bool = False
    side: int = 0
    sent: float = 0.0
    lease: int = 0
    token: int = 0
    vacant: float | None = None
    seen: Seen = field(default_factory=Seen.nothing)
    wants: list[tuple[int, str, Any]] = field(default_factory=list)
    # Its mirror, and what it has not heard yet.
    lead: LeadRecord | None = None
    nodes: dict[int, NodeRecord] = field(default_factory=dict)
    seats: dict[int, SeatRecord] = field(default_factory=dict)
    news: list[tuple[str, Any]] = field(default_factory=list)


class LeadWorld:
    """`serving` node ranks of which the first `members` have a member of etcd, and `spares`."""

    kind: type[Agent] = Agent

    def __init__(self, serving: int, members: int, spares: int, choose: Callable[[int], int], faults: int = 3) -> None:
        self.serving, self.members, self.spares, self.choose, self.faults = serving, members, spares, choose, faults
        self.now, self.revision, self.leases = 0.0, 0, 0
        self.log: list[str] = []
        self.aborted = ""
        self.agents = [self.kind(k, k) for k in range(serving + spares)]
        #: The store: leases and when they end; records with theirs; the role, and in which order leases had it.
        self.ends: dict[int, float] = {}
        self.nodes: dict[int, tuple[NodeRecord, int]] = {}
        self.seats: dict[int, SeatRecord] = {}
        self.lead: LeadRecord | None = None
        self.terms: list[int] = []
        self.said = -1  # which of them has last written something
        self.refused = self.taken = 0
        for agent in self.agents:
            self.sit(agent)
        self.settle()

    # -- the store ---------------------------------------------------------------------------------------------------

    def reaches(self, a: Agent) -> bool:
        """Whether an agent has a majority of the members on its side."""
        there = [b for b in self.agents if b.up and b.side == a.side and seats.seat_of(self.seats, b.origin) == b.rank]
        return a.up and 2 * sum(b.rank < self.members for b in there) > self.members

    def tell(self, what: str, value: Any) -> None:
        self.revision += 1
        for agent in self.agents:
            if agent.up:
                agent.news.append((what, value))

    def owns(self, a: Agent) -> bool:
        return seats.owner(self.seats, a.rank) == a.origin

    def holds(self, token: int) -> bool:
        """The compare with which the store writes what a leader wants."""
        return self.lead is not None and self.lead.lease == token

    def free(self) -> bool:
        """That with which it gives the role."""
        return self.lead is None

    def expire(self) -> None:
        for lease in [k for k, end in self.ends.items() if end <= self.now]:
            del self.ends[lease]
            for rank in [r for r, (_, on) in self.nodes.items() if on == lease]:
                del self.nodes[rank]
                self.tell("node", (rank, None))
            if self.lead is not None and self.lead.lease == lease:
                self.lead = None
                self.tell("lead", None)

    # -- an agent ----------------------------------------------------------------------------------------------------

    def sit(self, a: Agent) -> None:
        """It takes a new lease, and its place, unless that is another's."""
        if not self.reaches(a) and self.revision:
            return
        a.news.clear()
        a.lead, a.nodes = self.lead, {r: n for r, (n, _) in self.nodes.items()}
        a.seats, a.token = dict(self.seats), 0
        if not self.owns(a):
            a.rank, a.vacant, a.seen = seats.seat_of(self.seats, a.origin), None, Seen.nothing()
            a.wants.clear()  # it begins again
        if a.rank in self.nodes:
            return  # the lease of whoever was there is not over
        self.leases += 1
        a.lease, a.sent = self.leases, self.now
        self.ends[a.lease] = self.now + GRANTED
        etcd = "here" if a.rank < self.members else ""
        record = NodeRecord(a.rank, "", "", "", 1, 1, origin=a.origin, etcd=etcd)
        self.nodes[a.rank] = (record, a.lease)
        self.tell("node", (a.rank, record))

    def sure(self, a: Agent) -> bool:
        """What an agent knows of its own lease."""
        return a.lease > 0 and self.now < a.sent + SILENCE

    def renew(self, a: Agent) -> None:
        if a.lease in self.ends and self.owns(a):
            a.sent, self.ends[a.lease] = self.now, self.now + GRANTED
        else:
            self.sit(a)

    def hear(self, a: Agent) -> None:
        what, value = a.news.pop(0)
        if what == "lead":
            a.lead = value
            a.token = a.lease if value is not None and value.lease == a.lease else 0
            if a.token:
                a.seen = Seen.nothing()
        elif what == "seat":
            a.seats[value.node_rank] = value
        elif value[1] is None:
            a.nodes.pop(value[0], None)
        else:
            a.nodes[value[0]] = value[1]

    def look(self, a: Agent) -> bool:
        """One step of its loop; says whether something came of it."""
        a.vacant = leadership.vacant_since(a.lead, a.vacant, self.now)
        if not self.sure(a):
            return False
        if not a.token:
            at = leadership.claim_at(a.rank, a.vacant, a.nodes, a.seats, self.members)
            if at is None or at > self.now or any(what == "claim" for _, what, _ in a.wants):
                return False
            a.wants.append((0, "claim", LeadRecord(a.rank, a.origin, "", a.lease)))
            return True
        a.seen = seats.look(a.nodes, a.seats, self.serving, a.seen, self.now, first=0)
        if any(what == "exchange" for _, what, _ in a.wants):
            return False
        rules = seats.Rules(self.serving, self.spares, WAIT, LEAST, self.members)
        found = seats.decide(a.nodes, a.seats, rules, a.seen, (), self.now)
        a.wants += [(a.token, "exchange", x) for x in found]
        return bool(found)

    def speak(self, a: Agent) -> None:
        """A leader says what the run is, as it does whenever something changes."""
        a.wants.append((a.token, "say", None))

    def write(self, a: Agent) -> None:
        """What it has wanted for longest comes to the store."""
        token, what, value = a.wants.pop(0)
        if what == "claim":
            if not (self.free() and self.owns(a) and value.lease in self.ends):
                return
            if self.lead is not None:
                raise Broken(f"{a.origin} takes the role, which {self.lead.origin} has")
            self.tell("lead", value)
            self.lead = value
            self.terms.append(value.lease)
            return
        if not self.holds(token):
            self.refused += 1
            return
        if (term := self.terms.index(token)) < self.said:
            raise Broken(f"{a.origin} writes as leader {term}, after leader {self.said}")
        self.said = term
        if what == "exchange":
            self.exchange(value)

    def exchange(self, x: Exchange) -> None:
        if x.node_rank in self.nodes or tuple(self.seats.get(s.node_rank) for s in x.seats) != x.before:
            return  # it is back at that moment, or another exchange was before this one
        before = {seats.owner(self.seats, s.node_rank) for s in x.seats}
        if before != {s.origin for s in x.seats}:
            raise Broken(f"ranks {x.node_rank} and {x.spare} of {sorted(before)} are given to others: {x.seats}")
        self.seats |= {s.node_rank: s for s in x.seats}
        self.taken += 1
        for seat in x.seats:
            self.tell("seat", seat)

    # -- time and faults ---------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """In steps in which everybody who is well renews."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            for a in self.agents:
                if a.up and not a.stopped and not a.lost and self.reaches(a):
                    self.renew(a)
            self.expire()

    def crash(self, a: Agent) -> None:
        a.up, a.stopped, a.token, a.lease = False, False, 0, 0
        a.news.clear()
        a.wants = []

    def lose(self, a: Agent) -> None:
        a.lost = True
        self.crash(a)

    def come_back(self, a: Agent) -> None:
        a.stopped, a.side = False, 0
        if not a.up:
            a.up, a.sent, a.vacant, a.seen = True, 0.0, None, Seen.nothing()
        if self.reaches(a):
            self.renew(a)

    def split(self, alone: int) -> None:
        """One of the members on one side, everybody else on the other."""
        for a in self.agents:
            a.side = int(a.rank == alone)

    def fault(self) -> str:
        kinds: list[tuple[str, Any]] = []
        for a in self.agents:
            if a.up and not a.stopped:
                kinds.append((f"agent {a.origin} is stopped", (setattr, a, "stopped", True)))
                kinds.append((f"agent {a.origin} dies", (self.crash, a)))
        if not any(a.lost for a in self.agents):  # one may be for good: of the members a majority stays
            kinds += [(f"node {a.origin} is gone for good", (self.lose, a)) for a in self.agents if a.up]
        kinds += [(f"rank {r} is cut off", (self.split, r)) for r in range(self.members)]
        name, (do, *args) = kinds[self.choose(len(kinds))]
        do(*args)
        self.faults -= 1
        return name

    def step(self) -> None:
        found: list[tuple[Any, ...]] = [(f"{s:g} s pass", self.pass_time, s) for s in (1.0, 6.0)]
        for a in self.agents:
            if a.lost:
                continue
            if a.stopped or not a.up or a.side:
                found.append((f"agent {a.origin} is well again", self.come_back, a))
            if not a.up or a.stopped:
                continue
            if a.news:
                found.append((f"agent {a.origin} hears", self.hear, a))
            found.append((f"agent {a.origin} looks", self.look, a))
            if a.token and self.sure(a):
                found.append((f"agent {a.origin} speaks", self.speak, a))
        # What was sent before its agent was stopped comes all the same.
        found += [
            (f"a wish of {a.origin} is written", self.write, a) for a in self.agents if a.wants and self.reaches(a)
        ]
        if self.faults and not self.choose(6):
            self.log.append(self.fault())
            return
        name, do, *args = found[self.choose(len(found))]
        self.log.append(name)
        do(*args)

    def settle(self) -> None:
        """Everybody who is not gone for good comes back; then somebody leads, and nobody's rank is empty."""
        self.faults = 0
        for a in self.agents:
            if not a.lost:
                self.come_back(a)
        for _ in range(80):
            for a in self.agents:
                while a.news and a.up:
                    self.hear(a)
                if a.up:
                    self.look(a)
                while a.wants and self.reaches(a):
                    self.write(a)
            if self.well():
                return
            self.pass_time(1.0)
        if not any(map(self.reaches, self.agents)) and any(a.lost for a in self.agents):
            self.aborted = "a member is gone for good, another had moved and nobody was in its place yet"
            return
        how = [(a.origin, a.rank, a.up, a.lost, a.lease, a.sent, a.token, a.vacant, a.lead) for a in self.agents]
        raise Broken(f"not well: {self.lead}, ranks {sorted(self.nodes)}, {self.seats}, {how}")

    def well(self) -> bool:
        whole = not any(a.lost for a in self.agents) or self.spares
        here = all(seats.here({r: n for r, (n, _) in self.nodes.items()}, self.seats, r) for r in range(self.serving))
        leaders = [a for a in self.agents if a.token]
        return len(leaders) == 1 and self.holds(leaders[0].token) and bool(here or not whole)


def explore(
    serving: int, members: int, spares: int, choose: Callable[[int], int], steps: int = 60, faults: int = 4
) -> LeadWorld:
    """A run, `steps` events with faults among them, and to its end. Raises `Broken`."""

    def begin(pick: Callable[[int], int]) -> LeadWorld:
        world = LeadWorld(serving, members, spares, pick, 0)
        world.faults = faults
        return world

    return through(begin, choose, steps, f"leads.replay({serving}, {members}, {spares}, ", f", {steps}, {faults})")


def replay(serving: int, members: int, spares: int, picked: list[int], steps: int, faults: int) -> LeadWorld:
    """Run a printed case again."""
    left = iter(picked)
    return explore(serving, members, spares, lambda n: next(left, 0), steps, faults)
