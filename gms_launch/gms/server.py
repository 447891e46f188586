"""The GMS server: sessions over a Unix socket, locks by connection, memory that stays when an engine dies.

One `SocketServer` a tag; those of a device share its memory. A connection that breaks the rules is closed and costs
nobody else anything. An error of the server itself ends the process: a server in doubt about its memory must not go
on answering (upstream's does the same).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gms_launch.gms import protocol as p
from gms_launch.gms import waiting
from gms_launch.gms.backends import OutOfMemoryError
from gms_launch.gms.locks import LockTable, State
from gms_launch.gms.store import Allocation, LayoutStore, RequestError

log = logging.getLogger("gms")

#: What a writer may ask beyond a reader.
_WRITES = (p.AllocateRequest, p.FreeAllocationRequest, p.MetadataPutRequest, p.MetadataDeleteRequest, p.CommitRequest)

#: Seconds between attempts to accept while the process has no descriptor left.
_ACCEPT_PAUSE = 0.1


class AlreadyRunningError(Exception):
    """A live server has the socket."""


@dataclass
class Session:
    """One connection with a granted lock."""

    number: int
    socket: socket.socket
    buffer: p.FrameBuffer = field(default_factory=p.FrameBuffer)
    mode: p.LockType | None = None
    pid: int = 0


class Room:
    """Woken whenever memory of a device may have become free."""

    def __init__(self) -> None:
        self.freed = asyncio.Condition()

    async def notify(self) -> None:
        async with self.freed:
            self.freed.notify_all()


class SocketServer:
    """Serves one tag of one device on one socket.

    `retry_interval` and `retry_timeout` are seconds between and until the end of attempts to allocate when the device
    is full (None: no end).
    """

    def __init__(
        self,
        path: Path,
        store: LayoutStore,
        room: Room,
        retry_interval: float = 0.5,
        retry_timeout: float | None = 60.0,
    ) -> None:
        self.path = path
        self.store = store
        self.locks = LockTable()
        self._room = room
        self._retry_interval, self._retry_timeout = retry_interval, retry_timeout
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
                pass
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
        listener.listen(128)
        self._listener = listener

    async def serve(self) -> None:
        """Accept until cancelled. Running out of descriptors delays those who wait and ends nothing."""
        assert self._listener is not None, "bind comes first"
        loop = asyncio.get_running_loop()
        failing = False
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
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
            task = loop.create_task(self._connection(Session(self._serial, connection)))
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

    async def _connection(self, session: Session) -> None:
        try:
            if await self._handshake(session):
                await self._requests(session)
        except p.ProtocolError as exc:
            log.warning("session %d from pid %d: %s; closing it", session.number, session.pid, exc)
            with contextlib.suppress(OSError):
                await self._send(session, p.ErrorResponse(error=str(exc)))
        except (OSError, EOFError) as exc:
            log.debug("session %d ended: %s", session.number, exc)
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

    async def _handshake(self, session: Session) -> bool:
        credentials = session.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        session.pid = struct.unpack("3i", credentials)[0]
        message = await self._receive(session)
        if isinstance(message, p.GetRuntimeStateRequest):
            await self._send(session, self.runtime_state())
            return False
        if isinstance(message, p.GetEventHistoryRequest):
            await self._send(session, p.GetEventHistoryResponse(list(self.store.events)))
            return False
        if not isinstance(message, p.HandshakeRequest):
            raise p.ProtocolError(f"expected a handshake, got {type(message).__name__}")
        granted = await self._wait_for_lock(session, message)
        if granted is None:
            await self._send(session, p.HandshakeResponse(success=False, committed=self.locks.committed))
            return False
        await self._send(
            session, p.HandshakeResponse(success=True, committed=self.locks.committed, granted_lock_type=granted)
        )
        return True

    async def _wait_for_lock(self, session: Session, request: p.HandshakeRequest) -> p.LockType | None:
        """Grant the lock, or None after the timeout. A client that hangs up while it waits waits no longer."""
        timeout = None if request.timeout_ms is None else max(0, request.timeout_ms) / 1000
        writer = request.lock_type is p.LockType.RW
        self.locks.waiting_writers += writer
        gone = asyncio.ensure_future(waiting.hung_up(session.socket))
        turn = asyncio.ensure_future(self._turn(session, request.lock_type))
        try:
            await asyncio.wait({gone, turn}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                return turn.result()
            if gone.done():
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
        if granted is p.LockType.RW:
            replaced = self.locks.committed
            self.locks.grant(session.number, granted)
            cleared = self.store.clear()
            if replaced:
                self.store.record("allocations_cleared", cleared)
            self.store.record("rw_connected")
        else:
            self.locks.grant(session.number, granted)
        session.mode = granted
        self._sessions[session.number] = session
        log.info("session %d: %s granted to pid %d", session.number, granted.value, session.pid)

    async def _end(self, session: Session) -> None:
        session.socket.close()
        if self._sessions.pop(session.number, None) is None:
            return
        if self.locks.release(session.number):
            log.warning("session %d: pid %d left without a commit; its layout is dropped", session.number, session.pid)
            cleared = self.store.clear()
            self.store.record("rw_aborted")
            self.store.record("allocations_cleared", cleared)
        await self._notify()
        await self._room.notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # -- requests ----------------------------------------------------------------------------------------------

    async def _requests(self, session: Session) -> None:
        while True:
            request = await self._receive(session)
            fd = -1
            try:
                if isinstance(request, _WRITES) and session.mode is not p.LockType.RW:
                    raise RequestError(f"{type(request).__name__} needs the RW lock; this session has RO")
                if isinstance(request, p.AllocateRequest):
                    answer: p.Message = await self._allocate(session, request)
                elif isinstance(request, p.ExportAllocationRequest):
                    found = self.store.get(request.allocation_id)
                    fd = self.store.memory.export(found.handle, session.mode is p.LockType.RW)
                    answer = p.ExportAllocationResponse(**_fields(found))
                elif isinstance(request, p.CommitRequest):
                    await self._commit(session)
                    return
                elif (handler := _SIMPLE.get(type(request))) is not None:
                    answer = handler(self, request)
                else:
                    raise RequestError(f"{type(request).__name__} is not a request of a session")
            except RequestError as exc:
                log.warning("session %d: rejected %s: %s", session.number, type(request).__name__, exc)
                answer = p.ErrorResponse(error=str(exc))
            try:
                await self._send(session, answer, fd)
            finally:
                if fd >= 0:
                    os.close(fd)

    async def _commit(self, session: Session) -> None:
        """Publish the layout, answer, and end the session, as upstream does: a writer comes back as a reader."""
        digest = self.store.seal()
        self.locks.commit(session.number)
        self.store.record("committed")
        log.info(
            "session %d: committed %d allocations, layout %s", session.number, len(self.store.allocations), digest[:12]
        )
        await self._notify()
        await self._send(session, p.CommitResponse(success=True))

    async def _allocate(self, session: Session, request: p.AllocateRequest) -> p.AllocateResponse:
        """Allocate, waiting for room: memory of an engine that has just died may be on its way back."""
        loop = asyncio.get_running_loop()
        deadline = None if self._retry_timeout is None else loop.time() + self._retry_timeout
        reported = False
        while True:
            try:
                made = self.store.allocate(request.size, request.tag)
                return p.AllocateResponse(made.allocation_id, made.size, made.aligned_size, made.layout_slot)
            except OutOfMemoryError as exc:
                if not reported:
                    reported = True
                    self.store.record("allocation_oom", len(self.store.allocations))
                    log.warning("session %d: out of memory (%s); waiting for room", session.number, exc)
                if deadline is not None and loop.time() >= deadline:
                    raise RequestError(f"no room within {self._retry_timeout:g} s: {exc}") from None
            async with self._room.freed:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._room.freed.wait(), self._retry_interval)
            if waiting.closed(session.socket):
                raise EOFError("closed while waiting for memory")

    def lock_state(self) -> p.GetLockStateResponse:
        locks = self.locks
        return p.GetLockStateResponse(
            state=locks.state.value,
            has_rw_session=locks.state is State.RW,
            ro_session_count=len(locks.readers),
            waiting_writers=locks.waiting_writers,
            committed=locks.committed,
            is_ready=locks.committed and locks.writer is None,
        )

    def runtime_state(self) -> p.GetRuntimeStateResponse:
        locks = self.lock_state()
        return p.GetRuntimeStateResponse(
            state=locks.state,
            has_rw_session=locks.has_rw_session,
            ro_session_count=locks.ro_session_count,
            waiting_writers=locks.waiting_writers,
            committed=locks.committed,
            is_ready=locks.is_ready,
            allocation_count=len(self.store.allocations),
            memory_layout_hash=self.store.layout_hash,
            sessions=[p.SessionInfo(s.mode.value, s.pid) for s in self._sessions.values() if s.mode],
            allocated_bytes=self.store.allocated_bytes,
        )

    def _get_metadata(self, request: p.MetadataGetRequest) -> p.MetadataGetResponse:
        found = self.store.metadata.get(request.key)
        if found is None:
            return p.MetadataGetResponse(found=False)
        return p.MetadataGetResponse(True, found.allocation_id, found.offset_bytes, found.value)

    def _put_metadata(self, request: p.MetadataPutRequest) -> p.MetadataPutResponse:
        self.store.put_metadata(request.key, request.allocation_id, request.offset_bytes, request.value)
        return p.MetadataPutResponse(success=True)

    def _list(self, request: p.ListAllocationsRequest) -> p.ListAllocationsResponse:
        return p.ListAllocationsResponse(
            [p.GetAllocationResponse(**_fields(a)) for a in self.store.listed(request.tag)]
        )


_SIMPLE: dict[type, Callable[[SocketServer, Any], p.Message]] = {
    p.GetLockStateRequest: lambda s, _: s.lock_state(),
    p.GetRuntimeStateRequest: lambda s, _: s.runtime_state(),
    p.GetEventHistoryRequest: lambda s, _: p.GetEventHistoryResponse(list(s.store.events)),
    p.GetAllocationStateRequest: lambda s, _: p.GetAllocationStateResponse(len(s.store.allocations)),
    p.GetAllocationRequest: lambda s, r: p.GetAllocationResponse(**_fields(s.store.get(r.allocation_id))),
    p.ListAllocationsRequest: lambda s, r: s._list(r),
    p.FreeAllocationRequest: lambda s, r: p.FreeAllocationResponse(s.store.free(r.allocation_id)),
    p.MetadataPutRequest: lambda s, r: s._put_metadata(r),
    p.MetadataGetRequest: lambda s, r: s._get_metadata(r),
    p.MetadataDeleteRequest: lambda s, r: p.MetadataDeleteResponse(s.store.metadata.pop(r.key, None) is not None),
    p.MetadataListRequest: lambda s, r: p.MetadataListResponse(
        sorted(k for k in s.store.metadata if k.startswith(r.prefix))
    ),
    p.GetLayoutHashRequest: lambda s, _: p.GetLayoutHashResponse(s.store.layout_hash),
}


def _fields(a: Allocation) -> dict[str, Any]:
    return {
        "allocation_id": a.allocation_id,
        "size": a.size,
        "aligned_size": a.aligned_size,
        "tag": a.tag,
        "layout_slot": a.layout_slot,
    }
