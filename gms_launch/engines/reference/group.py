"""How the workers of a cohort depend on each other: a meeting at the master port, then steps that need everybody.

As with a collective of NCCL, nobody notices a peer's death by itself: a leader waits for the answer of a worker that
is gone, and a worker whose leader is gone goes on waiting with everything it holds. That is what a launcher is for.

With hybrid load balancing the leader ranks of the other nodes come to that meeting too (`Peer`): what they ask of the
workers, their own or all, goes through the first one, so that it dies for everybody.

Only who knows the life's secret takes part (`meeting`); a stranger at the port costs a descriptor for some seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gms_launch.engines.reference import meeting
from gms_launch.engines.reference.meeting import Handshake, StrangerError, Voice

log = logging.getLogger("reference")

_HEADER = struct.Struct("!I")
#: So many connections may be without a proof at one time; one more, and the oldest of them is closed.
STRANGERS = 64
#: What takes all of those who are asked, as a collective does: they must be awake.
STEPS = frozenset({"prefill", "steps"})
Reply = dict[str, Any]


def _pack(body: bytes, voice: Voice) -> bytes:
    return _HEADER.pack(len(body)) + body + voice.mark(body)


@dataclass
class _Seat:
    """A worker that has joined."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    to: Voice
    of: Voice
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def read(self) -> Reply:
        """Its next answer; for ever if none comes: a dead peer is not noticed."""
        try:
            (length,) = _HEADER.unpack(await self.reader.readexactly(_HEADER.size))
            body = await self.reader.readexactly(length)
            self.of.check(body, await self.reader.readexactly(meeting.MARK))
            reply: Reply = msgspec.msgpack.decode(body)
            return reply
        except StrangerError as exc:
            log.error("a worker's line is not its own any more: %s", exc)
        except (asyncio.IncompleteReadError, OSError):
            pass
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


class Leader:
    """The leader rank's end: collects `world` workers that know `secret`, then broadcasts and gathers.

    `peers`: leader ranks of other nodes may come too, with numbers of so many behind the workers'.
    """

    def __init__(self, world: int, secret: bytes, peers: int = 0) -> None:
        self._world, self._secret, self._last = world, secret, world + peers
        self._peers: dict[int, asyncio.Task[None]] = {}
        self._passing: set[asyncio.Task[None]] = set()
        self._awake: set[int] = set()
        self._woken = asyncio.Event()
        self._workers: dict[int, _Seat] = {}
        self._unproved: dict[asyncio.StreamWriter, None] = {}
        self._told = 0
        self._complete = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Open the master port (0 picks one); returns it. Raises `OSError` when it is taken."""
        self._server = await asyncio.start_server(self._came, host, port, backlog=1024)
        return int(self._server.sockets[0].getsockname()[1])

    async def everybody(self) -> None:
        """Wait until every worker has joined."""
        await self._complete.wait()

    async def _came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Let a worker in, and nobody else: who is silent, or talks nonsense, must not keep the ranks from meeting."""
        if len(self._unproved) >= STRANGERS:
            oldest = next(iter(self._unproved))  # a worker takes no time: who has waited longest is none
            del self._unproved[oldest]
            oldest.transport.abort()
        self._unproved[writer] = None
        try:
            await asyncio.wait_for(self._join(reader, writer), meeting.PATIENCE)
        except (StrangerError, asyncio.IncompleteReadError, asyncio.TimeoutError, OSError) as exc:
            writer.transport.abort()
            self._told += 1
            if self._told & (self._told - 1) == 0:  # the 1st, 2nd, 4th, 8th: nobody is to fill the log
                log.warning("refused at the master port, %d by now: %s", self._told, exc or type(exc).__name__)
        finally:
            self._unproved.pop(writer, None)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hand = Handshake(self._secret)
        writer.write(hand.answer(await reader.readexactly(meeting.CALL)))
        rank, to, of = hand.joined(await reader.readexactly(meeting.CLAIM))
        if rank >= self._last or rank in self._workers or rank in self._peers:
            raise StrangerError(f"a second rank {rank}, or one above {self._last - 1}")
        seat = _Seat(reader, writer, to, of)
        if rank >= self._world:
            self._peers[rank] = asyncio.get_running_loop().create_task(self._attend(seat))
            return
        self._workers[rank] = seat
        if len(self._workers) == self._world:
            self._complete.set()

    async def _attend(self, peer: _Seat) -> None:
        """Do for another node's leader rank what it asks for; of several things each as soon as it can be done."""
        while True:
            task = asyncio.get_running_loop().create_task(self._pass_on(peer, await peer.read()))
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)

    async def _pass_on(self, peer: _Seat, asked: Reply) -> None:
        await self.everybody()
        replies = await self.some(range(*asked["ranks"]), **asked["message"])
        peer.writer.write(_pack(msgspec.msgpack.encode({"number": asked["number"], "replies": replies}), peer.to))

    async def all(self, **message: Any) -> list[Reply]:
        """Send `message` to every worker and return all answers by rank. Waits for ever for one that is gone."""
        return await self.some(range(self._world), **message)

    async def some(self, ranks: range, **message: Any) -> list[Reply]:
        """The same with some of the workers; those of others answer meanwhile. No step before all of them are awake."""
        if message["op"] == "sleep":
            self._awake.difference_update(ranks)
        while message["op"] in STEPS and not self._awake.issuperset(ranks):
            await self._woken.wait()
        replies = await self._have(ranks, message)
        if message["op"] == "wake":
            self._awake.update(ranks)
            self._woken.set()
            self._woken = asyncio.Event()
        return replies

    async def _have(self, ranks: range, message: Reply) -> list[Reply]:
        seats = [self._workers[r] for r in ranks]
        async with AsyncExitStack() as turns:
            for seat in seats:  # in one order, so that nobody waits for somebody who waits for him
                await turns.enter_async_context(seat.turn)
            body = msgspec.msgpack.encode(message)
            for seat in seats:
                seat.writer.write(_pack(body, seat.to))
            return await asyncio.gather(*(seat.read() for seat in seats))


class Peer:
    """The end of another node's leader rank: the first one's does what it asks for. `number`: its own there."""

    def __init__(self, number: int, secret: bytes) -> None:
        self._number, self._secret = number, secret
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[list[Reply]]] = {}

    async def join(self, host: str, port: int) -> None:
        """Come to the meeting. Retries until the first node's leader rank listens."""
        while True:
            try:
                connection, to, of = await asyncio.to_thread(_join, host, port, self._number, self._secret)
                break
            except (OSError, StrangerError):
                await asyncio.sleep(0.05)
        self._seat = _Seat(*await asyncio.open_connection(sock=connection), to, of)
        self._hearing = asyncio.get_running_loop().create_task(self._hear())

    async def _hear(self) -> None:
        while True:
            said = await self._seat.read()
            answer = self._asked.pop(said["number"])
            if not answer.done():  # nobody waits for it any more
                answer.set_result(said["replies"])

    async def everybody(self) -> None:
        """Wait until every worker has joined."""
        await self.some(range(0), op="nothing")

    async def some(self, ranks: range, **message: Any) -> list[Reply]:
        """Have `message` sent to some of the workers, and return their answers by rank. Waits for ever as they do."""
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        asked = {"number": number, "ranks": [ranks.start, ranks.stop], "message": message}
        self._seat.writer.write(_pack(msgspec.msgpack.encode(asked), self._seat.to))
        found: list[Reply] = await answer
        return found


def serve_worker(host: str, port: int, rank: int, secret: bytes, handle: Callable[[Reply], Reply]) -> None:
    """A worker's end: join, then answer until the end of time. Retries until the leader listens."""
    while True:
        try:
            connection, to, of = _join(host, port, rank, secret)
            break
        except (OSError, StrangerError):
            time.sleep(0.05)  # the leader may not listen yet, and nothing announces it
    while True:
        head = _receive(connection, _HEADER.size)
        body = _receive(connection, _HEADER.unpack(head)[0]) if head else b""
        mark = _receive(connection, meeting.MARK) if body else b""
        try:
            of.check(body, mark)
        except StrangerError as exc:
            if mark:
                log.error("the leader's line is not its own any more: %s", exc)
            while True:  # the leader is gone; like a rank inside a collective, wait for it all the same
                signal.pause()
        connection.sendall(_pack(msgspec.msgpack.encode(handle(msgspec.msgpack.decode(body))), to))


def _join(host: str, port: int, rank: int, secret: bytes) -> tuple[socket.socket, Voice, Voice]:
    """A line to the leader of this life. Raises `OSError` and `StrangerError`."""
    connection = socket.create_connection((host, port), timeout=meeting.PATIENCE)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hand = Handshake(secret)
        connection.sendall(hand.call())
        claim, to, of = hand.claim(_receive(connection, meeting.ANSWER), rank)
        connection.settimeout(None)
        connection.sendall(claim)
    except BaseException:
        connection.close()
        raise
    return connection, to, of


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            chunk = connection.recv(size - len(data))
        except ConnectionError:
            return b""
        if not chunk:
            return b""
        data += chunk
    return data
