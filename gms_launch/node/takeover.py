"""The run's leader gives a lost node's rank to a spare: looks, asks `cohort.seats`, and carries it out.

Decides nothing, and starts nothing: the two agents find out from the records of their seats.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from gms_launch.cohort import membership, seats
from gms_launch.cohort.controller import NODE_GRACE
from gms_launch.errors import NoContactError
from gms_launch.node.node import Node
from gms_launch.run import allocation
from gms_launch.settings.rules import LEAST_SPARE_WAIT

log = logging.getLogger("agent")

#: How often the scheduler is asked of a node that is lost (seconds).
ASK_AGAIN = 2.0


class Takeover:
    """What the run's leader remembers of lost nodes."""

    def __init__(self, me: Node) -> None:
        self._me = me
        self._seen = seats.Seen.nothing()
        self._down: set[int] = set()
        self._asked: dict[int, float] = {}
        self._busy = False

    def look(self, now: float) -> float | None:
        """Decide and act once; returns when to look again though nothing happened. `now` in monotonic seconds."""
        me, s = self._me, self._me.settings
        nodes, known = me.mirror.nodes, me.mirror.seats
        members = me.layout.store.members if me.layout.store.several else 0
        rules = seats.Rules(s.serving_nodes, s.spares, s.spare_wait + NODE_GRACE, LEAST_SPARE_WAIT, members)
        self._seen = seats.look(nodes, known, s.serving_nodes, self._seen, now, 0 if me.layout.role_moves else 1)
        self._down &= self._seen.absent.keys()
        self._ask_slurm(now)
        if not self._busy:
            found = seats.decide(nodes, known, rules, self._seen, self._down, now)
            if found:
                self._busy = True
                me.spawn(self._exchange(found))
        again = seats.next_look(self._seen, rules, self._down, now)
        asked = [at + ASK_AGAIN for rank, at in self._asked.items() if rank not in self._down]
        return min([*asked, *([] if again is None else [again])], default=None)

    async def _exchange(self, found: list[seats.Exchange]) -> None:
        me = self._me
        try:
            for x in found:
                told = f"{self._name(x.spare)}, a spare, takes the place of {self._name(x.node_rank)}"
                try:
                    done = await me.loop.run_in_executor(None, me.session.exchange, x)
                except NoContactError as exc:
                    log.warning("no spare can take the place of %s: %s", self._name(x.node_rank), exc)
                    return
                if not done:  # it is back at this very moment
                    continue
                for seat in x.seats:
                    me.mirror.seats[seat.node_rank] = seat
                seen = me.report.seen
                seen[x.node_rank], seen[x.spare] = seen[x.spare], seen[x.node_rank]
                me.progress(told)
                me.report.emit("spare_takes_over", detail=told, rank=x.node_rank, spare=x.spare)
        finally:
            self._busy = False
            me.wake.set()

    def _name(self, node_rank: int) -> str:
        node = self._me.mirror.nodes.get(node_rank) or self._me.report.seen.get(node_rank)
        # By the rank that it has now: a spare may be lost before it writes down its new one.
        return membership.name(replace(node, node_rank=node_rank)) if node is not None else f"node {node_rank}"

    def _ask_slurm(self, now: float) -> None:
        """A node that Slurm calls down is not waited for."""
        absent = self._seen.absent
        self._asked = {rank: at for rank, at in self._asked.items() if rank in absent}
        if not allocation.is_ours():
            return
        for rank in absent.keys() - self._down:
            node = self._me.report.seen.get(rank)
            if node is not None and now - self._asked.get(rank, float("-inf")) >= ASK_AGAIN:
                self._asked[rank] = now
                self._me.spawn(self._is_down(rank, node.host))

    async def _is_down(self, rank: int, host: str) -> None:
        if await self._me.loop.run_in_executor(None, allocation.has_lost, host) and rank in self._seen.absent:
            self._down.add(rank)
            self._me.report.emit("node_down", detail=f"Slurm has given {self._name(rank)} up")
            self._me.wake.set()
