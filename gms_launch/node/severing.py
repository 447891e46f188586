"""Ends the connections of this node's frontend with lost nodes, which TCP alone would leave open.

The frontend would wait for the rest of their answers: nothing tells it that no more will come. The run's leader says
which nodes are meant (`cohort.dark`), and every agent does it for its own frontend. Where the run is one engine, and
its leader is what was lost, each agent sees that for itself.
"""

from __future__ import annotations

import asyncio

from gms_launch.cohort import dark
from gms_launch.cohort.dark import DarkRecord
from gms_launch.cohort.records import NodeRecord, RecordError
from gms_launch.errors import LaunchError, NoContactError
from gms_launch.node.node import Node
from gms_launch.numbers import numbered
from gms_launch.process import listener

#: How long a frontend has to hear that an engine is gone before it loses the way to it (seconds); it takes some 0.1.
HEARD = 1.0


class Severing:
    """What an agent remembers of lost nodes."""

    def __init__(self, me: Node) -> None:
        self._me = me
        self._known: dict[str, DarkRecord] = {}

    def look(self) -> None:
        """Act once for each loss."""
        me, lost = self._me, self._lost()
        for key in dark.news(self._known, lost, me.layout.home.address):
            me.spawn(self._sever(key, lost[key]))
        self._known = lost

    def _lost(self) -> dict[str, DarkRecord]:
        """What the run's leader tells of. Where the run is one engine nobody is left to tell that the leader is lost:
        its engine is lost with it, and nobody else serves what the frontend asked of it.
        """
        me = self._me
        lost = dict(me.mirror.dark)
        if not me.layout.number_of_groups and any(group.leaderless(me.loop.time()) for group in me.groups):
            lost[""] = DarkRecord("node 0", me.layout.home.leader_address)
        return lost

    async def _sever(self, key: str, lost: DarkRecord) -> None:
        """Have the frontend send on what it asked of engines on a lost node, and what they were answering.

        Not before it has heard that the engine is gone: it would ask there again, on a new connection, and what waits
        for one that nobody takes is given up for good after 5 s (Dynamo 1.4).
        """
        me = self._me
        await asyncio.sleep(HEARD)
        pid = me.near.pid()
        if not pid or self._lost().get(key) != lost:
            return
        if key in me.mirror.dark and await asyncio.to_thread(self._is_back, lost):
            return
        try:
            count = await asyncio.to_thread(listener.sever, pid, lost.address)
        except (LaunchError, OSError) as exc:
            me.report.emit("not_severed", detail=f"{exc}; answers that {lost.host} was giving hang", group=lost.group)
            return
        detail = f"{numbered(count, 'connection')} of the frontend with {lost.host} ({lost.address})"
        me.report.emit("severed", detail=detail, group=lost.group)

    def _is_back(self, lost: DarkRecord) -> bool:
        """Whether that node is there again, by etcd: what the leader says of it may be out of date. Blocks."""
        link, key = self._me.report.link, self._me.mirror.keys.node(lost.node_rank)
        try:
            found = link.get(key) if link is not None else None
            return dark.is_back(lost, NodeRecord.decode(found) if found is not None else None)
        except (NoContactError, RecordError):
            return False
