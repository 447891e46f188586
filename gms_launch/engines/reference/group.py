"""How the workers of a cohort depend on each other: a meeting at the master port, then steps that need everybody.

As with a collective of NCCL, nobody notices a peer's death by itself: a leader waits for the answer of a worker that
is gone, and a worker whose leader is gone goes on waiting with everything it holds. That is what a launcher is for.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgspec

_HEADER = struct.Struct("!I")
Reply = dict[str, Any]


def _pack(message: Reply) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _HEADER.pack(len(body)) + body


class Leader:
    """The leader rank's end: collects `world` workers, then broadcasts and gathers."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._workers: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self._complete = asyncio.Event()
        self._step = asyncio.Lock()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Open the master port (0 picks one); returns it. Raises `OSError` when it is taken."""
        self._server = await asyncio.start_server(self._joined, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def everybody(self) -> None:
        """Wait until every worker has joined."""
        await self._complete.wait()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await self._read(reader)
        self._workers[hello["rank"]] = (reader, writer)
        if len(self._workers) == self._world:
            self._complete.set()

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> Reply:
        try:
            (length,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            reply: Reply = msgspec.msgpack.decode(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.Event().wait()  # a dead peer is not noticed: nothing ever comes
            raise AssertionError("unreachable") from None
        return reply

    async def all(self, **message: Any) -> list[Reply]:
        """Send `message` to every worker and return all answers by rank. Waits for ever for one that is gone."""
        async with self._step:
            data = _pack(message)
            for _, writer in self._workers.values():
                writer.write(data)
            return await asyncio.gather(*(self._read(self._workers[r][0]) for r in sorted(self._workers)))


def serve_worker(host: str, port: int, rank: int, handle: Callable[[Reply], Reply]) -> None:
    """A worker's end: join, then answer until the end of time. Retries until the leader listens."""
    while True:
        try:
            connection = socket.create_connection((host, port))
            break
        except OSError:
            time.sleep(0.05)  # the leader may not listen yet, and nothing announces it
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_pack({"rank": rank}))
    while True:
        head = _receive(connection, _HEADER.size)
        body = _receive(connection, _HEADER.unpack(head)[0]) if head else b""
        if not body:
            while True:  # the leader is gone; like a rank inside a collective, wait for it all the same
                signal.pause()
        connection.sendall(_pack(handle(msgspec.msgpack.decode(body))))


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
