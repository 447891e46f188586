"""Lost nodes, for the run's leader: that requests are not sent to their engines any more, nor waited for there.

Nobody on such a node ends what its engines have registered with Dynamo. Which that are their agents had told
(`NodeRecord.leases`), what is to be forgotten is decided in `dark`, and what follows of it is done by `severing`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gms_launch.cohort import controller, dark, membership
from gms_launch.cohort.dark import DarkRecord, Loss
from gms_launch.cohort.records import RunRecord
from gms_launch.node.herald import agent_number
from gms_launch.node.node import Node
from gms_launch.node.standing import Standing


class Losses:
    """What the run's leader remembers of lost nodes. `absent_since` is in the loop's seconds, by node rank."""

    def __init__(self, me: Node) -> None:
        self._me = me
        self._standing = Standing(lambda: me.report.link, me.settings.dynamo_lease_ttl)
        self._ended: set[int] = set()
        self.absent_since: dict[int, float] = {}

    def forget(self) -> None:
        """What was seen when this agent led before, if it did, is long over."""
        self.absent_since = {}

    def is_lost(self, node_rank: int) -> bool:
        """Whether a node's agent is dead, or has had no lease for longer than it takes to get another, as after a
        restart of etcd.
        """
        me = self._me
        if node_rank in me.mirror.nodes:
            return self._is_dead(node_rank)
        now = me.loop.time()
        if node_rank not in self.absent_since:
            self.absent_since[node_rank] = now
            me.loop.call_later(controller.NODE_GRACE, me.wake.set)
            me.loop.call_later(me.settings.node_wait + 0.1, me.wake.set)
        return now - self.absent_since[node_rank] >= controller.NODE_GRACE

    def _is_dead(self, node_rank: int) -> bool:
        """Whether a node's agent is dead, by its guard's word."""
        record = self._me.mirror.nodes.get(node_rank)
        return record is not None and self._me.dead_agents.get(node_rank) == agent_number(
            record.agent_pid, record.agent_start
        )

    def look(self, groups: Mapping[str, RunRecord]) -> None:
        """Act once for each engine of a lost node; `groups` are all of the run's, as their leaders see them."""
        me = self._me
        self.absent_since = {rank: at for rank, at in self.absent_since.items() if rank not in me.mirror.nodes}
        nodes = {rank: me.mirror.nodes.get(rank, node) for rank, node in me.report.seen.items()}
        watched = {rank for rank, node in nodes.items() if node.leases} | {g.leader for g in groups.values()}
        gone = {rank for rank in watched if rank != me.node_rank and self.is_lost(rank)}
        dead = {rank for rank in gone if self._is_dead(rank)}
        lost = {name: dark.lost_of(group, gone, dead) for name, group in groups.items() if gone or group.lost}
        for loss in dark.losses(lost, nodes, self._ended):
            self._ended.update(loss.leases)
            for lease in loss.leases:
                detail = f"{lease:x}: {membership.name(loss.node)} is lost"
                me.report.emit("lease_revoked", detail=detail, group=loss.group)
            me.spawn(self._let_go(loss))
        for key in dark.over(me.mirror.dark, lost, me.mirror.nodes):
            del me.mirror.dark[key]
            me.report.unsay(f"{me.mirror.keys.dark}{key}")

    async def _let_go(self, loss: Loss) -> None:
        """Have no frontend ask those engines any more, nor wait for what they were answering."""
        me, node = self._me, loss.node
        await self._standing.end(loss.leases)
        said = DarkRecord(node.host, node.address, loss.leases, node.node_rank, loss.group)
        me.report.say(me.mirror.keys.dark_of(loss.group, node.node_rank), said.encode())
