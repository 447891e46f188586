"""The GMS server: sessions over a Unix socket, locks by connection, memory that stays when an engine dies.

One `SocketServer` a tag; those of a device share its memory. A connection that breaks the rules is closed and costs
nobody else anything. An error of the server itself ends the process: a server in doubt about its memory must not go
on answering (upstream's does the same).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec

from gms_launch.gms import protocol as p
from gms_launch.gms import waiting
from gms_launch.gms.locks import WRITERS, Left, LockTable
from gms_launch.gms.requests import Requests, Room, Session, lock_state
from gms_launch.gms.store import LayoutStore

log = logging.getLogger("gms")

#: Seconds between attempts to accept while the process has no descriptor left.
_ACCEPT_PAUSE = 0.1
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
#: Descriptors that new connections leave for the sessions that are there: an export needs one.
_RESERVE = 32


class AlreadyRunningError(Exception):
    """A live server has the socket."""


class SocketServer:
    """Serves one tag of one device on one socket. For `retry_interval` and `retry_timeout` see `Requests`.

    A connection that has not said in `first_frame_timeout` seconds what it wants is closed: it holds a descriptor.
    """

    def __init__(
        self,
        path: Path,
        store: LayoutStore,
        room: Room,
        retry_interval: float = 0.5,
        retry_timeout: float | None = 60.0,
        first_frame_timeout: float = 30.0,
    ) -> None:
        self.path = path
        self.store = store
        self.locks = LockTable()
        self._room = room
        self._requests = Requests(store, self.locks, room, retry_interval, retry_timeout)
        self._first_frame_timeout = first_frame_timeout
        self._changed = asyncio.Condition()
        self._sessions: dict[int, Session] = {}
        self._serial = 0
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- listening ---------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Take the socket. Raises `AlreadyRunningError` over a live one; a dead one is replaced."""
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with probe:
            try:
                probe.connect(str(self.path))
            except FileNotFoundError:
                _leave_a_reserve()
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
            else:
                raise AlreadyRunningError(f"a GMS server already answers at {self.path}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        previous = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        finally:
            os.umask(previous)
        listener.listen(1024)
        self._listener = listener

    async def serve(self) -> None:
        """Accept until cancelled. Running out of descriptors delays those who wait and ends nothing."""
        assert self._listener is not None, "bind comes first"
        hang_ups = waiting.HangUps()
        try:
            await self._accept(self._listener, hang_ups)
        finally:
            hang_ups.close()

    async def _accept(self, listener: socket.socket, hang_ups: waiting.HangUps) -> None:
        loop = asyncio.get_running_loop()
        failing = False
        while True:
            try:
                _leave_a_reserve()
                connection, _ = await loop.sock_accept(listener)
            except OSError as exc:
                if not failing:  # once, not at every attempt
                    log.error("%s: cannot accept: %s; trying again each %g s", self.path, exc, _ACCEPT_PAUSE)
                failing = True
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if failing:
                log.warning("%s: accepting again", self.path)
            failing = False
            connection.setblocking(False)
            self._serial += 1
            task = loop.create_task(self._connection(Session(self._serial, connection), hang_ups))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.critical("fatal server error, giving up all memory", exc_info=task.exception())
            os._exit(1)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self.path.unlink(missing_ok=True)

    # -- one connection ----------------------------------------------------------------------------------------

    async def _connection(self, session: Session, hang_ups: waiting.HangUps) -> None:
        try:
            if await self._handshake(session, hang_ups):
                await self._serve_session(session, hang_ups)
        except p.ProtocolError as exc:
            log.warning("session %d from pid %d: %s; closing it", session.number, session.pid, exc)
            with contextlib.suppress(OSError):
                await self._send(session, p.ErrorResponse(error=str(exc)))
        except (OSError, EOFError) as exc:
            level = logging.WARNING if getattr(exc, "errno", None) in _NO_DESCRIPTORS else logging.DEBUG
            log.log(level, "session %d from pid %d ended: %s", session.number, session.pid, exc)
        finally:
            await self._end(session)

    async def _receive(self, session: Session) -> Any:
        loop = asyncio.get_running_loop()
        while (message := session.buffer.next()) is None:
            data = await loop.sock_recv(session.socket, 65536)
            if not data:
                raise EOFError("closed by the client")
            session.buffer.feed(data)
        return message

    async def _send(self, session: Session, message: p.Message, fd: int = -1) -> None:
        loop = asyncio.get_running_loop()
        data = p.frame(message)
        if fd >= 0:
            while True:
                try:
                    sent = socket.send_fds(session.socket, [data], [fd])
                    break
                except BlockingIOError:
                    await waiting.writable(session.socket)
            data = data[sent:]
        await loop.sock_sendall(session.socket, data)

    async def _handshake(self, session: Session, hang_ups: waiting.HangUps) -> bool:
        credentials = session.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        session.pid = struct.unpack("3i", credentials)[0]
        try:
            message = await asyncio.wait_for(self._receive(session), self._first_frame_timeout)
        except asyncio.TimeoutError:
            raise p.ProtocolError(f"no complete message within {self._first_frame_timeout:g} s") from None
        if isinstance(message, p.GetRuntimeStateRequest):
            await self._send(session, self.runtime_state())
            return False
        if isinstance(message, p.GetEventHistoryRequest):
            await self._send(session, p.GetEventHistoryResponse(list(self.store.events)))
            return False
        if not isinstance(message, p.HandshakeRequest) or message.lock_type is p.LockType.RW_DATA:
            raise p.ProtocolError("Expected HandshakeRequest")
        granted = await self._wait_for_lock(session, message, hang_ups)
        if granted is None:
            await self._send(session, p.HandshakeResponse(success=False, committed=self.locks.committed))
            return False
        await self._send(
            session, p.HandshakeResponse(success=True, committed=self.locks.committed, granted_lock_type=granted)
        )
        return True

    async def _wait_for_lock(
        self, session: Session, request: p.HandshakeRequest, hang_ups: waiting.HangUps
    ) -> p.LockType | None:
        """Grant the lock, or None after the timeout. A client that hangs up while it waits waits no longer."""
        timeout = None if request.timeout_ms is None else max(0, request.timeout_ms) / 1000
        writer = request.lock_type in WRITERS
        self.locks.waiting_writers += writer
        gone = asyncio.ensure_future(hang_ups.of(session.socket))
        turn = asyncio.ensure_future(self._turn(session, request.lock_type))
        try:
            await asyncio.wait({gone, turn}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                return turn.result()
            if gone.done():
                gone.result()
                raise EOFError("closed while waiting for the lock")
            return None
        finally:
            for future in (gone, turn):
                future.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await future
            self.locks.waiting_writers -= writer
            await self._notify()

    async def _turn(self, session: Session, wanted: p.LockType) -> p.LockType:
        async with self._changed:
            while (granted := self.locks.offer(wanted)) is None:
                await self._changed.wait()
            self._grant(session, granted)
            return granted

    def _grant(self, session: Session, granted: p.LockType) -> None:
        replaced = self.locks.committed
        self.locks.grant(session.number, granted)
        if granted is p.LockType.RW:
            cleared = self.store.clear()
            if replaced:
                self.store.record("allocations_cleared", cleared)
        if granted is not p.LockType.RO:
            self.store.record("rw_connected")
        session.grant(granted)
        self._sessions[session.number] = session
        log.info("session %d: %s granted to pid %d", session.number, granted.value, session.pid)

    async def _end(self, session: Session) -> None:
        session.socket.close()
        if self._sessions.pop(session.number, None) is None:
            return
        left = self.locks.release(session.number)
        if left is not Left.AS_IT_WAS:
            log.warning("session %d: writer, pid %d, left; its layout is %s", session.number, session.pid, left.value)
        if left is Left.DROPPED:
            cleared = self.store.clear()
            self.store.record("rw_aborted")
            self.store.record("allocations_cleared", cleared)
        elif left is Left.SEALED:
            self.store.record("rw_disconnected", len(self.store.allocations))
        await self._notify()
        await self._room.notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # -- requests ----------------------------------------------------------------------------------------------

    async def _serve_session(self, session: Session, hang_ups: waiting.HangUps) -> None:
        if session.mode is p.LockType.RW:
            await self._room.notify()  # what it replaced is free now
        while True:
            request = await self._receive(session)
            answer, fd = await self._requests.answer(session, request, hang_ups)
            if committed := isinstance(answer, p.CommitResponse):
                await self._notify()
            try:
                await self._send(session, answer, fd)
            finally:
                if fd >= 0:
                    os.close(fd)
            if committed:
                return

    def runtime_state(self) -> p.GetRuntimeStateResponse:
        return p.GetRuntimeStateResponse(
            **msgspec.structs.asdict(lock_state(self.locks)),
            allocation_count=len(self.store.allocations),
            memory_layout_hash=self.store.layout_hash,
            sessions=[p.SessionInfo(s.mode.value, s.pid) for s in self._sessions.values() if s.mode],
            allocated_bytes=self.store.allocated_bytes,
        )


def _leave_a_reserve() -> None:
    """Raises `OSError` (EMFILE) when one connection more would take the last descriptors of this process."""
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if lowest >= soft - min(_RESERVE, soft // 4):
        raise OSError(errno.EMFILE, "all but a reserve of the descriptors are taken")
