"""Groups whose leading node is lost: what the run's leader does for them, since nobody in them decides then.

Requests are not sent there any more; and a group whose node does not come back, nor a spare for it, is over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from gms_launch.cohort import census, controller, membership
from gms_launch.cohort.dark import DarkRecord
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import RunRecord
from gms_launch.control.keys import Keys
from gms_launch.errors import DeadlineError, NoContactError
from gms_launch.node.herald import agent_number
from gms_launch.node.node import Node
from gms_launch.node.standing import Standing

log = logging.getLogger("agent")

#: Between two tries to write down that a group is over (seconds).
AGAIN = 1.0


class Orphans:
    """What the run's leader remembers of lost nodes that lead groups."""

    def __init__(self, me: Node) -> None:
        self._me = me
        self._standing = Standing(lambda: me.report.link, me.settings.dynamo_lease_ttl)
        self._ended_leases: set[int] = set()
        self._forgotten: set[str] = set()
        self._absent_since: dict[int, float] = {}
        self._ending: set[str] = set()
        self._told_down: set[str] = set()

    def forget(self) -> None:
        """What was seen when this agent led before, if it did, is long over."""
        self._absent_since, self._forgotten = {}, set()

    def look(self, groups: Mapping[str, RunRecord]) -> None:
        """Act for each of them once; `groups` are all of the run's, as their leaders see them."""
        for name, record in groups.items():
            lost = self._is_lost(record.leader)
            if not lost:
                self._forgotten.discard(name)
                self._take_back(name, record.leader)
            elif name not in self._forgotten or record.leader in self._me.mirror.nodes:
                self._forgotten.add(name)
                self._forget_engines(name, record)
            self._tell(name, record, lost)
        if not self._me.ready.is_set():
            return  # the first start has deadlines of its own
        for name in census.orphans(groups, self._absent_since, self._me.settings.node_wait, self._me.loop.time()):
            if name not in self._ending:
                self._ending.add(name)
                self._me.spawn(self._end(name, groups[name]))

    def _take_back(self, name: str, node_rank: int) -> None:
        """A node leads it again: what was said of the lost one is over."""
        me = self._me
        if name in me.mirror.dark and node_rank in me.mirror.nodes:
            del me.mirror.dark[name]
            me.report.unsay(me.mirror.keys.dark_of(name))

    def _tell(self, name: str, record: RunRecord, lost: bool) -> None:
        """Nobody serves in a group whose leader is lost, and nobody there says so: hooks and the pages' strips wait
        for that word.
        """
        if not lost:
            self._told_down.discard(name)
        elif name not in self._told_down and record.redundancy and not record.failed:
            self._told_down.add(name)
            self._me.report.emit("redundancy", detail=Redundancy.DOWN.value, group=name)
            self._me.progress(f"{name}: redundancy down: the node that leads it is lost")

    def _is_lost(self, node_rank: int) -> bool:
        """Whether a node's agent is dead, by its guard's word, or has had no lease for longer than it takes to get
        another, as after a restart of etcd.
        """
        me = self._me
        if (record := me.mirror.nodes.get(node_rank)) is not None:
            self._absent_since.pop(node_rank, None)
            return me.dead_agents.get(node_rank) == agent_number(record.agent_pid, record.agent_start)
        now = me.loop.time()
        if node_rank not in self._absent_since:
            self._absent_since[node_rank] = now
            me.loop.call_later(controller.NODE_GRACE, me.wake.set)
            me.loop.call_later(me.settings.node_wait + 0.1, me.wake.set)
        return now - self._absent_since[node_rank] >= controller.NODE_GRACE

    async def _end(self, name: str, record: RunRecord) -> None:
        """Write down that a group is over, if its leading node is not there at that very moment."""
        me = self._me
        node = me.report.seen.get(record.leader)
        who = membership.name(node) if node is not None else f"node {record.leader}"
        why = f"{who}, which leads it, was lost and did not come back within {me.settings.node_wait:g} s (node_wait)"
        ended = replace(
            record, failed=why, exit_code=DeadlineError.exit_code, redundancy=Redundancy.DOWN.value, leases=()
        )
        keys, link = me.mirror.keys, me.report.link
        assert link is not None, "who leads the run has etcd"
        key = f"{keys.groups}{name}"
        conditions = {keys.node(record.leader): None, key: record.encode()}
        # Whoever led it may have something to say that has waited, and says it before hearing of this.
        records = {key: ended.encode(), Keys(me.layout.run, name).over: why.encode()}
        done = False
        try:
            done = await me.loop.run_in_executor(None, link.write_if, conditions, records)
        except NoContactError as exc:
            log.warning("that group %s is over cannot be written down: %s", name, exc)
        finally:
            if not done:
                me.loop.call_later(AGAIN, self._ending.discard, name)
                me.loop.call_later(AGAIN + 0.1, me.wake.set)
        if done:
            me.progress(f"{name}: this group is over: {why}")
            me.report.emit("group_over", detail=why, group=name)

    def _forget_engines(self, name: str, record: RunRecord) -> None:
        """The node that a group's engines answered from is lost: no request is to be sent there any more.

        Once for each loss: an agent that is away and not dead may wake up and tell of another life, which took over
        meanwhile, before it is seen to be back.
        """
        fresh = set(record.leases) - self._ended_leases
        self._ended_leases |= fresh
        for lease in fresh:
            detail = f"{lease:x}: the leader of group {name} is lost"
            self._me.report.emit("lease_revoked", detail=detail, group=name)
        if fresh:
            self._me.spawn(self._let_go(name, fresh, record.leader))

    async def _let_go(self, name: str, leases: set[int], node_rank: int) -> None:
        """Have no frontend ask those engines any more, nor wait for what they were answering."""
        me, node = self._me, self._me.report.seen.get(node_rank)
        await self._standing.end(leases)
        if node is not None:
            me.report.say(me.mirror.keys.dark_of(name), DarkRecord(node.host, node.address, tuple(leases)).encode())
