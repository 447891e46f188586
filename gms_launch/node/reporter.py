"""What an agent tells the world: its node, the run, and everything that happens.

Records go to etcd through the control link; events also to the journal on the leader, from which timelines are read.
What goes to disk goes through the writer, so that telling never fails and never waits.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from gms_launch import __version__
from gms_launch.cohort import seats
from gms_launch.cohort.records import CommandRecord, EventRecord, ModelStamp, NodeRecord, RunRecord, WritingStatus
from gms_launch.control.mirror import Mirror
from gms_launch.process import clock, proc
from gms_launch.run.agreement import settings_digest
from gms_launch.run.plan import Layout
from gms_launch.spool.writer import Place, Writer
from gms_launch.urls import is_loopback

if TYPE_CHECKING:
    from gms_launch.control.link import ControlLink

log = logging.getLogger("agent")

#: Events that somebody should look at; everything else is as it should be.
LEVELS = {
    **dict.fromkeys(
        (
            "left_behind",
            "exit",
            "hung",
            "cut_off",
            "lease_lost",
            "rolled_back",
            "gms_restart",
            "gms_silent",
            "hook_failed",
            "hook_dropped",
            "port_taken",
        ),
        logging.WARNING,
    ),
    **dict.fromkeys(
        (
            "service_exited",
            "service_killed",
            "service_restarted",
            "service_looping",
            "service_crowded",
            "engine_crowded",
            "guard_exited",
            "guard_missing",
            "stood_still",
        ),
        logging.WARNING,
    ),
    **dict.fromkeys(("unfenced", "given_up", "service_failed", "etcd_alarm"), logging.ERROR),
}
#: Events of which the agent says the same to people, in the same log.
SAID = frozenset({"redundancy", "stopping", "stopped"})
#: Events of this node that stay in etcd; the journal keeps all.
EVENTS_KEPT = 1000


class Reporter:
    """One agent's reports. `link` is set once there is an etcd, `lease` whenever this node has one.

    That of a group says `above`, the node's, what happens.
    `listeners` hear every event of this node, on the leader of all nodes; they must return at once and raise nothing.
    """

    def __init__(self, layout: Layout, mirror: Mirror, writer: Writer, above: Reporter | None = None) -> None:
        self._layout, self._above = layout, above
        self._writer = writer
        self._mirror = mirror
        self._keys = mirror.keys
        self._node_rank = layout.topology.node_rank
        self._serial = 0
        self._event_keys: deque[str] = deque()
        self._node: NodeRecord | None = None
        self._listed: dict[str, Any] = {}
        self.seen: dict[int, NodeRecord] = {}
        self.listeners: list[Callable[[EventRecord], None]] = []
        self.leads: Callable[[], bool] = lambda: layout.founds
        self._held: list[bytes] | None = None
        self._filled: frozenset[bytes] = frozenset()
        self._targets: list[dict[str, Any]] = []
        self._link: ControlLink | None = None
        self._lease = 0
        self.model = ModelStamp()
        self.word_port = 0
        self.started = clock.now()
        self.errors = 0
        self._places: dict[str, Place] = {}

    @property
    def link(self) -> ControlLink | None:
        return self._above.link if self._above is not None else self._link

    @link.setter
    def link(self, link: ControlLink) -> None:
        self._link = link

    @property
    def lease(self) -> int:
        return self._above.lease if self._above is not None else self._lease

    @lease.setter
    def lease(self, lease: int) -> None:
        self._lease = lease

    def put(self, key: str, value: bytes, lease: int = 0, later: bool = False) -> None:
        """Store a record in etcd, at once, or `later` when nobody waits for it."""
        assert self.link is not None, "nothing is reported before there is etcd"
        self.link.put(key, value, lease, later)

    def say(self, key: str, value: bytes) -> None:
        """Store in etcd what the run's leader says, at once."""
        assert self.link is not None, "nothing is reported before there is etcd"
        self.link.say(key, value)

    def unsay(self, key: str) -> None:
        """Take out of etcd what the run's leader said."""
        assert self.link is not None, "nothing is reported before there is etcd"
        self.link.unsay(key)

    def put_once(self, key: str, value: bytes) -> None:
        """Store a record in etcd, at once, unless somebody did: whatever many may say at once, all hear once."""
        assert self.link is not None, "nothing is reported before there is etcd"
        self.link.put(key, value, unless=key)

    def take(self, command: CommandRecord) -> bool:
        """Take a command for this agent; False when it no longer stands. Blocks. Raises `NoContactError`."""
        assert self.link is not None, "no command is heard before there is etcd"
        taken = replace(command, taken=f"{self._layout.topology.host} {os.getpid()}")
        return self.link.take(self._keys.command(command.uuid), taken.encode())

    def delete(self, key: str) -> None:
        """Take a record out of etcd."""
        assert self.link is not None, "nothing is reported before there is etcd"
        self.link.delete(key)

    def emit(
        self,
        kind: str,
        cohort_id: int = -1,
        incarnation: int = 0,
        detail: str = "",
        when: float | None = None,
        group: str = "",
        **data: Any,
    ) -> None:
        """Record an event that happened at `when` (Unix seconds; now when not given)."""
        if self._above is not None:
            self._above.emit(kind, cohort_id, incarnation, detail, when, self._layout.group, **data)
            return
        now = clock.now() if when is None else when
        event = EventRecord(now, self._node_rank, kind, cohort_id, incarnation, detail, data, group)
        self._serial += 1
        self._heard(event)
        if self.link is not None:
            key = self._keys.event(int(now * 1e9), self._node_rank, self._serial)
            self.link.put(key, event.encode(), later=True)
            self._event_keys.append(key)
            if len(self._event_keys) > EVENTS_KEPT:
                self.link.delete(self._event_keys.popleft())
        who = f"{group} " if group else ""
        who += f"cohort {cohort_id}.{incarnation} " if cohort_id >= 0 else ""
        if kind not in SAID:
            log.log(LEVELS.get(kind, logging.INFO), "%s%s %s", who, kind, detail)

    def take_event(self, event: EventRecord) -> None:
        """Keep another node's event in the journal."""
        if event.node_rank != self._node_rank:
            self._heard(event)

    def _heard(self, event: EventRecord) -> None:
        if self.leads():
            self._keep(event.encode() + b"\n")
        for listener in self.listeners:
            listener(event)

    def _keep(self, line: bytes) -> None:
        """In the journal, once."""
        if self._held is not None:
            self._held.append(line)
        elif line not in self._filled:
            self._writer.append(self._layout.run_dir.events, line)

    def hold_journal(self) -> None:
        """Wait with the journal until it is known what it lacks."""
        self._held = []

    def fill_journal(self, missed: Sequence[bytes]) -> None:
        """Put down what it lacks, and what has come meanwhile."""
        lines, self._held, self._filled = dict.fromkeys([*missed, *(self._held or ())]), None, frozenset(missed)
        for line in lines:
            self._writer.append(self._layout.run_dir.events, line)

    def unexpected(self, what: str, error: BaseException) -> None:
        """An error of ours, which the run outlives: logged, counted, told."""
        if self._above is not None:
            self._above.unexpected(what, error)
            return
        self.errors += 1
        log.error("internal error: %s", what, exc_info=error)
        self.emit("internal_error", detail=f"{what}: {error!r}")

    def places(self) -> tuple[WritingStatus, ...]:
        """How it is with the directories that are written to; a change of it is an event."""
        found = {p.name: p for p in self._writer.places()}
        for name in found.keys() | self._places.keys():
            place = found.get(name) or replace(self._places[name], state="")
            before = self._places.get(name)
            if place.state != (before.state if before else ""):
                lost = f"; {place.dropped} entries and {place.dropped_bytes} bytes of logs were dropped"
                lost = lost if place.dropped or place.dropped_bytes else ""
                self.emit("writing", detail=f"the {name} {place.path} is {place.state or 'well again'}{lost}")
        self._places = found
        return tuple(WritingStatus(**asdict(place)) for place in found.values())

    def run(self, **changes: Any) -> None:
        """Say what everybody must agree on, with `changes` from now on; the leader's business."""
        layout = self._layout
        known = self._mirror.run or RunRecord(
            run=layout.run,
            settings_digest=settings_digest(layout.settings),
            leader_address=layout.topology.leader_address,
            version=__version__,
            created=self.started,
            nnodes=layout.topology.nnodes,
            shadows=layout.settings.shadows,
            frontend_url=layout.front.url,
            model_name=layout.model_name,
            attempt=layout.attempt,
            leader=layout.home.node_rank,
            spares=layout.settings.spares,
        )
        record = replace(known, **changes)
        self._mirror.run = record
        if self._above is None:
            self.say(self._keys.run, record.encode())
        else:
            assert self.link is not None, "nothing is reported before there is etcd"
            self.link.put(self._keys.run, record.encode(), unless=self._keys.over)

    def record(self) -> NodeRecord:
        """This node as it comes to the run."""
        me = proc.identity(os.getpid())
        layout = self._layout
        return NodeRecord(
            node_rank=self._node_rank,
            host=layout.topology.host,
            address=layout.topology.address,
            boot_id=proc.boot_id(),
            agent_pid=os.getpid(),
            agent_start=me.start if me else 0,
            gpus=tuple(d.uuid for d in layout.devices()),
            version=__version__,
            settings_digest=settings_digest(layout.settings),
            differences=layout.differences,
            clock_skew=layout.clock_skew,
            model=self.model,
            word_port=self.word_port,
            clock=clock.OFFSET,
            number=layout.home.node_rank if layout.group else -1,
            origin=layout.origin,
        )

    def lease_known(self) -> None:
        """This node's place is taken: from now on its record is kept up to date."""
        self._node = self.record()
        self._mirror.nodes[self._node_rank] = self._node

    def node(self, force: bool = False, **news: Any) -> None:
        """Report this node if anything changed, or in any case. Without a lease there is nothing to report under."""
        if self._node is None or not self.lease:
            return
        record = replace(self._node, **news)
        if force or record != self._node:
            self._node = record
            self._mirror.nodes[self._node_rank] = record
            self.put(self._keys.node(self._node_rank), record.encode(), self.lease)

    def look(self) -> None:
        """Note how the nodes are, for the day when one is lost."""
        for node in self._mirror.nodes.values():
            if self._above is not None or node.origin == seats.owner(self._mirror.seats, node.node_rank):
                self.seen[node.node_rank] = node

    def ranks(self) -> None:
        """Keep the list of all nodes and ranks in the run directory, for whoever must act while etcd is away.

        Of a group its leader keeps one.
        """
        self.look()
        ranks = [
            {
                "cohort_id": r.cohort_id,
                "incarnation": r.incarnation,
                "node_rank": r.node_rank,
                "phase": r.phase.value,
                "pid": r.pid,
                "start": r.start,
            }
            for _, r in sorted(self._mirror.ranks.items())
        ]
        nodes = [{"node_rank": n.node_rank, "host": n.host, "address": n.address} for _, n in sorted(self.seen.items())]
        listed = {"nodes": nodes, "ranks": ranks}
        if listed != self._listed:
            self._listed = listed
            text = json.dumps(listed, indent=1)
            place = self._layout.run_dir.ranks_of(self._layout.group)
            self._writer.replace(place, text)
            node_dir = self._layout.node_dir if self._above is None else self._above._layout.node_dir
            self._writer.here(node_dir.path / place.name, text)

    def targets(self, ended: bool = False) -> None:
        """Say beside the run directory where nodes serve their metrics, as Prometheus reads it; nowhere once `ended`.

        Also of nodes that are lost: that they do not answer is what somebody wants to be told. Not of those that serve
        on another machine's loopback, where whoever reads this would meet himself.
        """
        run, here = self._layout.run, proc.boot_id()
        found = [
            {"targets": [n.metrics], "labels": {"run": run, "node_rank": str(n.node_rank), "host": n.host}}
            for _, n in sorted(self.seen.items())
            if n.metrics and not ended and (n.boot_id == here or not _is_loopback(n.metrics))
        ]
        if found != self._targets:
            self._targets = found
            self._writer.replace(self._layout.run_dir.targets_json, json.dumps(found, indent=1))


def _is_loopback(where: str) -> bool:
    """True when host:port is a machine's own."""
    return is_loopback(where.rpartition(":")[0].strip("[]"))
