"""Several groups of one run in miniature: each is a `World`, and its nodes are parts of agents that others share.

One store holds all, under the names that the code gives its keys (`control.keys`), and hands each change to the agents
whose ranges have it, of which each of their groups takes what it can read. So whatever one group could see of another,
it sees here. The line to a node, its lease and its agent are those of all groups on it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gms_launch.cohort import census, controller, reconciler
from gms_launch.cohort.model import CohortView, Phase, Redundancy, cohort_phase, redundancy
from gms_launch.control.keys import DYNAMO_INSTANCES, Keys, Range, Share, followed, prefix
from tests.simulation.world import NEVER, Broken, Life, Node, Proc, World, nobody, through

RUN = Keys("r")
#: Where all engines of a run register with Dynamo.
INSTANCES = f"{DYNAMO_INSTANCES}dynamo/backend/generate/"


@dataclass(frozen=True)
class Said:
    """What a group's leader says of it, as far as it counts here."""

    redundancy: str = ""
    failed: str = ""
    exit_code: int = 1


@dataclass
class Agent:
    """What one node has of all groups, and the ranges that its agent follows."""

    number: int
    parts: list[tuple[Group, Node]] = field(default_factory=list)
    ranges: set[Range] = field(default_factory=set)
    messages: int = 0

    def follow(self) -> None:
        run = Share(RUN, self.number == 0, 0)
        shares = [Share(group.keys, node.rank == 0, group.policy.cohorts) for group, node in self.parts]
        self.ranges = set(followed(run, shares))
        if any(share.leads for share in shares):
            self.ranges.add(prefix(DYNAMO_INSTANCES))


class Group(World):
    """One group of a run; its first node leads it, and is never lost."""

    def __init__(self, run: Run, name: str, agents: Sequence[Agent], cohorts: int, activate: bool) -> None:
        super().__init__(len(agents), cohorts, nobody, 0, activate)
        self.name, self.run, self.agents = name, run, tuple(agents)
        self.keys = Keys("r", name)
        self.log = run.log
        self.said = ""
        self.touched = False
        self.registered: dict[Life, bool] = {}
        for agent, node in zip(agents, self.nodes, strict=True):
            agent.parts.append((self, node))

    def named(self, key: Any) -> str:
        """A key as etcd has it."""
        kind, *rest = key
        if kind == "rank":
            return self.keys.rank(*rest)
        if kind == "desired":
            return self.keys.cohort(*rest)
        return self.keys.life_ended(*rest) if kind == "ended" else self.keys.run

    def read(self, key: str) -> Any:
        """A key of etcd as this group's mirror takes it; None for one that it does not."""
        for kind, front in (("desired", self.keys.desired), ("rank", self.keys.ranks), ("ended", self.keys.ended)):
            if key.startswith(front):
                return (kind, *map(int, key[len(front) :].split("/")))
        return ("run",) if key == self.keys.run else None

    # -- what is of the node, and so of all groups on it -------------------------------------------------------------

    def put(self, node: Node, key: Any, value: Any) -> None:
        if not node.connected:
            node.known[key] = (node.known.get(key, NEVER)[0], value)
            return
        self.run.put(self.named(key), value, node)
        self.revision = self.run.revision

    def _parts(self, node: Node) -> list[tuple[Group, Node]]:
        return self.agents[node.rank].parts

    def fault(self) -> str:
        self.touched = True
        return super().fault()

    def cut(self, node: Node) -> None:
        for group, part in self._parts(node):
            group.touched = True
            World.cut(group, part)

    def crash(self, node: Node) -> None:
        for group, part in self._parts(node):
            group.touched = True
            World.crash(group, part)

    def lose(self, node: Node) -> None:
        for group, part in self._parts(node):
            group.gone.add(part.rank)
        self.crash(node)

    def come_back(self, node: Node) -> None:
        for group, part in self._parts(node):
            World.come_back(group, part)

    def pass_time(self, seconds: float) -> None:
        for group in self.run.groups:
            group.touched |= seconds > 5.0 and any(not n.connected for n in group.nodes)
            World.pass_time(group, seconds)

    # -- what is said of the group -----------------------------------------------------------------------------------

    def lead(self) -> bool:
        did = super().lead()
        if not self.run.quiet:
            self.announce()
        return did

    def announce(self) -> None:
        """As the agent that leads it does: more redundancy only when a token came."""
        view = self.view()
        cohorts = [CohortView(s.cohort_id, s.incarnation, s.phase, s.since) for s in view.slots.values()]
        found = redundancy(cohorts, self.policy.cohorts - 1, all(n.gms for n in self.nodes))
        confirmed = any(s.life == self.confirmed for s in view.slots.values())
        if self.aborted:
            found = Redundancy.DOWN
        if found.value != self.said and (confirmed or found is Redundancy.DOWN) and not self.memory.initial:
            self.say(found.value)

    def say(self, what: str) -> None:
        self.said = what
        leader = self.nodes[0]
        self.put(leader, ("run",), self.store.get(("run",), (0, ((), 0)))[1])
        self.run.records[self.name] = Said(what, self.aborted)
        self.run.sum_up()

    def move(self, node: Node, proc: Proc, phase: Phase) -> None:
        """A leader rank registers with Dynamo when it serves, and is gone from there when it is proved dead."""
        super().move(node, proc, phase)
        there = self.registered.get(proc.life, False)
        if node.rank == 0 and there != (phase is Phase.ACTIVE) and phase in (Phase.ACTIVE, Phase.FENCED):
            self.registered[proc.life] = not there
            lease = f"{self.name}-{proc.cohort}-{proc.incarnation}"
            self.run.put(f"{INSTANCES}{lease}", None if there else lease, node)
            if not self.run.quiet:
                self.say(self.said)  # with the lease under which it is registered

    def check(self) -> None:
        super().check()
        self.run.check()


class Run:
    """Groups on nodes: `places` says for each on which, its leader first. Its own leader is node 0.

    `quiet` leaves out what only costs messages.
    """

    def __init__(
        self, places: Sequence[Sequence[int]], cohorts: int = 2, activate: bool = False, quiet: bool = True
    ) -> None:
        self.quiet = quiet
        self.log: list[str] = []
        self.revision = self.messages = 0
        self.records: dict[str, Said] = {}
        self.redundancy = ""
        self.choose: Callable[[int], int] = nobody
        self.agents = [Agent(k) for k in range(1 + max(n for place in places for n in place))]
        self.groups = [
            Group(self, f"g{k}", [self.agents[n] for n in place], cohorts, activate) for k, place in enumerate(places)
        ]
        #: Those that have had news since they last had nothing to do.
        self.awake: list[Group] = list(self.groups)
        self._hearers: dict[str, list[Agent]] = {}
        self._takers: dict[str, list[tuple[Group, Any]]] = {}
        for agent in self.agents:
            agent.follow()
        self._ranges: dict[Range, list[Agent]] = {}
        for agent in self.agents:
            for found in agent.ranges:
                self._ranges.setdefault(found, []).append(agent)

    @property
    def aborted(self) -> str:
        """Why the run is over: too few groups are left."""
        over = {g.name: Said(failed=g.aborted) for g in self.groups if g.aborted}
        return census.too_few(over, len(self.groups), 1, up=True)[0]

    def hearers(self, key: str) -> list[Agent]:
        """Who follows a key."""
        if key not in self._hearers:
            ranges = [r for r in self._ranges if (r.first <= key < r.end if r.end else key == r.first)]
            found = {id(a): a for r in ranges for a in self._ranges[r]}
            self._hearers[key] = list(found.values())
        return self._hearers[key]

    def takers(self, key: str) -> list[tuple[Group, Any]]:
        """Which groups can read a key, and as what."""
        if key not in self._takers:
            self._takers[key] = [(g, found) for g in self.groups if (found := g.read(key)) is not None]
        return self._takers[key]

    def put(self, key: str, value: Any, by: Node | None = None) -> None:
        """A write to the store, and a message to everybody who follows the key."""
        self.revision += 1
        takers = self.takers(key)
        for group, found in takers:
            group.store[found] = (self.revision, value)
            if group not in self.awake:
                self.awake.append(group)
        for agent in self.hearers(key):
            if not (agent.parts[0][1].up and agent.parts[0][1].connected):
                continue
            self.messages += 1
            agent.messages += 1
            for group, found in takers:
                part = next((n for g, n in agent.parts if g is group), None)
                if part is by and by is not None:
                    by.known[found] = (self.revision, value)
                elif part is not None:
                    part.inbox.append((self.revision, found, value))

    def sum_up(self) -> None:
        """The run's leader, when a group says something of itself: all nodes hear once that everything is up."""
        found = census.redundancy(self.records, len(self.groups))
        if found is Redundancy.FULL and not self.redundancy:
            self.redundancy = found.value
            self.put(RUN.run, found.value)

    @property
    def decisions(self) -> int:
        return sum(g.decisions for g in self.groups)

    def check(self) -> None:
        """A group that no fault has touched is as it was when the run came up."""
        for group in self.groups:
            if group.touched or group.memory.initial:
                continue
            procs = [p for n in group.nodes for p in n.procs.values()]
            if group.aborted or any(p.dead or p.incarnation > 1 for p in procs):
                raise Broken(f"group {group.name} has had no fault, and: {group.aborted or group.describe()}")

    def step(self) -> None:
        """One event of one group."""
        going = [g for g in self.groups if not g.aborted]
        self.awake = list(self.groups)
        group = going[self.choose(len(going))]
        self.log.append(f"# group {group.name}:")
        group.step()

    def settle(self, rounds: int = 400) -> None:
        """As `World.settle`, all groups side by side that have something to do."""
        for group in self.groups:
            group.faults = 0
        for _ in range(rounds):
            pauses = [(group, group.turn()) for group in list(self.awake)]
            self.awake = [group for group, pause in pauses if pause is not None]
            waiting = [pause for _, pause in pauses if pause is not None]
            if not waiting:
                return
            if all(waiting):
                self.groups[0].pass_time(min(waiting))
        raise Broken(f"neither full nor ended after {rounds} rounds: {[g.describe() for g in self.groups]}")


#: Two groups on the same nodes, on nodes of their own, as groups of GPUs on one node, and such a one beside a larger.
PLACES = (((0, 1), (0, 1)), ((0, 1), (2, 3)), ((0,), (0,)), ((0, 1, 2), (0,)), ((0, 1), (2,)))
#: How many faults each has: in one of two runs the other has none, and must not notice.
FAULTS = ((2, 0), (0, 2), (1, 1), (2, 1))
_SETTLED: dict[Any, bytes] = {}


def settled(places: Sequence[Sequence[int]], cohorts: int, activate: bool) -> Run:
    """A run that has just come up. Raises `Broken`."""
    made = (Keys, controller.decide, reconciler.decide, cohort_phase)  # tests replace those
    key = (tuple(map(tuple, places)), cohorts, activate, made)
    if key not in _SETTLED:
        run = Run(places, cohorts, activate)
        run.settle()
        _SETTLED[key] = pickle.dumps(run, pickle.HIGHEST_PROTOCOL)
    found: Run = pickle.loads(_SETTLED[key])
    return found


def explore(choose: Callable[[int], int], steps: int) -> Run:
    """Two groups of one run: `choose` says where they lie, what befalls which, and in which order. Raises `Broken`."""

    def begin(pick: Callable[[int], int]) -> Run:
        places, faults = PLACES[pick(len(PLACES))], FAULTS[pick(len(FAULTS))]
        run = settled(places, 2 + pick(2), not pick(3))
        run.choose = pick
        for group, number in zip(run.groups, faults, strict=True):
            group.choose, group.faults = pick, number
        return run

    return through(begin, choose, steps, "groups.replay(", f", {steps})")


def replay(picked: list[int], steps: int) -> Run:
    """Run a printed case again."""
    left = iter(picked)
    return explore(lambda n: next(left, 0), steps)
