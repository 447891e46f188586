"""Wait for what a session's socket does, on the event loop, without reading from it or writing to it."""

from __future__ import annotations

import asyncio
import socket


def closed(sock: socket.socket) -> bool:
    """True when the peer has closed; whatever it sent before stays unread."""
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def hung_up(sock: socket.socket) -> None:
    """Return when the peer has closed. Data it sent ahead of the answer is left in place, and watching ends."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock.fileno())
    if not closed(sock):
        await loop.create_future()  # it spoke out of turn; wait for the lock to be decided


async def writable(sock: socket.socket) -> None:
    """Return when something can be sent."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock.fileno())
