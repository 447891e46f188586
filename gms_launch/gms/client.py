"""A GMS client: memory of a socket in this process, at addresses that do not change.

A writer allocates and maps; at `commit` its mappings go and the addresses stay reserved. A reader imports. `unmap_all`
drops the mappings and keeps the addresses; `remap_all` brings the same layout back to the same addresses, after
checking the layout hash. There is never a second copy: all clients map what the server owns.

A writer that seals its layout (`commit_layout`) keeps its mappings and goes on writing; the next one may take the same
memory over (`connect(RW_DATA_OR_RW)`) instead of making its own.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gms_launch.gms import protocol as p
from gms_launch.gms.backends import Mapper, align

M = TypeVar("M", bound=p.Message)


class GmsError(Exception):
    """The server refused a request, or a lock was not to be had in time."""


class StaleLayoutError(GmsError):
    """The layout changed while it was unmapped: addresses would mean something else now."""


@dataclass(frozen=True)
class Mapping:
    """One allocation at one address. Sizes in bytes; `mapped` is False while only the address is kept."""

    allocation_id: str
    layout_slot: int
    address: int
    size: int
    aligned_size: int
    tag: str
    mapped: bool

    def view(self) -> memoryview:
        """The bytes. Using it after an unmap is a segmentation fault, as it would be on a GPU."""
        assert self.mapped, "the allocation is not mapped"
        return memoryview((ctypes.c_char * self.size).from_address(self.address)).cast("B")


class GmsClient:
    """A session with one socket and what it has mapped. Not safe to share between threads."""

    def __init__(self, path: Path, mapper: Mapper) -> None:
        self.path = path
        self._mapper = mapper
        self._channel: p.Channel | None = None
        self.granted: p.LockType | None = None
        self.committed = False
        self.mappings: dict[int, Mapping] = {}  # layout slot -> mapping
        self._layout_hash = ""

    # -- session -----------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._channel is not None

    def connect(self, mode: p.LockType, timeout_ms: int | None = None, server_wait: float = 30.0) -> p.LockType:
        """Take the lock; returns what was granted.

        Waits up to `server_wait` seconds for the server's socket, as upstream's client does from 1.4 on. Raises
        `GmsError` when there is no server or no lock in `timeout_ms` milliseconds (None: no limit).
        """
        assert self._channel is None, "already connected"
        deadline = time.monotonic() + server_wait
        while True:
            try:
                channel = p.Channel(str(self.path))
                break
            except (FileNotFoundError, ConnectionRefusedError) as exc:
                if time.monotonic() > deadline:
                    raise GmsError(f"no GMS server at {self.path} within {server_wait:g} s: {exc.strerror}") from None
                time.sleep(0.05)  # the socket belongs to another process; nothing announces it
        self._channel = channel
        try:
            answer = self._request(p.HandshakeRequest(mode, timeout_ms), p.HandshakeResponse)
        except BaseException:
            self.disconnect()
            raise
        if not answer.success or answer.granted_lock_type is None:
            self.disconnect()
            raise GmsError(f"the {mode.value} lock of {self.path} was not to be had within {timeout_ms} ms")
        self.granted, self.committed = answer.granted_lock_type, answer.committed
        return self.granted

    def disconnect(self) -> None:
        """End the session and with it the lock. Mappings stay until they are unmapped."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self.granted = None

    def _ask(self, request: p.Message) -> tuple[Any, int]:
        assert self._channel is not None, "not connected"
        try:
            return self._channel.ask(request)
        except (OSError, p.ProtocolError) as exc:
            raise GmsError(f"{type(request).__name__} to {self.path}: {exc}") from None

    def _request(self, request: p.Message, kind: type[M]) -> M:
        answer, fd = self._ask(request)
        if fd >= 0:
            os.close(fd)
        if isinstance(answer, p.ErrorResponse):
            raise GmsError(f"{type(request).__name__} to {self.path}: {answer.error}")
        if not isinstance(answer, kind):
            raise GmsError(f"{type(request).__name__} to {self.path}: answered {type(answer).__name__}")
        return answer

    # -- writing -----------------------------------------------------------------------------------------------

    def allocate(self, size: int, tag: str = "default", address: int | None = None) -> Mapping:
        """Allocate `size` bytes and map them for writing, at a reserved `address` if one is given."""
        answer = self._request(p.AllocateRequest(size, tag), p.AllocateResponse)
        if address is None:
            address = self._mapper.reserve(answer.aligned_size)
        mapping = Mapping(
            answer.allocation_id, answer.layout_slot, address, size, answer.aligned_size, tag, mapped=False
        )
        return self._map(mapping)

    def put(self, key: str, allocation_id: str, offset: int, value: bytes) -> None:
        """Store metadata: what lies at `offset` bytes into an allocation."""
        self._request(p.MetadataPutRequest(key, allocation_id, offset, value), p.MetadataPutResponse)

    def free(self, slot: int) -> None:
        """Give an allocation back, with its mapping, its address and its metadata."""
        mapping = self.mappings.pop(slot)
        if mapping.mapped:
            self._mapper.unmap(mapping.address, mapping.aligned_size)
        self._mapper.free(mapping.address, mapping.aligned_size)
        self._request(p.FreeAllocationRequest(mapping.allocation_id), p.FreeAllocationResponse)

    def commit_layout(self) -> str:
        """Seal the shape and go on writing; returns the layout hash. The memory outlives this session from now on."""
        answer = self._request(p.CommitLayoutRequest(), p.CommitLayoutResponse)
        self.granted = answer.granted_lock_type
        self._layout_hash = answer.memory_layout_hash
        return answer.memory_layout_hash

    def commit(self) -> None:
        """Publish: unmap, commit, end the session. Read back with `connect(RO)` and `remap_all`."""
        self.unmap_all()
        self._request(p.CommitRequest(), p.CommitResponse)
        self._layout_hash = ""
        self.disconnect()

    # -- reading -----------------------------------------------------------------------------------------------

    def get(self, key: str) -> tuple[str, int, bytes] | None:
        """Allocation id, offset and value of metadata, or None."""
        answer = self._request(p.MetadataGetRequest(key), p.MetadataGetResponse)
        if not answer.found:
            return None
        assert answer.allocation_id is not None and answer.offset_bytes is not None and answer.value is not None
        return answer.allocation_id, answer.offset_bytes, answer.value

    def keys(self, prefix: str = "") -> list[str]:
        return self._request(p.MetadataListRequest(prefix), p.MetadataListResponse).keys

    def layout_hash(self) -> str:
        return self._request(p.GetLayoutHashRequest(), p.GetLayoutHashResponse).memory_layout_hash

    def import_all(self) -> list[Mapping]:
        """Map every allocation of the socket at new addresses, in slot order."""
        self._layout_hash = self.layout_hash()
        for a in self._listed():
            address = self._mapper.reserve(a.aligned_size)
            self._map(Mapping(a.allocation_id, a.layout_slot, address, a.size, a.aligned_size, a.tag, mapped=False))
        return [self.mappings[slot] for slot in sorted(self.mappings)]

    def _listed(self) -> list[p.GetAllocationResponse]:
        return self._request(p.ListAllocationsRequest(), p.ListAllocationsResponse).allocations

    # -- mappings ----------------------------------------------------------------------------------------------

    def _map(self, mapping: Mapping) -> Mapping:
        answer, fd = self._ask(p.ExportAllocationRequest(mapping.allocation_id))
        if isinstance(answer, p.ErrorResponse) or fd < 0:
            raise GmsError(
                f"export of {mapping.allocation_id} from {self.path}: {getattr(answer, 'error', 'no descriptor')}"
            )
        try:
            self._mapper.map(mapping.address, mapping.aligned_size, fd, self.granted is not p.LockType.RO)
        finally:
            os.close(fd)
        mapping = replace(mapping, mapped=True)
        self.mappings[mapping.layout_slot] = mapping
        return mapping

    def unmap_all(self) -> int:
        """Drop every mapping and keep its address; returns the bytes let go."""
        freed = 0
        for slot, mapping in self.mappings.items():
            if mapping.mapped:
                self._mapper.unmap(mapping.address, mapping.aligned_size)
                self.mappings[slot] = replace(mapping, mapped=False)
                freed += mapping.aligned_size
        return freed

    def remap_all(self) -> int:
        """Bring the committed layout back to the same addresses; returns the bytes mapped.

        Allocations are matched by their rank in slot order, as the layout hash counts them: who freed some before the
        commit left gaps. Raises `StaleLayoutError` when the layout is no longer the one that was unmapped.
        """
        current = self.layout_hash()
        if self._layout_hash and current != self._layout_hash:
            raise StaleLayoutError(f"layout {self._layout_hash[:12]} was unmapped and {current[:12]} is there now")
        listed = sorted(self._listed(), key=lambda a: a.layout_slot)
        unmapped = [self.mappings[slot] for slot in sorted(self.mappings)]
        if len(listed) != len(unmapped):
            raise StaleLayoutError(f"{len(unmapped)} allocations were unmapped and {len(listed)} are there now")
        for rank, (found, mapping) in enumerate(zip(listed, unmapped, strict=True)):
            if (found.aligned_size, found.tag) != (mapping.aligned_size, mapping.tag):
                raise StaleLayoutError(
                    f"allocation {rank} was {mapping.aligned_size} bytes of {mapping.tag} "
                    f"and is {found.aligned_size} of {found.tag} now"
                )
        self.mappings = {
            found.layout_slot: replace(mapping, allocation_id=found.allocation_id, layout_slot=found.layout_slot)
            for found, mapping in zip(listed, unmapped, strict=True)
        }
        for mapping in list(self.mappings.values()):
            self._map(mapping)
        self._layout_hash = current
        return sum(m.aligned_size for m in self.mappings.values())

    def reserve_scratch(self, size: int) -> int:
        """Reserve addresses for `size` bytes with memory of this process behind them; returns the address."""
        size = align(size, self._mapper.granularity)
        address = self._mapper.reserve(size)
        self._mapper.map_private(address, size)
        return address

    def drop_scratch(self, address: int, size: int) -> int:
        """Take the private memory away and keep the addresses; returns the bytes let go."""
        size = align(size, self._mapper.granularity)
        self._mapper.unmap(address, size)
        return size
