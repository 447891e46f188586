"""A whole run in miniature: groups of engines over nodes that may be lost, spares, and the run's leader role.

To the agents of `leads` and their store come engines: each group has the real reconciler on every node and the real
controller on its first, which moves with that place; the run's leader ends the run by the real census. Nodes are parted
in every way, one against two and two against three, leaders of the run and of groups are lost together, and spares
while they take over; who is lost may come back as a spare. What an agent writes comes to the store later than it was
decided, if its seat is still its own by then.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gms_launch.cohort import census, controller, leadership, reconciler, seats
from gms_launch.cohort.model import ALIVE, ENDED, Phase, cohort_phase
from gms_launch.cohort.reconciler import Desire, LocalRank
from gms_launch.cohort.records import SeatRecord
from gms_launch.cohort.view import Memory, Policy, Slot, View
from tests.simulation.leads import SILENCE, Agent, LeadWorld
from tests.simulation.world import Broken, Life, Proc, nobody, through

COHORTS = 2
#: How long after its lease a guard ends what its stopped agent has not (seconds).
GUARD = 1.0
NODE_WAIT = 30.0
POLICY = Policy(COHORTS, 100.0, 20.0, 1.0, 8.0, 600.0, limit=20, node_wait=NODE_WAIT)
#: Whoever is back for so long has been seen (seconds).
SEEN = 10.0
#: A watch that has said nothing for so long is begun anew: what etcd has known for longer, who is well knows (seconds).
WATCH = 6.0
#: Fewer groups than this end the run.
LEAST = 1
Key = tuple[Any, ...]


@dataclass(slots=True)
class Rank(Proc):
    """A process of an engine in its `place` in a group."""

    group: int = 0
    place: int = 0


@dataclass(frozen=True)
class Said:
    """What a group's leader says of it."""

    lost: tuple[int, ...] = ()
    failed: str = ""
    redundancy: str = "full"
    leader: int = 0
    exit_code: int = 4


@dataclass(eq=False)
class Machine(Agent):
    """`known` is what its agent has heard of its group, `unsaid` what it has written and etcd has not got; `told` the
    record of its seat when it took that.
    """

    procs: dict[int, Rank] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)
    known: dict[Key, Any] = field(default_factory=dict)
    unsaid: dict[Key, tuple[Any, bool]] = field(default_factory=dict)
    told: SeatRecord | None = None
    memory: Memory = field(default_factory=lambda: Memory(initial=False))
    confirmed: Life | None = None
    alone: float | None = None
    lock: Rank | None = None
    absent: dict[int, float] = field(default_factory=dict)
    heard_since: float = 0.0
    behind_since: float | None = None
    #: How often there was news, and after which, and when, it last looked.
    heard: int = 0
    looked: tuple[float, int] = (-1.0, 0)


class RunWorld(LeadWorld):
    """`sizes` are how many nodes each group has; the first `members` of all have a member of etcd."""

    agents: list[Machine]  # type: ignore[assignment]
    kind = Machine

    def __init__(
        self, sizes: tuple[int, ...], members: int, spares: int, choose: Callable[[int], int], faults: int = 0
    ) -> None:
        firsts = [sum(sizes[:g]) for g in range(len(sizes))]
        self.places = [range(first, first + size) for first, size in zip(firsts, sizes, strict=True)]
        self.group_of = {rank: g for g, ranks in enumerate(self.places) for rank in ranks}
        #: What etcd has of groups, and by which record of its leader's seat each was last written.
        self.store: dict[Key, Any] = {("said", g): Said(leader=firsts[g]) for g in range(len(sizes))}
        self.terms_of: list[int] = [0] * len(sizes)
        self.vacant: dict[int, float] = {}
        self.longest: dict[int, float] = {}
        self.back: dict[int, float] = {}
        self.caused: set[tuple[int, Life]] = set()
        self.ended = ""
        self.moved = 0
        self._reached: dict[int, bool] = {}
        super().__init__(sum(sizes), members, spares, choose, faults)

    def reaches(self, a: Agent) -> bool:
        """As there, and remembered until somebody goes, comes, moves or is parted from others."""
        if not a.up:
            return False
        found = self._reached.get(a.side)
        if found is None:
            self._reached[a.side] = found = super().reaches(a)
        return found

    # -- the rules that keep two from one place ----------------------------------------------------------------------

    def may_write(self, m: Machine) -> bool:
        """The compare with which etcd writes what an agent says under its rank."""
        return self.seats.get(m.rank) == m.told

    def vacated(self, rank: int) -> bool:
        """That with which it gives a rank to another."""
        return rank not in self.nodes

    def guard(self, m: Machine) -> None:
        for proc in m.procs.values():
            self.die(proc)

    # -- the store ---------------------------------------------------------------------------------------------------

    def follows(self, m: Machine, key: Key) -> bool:
        """`Keys.followed`: what a group's leader and what its other nodes have to know, and what the run's leader."""
        if key[0] == "said":
            return True
        group = self.group_of.get(m.rank)
        return group == key[1] and (key[0] != "rank" or key[3] == 0 or m.rank == self.places[group][0])

    def leads_group(self, m: Machine) -> bool:
        return any(m.rank == ranks[0] for ranks in self.places)

    def put(self, m: Machine, key: Key, value: Any, once: bool = False) -> None:
        """Its own copy at once, etcd's when `deliver` says so."""
        if once and key in m.known:
            return
        self.learn(m, key, value)
        m.unsaid.pop(key, None)
        m.unsaid[key] = value, once

    @staticmethod
    def learn(m: Machine, key: Key, value: Any) -> None:
        if value is None:
            m.known.pop(key, None)
        else:
            m.known[key] = value

    def deliver(self, m: Machine) -> None:
        """What it has written comes to etcd, which refuses it if the seat is another's."""
        unsaid, m.unsaid = m.unsaid, {}
        if not self.may_write(m):
            self.refused += 1
            return
        for key, (value, once) in unsaid.items():
            if once and key in self.store:
                self.learn(m, key, self.store[key])
                continue
            if key[0] == "said" and self.over(key[1]):
                continue  # that is the last word
            if key[0] in ("desired", "said"):
                self.fenced(m, key[1])
            if value is None:
                self.store.pop(key, None)
            else:
                self.store[key] = value
            self.revision += 1
            for other in self.agents:
                if other is not m and other.up and self.follows(other, key):
                    other.news.append(("record", (key, value)))

    def over(self, group: int) -> bool:
        """Whether the run's leader has said so, after which nobody says how the group is."""
        return bool(self.store["said", group].failed)

    def fenced(self, m: Machine, group: int) -> None:
        """Nobody writes as a group's leader after the one that followed it."""
        term = m.told.serial if m.told is not None else 0
        if term < self.terms_of[group]:
            raise Broken(f"{m.origin} writes as leader {term} of group {group}, after leader {self.terms_of[group]}")
        self.terms_of[group] = term

    def expire(self) -> None:
        super().expire()
        for rank in range(self.serving):
            if rank in self.nodes:  # for a moment, it may not have been seen
                if self.now - self.back.setdefault(rank, self.now) >= SEEN:
                    self.vacant.pop(rank, None)
            else:
                self.back.pop(rank, None)
                since = self.vacant.setdefault(rank, self.now)
                self.longest[rank] = max(self.longest.get(rank, 0.0), self.now - since)

    def exchange(self, x: seats.Exchange) -> None:
        if not self.vacated(x.node_rank):
            return
        self._reached = {}
        self.nodes, there = {r: n for r, n in self.nodes.items() if r != x.node_rank}, self.nodes
        super().exchange(x)
        self.nodes = there

    # -- an agent ----------------------------------------------------------------------------------------------------

    def sit(self, a: Agent) -> None:
        """It knows what etcd has, and says again what is here; with another seat it begins anew."""
        assert isinstance(a, Machine)
        fresh, before, known = not a.lease, (a.rank, a.told), a.known
        super().sit(a)
        self.notice(a)
        self._reached = {}
        if a.lease not in self.ends:
            return
        a.told = self.seats.get(a.rank)
        moved = before != (a.rank, a.told)
        if fresh or moved:
            self.moved += moved
            self.begin(a)
        else:
            a.known = self.heard_of(a)
            if self.leads_group(a):  # a leader's own memory is newer
                own = [k for k in known if k[0] in ("desired", "said") and k[1] == self.group_of[a.rank]]
                for key in own:
                    if key[0] == "desired" or not a.known[key].failed:
                        self.put(a, key, known[key])
        for cohort, incarnation in a.skipped.items():
            if cohort not in a.procs or a.procs[cohort].incarnation < incarnation:
                self.record(a, (cohort, incarnation), Phase.FENCED, self.now)
        for proc in a.procs.values():
            if proc.incarnation >= a.skipped.get(proc.cohort, 0):
                self.record(a, proc.life, proc.phase, proc.since)

    def renew(self, a: Agent) -> None:
        assert isinstance(a, Machine)
        before = a.sent
        super().renew(a)
        if a.sent > before + SILENCE:
            a.heard_since = a.sent

    def begin(self, m: Machine) -> None:
        """A new agent, in its place or in another's: nothing of an earlier one lives, and no life of then begins."""
        self.forget(m)
        m.known = self.heard_of(m)
        m.skipped = {k[2]: d.incarnation for k, d in m.known.items() if k[0] == "desired"}

    def heard_of(self, m: Machine) -> dict[Key, Any]:
        return {k: v for k, v in self.store.items() if self.follows(m, k)}

    def forget(self, m: Machine) -> None:
        for proc in m.procs.values():
            self.die(proc)
        m.procs, m.skipped, m.known, m.unsaid = {}, {}, {}, {}
        m.memory, m.confirmed, m.alone, m.lock = Memory(initial=False), None, None, None

    def hear(self, a: Agent) -> None:
        assert isinstance(a, Machine)
        a.heard += 1
        if a.news[0][0] != "record":
            super().hear(a)
            self.notice(a)
            if not a.token:
                a.absent = {}  # as whoever begins to lead
            return
        _, (key, value) = a.news.pop(0)
        own = key[0] in ("desired", "said") and self.leads_group(a) and self.group_of[a.rank] == key[1]
        if not (own and not (key[0] == "said" and value.failed)) and self.follows(a, key):
            self.learn(a, key, value)

    def notice(self, m: Machine) -> None:
        """Who is there is seen, also if it is away again when this agent acts next: it looks after each word of one."""
        group = self.group_of.get(m.rank)
        m.absent = {r: since for r, since in m.absent.items() if r not in m.nodes}
        if group is not None:
            away = {p: s for p, s in m.memory.absent_since.items() if self.places[group][p] not in m.nodes}
            m.memory = replace(m.memory, absent_since=away)

    def record(self, m: Machine, life: Life, phase: Phase, since: float) -> None:
        if (group := self.group_of.get(m.rank)) is None:
            return
        place = m.rank - self.places[group][0]
        if phase in ENDED:
            self.put(m, ("ended", group, *life), place, once=True)
        self.put(m, ("rank", group, life[0], place), (life[1], phase, since))

    def move(self, m: Machine, proc: Rank, phase: Phase) -> None:
        proc.phase, proc.since = phase, self.now
        self.record(m, proc.life, phase, self.now)

    def die(self, proc: Rank) -> None:
        proc.dead = True

    def kill(self, m: Machine, proc: Rank) -> None:
        self.die(proc)
        if proc.phase in ALIVE:
            self.move(m, proc, Phase.FAILING)

    def act(self, m: Machine) -> bool:
        """One look at its group; says whether something came of it."""
        group = self.group_of.get(m.rank)
        if group is None or not m.lease:
            return False
        before = len(m.unsaid), [(p.phase, p.incarnation) for p in m.procs.values()]
        for proc in m.procs.values():
            if proc.phase is Phase.FAILING:
                self.move(m, proc, Phase.FENCED)
            elif proc.dead and proc.phase in ALIVE:
                self.move(m, proc, Phase.FAILING)
        desired = {k[2]: v for k, v in m.known.items() if k[0] == "desired"}
        if not self.sure(m):
            desired = {}
        elif self.leaderless(m, group):
            desired = {c: replace(d, running=False, why="its leader was lost") for c, d in desired.items()}
        ended = {(k[2], k[3]): v for k, v in m.known.items() if k[0] == "ended"}
        local = {c: LocalRank(c, p.incarnation, p.phase, p.dead) for c, p in m.procs.items()}
        for cohort, incarnation in m.skipped.items():
            if cohort not in local or local[cohort].incarnation < incarnation:
                local[cohort] = LocalRank(cohort, incarnation, Phase.FENCED, True)
        for action in reconciler.decide(desired, local, ended):
            if isinstance(action, reconciler.StartRank):
                self.start(m, group, action.desire)
            elif isinstance(action, reconciler.SkipRank):
                m.skipped[action.cohort_id] = action.incarnation
                self.record(m, (action.cohort_id, action.incarnation), Phase.FENCED, self.now)
            else:
                self.check_cause(m, m.procs[action.cohort_id], action.reason)
                self.kill(m, m.procs[action.cohort_id])
        if self.leads_group(m) and self.sure(m) and not m.known["said", group].failed:
            self.control(m, group)
        did = before != (len(m.unsaid), [(p.phase, p.incarnation) for p in m.procs.values()])
        m.heard += did
        return did

    def leaderless(self, m: Machine, group: int) -> bool:
        first = self.places[group][0]
        if m.rank == first or first in m.nodes:
            m.alone = None
            return False
        m.alone = self.now if m.alone is None else m.alone
        return self.now - m.alone >= controller.NODE_GRACE

    def start(self, m: Machine, group: int, desire: Desire) -> None:
        place = m.rank - self.places[group][0]
        for other in self.agents:
            proc = other.procs.get(desire.cohort_id)
            if proc is None or proc.dead or proc.group != group:
                continue
            if proc.incarnation != desire.incarnation or proc.place == place:
                raise Broken(
                    f"life {desire.incarnation} of cohort {desire.cohort_id} of group {group} started on {m.origin} in "
                    f"place {place} while life {proc.incarnation} is alive on {other.origin}, in place {proc.place}"
                )
        m.procs[desire.cohort_id] = Rank(desire.cohort_id, desire.incarnation, since=self.now, group=group, place=place)
        self.record(m, (desire.cohort_id, desire.incarnation), Phase.STARTING, self.now)

    def check_cause(self, m: Machine, proc: Rank, reason: str) -> None:
        """Nobody is killed without a cause."""
        ranks = [p for o in self.agents for p in o.procs.values() if p.group == proc.group and p.life == proc.life]
        whole = len(ranks) == len(self.places[proc.group]) and not any(p.dead for p in ranks)
        if whole and (proc.group, proc.life) not in self.caused and m.alone is None:
            raise Broken(f"life {proc.life} of group {proc.group} was killed on {m.origin} without a cause: {reason}")

    # -- a group's leader --------------------------------------------------------------------------------------------

    def view(self, m: Machine, group: int) -> View:
        known, ranks = m.known, self.places[group]
        lost = known["said", group].lost
        counting = [p for p in range(len(ranks)) if p not in lost]
        slots = {}
        for cohort in range(COHORTS):
            if (desire := known.get(("desired", group, cohort))) is None:
                continue
            phases, since = {}, 0.0
            for place in range(len(ranks)):
                record = known.get(("rank", group, cohort, place))
                if record is not None and record[0] == desire.incarnation:
                    phases[place], since = record[1], max(since, record[2])
            phase = cohort_phase(phases, counting)
            slots[cohort] = Slot(cohort, desire.incarnation, desire.running, False, phase, since)
        absent = {p: f"node {r}" for p, r in enumerate(ranks) if r != m.rank and not seats.here(m.nodes, m.seats, r)}
        return View(slots, m.confirmed, absent=absent, lost=lost, heard_since=m.heard_since)

    def control(self, m: Machine, group: int) -> None:
        view = self.view(m, group)
        actions, m.memory = controller.decide(view, m.memory, POLICY, self.now)
        said = m.known["said", group]
        for action in actions:
            if isinstance(action, controller.Start):
                self.put(m, ("ended", group, action.cohort_id, action.incarnation - 1), None)
                desire = Desire(action.cohort_id, action.incarnation, True, 0, action.why)
                self.put(m, ("desired", group, action.cohort_id), desire)
            elif isinstance(action, controller.Kill):
                self.caused.add((group, (action.cohort_id, action.incarnation)))
                desire = Desire(action.cohort_id, action.incarnation, False, 0, action.why)
                self.put(m, ("desired", group, action.cohort_id), desire)
            elif isinstance(action, controller.LoseNodes):
                self.put(m, ("said", group), said := replace(said, lost=action.lost))
            elif isinstance(action, controller.Abort):
                if not m.news and all(self.longest.get(r, 0.0) < NODE_WAIT - 2 for r in self.places[group]):
                    raise Broken(f"group {group} ended for no good reason: {action.why}")
                self.put(m, ("said", group), said := replace(said, failed=action.why, redundancy="down"))
            else:
                raise AssertionError(f"the simulation has no hand for {action!r}")

    # -- the run's leader: its end -----------------------------------------------------------------------------------

    def look(self, a: Agent) -> bool:
        assert isinstance(a, Machine)
        did = super().look(a)
        if a.token and self.sure(a) and not any(what == "end" for _, what, _ in a.wants):
            absent = {ranks[0]: a.absent.get(ranks[0], self.now) for ranks in self.places if ranks[0] not in a.nodes}
            a.absent = absent
            # Of its own group too it knows here what etcd has got.
            heard = {k: self.store[k] if k in a.unsaid else v for k, v in a.known.items() if k[0] == "said"}
            said = {str(k[1]): v for k, v in heard.items()}
            if not any(what == "over" for _, what, _ in a.wants):
                found = census.orphans(said, absent, NODE_WAIT, self.now)
                a.wants += [(a.token, "over", (int(name), said[name])) for name in found]
                did |= bool(found)
            why, _ = census.too_few(said, len(self.places), LEAST, up=True)
            if why:
                a.wants.append((a.token, "end", why))
                return True
        return did

    def write(self, a: Agent) -> None:
        _, what, value = a.wants[0]
        refused = self.refused
        super().write(a)
        if refused != self.refused:
            return
        if what == "end":
            if sum(not self.store["said", g].failed for g in range(len(self.places))) >= LEAST:
                raise Broken(f"the run is to end, and enough of its groups are not over: {value}")
            self.ended = self.aborted = value
        elif what == "over":
            self.orphaned(*value)

    def orphaned(self, group: int, said: Said) -> None:
        """The run's leader says that a group is over, if its leading node is not there, nor has said anything since."""
        rank = self.places[group][0]
        if not self.vacated(rank) or self.store["said", group] != said:
            return
        if self.longest.get(rank, 0.0) < NODE_WAIT - 2:
            raise Broken(f"group {group} is said to be over, and its node {rank} was not waited for")
        self.store["said", group] = over = replace(said, failed="its leading node was lost", redundancy="down")
        for other in self.agents:
            if other.up:
                other.news.append(("record", (("said", group), over)))

    def left(self) -> int:
        """How many groups can still serve."""
        return sum(not self.store["said", g].failed and self.can(g) for g in range(len(self.places)))

    # -- engines -----------------------------------------------------------------------------------------------------

    def living(self, group: int, life: Life) -> list[tuple[Machine, Rank]]:
        return [
            (m, p)
            for m in self.agents
            if (p := m.procs.get(life[0])) is not None and p.group == group and p.life == life and not p.dead
        ]

    def engine(self, m: Machine, proc: Rank) -> bool:
        """The next step of a leader rank by itself; an agent that is stopped does not see it, and says so later."""
        ranks = self.living(proc.group, proc.life)
        if proc.dead or proc.place or len({p.place for _, p in ranks}) < len(self.places[proc.group]):
            return False
        if any(other.side != m.side for other, _ in ranks):
            return False
        if proc.phase is Phase.STARTING:
            self.move(m, proc, Phase.PARKED)
        elif proc.phase is Phase.PARKED and (m.lock is None or m.lock.dead):
            m.lock = proc
            for _, rank in ranks:
                rank.had_the_lock = True
            self.move(m, proc, Phase.WAKING)
        elif proc.phase is Phase.WAKING:
            held = any(
                p.had_the_lock and not p.dead and p.life != proc.life for o, _ in ranks for p in o.procs.values()
            )
            if held:
                return False
            self.move(m, proc, Phase.ACTIVE)
            self.check()
        elif proc.phase is Phase.ACTIVE and m.confirmed != proc.life and m.up and not m.stopped:
            m.confirmed = proc.life
        else:
            return False
        return True

    def check(self) -> None:
        """Never two active in a group."""
        for group in range(len(self.places)):
            found = [
                (m.origin, p.life)
                for m in self.agents
                for p in m.procs.values()
                if p.group == group and p.place == 0 and p.phase is Phase.ACTIVE and not p.dead
            ]
            if len(found) > 1:
                raise Broken(f"two cohorts of group {group} are active: {found}")

    # -- time and faults ---------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """Who is not sure of its lease has ended its ranks, and its guard those of one that stands still."""
        end = self.now + seconds
        while self.now < end:
            super().pass_time(min(1.0, end - self.now))
            for m in self.agents:
                m.behind_since = (self.now if m.behind_since is None else m.behind_since) if m.news else None
                if m.behind_since is not None and self.now - m.behind_since >= WATCH and not m.stopped:
                    while m.news and self.reaches(m):
                        self.hear(m)
                if not m.procs or self.sure(m):
                    continue
                if not m.stopped:
                    for proc in m.procs.values():
                        if not proc.dead:
                            self.kill(m, proc)
                elif self.now >= m.sent + SILENCE + GUARD:
                    self.guard(m)

    def crash(self, a: Agent) -> None:
        assert isinstance(a, Machine)
        super().crash(a)
        self._reached = {}
        self.forget(a)
        a.told = None
        a.absent = {}

    def part(self, bits: int) -> None:
        """Machines on two sides."""
        for m in self.agents:
            m.side = bits >> m.origin & 1
        self._reached = {}

    def come_back(self, a: Agent) -> None:
        self._reached = {}
        super().come_back(a)
        self._reached = {}

    def lose_both(self, one: Machine, other: Machine, good: bool) -> None:
        for m in (one, other):
            if good and self.may_be_lost(m):
                self.lose(m)
            else:
                self.crash(m)

    def may_be_lost(self, m: Machine) -> bool:
        """For good: a majority of the members can come back, and no more than one is without a spare."""
        if sum(o.lost for o in self.agents) > self.spares:
            return False
        gone = sum(o.lost and seats.seat_of(self.seats, o.origin) < self.members for o in self.agents)
        return seats.seat_of(self.seats, m.origin) >= self.members or 2 * (gone + 1) < self.members

    def fault(self) -> str:
        kinds: list[tuple[str, Any]] = []
        up = [m for m in self.agents if m.up]
        for m in up:
            if not m.stopped:
                kinds.append((f"agent {m.origin} is stopped", (setattr, m, "stopped", True)))
                kinds.append((f"agent {m.origin} dies", (self.crash, m)))
            if self.may_be_lost(m):
                kinds.append((f"node {m.origin} is gone for good", (self.lose, m)))
                if m.rank < self.serving and m.rank not in self.nodes:  # it takes over at this moment
                    kinds += [(f"spare {m.origin} is lost as it takes over", (self.lose, m))] * 4
            for p in m.procs.values():
                if not p.dead:
                    kinds.append((f"rank of life {p.life} on {m.origin} dies", (self.die, p)))
        leaders = [m for m in up if m.token]
        for one in leaders:
            for other in up:
                if other is not one and self.leads_group(other):
                    what = f"leader {one.origin} and group leader {other.origin}"
                    kinds.append((f"{what} die", (self.lose_both, one, other, False)))
                    kinds.append((f"{what} are gone", (self.lose_both, one, other, True)))
        kinds += [("parted", None)] * len(self.agents)
        name, what = kinds[self.choose(len(kinds))]
        if what is None:
            bits = 1 + self.choose(2 ** len(self.agents) - 2)
            name, what = f"parted: {bits:b}", (self.part, bits)
        do, *args = what
        do(*args)
        self.faults -= 1
        return name

    # -- running it --------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Everything that can happen does, once, of who is well; says whether something did."""
        did = False
        for m in self.agents:
            if not m.up:
                continue
            if not m.stopped:
                reached = self.reaches(m)
                while m.news and reached:
                    self.hear(m)
                    did = True
                if m.looked != (seen := (self.now, m.heard)):
                    m.looked = seen
                    did |= self.look(m) | self.act(m)
                if reached and (m.unsaid or m.wants):
                    did = True
                    if m.unsaid:
                        self.deliver(m)
                    while m.wants and not self.ended:
                        self.write(m)
            for proc in m.procs.values():
                if not proc.place and self.engine(m, proc):
                    did = True
                    m.heard += 1
        return did

    def go_on(self, seconds: float) -> None:
        """All who are well do all there is to do."""
        end = self.now + seconds
        while not self.ended:
            for _ in range(8):
                if not self.turn():
                    break
            if self.now >= end or self.ended:
                return
            self.pass_time(1.0)

    def step(self) -> None:
        if self.faults and not self.choose(5):
            self.log.append(self.fault())
            return
        if not self.choose(4):
            seconds = (1.0, 3.0, 8.0, 13.0)[self.choose(4)]
            self.log.append(f"all go on for {seconds:g} s")
            self.go_on(seconds)
            return
        found: list[tuple[Any, ...]] = [(f"{s:g} s pass", self.pass_time, s) for s in (1.0, 6.0)]
        for m in self.agents:
            if not m.lost and (m.stopped or not m.up or m.side):
                found.append((f"agent {m.origin} is well again", self.come_back, m))
            reached = m.up and self.reaches(m)
            if reached and m.wants:  # what was sent before it was stopped comes all the same
                found.append((f"a wish of {m.origin} is written", self.write, m))
            if reached and m.unsaid:
                found.append((f"what {m.origin} has said is written", self.deliver, m))
            for proc in m.procs.values():
                if not proc.dead and not proc.place and proc.phase in ALIVE:
                    found.append((f"engine {proc.life} on {m.origin}", self.engine, m, proc))
            if not m.up or m.stopped:
                continue
            if m.news and reached:
                found.append((f"agent {m.origin} hears", self.hear, m))
            found.append((f"agent {m.origin} looks", self.look, m))
            if m.rank in self.group_of:
                found.append((f"agent {m.origin} acts", self.act, m))
            if m.token and self.sure(m):
                found.append((f"agent {m.origin} speaks", self.speak, m))
        name, do, *args = found[self.choose(len(found))]
        self.log.append(name)
        do(*args)

    def settle(self) -> None:
        """All who are not gone for good come back, and nothing more befalls them: each group that can is full, and the
        run is over if, and only if, too few can be.
        """
        self.faults = 0
        if not self.ended:
            for m in self.agents:
                m.side = 0
            self._reached = {}
            for m in self.agents:
                if not m.lost:
                    self.come_back(m)
        end = self.now + 4 * NODE_WAIT
        while not self.ended and self.now < end and not self.well():
            if not any(self.reaches(m) for m in self.agents):
                self.aborted = "no majority of the members can come back"  # all give up after node_wait
                return
            self.go_on(1.0)
        if self.ended:
            return  # rightly, as `write` has seen
        if not self.well():
            raise Broken(f"not well: {self.describe()}")

    def can(self, group: int) -> bool:
        """Whether a group's nodes can all be there."""
        owners = {seats.owner(self.seats, rank) for rank in self.places[group]}
        return not any(m.lost for m in self.agents if m.origin in owners)

    def full(self, group: int) -> bool:
        """By what really is."""
        first = next((m for m in self.agents if m.up and m.rank == self.places[group][0] and self.owns(m)), None)
        if first is None or first.known.get(("said", group)) is None:
            return False
        lives = [p for p in first.procs.values() if not p.dead]
        active = [p for p in lives if p.phase is Phase.ACTIVE]
        return (
            len(active) == 1
            and first.confirmed == active[0].life
            and sum(p.phase is Phase.PARKED for p in lives) == COHORTS - 1
            and all(len(self.living(group, p.life)) == len(self.places[group]) for p in lives)
        )

    def well(self) -> bool:
        leaders = [m for m in self.agents if m.token]
        if len(leaders) != 1 or not self.holds(leaders[0].token):
            return False
        if sum(m.lost for m in self.agents) <= self.spares and not all(map(self.can, range(len(self.places)))):
            return False  # a spare is to come
        for group in range(len(self.places)):
            if not self.store["said", group].failed and not (self.can(group) and self.full(group)):
                return False  # else somebody has to say that it is over
        return self.left() >= LEAST

    def describe(self) -> str:
        machines = [
            f"{m.origin} as {m.rank}: up {m.up} lost {m.lost} lease {m.lease in self.ends} {m.lead} news {len(m.news)} "
            f"{[(p.group, p.place, p.life, p.phase.value, p.dead) for p in m.procs.values()]} {m.skipped} {m.confirmed}"
            for m in self.agents
        ]
        return "\n".join([f"t={self.now}", *machines, str(self.seats), str(self.store)])


#: Sizes of groups, members of etcd and spares: two groups of two nodes with a spare, without, with two; one on all
#: nodes; one node a group; and five members.
SHAPES = (
    ((2, 2), 3, 1),
    ((2, 2), 3, 1),
    ((2, 2), 3, 0),
    ((2, 1), 3, 2),
    ((3,), 3, 1),
    ((1, 1, 1), 3, 1),
    ((2, 2, 1), 5, 1),
)
_SETTLED: dict[Any, bytes] = {}


def settled(shape: tuple[tuple[int, ...], int, int]) -> RunWorld:
    """A run that has just come up. Raises `Broken`."""
    key = (shape, controller.decide, reconciler.decide, seats.decide, leadership.claim_at, census.too_few)
    if key not in _SETTLED:
        _SETTLED[key] = pickle.dumps(RunWorld(*shape, nobody), pickle.HIGHEST_PROTOCOL)
    found: RunWorld = pickle.loads(_SETTLED[key])
    return found


def explore(choose: Callable[[int], int], steps: int = 40, faults: int = 3) -> RunWorld:
    """A run from full on, `steps` events with faults among them, and to its end. Raises `Broken`."""

    def begin(pick: Callable[[int], int]) -> RunWorld:
        world = settled(SHAPES[pick(len(SHAPES))])
        world.choose, world.faults = pick, faults
        return world

    return through(begin, choose, steps, "roles.replay(", f", {steps}, {faults})")


def replay(picked: list[int], steps: int, faults: int) -> RunWorld:
    """Run a printed case again."""
    left = iter(picked)
    return explore(lambda n: next(left, 0), steps, faults)
