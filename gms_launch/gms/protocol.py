"""GMS wire protocol: messages and framing, compatible with upstream's `gpu_memory_service`.

A frame is a 4-byte big-endian length and a MessagePack map whose `type` names the message; names and fields are
upstream's (common/protocol/messages.py and wire.py, releases 1.1 to 1.6, and the sealed layouts of its newest). A
descriptor rides along by SCM_RIGHTS with the frame it belongs to. Unknown fields are ignored in both directions, so
either side may be newer. Not spoken: V1 (snapshots), and the persistent allocations of unreleased branches.
"""

from __future__ import annotations

import os
import socket
import struct
from enum import Enum
from typing import Any, Union

import msgspec

#: The longest frame, by what its sender has shown so far (bytes). A stranger says a few words; who holds a lock asks by
#: name; only the one writer sends contents, metadata of tens of MiB with large models. Answers may be as long as that.
MAX_FIRST_FRAME = 64 * 1024
MAX_REQUEST = 1024 * 1024
MAX_FRAME = 256 * 1024 * 1024
HEADER = struct.Struct("!I")


class ProtocolError(Exception):
    """The peer sent something that is not this protocol."""


class LockType(str, Enum):
    """What a handshake asks for; a grant is RW, RO or RW_DATA, which is never asked for by name."""

    RW = "rw"
    RO = "ro"
    RW_OR_RO = "rw_or_ro"
    RW_DATA_OR_RW = "rw_data_or_rw"
    RW_DATA = "rw_data"


class Message(msgspec.Struct):
    """Base of all messages."""


class HandshakeRequest(Message, tag="handshake_request"):
    """First message of a session. `timeout_ms` None waits without limit."""

    lock_type: LockType
    timeout_ms: int | None = None


class HandshakeResponse(Message, tag="handshake_response"):
    success: bool
    committed: bool
    granted_lock_type: LockType | None = None


class ErrorResponse(Message, tag="error_response"):
    error: str
    code: int = 0


class CommitRequest(Message, tag="commit_request"):
    pass


class CommitResponse(Message, tag="commit_response"):
    success: bool


class CommitLayoutRequest(Message, tag="commit_layout_request"):
    """Seal the shape of the layout: it outlives its writer, who goes on with RW_DATA. Contents are not published."""


class CommitLayoutResponse(Message, tag="commit_layout_response"):
    success: bool
    memory_layout_hash: str = ""
    granted_lock_type: LockType | None = None


class GetLockStateRequest(Message, tag="get_lock_state_request"):
    pass


class GetLockStateResponse(Message, tag="get_lock_state_response"):
    state: str
    has_rw_session: bool
    ro_session_count: int
    waiting_writers: int
    committed: bool
    is_ready: bool
    layout_committed: bool = False


class GetAllocationStateRequest(Message, tag="get_allocation_state_request"):
    pass


class GetAllocationStateResponse(Message, tag="get_allocation_state_response"):
    allocation_count: int


class AllocateRequest(Message, tag="allocate_request"):
    size: int
    tag: str = "default"


class AllocateResponse(Message, tag="allocate_response"):
    allocation_id: str
    size: int
    aligned_size: int
    layout_slot: int


class ExportAllocationRequest(Message, tag="export_allocation_request"):
    allocation_id: str


class ExportAllocationResponse(Message, tag="export_allocation_response"):
    """Carries the descriptor."""

    allocation_id: str
    size: int
    aligned_size: int
    tag: str
    layout_slot: int


class GetAllocationRequest(Message, tag="get_allocation_request"):
    allocation_id: str


class GetAllocationResponse(Message, tag="get_allocation_response"):
    allocation_id: str
    size: int
    aligned_size: int
    tag: str
    layout_slot: int


class ListAllocationsRequest(Message, tag="list_allocations_request"):
    tag: str | None = None


class ListAllocationsResponse(Message, tag="list_allocations_response"):
    allocations: list[GetAllocationResponse] = []


class FreeAllocationRequest(Message, tag="free_allocation_request"):
    allocation_id: str


class FreeAllocationResponse(Message, tag="free_allocation_response"):
    success: bool


class MetadataPutRequest(Message, tag="metadata_put_request"):
    key: str
    allocation_id: str
    offset_bytes: int
    value: bytes


class MetadataPutResponse(Message, tag="metadata_put_response"):
    success: bool


class MetadataGetRequest(Message, tag="metadata_get_request"):
    key: str


class MetadataGetResponse(Message, tag="metadata_get_response"):
    found: bool
    allocation_id: str | None = None
    offset_bytes: int | None = None
    value: bytes | None = None


class MetadataDeleteRequest(Message, tag="metadata_delete_request"):
    key: str


class MetadataDeleteResponse(Message, tag="metadata_delete_response"):
    deleted: bool


class MetadataListRequest(Message, tag="metadata_list_request"):
    prefix: str = ""


class MetadataListResponse(Message, tag="metadata_list_response"):
    keys: list[str] = []


class GetLayoutHashRequest(Message, tag="get_memory_layout_hash_request"):
    pass


class GetLayoutHashResponse(Message, tag="get_memory_layout_hash_response"):
    """`memory_layout_hash` is empty before a commit."""

    memory_layout_hash: str


class GetRuntimeStateRequest(Message, tag="get_runtime_state_request"):
    """A probe: may be the first message instead of a handshake, gets one answer, touches no lock."""


class SessionInfo(msgspec.Struct):
    """A session as only our server reports it: who holds what. `pid` is the peer's, 0 when it cannot be seen."""

    mode: str
    pid: int


class GetRuntimeStateResponse(Message, tag="get_runtime_state_response"):
    """Field by field upstream's, and `sessions`, which upstream's decoder passes over. Sizes in bytes."""

    state: str
    has_rw_session: bool = False
    ro_session_count: int = 0
    waiting_writers: int = 0
    committed: bool = False
    is_ready: bool = False
    allocation_count: int = 0
    memory_layout_hash: str = ""
    layout_committed: bool = False
    sessions: list[SessionInfo] = []
    allocated_bytes: int | None = None  # of our server only


class RuntimeEvent(msgspec.Struct):
    """`kind` is one of rw_connected, rw_aborted, rw_disconnected, allocations_cleared, committed, layout_committed,
    allocation_oom.
    """

    kind: str
    allocation_count: int = 0


class GetEventHistoryRequest(Message, tag="get_event_history_request"):
    """A probe like GetRuntimeStateRequest; the answer holds the last 256 events."""


class GetEventHistoryResponse(Message, tag="get_event_history_response"):
    events: list[RuntimeEvent] = []


def _all_messages() -> Any:
    return tuple(Message.__subclasses__())


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Union[_all_messages()])  # noqa: UP007 - a tuple made at run time


def frame(message: Message) -> bytes:
    """`message` with its length in front."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> Any:
    """The message in a frame's body. Raises `ProtocolError`, whatever it was that the body broke."""
    try:
        return _decoder.decode(body)
    except Exception as exc:  # the decoder's own errors, and RecursionError, UnicodeDecodeError, OverflowError, ...
        raise ProtocolError(f"not a GMS message: {exc}") from None


class FrameBuffer:
    """Collects bytes and hands out complete frames of at most `limit` bytes."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data

    def next(self) -> Any | None:
        """The next complete message, or None while one is still on its way. Raises `ProtocolError`."""
        if len(self._data) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._data)
        if length > self.limit:
            raise ProtocolError(f"a frame of {length} bytes; the longest allowed here is {self.limit}")
        end = HEADER.size + length
        if len(self._data) < end:
            return None
        body = bytes(self._data[HEADER.size : end])
        del self._data[:end]
        return decode(body)


class Channel:
    """A blocking connection to a GMS server: one request, one answer."""

    def __init__(self, path: str, timeout: float | None = None) -> None:
        """Connect to the socket at `path`; the kernel waits up to `timeout` seconds for a place in its queue.

        Raises `OSError`. (A non-blocking connect, which Python's own timeout makes, fails at once on a full queue.)
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if timeout:
                limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6) or 1)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._socket.connect(path)
            self._socket.settimeout(timeout)
        except BlockingIOError:
            self._socket.close()
            raise TimeoutError(f"no place in its queue within {timeout} s") from None
        except BaseException:
            self._socket.close()
            raise
        self._buffer = FrameBuffer()
        self._fds: list[int] = []

    def ask(self, request: Message) -> tuple[Any, int]:
        """Send `request`; returns the answer and the descriptor that came with it (-1 for none).

        Raises `ConnectionError` when the server goes away and `ProtocolError` when it answers nonsense.
        """
        self._socket.sendall(frame(request))
        while (answer := self._buffer.next()) is None:
            data, fds, _, _ = socket.recv_fds(self._socket, 65536, 1)
            self._fds += fds
            if not data:
                raise ConnectionError("the GMS server closed the connection")
            self._buffer.feed(data)
        return answer, self._fds.pop(0) if self._fds else -1

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._socket.close()
