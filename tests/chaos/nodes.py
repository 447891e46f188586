"""Machines off and networks parted at random, in a run of two groups that outlives any of its nodes, under load.

    python -m tests.chaos.nodes [--rounds 30] [--seed 1] [--only KIND ...] [--out FILE]

Five machines of the lab, without Slurm and without a freezer: three members of etcd with a frontend each, two groups of
two nodes with a model each, and a spare. Each round is one fault: the machine that leads the run is switched off, or
another one with a member, or one that a spare follows, or that spare too as it takes over, or the network falls in two
for longer than a lease. Judged from outside, all the time: never two active in a group; and at the end of each round
everything is whole, every text is right, and what happened in one group was not seen in the other, neither in its lives
nor by its clients. The first broken invariant ends it. The same seed chooses the same faults. Needs root, for the
namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import nodes_off
from bench.stopping import stoppable
from gms_launch.process import proc
from tests.chaos.chaos import BrokenError
from tests.chaos.ends import Keep, Row, command, nowhere, shuffled, telling
from tests.load import Either
from tests.slurm.lab import Lab
from tests.slurm.moving import NAMES, Actives, Pair, routed
from tests.slurm.support import since
from tests.support import LONG, eventually

MEMBERS = 3
#: How long a network stays parted (seconds): some leases.
PARTED = 15.0


@dataclass
class Round:
    """What faults act on: the run as it stood before, whole."""

    run: Pair
    rng: random.Random
    loads: dict[str, Either]

    def machine(self, *ranks: int) -> int:
        """One of those with these node ranks, by its place in `run.nodes`."""
        rank = self.rng.choice(ranks)
        return next(self.run.nodes.index(name) for name, found in self.run.seats().items() if found == rank)

    def off(self, number: int) -> None:
        name = self.run.nodes[number]
        self.run.lab.node(name).power_off()
        self.run.processes[number].wait(60)

    def on(self, number: int) -> None:
        name = self.run.nodes[number]
        self.run.lab.node(name).start(daemons=False)
        routed(self.run.lab, name)
        self.run.hand(number)
        self.run.processes[number] = self.run.processes.pop()


# -- the kinds of fault: each returns its row ------------------------------------------------------------------------


def leader_node_off(r: Round) -> dict[str, Any]:
    return nodes_off.switch_off(r.run, r.machine(r.run.leader()), r.loads)


def member_off(r: Round) -> dict[str, Any]:
    others = [rank for rank in range(MEMBERS) if rank != r.run.leader()]
    return nodes_off.switch_off(r.run, r.machine(*others), r.loads)


def spare_takes_over(r: Round) -> dict[str, Any]:
    """For a node without a member."""
    return nodes_off.switch_off(r.run, r.machine(MEMBERS), r.loads)


def spare_off_as_it_takes_over(r: Round) -> dict[str, Any]:
    """Both are switched on again: one has the rank, and the other is the spare."""
    (spare,) = r.run.spare()
    first, second, clock = r.machine(MEMBERS), r.run.nodes.index(spare), time.time()
    untouched = r.run.lives("a")
    r.off(first)
    off = time.monotonic()
    eventually(lambda: any(e["time"] > clock for e in r.run.events("spare_takes_over")), LONG, "a spare has its place")
    time.sleep(r.rng.uniform(0.0, 2.0))  # the moment is the point
    r.off(second)
    eventually(lambda: since(off) > nodes_off.SETTLED, LONG)
    r.on(first)
    r.on(second)
    r.run.whole()
    row = {"machine": r.run.nodes[first], "spare": spare, "whole_s": round(since(off), 2)}
    if r.run.lives("a") != untouched:
        raise BrokenError(f"group a was touched: {untouched} before, and {r.run.lives('a')}")
    return row | answers(r, off, ["a"])


def partition(r: Round) -> dict[str, Any]:
    """Any two against the other three; who has a majority of the members goes on."""
    run, seats = r.run, r.run.seats()
    cut = sorted(r.rng.sample(run.nodes, 2))
    two_go_on = 2 * sum(seats[name] < MEMBERS for name in cut) > MEMBERS
    ended = [name for name in run.nodes if (name in cut) != two_go_on]
    found = run.full(*NAMES)
    kept = [g for g in NAMES if not any(n["host"] in ended for n in found[g]["nodes"])]
    lives, old = {g: run.lives(g) for g in kept}, run.engines_at(*ended)
    begun = time.monotonic()
    run.lab.split(*cut)
    try:
        eventually(lambda: not any(map(proc.alive, old)), LONG, "the minority ends its ranks")
        dead = since(begun)
        while since(begun) < PARTED:
            if run.engines_at(*ended):
                raise BrokenError(f"{ended}, which are cut off from a majority, have engines")
            time.sleep(0.2)
    finally:
        run.lab.heal(*cut)
    run.whole()
    for group, was in lives.items():
        if (now := run.lives(group)) != was:
            raise BrokenError(f"group {group}, whose side goes on, was touched: {was} before, and {now}")
    row = {"cut": cut, "go_on": "two" if two_go_on else "three", "ranks_dead_s": round(dead, 2), "kept": kept}
    # Which frontends are on the side that goes on its clients cannot know.
    return row | {"whole_s": round(since(begun), 2)} | answers(r, begun, [])


def answers(r: Round, begun: float, untouched: list[str]) -> dict[str, Any]:
    """What clients saw since `begun`; raises `BrokenError` where they saw what they must not."""
    row = {}
    for group, load in r.loads.items():
        lost = [a for a in load.answers if a.error and a.done >= begun]
        row[group] = {"errors": len(lost), "longest_answer_s": round(load.longest_wait(begun), 2)}
        if load.wrong:
            raise BrokenError(f"a client of {group} got another text: {load.said()}")
        if group in untouched and lost:
            raise BrokenError(f"{len(lost)} requests of {group}, which lost no node, failed: {lost[0].error}")
        load.answers, load.retried = [a for a in load.answers if not a.error][-100:], []
    return row


KINDS: tuple[Callable[[Round], dict[str, Any]], ...] = (
    *(leader_node_off, member_off, partition, spare_takes_over, spare_off_as_it_takes_over),
)


# -- rounds ----------------------------------------------------------------------------------------------------------


def rounds(
    run: Pair,
    kinds: list[Callable[[Round], dict[str, Any]]],
    rng: random.Random,
    keep: Keep = nowhere,
) -> list[Row]:
    """One round for each of `kinds`, of which `keep` gets the row. Raises `BrokenError`, or what a wait raises."""
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        run.whole()
        actives = stack.enter_context(Actives(run))
        first = nodes_off.urls(run, "")
        loads = {
            name: stack.enter_context(Either(first, 2, 1, 2.0, tokens=30, prompts=4, model=name, timeout=45.0))
            for name in NAMES
        }
        for number, kind in enumerate(kinds, 1):
            for load in loads.values():
                load.urls = nodes_off.urls(run, "")
                load.wait_busy(0.5)
            row = {"round": number, "kind": kind.__name__} | kind(Round(run, rng, loads))
            again = time.monotonic()
            for load in loads.values():
                load.urls = nodes_off.urls(run, "")
                eventually(
                    lambda x=load, t=again: any(a.sent >= t and not a.error for a in list(x.answers)[-50:]), LONG
                )
            if actives.broken or not actives.looks:
                raise BrokenError((actives.broken or ["nobody looked who is active"])[0])
            if errors := run.events("internal_error"):
                raise BrokenError(f"an agent's own error: {errors[0]}")
            row["looks"] = actives.looks
            found.append(row)
            keep(row)
            print(f"{number:4d} {kind.__name__:28s} whole after {row['whole_s']:6.2f} s: {row}", flush=True)
    return found


def go(options: argparse.Namespace, rng: random.Random, keep: Keep) -> list[Row]:
    with Lab(nodes_off.NODES, slurm=False) as lab:
        routed(lab)
        with Pair(lab) as run, telling(run, options.seed):
            return rounds(run, shuffled(KINDS, options.rounds, rng, options.only), rng, keep)


if __name__ == "__main__":
    stoppable(lambda: command(__doc__, 30, KINDS, go, {"whole_s": "whole again"}))
