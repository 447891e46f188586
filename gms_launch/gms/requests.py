"""What a session may ask of its socket, and the answers. Who holds which lock, and the wire, are `server`'s business.

A refusal is an error answer and the session goes on. Its texts are upstream's (server/session.py, gms.py), which its
clients and tests match.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gms_launch.gms import protocol as p
from gms_launch.gms.backends import OutOfMemoryError
from gms_launch.gms.locks import LockTable, State
from gms_launch.gms.store import Allocation, LayoutStore, RequestError
from gms_launch.gms.waiting import HangUps

log = logging.getLogger("gms")

_READS = (
    p.ExportAllocationRequest,
    p.GetAllocationRequest,
    p.ListAllocationsRequest,
    p.MetadataGetRequest,
    p.MetadataListRequest,
    p.GetLockStateRequest,
    p.GetAllocationStateRequest,
    p.GetLayoutHashRequest,
)
#: What changes the layout's shape: a sealed one has given it up.
_SHAPES = (p.AllocateRequest, p.FreeAllocationRequest, p.MetadataPutRequest, p.MetadataDeleteRequest)
_ALLOWED: dict[p.LockType | None, tuple[type[p.Message], ...]] = {
    p.LockType.RO: _READS,
    p.LockType.RW_DATA: _READS,  # it writes through its mappings, of which the server sees nothing
    p.LockType.RW: _READS + _SHAPES + (p.CommitRequest, p.CommitLayoutRequest),
}


@dataclass
class Session:
    """One connection, and the lock granted to it."""

    number: int
    socket: socket.socket
    buffer: p.FrameBuffer = field(default_factory=lambda: p.FrameBuffer(p.MAX_FIRST_FRAME))
    mode: p.LockType | None = None
    pid: int = 0

    def grant(self, mode: p.LockType) -> None:
        """Take over the lock's rights; only the one writer may send much at a time."""
        self.mode = mode
        self.buffer.limit = p.MAX_FRAME if mode is p.LockType.RW else p.MAX_REQUEST


class Room:
    """Woken whenever memory of a device may have become free."""

    def __init__(self) -> None:
        self.freed = asyncio.Condition()

    async def notify(self) -> None:
        async with self.freed:
            self.freed.notify_all()


class Requests:
    """Answers the requests of one socket's sessions.

    `retry_interval` and `retry_timeout` are seconds between and until the end of attempts to allocate when the device
    is full (None: no end).
    """

    def __init__(
        self, store: LayoutStore, locks: LockTable, room: Room, retry_interval: float, retry_timeout: float | None
    ) -> None:
        self._store, self._locks, self._room = store, locks, room
        self._retry_interval, self._retry_timeout = retry_interval, retry_timeout

    async def answer(self, session: Session, request: p.Message, hang_ups: HangUps) -> tuple[p.Message, int]:
        """The answer, and a descriptor to send along and close (-1: none). Raises `EOFError` when nobody waits for it.

        After a `CommitRequest` the lock is free and the session is to be ended.
        """
        try:
            self._check(session, request)
            if isinstance(request, p.AllocateRequest):
                return await self._allocate(session, request, hang_ups), -1
            if isinstance(request, p.ExportAllocationRequest):
                return self._export(session, request)
            if isinstance(request, p.CommitRequest):
                return self._commit(session), -1
            if isinstance(request, p.CommitLayoutRequest):
                return self._seal(session), -1
            return _SIMPLE[type(request)](self._store, self._locks, request), -1
        except RequestError as exc:
            error = str(exc)
        except OSError as exc:  # no descriptor left, most likely; it may be had again
            error = f"{type(request).__name__}: {exc.strerror or exc}"
        log.warning("session %d: rejected %s: %s", session.number, type(request).__name__, error)
        return p.ErrorResponse(error=error), -1

    def _check(self, session: Session, request: p.Message) -> None:
        if isinstance(request, _ALLOWED[session.mode]):
            return
        assert session.mode is not None
        name = type(request).__name__
        if session.mode is p.LockType.RW_DATA and isinstance(request, _SHAPES):
            raise RequestError(f"{name} not allowed: the layout is committed. Reconnect with RW to replace it.")
        state = self._locks.state.name
        raise RequestError(f"{name} not allowed for {session.mode.name} session in state {state}")

    def _export(self, session: Session, request: p.ExportAllocationRequest) -> tuple[p.Message, int]:
        found = self._store.get(request.allocation_id)
        fd = self._store.memory.export(found.handle, session.mode is not p.LockType.RO)
        return p.ExportAllocationResponse(**_fields(found)), fd

    def _commit(self, session: Session) -> p.CommitResponse:
        """Publish the layout. The session ends with it, as upstream's does: a writer comes back as a reader."""
        count, digest = len(self._store.allocations), self._store.seal()
        self._locks.commit(session.number)
        self._store.record("committed")
        log.info("session %d: committed %d allocations, layout %s", session.number, count, digest[:12])
        return p.CommitResponse(success=True)

    def _seal(self, session: Session) -> p.CommitLayoutResponse:
        """Make the shape final. The writer stays and goes on writing; its memory outlives it from now on."""
        count, digest = len(self._store.allocations), self._store.seal()
        self._locks.seal(session.number)
        session.grant(p.LockType.RW_DATA)
        self._store.record("layout_committed", count)
        log.info("session %d: sealed %d allocations, layout %s", session.number, count, digest[:12])
        return p.CommitLayoutResponse(True, digest, p.LockType.RW_DATA)

    async def _allocate(self, session: Session, request: p.AllocateRequest, hang_ups: HangUps) -> p.AllocateResponse:
        """Allocate, waiting for room: memory of an engine that has just died may be on its way back."""
        try:
            return self._allocated(request)
        except OutOfMemoryError as exc:
            log.warning("session %d: out of memory (%s); waiting for room", session.number, exc)
        self._store.record("allocation_oom", len(self._store.allocations))
        gone = asyncio.ensure_future(hang_ups.of(session.socket))
        try:
            return await self._retry(request, gone)
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await gone

    async def _retry(self, request: p.AllocateRequest, gone: asyncio.Future[None]) -> p.AllocateResponse:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        aligned, total = self._store.aligned(request.size), self._store.memory.total
        while True:
            waited = loop.time() - begun
            left = None if self._retry_timeout is None else self._retry_timeout - waited
            if aligned > total or (left is not None and left <= 0):
                never = f"; it can never be had, the device has {total} bytes" if aligned > total else ""
                raise RequestError(
                    f"Timed out waiting for GPU memory: requested_size={request.size}, aligned_size={aligned}, "
                    f"tag={request.tag}, waited_sec={waited:.3f}{never}"
                )
            freed = asyncio.ensure_future(self._freed())
            pause = self._retry_interval if left is None else min(self._retry_interval, left)
            try:
                await asyncio.wait({gone, freed}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            finally:
                freed.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await freed
            if gone.done():
                gone.result()
                raise EOFError("closed while waiting for memory")
            with contextlib.suppress(OutOfMemoryError):
                return self._allocated(request)

    async def _freed(self) -> None:
        async with self._room.freed:
            await self._room.freed.wait()

    def _allocated(self, request: p.AllocateRequest) -> p.AllocateResponse:
        made = self._store.allocate(request.size, request.tag)
        return p.AllocateResponse(made.allocation_id, made.size, made.aligned_size, made.layout_slot)


def lock_state(locks: LockTable) -> p.GetLockStateResponse:
    return p.GetLockStateResponse(
        state=locks.state.value,
        has_rw_session=locks.state is State.RW,
        ro_session_count=len(locks.readers),
        waiting_writers=locks.waiting_writers,
        committed=locks.committed,
        is_ready=locks.committed and locks.writer is None,
        layout_committed=locks.committed or locks.sealed,
    )


def _get_metadata(store: LayoutStore, request: p.MetadataGetRequest) -> p.MetadataGetResponse:
    found = store.metadata.get(request.key)
    if found is None:
        return p.MetadataGetResponse(found=False)
    return p.MetadataGetResponse(True, found.allocation_id, found.offset_bytes, found.value)


def _put_metadata(store: LayoutStore, request: p.MetadataPutRequest) -> p.MetadataPutResponse:
    store.put_metadata(request.key, request.allocation_id, request.offset_bytes, request.value)
    return p.MetadataPutResponse(success=True)


_SIMPLE: dict[type, Callable[[LayoutStore, LockTable, Any], p.Message]] = {
    p.GetLockStateRequest: lambda _, locks, __: lock_state(locks),
    p.GetAllocationStateRequest: lambda s, _, __: p.GetAllocationStateResponse(len(s.allocations)),
    p.GetAllocationRequest: lambda s, _, r: p.GetAllocationResponse(**_fields(s.get(r.allocation_id))),
    p.ListAllocationsRequest: lambda s, _, r: p.ListAllocationsResponse(
        [p.GetAllocationResponse(**_fields(a)) for a in s.listed(r.tag)]
    ),
    p.FreeAllocationRequest: lambda s, _, r: p.FreeAllocationResponse(s.free(r.allocation_id)),
    p.MetadataPutRequest: lambda s, _, r: _put_metadata(s, r),
    p.MetadataGetRequest: lambda s, _, r: _get_metadata(s, r),
    p.MetadataDeleteRequest: lambda s, _, r: p.MetadataDeleteResponse(s.metadata.pop(r.key, None) is not None),
    p.MetadataListRequest: lambda s, _, r: p.MetadataListResponse(
        sorted(k for k in s.metadata if k.startswith(r.prefix))
    ),
    p.GetLayoutHashRequest: lambda s, _, __: p.GetLayoutHashResponse(s.layout_hash),
}


def _fields(a: Allocation) -> dict[str, Any]:
    return {
        "allocation_id": a.allocation_id,
        "size": a.size,
        "aligned_size": a.aligned_size,
        "tag": a.tag,
        "layout_slot": a.layout_slot,
    }
