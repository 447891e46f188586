"""What an agent tells the world: its node, the run, and everything that happens.

Records go to etcd through the control link; events also to the journal on the leader, from which timelines are read.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from gms_launch import __version__
from gms_launch.cohort import proc
from gms_launch.control.mirror import Mirror
from gms_launch.control.records import EventRecord, GmsStatus, NodeRecord, RunRecord, ServiceStatus
from gms_launch.observe.journal import Journal
from gms_launch.plan import Layout, settings_digest

if TYPE_CHECKING:
    from gms_launch.control.link import ControlLink

log = logging.getLogger("agent")

#: Events of this node that stay in etcd; the journal keeps all.
EVENTS_KEPT = 1000


class Reporter:
    """One agent's reports. `link` is set once there is an etcd, `lease` whenever this node has one."""

    def __init__(self, layout: Layout, mirror: Mirror) -> None:
        self._layout = layout
        self._mirror = mirror
        self._keys = mirror.keys
        self._node_rank = layout.topology.node_rank
        self._journal = Journal(layout.run_dir.events) if layout.topology.is_leader else None
        self._serial = 0
        self._event_keys: deque[str] = deque()
        self._last_node: NodeRecord | None = None
        self.link: ControlLink | None = None
        self.lease = 0
        self.started = time.time()

    def put(self, key: str, value: bytes, lease: int = 0) -> None:
        """Store a record in etcd, as soon as there is one."""
        assert self.link is not None, "nothing is reported before there is etcd"
        self.link.put(key, value, lease)

    def emit(
        self,
        kind: str,
        cohort_id: int = -1,
        incarnation: int = 0,
        detail: str = "",
        when: float | None = None,
        **data: Any,
    ) -> None:
        """Record an event that happened at `when` (Unix seconds; now when not given)."""
        now = time.time() if when is None else when
        event = EventRecord(now, self._node_rank, kind, cohort_id, incarnation, detail, data)
        self._serial += 1
        if self._journal is not None:
            self._journal.add(event)
        if self.link is not None:
            key = self._keys.event(int(now * 1e9), self._node_rank, self._serial)
            self.link.put(key, event.encode())
            self._event_keys.append(key)
            if len(self._event_keys) > EVENTS_KEPT:
                self.link.delete(self._event_keys.popleft())
        who = f"cohort {cohort_id}.{incarnation} " if cohort_id >= 0 else ""
        log.info("%s%s %s", who, kind, detail)

    def take_event(self, event: EventRecord) -> None:
        """Keep another node's event in the journal."""
        if self._journal is not None and event.node_rank != self._node_rank:
            self._journal.add(event)

    def run(self) -> None:
        """Say what everybody must agree on; the leader's business."""
        layout = self._layout
        if not layout.topology.is_leader:
            return
        record = RunRecord(
            run=layout.run,
            settings_digest=settings_digest(layout.settings),
            leader_address=layout.topology.leader_address,
            version=__version__,
            created=self.started,
            nnodes=layout.topology.nnodes,
            shadows=layout.settings.shadows,
            frontend_url=layout.frontend_url,
            model_name=layout.model_name,
        )
        self._mirror.run = record
        self.put(self._keys.run, record.encode())

    def node(
        self,
        services: tuple[ServiceStatus, ...],
        gms: tuple[GmsStatus, ...],
        lock_holder: str,
        stopping: bool,
        force: bool,
    ) -> None:
        """Report this node if anything changed, or in any case. Without a lease there is nothing to report under."""
        if not self.lease:
            return
        me = proc.identity(os.getpid())
        record = NodeRecord(
            node_rank=self._node_rank,
            host=self._layout.topology.host,
            address=self._layout.topology.address,
            boot_id=proc.boot_id(),
            agent_pid=os.getpid(),
            agent_start=me.start if me else 0,
            gpus=tuple(dict.fromkeys(g.uuid for g in gms)),
            services=services,
            gms=gms,
            lock_holder=lock_holder,
            stopping=stopping,
        )
        if force or record != self._last_node:
            self._last_node = record
            self._mirror.nodes[self._node_rank] = record
            self.put(self._keys.node(self._node_rank), record.encode(), self.lease)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
