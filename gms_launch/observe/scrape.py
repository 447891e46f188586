"""Serves one page over HTTP, from a thread of its own, so that nobody who comes can hold up the agent.

Asleep until there is a connection. What a crowd or a silent client can take is bounded: so many connections at once,
the oldest giving way to the newest; so many new ones a second, the others waiting in the kernel; so much time for each;
and the page is made once a second at most. It knows nothing of what is on the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger("agent")

#: Connections at once, and the pause after each that is taken (seconds).
MOST, PAUSE = 32, 0.01
#: What a connection may take from its first byte to its last (seconds).
PATIENCE = 5.0
#: Of a request's head (bytes).
HEAD_MAX = 8192
#: How long a page is good (seconds).
FRESH = 1.0
#: Pause when the system has no descriptor for us (seconds).
WITHOUT = 1.0
PATH = "/metrics"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, on a name's first address. Raises `OSError`."""
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    found = socket.socket(family, kind)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(where)
        found.listen(64)
        found.setblocking(False)
    except OSError:
        found.close()
        raise
    return found


class Server:
    """Serves `page` at /metrics on a listening socket, as `content_type`."""

    def __init__(self, listening: socket.socket, page: Callable[[], bytes], content_type: str) -> None:
        self._listening, self._make, self._content_type = listening, page, content_type
        self._page: bytes | None = None
        self._made = 0.0
        self._open: dict[asyncio.Task[None], None] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def soon(self, call: Callable[[], None]) -> None:
        """Have something done in this thread."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(call)

    def stop(self, timeout: float = 1.0) -> None:
        """End, within `timeout` seconds. Blocks."""
        self.soon(self._loop.stop)
        self._thread.join(timeout)

    def _run(self) -> None:
        accepting = self._loop.create_task(self._accept())
        try:
            self._loop.run_forever()
        finally:
            left = [accepting, *self._open]
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._listening.close()
            self._loop.close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listening)
            except OSError:
                await asyncio.sleep(WITHOUT)  # no descriptor left, say: they are for others now
                continue
            while len(self._open) >= MOST:
                oldest = next(iter(self._open))
                del self._open[oldest]
                oldest.cancel()
            task = self._loop.create_task(self._serve(connection))
            self._open[task] = None
            task.add_done_callback(lambda done: self._open.pop(done, None))
            await asyncio.sleep(PAUSE)

    async def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, asyncio.TimeoutError):
            connection.setblocking(False)
            await asyncio.wait_for(self._talk(connection), PATIENCE)

    async def _talk(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            data = await self._loop.sock_recv(connection, HEAD_MAX)
            head += data
            if not data or len(head) > HEAD_MAX:
                return
        words = head.split(b"\r\n", 1)[0].split(b" ")
        method, target = words[0], words[1].partition(b"?")[0] if len(words) > 1 else b""
        status, kind, body = self._answer(method, target)
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close"]
        answer = "\r\n".join([*lines, "", ""]).encode() + (b"" if method == b"HEAD" else body)
        await self._loop.sock_sendall(connection, answer)

    def _answer(self, method: bytes, target: bytes) -> tuple[str, str, bytes]:
        if method not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", "text/plain", b"only to be read\n"
        if target != PATH.encode():
            return "404 Not Found", "text/plain", f"there is only {PATH}\n".encode()
        try:
            if self._page is None or time.monotonic() - self._made > FRESH:
                self._page, self._made = self._make(), time.monotonic()
        except Exception:
            log.exception("internal error: the metrics cannot be made")
            return "500 Internal Server Error", "text/plain", b"see the agent's log\n"
        return "200 OK", self._content_type, self._page
