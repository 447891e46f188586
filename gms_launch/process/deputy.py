"""What the guard does for an agent that stands still: end a life that has ended, on this node, and say so.

The agent tells its guard which ranks live here. When one of them exits, or another node says that its life has ended,
the agent kills it and takes it off that list, within milliseconds. If it has not within `PATIENCE`, it is stopped or
hangs, and the guard does both duties in its place: the kill, and the word to the other nodes. Nothing else: what comes
next is for the agent and the controller, when they go on. To be late or twice does no harm, since that life is over.
Where a spare may take this node's place, all that lives here is ended likewise when this node's lease is over.
Of an agent that is dead it says so, and that all that lives here ends, which the guard sees to.

Socket and list are the agent's; the deputy costs nothing while nothing happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gms_launch.process import lifecycle, word
from gms_launch.process.proc import ProcessId
from gms_launch.process.word import Peer, Word

#: How long an agent has to end what it should end (seconds).
PATIENCE = 1.0
#: So many datagrams are looked at in its place at one time: in its second some may have come from strangers.
UNREAD = 4096
#: Longest message between an agent and its guard (bytes): a thousand peers.
LONGEST = 128 * 1024

Life = tuple[int, int]
#: Of each group the number of its first cohort, ascending, and the other nodes that have ranks of it.
Groups = tuple[tuple[int, tuple[Peer, ...]], ...]


def others(groups: Groups, cohort_id: int) -> tuple[Peer, ...]:
    """Who else has a rank of a cohort."""
    return next((peers for first, peers in reversed(groups) if first <= cohort_id), ())


@dataclass(frozen=True)
class Duty:
    """What the agent tells: the living ranks of this node by life, its groups' other nodes, the key of their words.

    `until`: this node's place is surely its own until then (monotonic seconds), and another may have it afterwards; 0
    where nobody takes it. `leader`: who hears that this `agent` is dead, if anybody has to.
    """

    ranks: dict[Life, ProcessId]
    peers: Groups = ()
    key: bytes = b""
    until: float = 0.0
    leader: tuple[Peer, ...] = ()
    agent: int = 0

    def encode(self) -> bytes:
        ranks = [[*life, who.pid, who.start] for life, who in self.ranks.items()]
        said = {"ranks": ranks, "peers": self.peers, "key": self.key.hex(), "until": self.until}
        return json.dumps(said | {"leader": self.leader, "agent": self.agent}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Duty:
        found = json.loads(data)
        ranks = {(c, i): ProcessId(pid, start) for c, i, pid, start in found["ranks"]}
        peers = tuple((first, tuple((a, p) for a, p in some)) for first, some in found["peers"])
        leader = tuple((a, p) for a, p in found["leader"])
        return cls(ranks, peers, bytes.fromhex(found["key"]), found["until"], leader, found["agent"])


class Deputy:
    """`serve` returns when the agent is gone. `line` is the node's socket for words, shared with the agent."""

    def __init__(self, run: str, node_rank: int, leash: socket.socket, line: socket.socket | None) -> None:
        self._run, self._node_rank, self._leash, self._line = run, node_rank, leash, line
        self._duty = Duty({})
        self._watched: dict[Life, int] = {}
        #: When the agent has had its time: for a life, and (None) for words that lie in the socket unread.
        self._due: dict[Life | None, float] = {}
        self._own: set[Life] = set()
        self._acted: set[Life] = set()
        self._poller = select.poll()
        self._poller.register(leash, select.POLLIN)
        if line is not None:
            self._poller.register(line, select.POLLIN)

    def serve(self) -> None:
        self._stand_by()
        duty = self._duty
        if not duty.ranks or self._line is None:
            return
        word.say(self._line, Word(word.AGENT, duty.agent, self._node_rank), duty.key, duty.leader)
        # The guard ends what lives here, and so each of these lives is over: nobody needs to wait for the lease.
        for life in duty.ranks:
            word.say(self._line, Word(*life, self._node_rank), duty.key, others(duty.peers, life[0]))

    def _stand_by(self) -> None:
        while True:
            wait = min([*self._due.values(), *self._out_of_place()], default=None)
            ready = self._poller.poll(None if wait is None else max(0.0, wait - time.monotonic()) * 1000)
            for fd, _ in ready:
                if fd == self._leash.fileno():
                    try:
                        data = self._leash.recv(LONGEST)
                    except ConnectionResetError:  # gone, and had not read all that we said
                        return
                    if not data:
                        return
                    self._take(Duty.decode(data))
                    break  # a new life's descriptor may have the number of one that is ready in this list
                if self._line is not None and fd == self._line.fileno():
                    self._poller.unregister(fd)  # the agent's to read; looked at again when it has had its time
                    self._due[None] = time.monotonic() + PATIENCE
                else:
                    life = next((k for k, watched in self._watched.items() if watched == fd), None)
                    if life is not None:  # else it was taken off the list at the same moment
                        self._forget(life)
                        self._own.add(life)
                        self._expect(life)
            now = time.monotonic()
            for late in [k for k, at in self._due.items() if at <= now]:
                del self._due[late]
                if late is None:
                    self._listen()
                else:
                    self._act(late)
            if any(at <= now for at in self._out_of_place()):
                for life in list(self._duty.ranks):
                    self._act(life)

    def _out_of_place(self) -> list[float]:
        """When the agent has had its time to end what lives here, this node's place being another's."""
        left = self._duty.until and not self._acted.issuperset(self._duty.ranks)
        return [self._duty.until + PATIENCE] if left else []

    def _expect(self, life: Life) -> None:
        """That life has ended: the agent is to take it off its list."""
        if life in self._duty.ranks:
            self._due.setdefault(life, time.monotonic() + PATIENCE)

    def _take(self, duty: Duty) -> None:
        self._duty = duty
        for life in [k for k in self._watched if k not in duty.ranks]:
            self._forget(life)
        for life in [k for k in self._due if k is not None and k not in duty.ranks]:
            del self._due[life]
        self._own &= set(duty.ranks)
        self._acted &= set(duty.ranks)
        for life, who in duty.ranks.items():
            if life in self._watched or life in self._own:
                continue
            fd = lifecycle.open_pidfd(who)
            if fd is None:
                self._own.add(life)
                self._expect(life)
            else:
                self._watched[life] = fd
                self._poller.register(fd, select.POLLIN)

    def _forget(self, life: Life) -> None:
        if (fd := self._watched.pop(life, None)) is not None:
            self._poller.unregister(fd)
            os.close(fd)

    def _listen(self) -> None:
        """The words that the agent has not read in its time."""
        assert self._line is not None
        for heard in word.hear(self._line, self._duty.key, UNREAD):
            if heard.life in self._duty.ranks:
                self._act(heard.life)
        self._poller.register(self._line, select.POLLIN)

    def _act(self, life: Life) -> None:
        """In the agent's place: kill what is left of that life here, and tell the others if they may not know."""
        who = self._duty.ranks.get(life)
        if who is None or life in self._acted:
            return
        self._acted.add(life)
        lifecycle.kill_group(who)
        if life in self._own and self._line is not None:
            word.say(self._line, Word(*life, self._node_rank), self._duty.key, others(self._duty.peers, life[0]))
        # What had left the group holds the lock as well as what had not.
        lifecycle.kill_tagged(f"{self._run}/{life[0]}/{life[1]}", PATIENCE, node_rank=self._node_rank)
        with contextlib.suppress(OSError):  # it may never read it
            self._leash.send(json.dumps(life).encode(), socket.MSG_DONTWAIT)


class Leash:
    """The agent's end: tells the guard its duty, whenever that changes, and never waits for it.

    `ended` once the other end is seen to be closed.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._told = Duty({})
        self.ended = False
        end.setblocking(False)

    def fileno(self) -> int:
        return self._end.fileno()

    def tell(self, duty: Duty) -> None:
        """To be called again at the next news: a guard that is slow hears the last state, not each."""
        if duty == self._told:
            return
        with contextlib.suppress(OSError):
            self._end.send(duty.encode())
            self._told = duty

    def acted(self) -> Sequence[Life]:
        """The lives that the guard has ended in our place."""
        lives: list[Life] = []
        while True:
            try:
                data = self._end.recv(LONGEST)
            except BlockingIOError:
                return lives
            except OSError:
                data = b""
            if not data:
                self.ended = True
                return lives
            cohort_id, incarnation = json.loads(data)
            lives.append((cohort_id, incarnation))

    def close(self) -> None:
        """The guard takes this for our end."""
        self._end.close()
