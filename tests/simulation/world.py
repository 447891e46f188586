"""A run in miniature: the real controller and reconciler, and everything around them made up and steerable.

Agents, etcd, the network, processes, the lock, the GMS servers and the clock are simulated. Which of the things that
may happen next does happen is for `choose` to say, so a run is a list of small numbers and can be replayed. Messages
come late, in any order between keys, twice, or not at all until the receiver reads everything anew. What etcd promises
is kept: of one key a reader never goes back to an older value.

After every event the invariants are checked; `Broken` says which one and prints the events that led there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from gms_launch.cohort import controller, reconciler
from gms_launch.cohort.actions import Activate, Proved, Roll, RollBack
from gms_launch.cohort.controller import Memory, Policy, Slot, View
from gms_launch.cohort.model import ALIVE, ENDED, Phase, cohort_phase
from gms_launch.cohort.reconciler import Desire, LocalRank
from gms_launch.cohort.view import Request, RollRequest

LEASE = 5.0
#: What a key that was never put has: no revision and no value.
NEVER = (0, None)
#: The record of the run (lost nodes, epoch of the GMS servers) before there is one.
NO_RUN: tuple[int, tuple[tuple[int, ...], int]] = (0, ((), 0))
Life = tuple[int, int]


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass(slots=True)
class Proc:
    """A rank on a node. `dead` is what really is; `phase` is what its agent has noticed. With hybrid load balancing
    (`hybrid`) its agent has `let_go` of its lock, and it has given a `token`.
    """

    cohort: int
    incarnation: int
    phase: Phase = Phase.STARTING
    since: float = 0.0
    dead: bool = False
    hangs: bool = False
    had_the_lock: bool = False
    let_go: bool = False
    token: bool = False
    life: Life = field(init=False)

    def __post_init__(self) -> None:
        self.life = self.cohort, self.incarnation


@dataclass(slots=True)
class Node:
    """An agent and what runs under it. `known` is its copy of the store: key -> (revision, value)."""

    rank: int
    up: bool = True
    connected: bool = True
    cut_off: bool = False
    lease: float = LEASE
    procs: dict[int, Proc] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)
    known: dict[Any, tuple[int, Any]] = field(default_factory=dict)
    inbox: list[tuple[int, Any, Any]] = field(default_factory=list)
    gms: bool = True
    epoch: int = 0


def for_all(key: Any) -> bool:
    """Which keys every agent watches (`Keys.followed`): no ranks but the leader's. The leader watches all."""
    return key[0] != "rank" or key[2] == 0


class World:
    """`choose(n)` picks one of n things. `faults` is how many may still happen; `log` what has happened."""

    def __init__(
        self, nnodes: int, cohorts: int, choose: Callable[[int], int], faults: int = 2, activate: bool = False
    ) -> None:
        self.policy = Policy(*(cohorts, 100.0, 20.0, 1.0, 8.0, 600.0), limit=4, node_wait=60.0, activate=activate)
        self.let_go: list[Life] = []
        self.generation, self.rolling = 0, False
        self.generations: dict[Life, int] = {}
        self.nodes = [Node(k) for k in range(nnodes)]
        self.choose, self.faults = choose, faults
        self.now = 0.0
        self.revision = 0
        self.store: dict[Any, tuple[int, Any]] = {}
        self.memory = Memory()
        self.lock: Proc | None = None
        self.confirmed: Life | None = None
        self.aborted = ""
        self.log: list[str] = []
        self.messages = self.decisions = 0
        self.caused: set[Life] = set()
        self.requests: list[Request] = []
        self.asked = 0
        self.bad_starts = [0] * cohorts
        self.gone: set[int] = set()
        self.spoilt = False

    # -- the store and the network -----------------------------------------------------------------------------

    def put(self, node: Node, key: Any, value: Any) -> None:
        """A write by an agent: its own copy at once, the store's and the others' if the line holds."""
        if not node.connected:
            node.known[key] = (node.known.get(key, NEVER)[0], value)
            return
        self.revision += 1
        self.store[key] = node.known[key] = (self.revision, value)
        for other in self.nodes if for_all(key) else self.nodes[:1]:
            if other.up and other.connected:
                self.messages += 1
                if other is not node:
                    other.inbox.append((self.revision, key, value))

    def put_once(self, node: Node, key: Any, value: Any) -> None:
        """A write that the store refuses when the key is there."""
        if not node.connected or self.store.get(key, NEVER)[1] is None:
            self.put(node, key, value)
        else:
            node.known[key] = self.store[key]

    def deliver(self, node: Node, index: int, keep: bool = False) -> None:
        revision, key, value = node.inbox[index] if keep else node.inbox.pop(index)
        if revision > node.known.get(key, NEVER)[0]:
            node.known[key] = (revision, value)

    def forget_messages(self, node: Node) -> None:
        node.inbox.clear()

    def deliver_all(self, node: Node) -> None:
        inbox, node.inbox = node.inbox, []
        for revision, key, value in inbox:
            if revision > node.known.get(key, NEVER)[0]:
                node.known[key] = (revision, value)

    def resync(self, node: Node) -> None:
        """Read everything anew and report what runs here, as an agent does after a break."""
        node.inbox.clear()
        node.known = {k: v for k, v in self.store.items() if node.rank == 0 or for_all(k)}
        for cohort, incarnation in node.skipped.items():
            if cohort not in node.procs or node.procs[cohort].incarnation < incarnation:
                self.record(node, (cohort, incarnation), Phase.FENCED, self.now)
        for proc in node.procs.values():
            if proc.incarnation >= node.skipped.get(proc.cohort, 0):
                self.report(node, proc)

    def report(self, node: Node, proc: Proc) -> None:
        self.record(node, proc.life, proc.phase, proc.since)

    def record(self, node: Node, life: Life, phase: Phase, since: float) -> None:
        """A rank's record, and for all other nodes that a life has ended, if this one has not heard of it."""
        if phase in ENDED and node.known.get(("ended", *life), (0, None))[1] is None:
            self.put_once(node, ("ended", *life), node.rank)
        self.put(node, ("rank", life[0], node.rank), (life[1], phase, since))

    # -- an agent ----------------------------------------------------------------------------------------------

    def agent(self, node: Node) -> None:
        """One look of an agent: what its reconciler says is done."""
        for proc in node.procs.values():
            if proc.dead and proc.phase in ALIVE:
                self.move(node, proc, Phase.FAILING)
        desired, ended = {}, {}
        for key, (_, value) in node.known.items():
            if key[0] == "desired":
                desired[key[1]] = value
            elif key[0] == "ended" and value is not None:
                ended[key[1], key[2]] = value
        local = {c: LocalRank(c, p.incarnation, p.phase, p.dead, p.let_go) for c, p in node.procs.items()}
        for cohort, incarnation in node.skipped.items():
            if cohort not in local or local[cohort].incarnation < incarnation:
                local[cohort] = LocalRank(cohort, incarnation, Phase.FENCED, True)
        self.decisions += 1
        for action in reconciler.decide({} if node.cut_off else desired, local, ended):
            if isinstance(action, reconciler.StartRank):
                self.start(node, action.desire)
            elif isinstance(action, reconciler.SkipRank):
                node.skipped[action.cohort_id] = action.incarnation
                self.record(node, (action.cohort_id, action.incarnation), Phase.FENCED, self.now)
            elif isinstance(action, reconciler.LetGo):
                self.open(node, node.procs[action.cohort_id])
            else:
                proc = node.procs[action.cohort_id]
                self.check_cause(node, proc, action.reason)
                self.kill(node, proc)
        run = node.known.get(("run",), NO_RUN)[1]
        if run[1] > node.epoch and all(p.phase is Phase.FENCED for p in node.procs.values()):
            node.epoch, node.gms = run[1], True

    def start(self, node: Node, desire: Desire) -> None:
        before = [(n, p) for n in self.nodes for p in n.procs.values() if p.cohort == desire.cohort_id and not p.dead]
        for other, proc in before:
            if proc.incarnation != desire.incarnation:
                raise Broken(
                    f"life {desire.incarnation} of cohort {desire.cohort_id} started on node {node.rank} while life "
                    f"{proc.incarnation} is alive on node {other.rank}"
                )
        proc = Proc(desire.cohort_id, desire.incarnation, since=self.now)
        node.procs[desire.cohort_id] = proc
        self.report(node, proc)

    def kill(self, node: Node, proc: Proc) -> None:
        self.die(proc)
        if proc.phase in ALIVE:
            self.move(node, proc, Phase.FAILING)

    def die(self, proc: Proc) -> None:
        proc.dead = True
        if self.lock is proc:
            self.lock = None

    def move(self, node: Node, proc: Proc, phase: Phase) -> None:
        proc.phase, proc.since = phase, self.now
        self.report(node, proc)

    def check_cause(self, node: Node, proc: Proc, reason: str) -> None:
        """Nobody is killed without a cause: a rank of that life is dead, or the controller had one."""
        ranks = [p for n in self.nodes if (p := n.procs.get(proc.cohort)) and p.life == proc.life]
        if proc.life not in self.caused and not any(p.dead for p in ranks) and len(ranks) == len(self.nodes):
            raise Broken(f"life {proc.life} was killed on node {node.rank} without a cause: {reason}")

    # -- the leader --------------------------------------------------------------------------------------------

    def view(self) -> View:
        leader = self.nodes[0]
        known = leader.known.get
        lost, epoch = known(("run",), NO_RUN)[1]
        counting = [n.rank for n in self.nodes if n.rank not in lost]
        slots = {}
        for cohort in range(self.policy.cohorts):
            if (desire := known(("desired", cohort), NEVER)[1]) is None:
                continue
            phases, since, incarnation = {}, 0.0, desire.incarnation
            for rank in range(len(self.nodes)):
                record = known(("rank", cohort, rank), NEVER)[1]
                if record is not None and record[0] == incarnation:
                    phases[rank], since = record[1], max(since, record[2])
            phase = self.phase(phases, counting)
            given_up = desire.why.startswith("given up")
            generation = self.generations[cohort, incarnation]
            slots[cohort] = Slot(cohort, incarnation, desire.running, given_up, phase, since, generation=generation)
        absent = {n.rank: f"node {n.rank}" for n in self.nodes[1:] if not n.up or n.lease <= self.now}
        return View(
            slots=slots,
            confirmed=self.confirmed,
            requests=tuple(self.requests),
            absent=absent,
            lost=lost,
            gms_down=tuple([f"node {n.rank}" for n in self.nodes if not n.gms and n.up and n.rank in counting]),
            gms_restarting=any(n.epoch < epoch and n.up and n.rank in counting for n in self.nodes),
            generation=self.generation,
            rolling=self.rolling,
            hung={p.life: "no token" for p in leader.procs.values() if p.hangs and p.phase is Phase.ACTIVE},
        )

    def phase(self, phases: dict[int, Phase], nodes: list[int]) -> Phase:
        return cohort_phase(phases, nodes)

    def lead(self) -> bool:
        """One look of the controller; True when it did something."""
        if self.aborted:
            return False
        leader, view = self.nodes[0], self.view()
        self.decisions += 1
        actions, self.memory = controller.decide(view, self.memory, self.policy, self.now)
        for action in actions:
            if isinstance(action, controller.Start):
                self.generations[action.cohort_id, action.incarnation] = self.generation
                last = ("ended", action.cohort_id, action.incarnation - 1)
                if self.store.get(last, (0, None))[1] is not None:
                    self.put(leader, last, None)
                desire = Desire(action.cohort_id, action.incarnation, True, 0, action.why)
                self.put(leader, ("desired", action.cohort_id), desire)
            elif isinstance(action, (controller.Kill, controller.GiveUp)):
                slot = view.slots[action.cohort_id]
                self.caused.add((action.cohort_id, action.incarnation))
                self.check_controllers_kill(slot, action, view)
                why = ("given up: " if isinstance(action, controller.GiveUp) else "") + action.why
                self.put(
                    leader, ("desired", action.cohort_id), Desire(action.cohort_id, action.incarnation, False, 0, why)
                )
            elif isinstance(action, controller.LoseNodes):
                epoch = leader.known.get(("run",), NO_RUN)[1][1]
                self.put(leader, ("run",), (action.lost, epoch))
            elif isinstance(action, controller.NewGms):
                lost, epoch = leader.known.get(("run",), NO_RUN)[1]
                self.put(leader, ("run",), (lost, epoch + 1))
            elif isinstance(action, Activate):
                self.activate((action.cohort_id, action.incarnation))
            elif isinstance(action, Roll):
                self.generation, self.rolling = self.generation + 1, True
            elif isinstance(action, Proved):
                self.rolling = False
            elif isinstance(action, RollBack):
                self.generation, self.rolling = self.generation - 1, False
            elif isinstance(action, controller.Answer):
                self.requests = [r for r in self.requests if r.uuid != action.uuid]
            elif isinstance(action, controller.Abort):
                late = any(n.lease - LEASE + self.policy.node_wait <= self.now for n in self.nodes[1:])
                if not self.gone and not self.spoilt and not late:
                    raise Broken(f"the run ended for no good reason: {action.why}")
                self.aborted = action.why
                self.log.append(f"# the run ends: {action.why}")
            else:
                raise AssertionError(f"the simulation has no hand for {action!r}")
        full = len(view.slots) == self.policy.cohorts and self.full()
        if full and self.memory.initial:
            self.memory = controller.replace(self.memory, initial=False)
        return bool(actions)

    def check_controllers_kill(self, slot: Slot, action: Any, view: View) -> None:
        """The controller kills a parked cohort for a lost node, for a GMS that is gone with nobody serving, for a roll
        while somebody serves, or because it does not take the lock that it was given.
        """
        if action.why.startswith("roll") and any(s.phase is Phase.ACTIVE for s in view.slots.values()):
            return
        if slot.life == self.memory.activated and "being let go" in action.why:
            return
        if slot.phase is Phase.PARKED and not view.absent and not view.gms_down and not view.gms_restarting:
            raise Broken(f"parked cohort {slot.cohort_id} was killed by the controller: {action.why}")

    # -- engines -----------------------------------------------------------------------------------------------

    def ranks(self, life: Life) -> list[Proc]:
        found = (n.procs.get(life[0]) for n in self.nodes)
        return [p for p in found if p is not None and p.life == life and not p.dead]

    def leaders(self) -> list[tuple[Node, Proc]]:
        """The ranks that speak for their life."""
        return [(self.nodes[0], proc) for proc in self.nodes[0].procs.values()]

    def engine(self, node: Node, proc: Proc) -> bool:
        """The next step of a leader rank, if it can take one: what an engine does by itself."""
        if proc.dead or proc.hangs or len(self.ranks(proc.life)) < len(self.nodes):
            return False  # like a collective, it waits for ever for a rank that is not there
        if proc.phase is Phase.STARTING:
            if self.bad_starts[proc.cohort] or not all(n.gms for n in self.nodes):
                self.bad_starts[proc.cohort] = max(0, self.bad_starts[proc.cohort] - 1)
                self.die(proc)
                return True
            self.move(node, proc, Phase.PARKED)
            return True
        if proc.phase is Phase.PARKED and self.may_serve(proc):
            self.lock = proc
            for rank in self.ranks(proc.life):
                rank.had_the_lock = True
            self.move(node, proc, Phase.WAKING)
            return True
        if proc.phase is Phase.WAKING:
            if not all(n.gms for n in self.nodes):
                self.die(proc)  # it cannot reconnect
                return True
            if self.memory_is_held(proc):
                return False  # somebody of an earlier primary still has the KV memory
            self.move(node, proc, Phase.ACTIVE)
            return True
        if proc.phase is Phase.ACTIVE and self.confirmed != proc.life:
            self.confirmed = proc.life
            return True
        return False

    def may_serve(self, proc: Proc) -> bool:
        """True when a parked engine finds its lock free: the one for all, or its own."""
        return proc.life in self.let_go if self.policy.activate else self.lock is None

    def open(self, node: Node, proc: Proc) -> None:
        raise AssertionError("nobody was told to let go of a lock")

    def activate(self, life: Life) -> None:
        """The agent lets go of a cohort's own lock."""
        for earlier in self.let_go:
            if self.ranks(earlier):
                raise Broken(f"life {life} is let go while life {earlier} is alive on node")
        self.let_go.append(life)

    def memory_is_held(self, proc: Proc) -> bool:
        served = (p for n in self.nodes for p in n.procs.values() if not p.dead and p.life != proc.life)
        return any(p.life in self.memory.served or p.had_the_lock for p in served)

    # -- time, faults, invariants ------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """Leases are renewed where agents are connected; a cut-off agent ends its ranks when its lease does."""
        self.now += seconds
        for node in self.nodes:
            if node.up and node.connected:
                node.lease = self.now + LEASE
            elif node.up and node.lease <= self.now and not node.cut_off:
                node.cut_off = True
                for proc in node.procs.values():
                    if proc.phase in ALIVE:
                        self.kill(node, proc)

    def fault(self) -> str:
        """One of the faults that can happen now."""
        living = [(n, p) for n in self.nodes for p in n.procs.values() if not p.dead]
        kinds: list[tuple[str, Any]] = [(f"kill rank {n.rank} of life {p.life}", (self.die, p)) for n, p in living]
        kinds += [(f"hang life {p.life}", (setattr, p, "hangs", True)) for n, p in living if n.rank == 0]
        for node in self.nodes[1:]:
            if node.up:
                kinds.append((f"agent {node.rank} dies", (self.crash, node)))
            if node.up and node.connected:
                kinds.append((f"node {node.rank} is cut off", (self.cut, node)))
        kinds += [(f"GMS of node {n.rank} dies", (setattr, n, "gms", False)) for n in self.nodes if n.gms and n.up]
        kinds += [
            (f"the next {k} starts of cohort {c} fail", (self.spoil, c, k))
            for c in range(len(self.bad_starts))
            for k in (1, 3)
        ]
        kinds += [(f"node {n.rank} is gone for good", (self.lose, n)) for n in self.nodes[1:] if n.up]
        kinds += [("a user kills the primary", (self.ask, False)), ("a user insists", (self.ask, True))]
        kinds += [("a user rolls", (self.ask_to_roll,))]
        name, (do, *args) = kinds[self.choose(len(kinds))]
        do(*args)
        self.faults -= 1
        return name

    def spoil(self, cohort: int, starts: int) -> None:
        self.bad_starts[cohort], self.spoilt = starts, True

    def ask(self, force: bool) -> None:
        self.asked += 1
        self.requests.append(controller.KillRequest(f"request {self.asked}", "group", force))

    def ask_to_roll(self) -> None:
        self.asked += 1
        self.requests.append(RollRequest(f"request {self.asked}", ("--new",)))

    def lose(self, node: Node) -> None:
        self.gone.add(node.rank)
        self.crash(node)

    def cut(self, node: Node) -> None:
        """The line to a node is cut."""
        node.connected = False

    def crash(self, node: Node) -> None:
        """An agent is SIGKILLed and takes everything with it."""
        for proc in node.procs.values():
            self.die(proc)
        node.up = node.connected = False
        node.procs, node.skipped, node.known = {}, {}, {}
        node.inbox.clear()

    def come_back(self, node: Node) -> None:
        """A new agent in a dead one's place, or the line restored."""
        if not node.up:
            node.up, node.gms = True, True
            node.epoch = self.store.get(("run",), NO_RUN)[1][1]
            for key, (_, desire) in self.store.items():
                if key[0] == "desired":
                    node.skipped[key[1]] = desire.incarnation
        node.connected, node.cut_off, node.lease = True, False, self.now + LEASE
        self.resync(node)

    def notice_hang(self, proc: Proc) -> None:
        """The agent's own look at a rank that has parked and does nothing any more."""
        self.caused.add(proc.life)
        self.kill(self.nodes[0], proc)

    def stated(self) -> bool:
        """Serving, and without redundancy for a reason that is told: a GMS is gone."""
        serving = any(p.phase is Phase.ACTIVE and p.life == self.confirmed for p in self.nodes[0].procs.values())
        return serving and any(not n.gms for n in self.nodes)

    def full(self) -> bool:
        """One cohort serves and gave a token, all others are parked; by what really is."""
        phases = [p.phase for p in self.nodes[0].procs.values() if not p.dead]
        return (
            phases.count(Phase.ACTIVE) == 1
            and phases.count(Phase.PARKED) == self.policy.cohorts - 1
            and all(len(self.ranks(p.life)) == len(self.nodes) for p in self.nodes[0].procs.values())
            and any(p.phase is Phase.ACTIVE and p.life == self.confirmed for p in self.nodes[0].procs.values())
        )

    def check(self) -> None:
        active, serving = Phase.ACTIVE, []
        for node in self.nodes:
            for proc in node.procs.values():
                if proc.phase is active and not proc.dead:
                    serving.append(proc.life)
        if len(serving) > 1:
            raise Broken(f"two cohorts are active: {serving}")

    # -- running it --------------------------------------------------------------------------------------------

    def enabled(self) -> list[tuple[Any, ...]]:
        """Everything that may happen next: what it is called, as a format for the arguments; what does it; those."""
        found: list[tuple[Any, ...]] = [("controller", self.lead)]
        for node in self.nodes:
            if node.rank in self.gone:
                continue
            if not node.up:
                found.append(("agent {0.rank} comes back", self.come_back, node))
                continue
            found.append(("agent {0.rank}", self.agent, node))
            if not node.connected:
                found.append(("node {0.rank} is connected again", self.come_back, node))
            if node.inbox:
                found.append(("node {0.rank} gets its oldest message", self.deliver, node, 0))
                if len(node.inbox) > 1:
                    found.append(("node {0.rank} gets its newest message", self.deliver, node, -1))
                    found.append(("node {0.rank} gets a message twice", self.deliver, node, 0, True))
                    found.append(("node {0.rank} loses all messages", self.forget_messages, node))
            for proc in node.procs.values():
                if proc.dead and proc.phase is Phase.FAILING:
                    found.append(("node {0.rank} proves life {1.life} dead", self.move, node, proc, Phase.FENCED))
        for node, proc in self.leaders():
            if not proc.dead and proc.phase in ALIVE:
                found.append(("engine {1.life} on node {0.rank}", self.engine, node, proc))
                if proc.hangs and proc.phase is Phase.PARKED:
                    found.append(("the hang of life {0.life} is noticed", self.notice_hang, proc))
        found += [("half a second passes", self.pass_time, 0.5), ("six seconds pass", self.pass_time, 6.0)]
        if self.faults > 0 and not self.memory.initial:
            found += [("fault", self.fault)] * 3
        return found

    def step(self) -> None:
        """One event, whichever `choose` picks."""
        name, do, *args = (events := self.enabled())[self.choose(len(events))]
        self.log.append(name.format(*args))
        if isinstance(what := do(*args), str):
            self.log[-1] += f": {what}"
        self.check()

    def settle(self, rounds: int = 400) -> None:
        """Everything that can happen does, in turn, without more faults: it must end in `full`, or with a word."""
        self.faults = 0
        for _ in range(rounds):
            if (pause := self.turn()) is None:
                return
            if pause:
                self.pass_time(pause)
        raise Broken(f"neither full nor ended after {rounds} rounds: {self.describe()}")

    def turn(self) -> float | None:
        """Everything that can happen does, once. Returns how long nothing will by itself; None when it has settled."""
        if self.aborted:
            return None
        before = self.revision
        for node in self.nodes:
            if node.rank in self.gone:
                continue
            if not node.up or not node.connected:
                self.come_back(node)
            self.deliver_all(node)
        self.lead()
        for node in (n for n in self.nodes if n.up):
            self.deliver_all(node)
            self.resync_if_behind(node)
            self.agent(node)
            for proc in list(node.procs.values()):
                if proc.dead and proc.phase is Phase.FAILING:
                    self.move(node, proc, Phase.FENCED)
        moved = False
        for node, proc in self.leaders():
            moved |= self.engine(node, proc)
            if proc.hangs and proc.phase is Phase.PARKED:
                self.notice_hang(proc)
        self.check()
        done = not self.requests and (self.full() or self.stated())
        if done and not self.memory.initial and not self.lead() and not moved:
            return None
        if moved or self.revision != before:
            return 0.0
        at = controller.next_look(self.view(), self.memory, self.policy, self.now)
        return max(0.1, (at or self.now) - self.now)

    def resync_if_behind(self, node: Node) -> None:
        for key, (revision, _) in self.store.items():
            if node.known.get(key, NEVER)[0] < revision and (node.rank == 0 or for_all(key)):
                self.resync(node)
                return

    def describe(self) -> str:
        lives = [
            f"node {n.rank}: {[(p.life, p.phase.value, 'dead' if p.dead else '') for p in n.procs.values()]}"
            for n in self.nodes
        ]
        return f"t={self.now:.1f} lock={self.lock.life if self.lock else None} {'; '.join(lives)} {self.view()}"


#: Runs that came up, as they begin: coming up is the same each time, and a copy takes a tenth of that.
_SETTLED: dict[Any, bytes] = {}


def settled(nnodes: int, cohorts: int, activate: bool) -> World:
    """A run that has just come up. Raises `Broken`."""
    key = (nnodes, cohorts, activate, controller.decide, reconciler.decide, cohort_phase)  # tests replace those
    if key not in _SETTLED:
        world = World(nnodes, cohorts, nobody, 0, activate)
        world.settle()
        _SETTLED[key] = pickle.dumps(world, pickle.HIGHEST_PROTOCOL)
    found: World = pickle.loads(_SETTLED[key])
    return found


def nobody(_: int) -> int:
    """Coming up, there is nothing to choose."""
    raise AssertionError("a choice before the first event")


def explore(
    nnodes: int, cohorts: int, choose: Callable[[int], int], steps: int, faults: int, activate: bool = False
) -> World:
    """A run from its start to full, `steps` events with faults among them, and to its end. Raises `Broken`."""

    def begin(pick: Callable[[int], int]) -> World:
        world = settled(nnodes, cohorts, activate)
        world.choose, world.faults = pick, faults
        return world

    return through(begin, choose, steps, f"replay({nnodes}, {cohorts}, ", f", {steps}, {faults}, {activate})")


class Steps(Protocol):
    """What is taken through a list of choices: a run, or several groups of one."""

    aborted: str
    log: list[str]

    def step(self) -> None: ...

    def settle(self) -> None: ...


S = TypeVar("S", bound=Steps)


def through(
    begin: Callable[[Callable[[int], int]], S], choose: Callable[[int], int], steps: int, before: str, after: str
) -> S:
    """Begin, take `steps` events and go to the end. Raises `Broken`, with the choices between `before` and `after`."""
    picked: list[int] = []

    def pick(n: int) -> int:
        picked.append(choose(n) % n)
        return picked[-1]

    world: S | None = None
    try:
        world = begin(pick)
        for _ in range(steps):
            if world.aborted:
                break
            world.step()
        world.settle()
    except Broken as exc:
        log = world.log if world is not None else []
        script = "\n".join(f"  {line}" for line in [*log, "# then everything in turn"])
        raise Broken(f"{exc}\n{script}\nreplay: {before}{picked}{after}") from None
    return world


def replay(nnodes: int, cohorts: int, picked: list[int], steps: int, faults: int, activate: bool = False) -> World:
    """Run a printed case again."""
    left = iter(picked)
    return explore(nnodes, cohorts, lambda n: next(left, 0), steps, faults, activate)
