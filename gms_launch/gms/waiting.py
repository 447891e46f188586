"""Wait for what a session's socket does, on the event loop, without reading from it or writing to it."""

from __future__ import annotations

import asyncio
import select
import socket

_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class HangUps:
    """Tells when a peer has closed, also behind data that nobody has read. One descriptor for any number of sockets.

    Watching for readability is not enough: what a client sent ahead of the answer stays readable for ever.
    """

    def __init__(self) -> None:
        """Needs a running loop, and belongs to it."""
        self._epoll = select.epoll()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._look)

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0):
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        if (found := self._waiting.pop(fd, None)) is not None:
            self._epoll.unregister(fd)
            if not found.done():
                found.set_result(None)

    async def of(self, sock: socket.socket) -> None:
        """Return when the peer of `sock` has closed. One waiter a socket."""
        fd = sock.fileno()
        self._epoll.register(fd, _GONE)
        self._waiting[fd] = self._loop.create_future()
        try:
            await self._waiting[fd]
        finally:
            self._forget(fd)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()


async def writable(sock: socket.socket) -> None:
    """Return when something can be sent."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock.fileno())
