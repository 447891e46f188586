"""A run with hybrid load balancing in miniature: every rank registers and waits for a lock that its own agent holds.

Never may two cohorts have a lock at one time, on whichever nodes. The rest is as in `world`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gms_launch.cohort import controller, reconciler
from gms_launch.cohort.model import Phase, cohort_phase
from tests.simulation.world import Broken, Life, Node, Proc, World, nobody, through


class Hybrid(World):
    """`choose` and `faults` as of a `World`; agents always decide who serves."""

    def __init__(self, nnodes: int, cohorts: int, choose: Callable[[int], int], faults: int = 2) -> None:
        super().__init__(nnodes, cohorts, choose, faults, activate=True)

    def phase(self, phases: dict[int, Phase], nodes: list[int]) -> Phase:
        return cohort_phase(phases, nodes, hybrid=True)

    def leaders(self) -> list[tuple[Node, Proc]]:
        return [(node, proc) for node in self.nodes for proc in node.procs.values()]

    def activate(self, life: Life) -> None:
        """The leader's word, which every agent hears in its own time."""
        key, leader = ("desired", life[0]), self.nodes[0]
        desire = leader.known[key][1]
        assert desire.incarnation == life[1]
        self.put(leader, key, replace(desire, serve=True))

    def open(self, node: Node, proc: Proc) -> None:
        proc.let_go = True

    def engine(self, node: Node, proc: Proc) -> bool:
        if proc.dead or proc.hangs or len(ranks := self.ranks(proc.life)) < len(self.nodes):
            return False
        if proc.phase is Phase.STARTING:
            if self.bad_starts[proc.cohort] or not node.gms:
                self.bad_starts[proc.cohort] = max(0, self.bad_starts[proc.cohort] - 1)
                self.die(proc)
            else:
                self.move(node, proc, Phase.PARKED)
            return True
        if proc.phase is Phase.PARKED and proc.let_go:
            proc.had_the_lock = True
            self.move(node, proc, Phase.WAKING)
            return True
        if proc.phase is Phase.WAKING:
            if not node.gms:
                self.die(proc)
                return True
            if any(p.had_the_lock and not p.dead and p is not proc for p in node.procs.values()):
                return False  # it has this node's KV memory
            self.move(node, proc, Phase.ACTIVE)
            return True
        if proc.phase is Phase.ACTIVE and not proc.token and all(p.phase is Phase.ACTIVE for p in ranks):
            proc.token = True  # a step takes the workers of all nodes
            if all(p.token for p in ranks):
                self.confirmed = proc.life
            return True
        return False

    def full(self) -> bool:
        each = [{p.cohort: p.phase for p in n.procs.values() if not p.dead} for n in self.nodes]
        return super().full() and all(phases == each[0] for phases in each)

    def check(self) -> None:
        living = [p for n in self.nodes for p in n.procs.values() if p.let_go and not p.dead]
        if len(lives := {p.life for p in living}) > 1:
            where = [(n.rank, p.life, p.phase.value) for n in self.nodes for p in n.procs.values() if p in living]
            raise Broken(f"cohorts are split, lives {sorted(lives)} have locks: {where}")


#: As `world._SETTLED`.
_SETTLED: dict[Any, bytes] = {}


def settled(nnodes: int, cohorts: int) -> Hybrid:
    """A run that has just come up. Raises `Broken`."""
    key = (nnodes, cohorts, controller.decide, reconciler.decide, cohort_phase)
    if key not in _SETTLED:
        world = Hybrid(nnodes, cohorts, nobody, 0)
        world.settle()
        _SETTLED[key] = pickle.dumps(world, pickle.HIGHEST_PROTOCOL)
    found: Hybrid = pickle.loads(_SETTLED[key])
    return found


def explore(nnodes: int, cohorts: int, choose: Callable[[int], int], steps: int, faults: int) -> Hybrid:
    """A run from its start to full, `steps` events with faults among them, and to its end. Raises `Broken`."""

    def begin(pick: Callable[[int], int]) -> Hybrid:
        world = settled(nnodes, cohorts)
        world.choose, world.faults = pick, faults
        return world

    return through(begin, choose, steps, f"hybrid.replay({nnodes}, {cohorts}, ", f", {steps}, {faults})")


def replay(nnodes: int, cohorts: int, picked: list[int], steps: int, faults: int) -> Hybrid:
    """Run a printed case again."""
    left = iter(picked)
    return explore(nnodes, cohorts, lambda n: next(left, 0), steps, faults)
