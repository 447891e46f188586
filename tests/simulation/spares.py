"""A run with spares in miniature: a `World` whose nodes are machines that change their node ranks.

Added to what may happen there: an agent is stopped and goes on, spares die or are cut off or take over, and the run's
leader exchanges ranks by the real `cohort.seats`. Etcd refuses what an agent writes under a rank that is another's, and
an exchange when the lost one is back. A machine that has lost its rank may still have ranks of the engine, and may hear
of news: none of that may become a second rank beside that of the spare.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gms_launch.cohort import seats
from gms_launch.cohort.records import NodeRecord, SeatRecord
from gms_launch.cohort.seats import Exchange, Seen
from tests.simulation.world import LEASE, Broken, Desire, Node, World, nobody, through

WAIT, LEAST = 10.0, 3.0
#: How long after its lease a guard ends what its stopped agent has not.
GUARD = 1.0


@dataclass(slots=True)
class Machine(Node):
    """Which rank it takes for its own is `rank`. `seated`: etcd has its record under that."""

    origin: int = -1
    stopped: bool = False
    lost: bool = False
    vacant: bool = False
    seated: bool = True


class SpareWorld(World):
    """`nodes` are those whose the ranks are, `idle` the spares and who has lost its rank and may not know it yet."""

    nodes: list[Machine]  # type: ignore[assignment]

    def __init__(self, serving: int, spares: int, cohorts: int, choose: Callable[[int], int], faults: int = 3) -> None:
        super().__init__(serving, cohorts, choose, faults)
        self.nodes = [Machine(k, origin=k) for k in range(serving)]
        self.idle = [Machine(serving + k, origin=serving + k) for k in range(spares)]
        self.serving, self.spares = serving, spares
        self.seats: dict[int, SeatRecord] = {}
        self.seen = Seen.nothing()
        self.decided: list[Exchange] = []
        self.taken = 0

    # -- the rules that keep two from one place --------------------------------------------------------------------

    def owns(self, m: Machine) -> bool:
        return seats.owner(self.seats, m.rank) == m.origin

    def may_act(self, m: Machine) -> bool:
        """What an agent knows of its own lease."""
        return m.seated and m.lease > self.now

    def guard(self, m: Machine) -> None:
        """What its guard does for a stopped agent when the lease is over."""
        for proc in m.procs.values():
            self.die(proc)

    def present(self) -> dict[int, NodeRecord]:
        """The records that are on living leases."""
        machines = [m for m in (*self.nodes, *self.idle) if m.up and m.seated and m.lease > self.now]
        return {m.rank: NodeRecord(m.rank, "", "", "", 1, 1, origin=m.origin) for m in machines}

    def put(self, node: Node, key: Any, value: Any) -> None:
        assert isinstance(node, Machine)
        if node.connected and not self.owns(node):
            return  # refused
        super().put(node, key, value)
        if node.connected:
            for m in self.idle:
                if m.up and m.connected and m.rank < self.serving:
                    m.inbox.append((self.revision, key, value))  # it still follows what it followed

    def agent(self, node: Node) -> None:
        assert isinstance(node, Machine)
        before = node.cut_off
        node.cut_off = before or not self.may_act(node)
        super().agent(node)
        node.cut_off = before

    def start(self, node: Node, desire: Desire) -> None:
        for other in (*self.nodes, *self.idle):
            proc = other.procs.get(desire.cohort_id)
            if other is not node and other.rank == node.rank and proc is not None and not proc.dead:
                raise Broken(f"cohort {desire.cohort_id} has two ranks {node.rank}: life {proc.life} and another")
        super().start(node, desire)

    # -- who takes whose place ---------------------------------------------------------------------------------------

    def look(self) -> None:
        """The run's leader looks for lost nodes."""
        nodes = self.present()
        self.seen = seats.look(nodes, self.seats, self.serving, self.seen, self.now)
        if not self.decided and not self.memory.initial:
            self.decided = seats.decide(nodes, self.seats, self.rules(), self.seen, (), self.now)

    def rules(self) -> seats.Rules:
        return seats.Rules(self.serving, self.spares, WAIT, LEAST)

    def exchange(self, x: Exchange) -> None:
        """Etcd does it, or refuses it."""
        self.decided.remove(x)
        if x.node_rank in self.present() or tuple(self.seats.get(s.node_rank) for s in x.seats) != x.before:
            return
        self.seats |= {s.node_rank: s for s in x.seats}
        old = self.nodes[x.node_rank]
        if not old.vacant:
            self.idle.append(old)
        self.nodes[x.node_rank] = Machine(x.node_rank, up=False, connected=False, lease=old.lease, vacant=True)
        self.gone.add(x.node_rank)
        self.taken += 1

    def move_in(self, m: Machine) -> None:
        """An agent begins again with the rank that is its own by now; what it had has ended before."""
        self.crash(m)
        m.rank = seats.seat_of(self.seats, m.origin)
        m.seated, m.stopped = True, False
        if m.rank < self.serving:
            self.idle.remove(m)
            self.nodes[m.rank] = m
            self.gone.discard(m.rank)
            super().come_back(m)
        else:
            m.up, m.connected, m.cut_off, m.lease = True, True, False, self.now + LEASE

    def come_back(self, node: Node) -> None:
        """A new agent, the line restored, or one that goes on: it has its rank, or finds out that it has not."""
        assert isinstance(node, Machine)
        node.stopped = False
        if node in self.nodes:
            node.seated = True
            super().come_back(node)
        elif not node.up or self.owns(node):
            self.move_in(node)
        else:
            node.connected = True  # with a lease over and its rank another's; `move_in` is what comes next

    # -- time and faults ---------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for m in (m for m in (*self.nodes, *self.idle) if m.up):
            if m.connected and not m.stopped and m.seated:
                m.lease = self.now + LEASE
            elif m.lease <= self.now:
                m.seated = False
                if m.stopped:
                    if m.lease + GUARD <= self.now:
                        self.guard(m)
                elif not m.cut_off:
                    m.cut_off = True
                    for proc in [p for p in m.procs.values() if not p.dead]:
                        self.kill(m, proc)

    def fault(self) -> str:
        kinds: list[tuple[str, Any]] = []
        for m in (*self.nodes[1:], *self.idle):
            if m.up and not m.stopped:
                kinds.append((f"the agent of machine {m.origin} is stopped", (setattr, m, "stopped", True)))
        for m in self.idle:
            if m.up:
                kinds.append((f"spare {m.origin} dies", (self.crash, m)))
                kinds.append((f"spare {m.origin} is cut off", (self.cut, m)))
                kinds.append((f"spare {m.origin} is gone for good", (self.lose, m)))
        if not kinds or self.choose(2):
            return super().fault()
        name, (do, *args) = kinds[self.choose(len(kinds))]
        do(*args)
        self.faults -= 1
        return name

    def lose(self, node: Node) -> None:
        assert isinstance(node, Machine)
        node.lost = self.spoilt = True  # too many may be
        if node in self.nodes:
            self.gone.add(node.rank)
        self.crash(node)

    def enabled(self) -> list[tuple[Any, ...]]:
        found = [e for e in super().enabled() if not (len(e) > 2 and isinstance(e[2], Machine) and e[2].stopped)]
        found += [("the leader looks for spares", self.look), ("twelve seconds pass", self.pass_time, 12.0)]
        found += [("rank {0.node_rank} is exchanged", self.exchange, x) for x in self.decided]
        for m in (m for m in (*self.nodes, *self.idle) if m.stopped and m.up):
            found.append(("machine {0.origin} goes on", self.come_back, m))
        for m in (m for m in self.idle if not m.stopped and not m.lost):
            if not m.up or not m.connected:
                found.append(("machine {0.origin} comes back", self.come_back, m))
                continue
            if not self.owns(m):
                found.append(("machine {0.origin} begins again", self.move_in, m))
            found.append(("the agent of machine {0.origin}", self.agent, m))
            if m.inbox:
                found.append(("machine {0.origin} gets its oldest message", self.deliver, m, 0))
                found.append(("machine {0.origin} gets its newest message", self.deliver, m, -1))
        return found

    def turn(self) -> float | None:
        for m in [m for m in (*self.nodes, *self.idle) if not m.lost and not m.vacant]:
            if m.stopped or (m in self.idle and (not m.up or not m.connected)):
                self.come_back(m)
        for m in [m for m in self.idle if m.up and not m.lost and not self.owns(m)]:
            self.move_in(m)
        self.look()
        for x in list(self.decided):
            self.exchange(x)
        pause = super().turn()
        at = seats.next_look(self.seen, self.rules(), (), self.now)
        if pause and at is not None:
            return min(pause, max(0.1, at - self.now))
        return pause


_SETTLED: dict[Any, bytes] = {}


def explore(
    serving: int, spares: int, cohorts: int, choose: Callable[[int], int], steps: int = 40, faults: int = 3
) -> SpareWorld:
    """A run from its start to full, `steps` events with faults among them, and to its end. Raises `Broken`."""

    def begin(pick: Callable[[int], int]) -> SpareWorld:
        key = serving, spares, cohorts
        if key not in _SETTLED:
            world = SpareWorld(*key, nobody, 0)
            world.settle()
            _SETTLED[key] = pickle.dumps(world, pickle.HIGHEST_PROTOCOL)
        world: SpareWorld = pickle.loads(_SETTLED[key])
        world.choose, world.faults = pick, faults
        return world

    return through(begin, choose, steps, f"replay({serving}, {spares}, {cohorts}, ", f", {steps}, {faults})")


def replay(serving: int, spares: int, cohorts: int, picked: list[int], steps: int, faults: int) -> SpareWorld:
    """Run a printed case again."""
    left = iter(picked)
    return explore(serving, spares, cohorts, lambda n: next(left, 0), steps, faults)
