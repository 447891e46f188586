"""An agent's part in the word of a life's end: says it to the other nodes, hears theirs, and keeps its guard informed.

What is heard goes where etcd's word of it goes, and has the same effect. Without its socket (the port is taken, the
network does not let such packets through) a run is as good as etcd is quick.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable

from gms_launch.cohort.records import EndedRecord, NodeRecord, PeersRecord
from gms_launch.control.mirror import Mirror
from gms_launch.process import proc, word
from gms_launch.process.deputy import Duty, Groups, Leash, others
from gms_launch.process.proc import ProcessId
from gms_launch.process.word import Peer, Word
from gms_launch.run.plan import Layout

log = logging.getLogger("agent")


class Herald:
    """One agent's. Cohorts have the numbers that they have in the run (`Layout.slot`).

    `heard(ended)` hears what others say, `acted(life)` when the guard acted in our place.
    """

    def __init__(
        self,
        layout: Layout,
        mirror: Mirror,
        heard: Callable[[EndedRecord], None],
        acted: Callable[[tuple[int, int]], None],
    ) -> None:
        self._layout, self._mirror, self._heard, self._acted = layout, mirror, heard, acted
        self._key = word.secret(layout.credentials.secret, layout.attempt)
        self._leash: Leash | None = None
        self._retired = not layout.settings.group_kill
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: tuple[PeersRecord, Groups] = (PeersRecord(), ())
        me = proc.identity(os.getpid())
        self._agent = agent_number(me.pid, me.start) if me is not None else 0
        self._living: dict[tuple[int, int], ProcessId] = {}
        self._until = 0.0
        self.line: socket.socket | None = None

    def open(self) -> tuple[int, int]:
        """Make what a guard shares with us: its end of a leash, and the node's socket for words.

        That is -1 where there is nobody to talk to, or it cannot be had. A leash that was there is a dead guard's.
        """
        topology, port = self._layout.topology, self._layout.ports.word
        self._let_go()
        if topology.nnodes > 1 and self._loop is None:
            try:
                self.line = word.listen(topology.address, port)
            except OSError as exc:
                log.warning(
                    "no direct word between nodes here (UDP port %d on %s: %s); etcd's has to do: --word-port",
                    *(port, topology.address, exc.strerror),
                )
        self._theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._leash = Leash(ours)
        return self._theirs.fileno(), self.line.fileno() if self.line is not None else -1

    @property
    def port(self) -> int:
        """Where others reach us; 0 for nowhere."""
        return self._layout.ports.word if self.line is not None else 0

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to listen to the others and to the guard, which has been started."""
        assert self._leash is not None
        self._theirs.close()
        first, self._loop = self._loop is None, loop
        loop.add_reader(self._leash.fileno(), self._of_the_guard)
        if first and self.line is not None:
            loop.add_reader(self.line.fileno(), self._of_the_others)

    def say(self, ended: EndedRecord) -> None:
        """Tell every other node, now and a few times more."""
        if self.line is None or self._loop is None or self._retired:
            return
        said = Word(ended.cohort_id, ended.incarnation, ended.node_rank)
        for pause in word.AGAIN:
            if pause:
                self._loop.call_later(pause, self._say_once, said)
            else:
                self._say_once(said)

    def _say_once(self, said: Word) -> None:
        if self.line is not None:
            word.say(self.line, said, self._key, others(self._peers(), said.cohort_id))

    def _peers(self) -> Groups:
        """Of each group of this node's, who else is in it."""
        record, peers = self._known
        if record is not self._mirror.peers:
            record = self._mirror.peers
            self._known = record, (peers := tuple((g.slot(0), self._others(record, g)) for g in self._layout.groups))
        return peers

    def _others(self, record: PeersRecord, group: Layout) -> tuple[Peer, ...]:
        place, me = group.topology, self._layout.topology.node_rank
        first = me - place.node_rank  # the nodes of a group lie beside each other
        own = range(first, first + place.nnodes) if group.group else None
        return tuple((a, p) for rank, a, p in record.peers if rank != me and p and (own is None or rank in own))

    def _leader(self) -> tuple[Peer, ...]:
        """Who hears that this node's agent is dead: the run's leader ends what must not be asked any more, in a run of
        groups or where every node registers engines.
        """
        leader = self._mirror.lead.node_rank if self._mirror.lead is not None else 0
        registers = self._layout.number_of_groups or self._layout.settings.hybrid
        far = registers and self._layout.topology.node_rank != leader
        return tuple((a, p) for rank, a, p in self._mirror.peers.peers if far and rank == leader and p)

    def inform(self, living: dict[tuple[int, int], ProcessId]) -> None:
        """Let the guard know what lives here now, by slot and incarnation; cheap when nothing has changed."""
        self._living = living
        if self._leash is not None and not self._retired:
            self._leash.tell(Duty(living, self._peers(), self._key, self._until, self._leader(), self._agent))

    def prolong(self, until: float) -> None:
        """Let the guard know until when (monotonic seconds) nobody takes this node's place."""
        self._until = until
        self.inform(self._living)

    def retire(self) -> None:
        """From now on ranks end because they are to: no word of it."""
        if self._leash is not None:
            self._leash.tell(Duty({}))
        self._retired = True

    def close(self) -> None:
        self._let_go()
        if self._loop is not None and self.line is not None:
            self._loop.remove_reader(self.line.fileno())
        if self.line is not None:
            self.line.close()
            self.line = None

    def _let_go(self) -> None:
        if self._leash is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._leash.fileno())
            self._leash.close()
            self._leash = None

    def _of_the_others(self) -> None:
        assert self.line is not None
        for said in word.hear(self.line, self._key):
            self._heard(EndedRecord(*said.life, said.node_rank))

    def _of_the_guard(self) -> None:
        assert self._leash is not None and self._loop is not None
        lives = self._leash.acted()
        for life in lives:
            self._acted(life)
        if self._leash.ended:  # `guarded` follows the process itself
            self._loop.remove_reader(self._leash.fileno())


def agent_number(pid: int, start: int) -> int:
    """One agent among all that a node had: what a word says of one that is dead, so that its successor is not meant."""
    return start << 22 | pid


def peers_of(nodes: Iterable[NodeRecord], before: PeersRecord) -> PeersRecord:
    """Where all nodes hear; one that is lost keeps its place, for it may be a matter of the way to etcd."""
    places = {rank: (rank, address, port) for rank, address, port in before.peers}
    places |= {n.node_rank: (n.node_rank, n.address, n.word_port) for n in nodes}
    return PeersRecord(tuple(places[rank] for rank in sorted(places)))
