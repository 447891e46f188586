"""What one GMS socket holds: allocations, metadata, the layout hash and the event history.

No sockets and no waiting here; `server` and `requests` add both. Errors that are the client's fault are `RequestError`,
with upstream's texts, which its clients match.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import deque
from dataclasses import dataclass

from gms_launch.gms.backends import Memory, align
from gms_launch.gms.protocol import RuntimeEvent

MAX_EVENTS = 256


class RequestError(Exception):
    """The request cannot be carried out; the text goes to the client and the session goes on."""


@dataclass(frozen=True)
class Allocation:
    """Sizes in bytes. `layout_slot` numbers allocations in the order they were made; none twice in a layout."""

    allocation_id: str
    size: int
    aligned_size: int
    tag: str
    layout_slot: int
    handle: int


@dataclass(frozen=True)
class Metadata:
    """A value tied to a place in an allocation."""

    allocation_id: str
    offset_bytes: int
    value: bytes


class LayoutStore:
    """The contents of one socket."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.allocations: dict[str, Allocation] = {}
        self.metadata: dict[str, Metadata] = {}
        self.layout_hash = ""
        self._next_slot = 0
        self.events: deque[RuntimeEvent] = deque(maxlen=MAX_EVENTS)

    def record(self, kind: str, allocation_count: int = 0) -> None:
        self.events.append(RuntimeEvent(kind, allocation_count))

    @property
    def allocated_bytes(self) -> int:
        return sum(a.aligned_size for a in self.allocations.values())

    def aligned(self, size: int) -> int:
        """The size an allocation of `size` bytes takes. Raises `RequestError`."""
        if size <= 0:
            raise RequestError(f"size must be > 0, got {size}")
        return align(size, self.memory.granularity)

    def allocate(self, size: int, tag: str) -> Allocation:
        """Raises `OutOfMemoryError`, `RequestError`, and `OSError` when the process has no descriptor left."""
        aligned = self.aligned(size)
        handle = self.memory.create(aligned)
        made = Allocation(str(uuid.uuid4()), size, aligned, tag, self._next_slot, handle)
        self._next_slot += 1
        self.allocations[made.allocation_id] = made
        return made

    def get(self, allocation_id: str) -> Allocation:
        try:
            return self.allocations[allocation_id]
        except KeyError:
            raise RequestError(f"Unknown allocation: {allocation_id}") from None

    def listed(self, tag: str | None) -> list[Allocation]:
        found = sorted(self.allocations.values(), key=lambda a: a.layout_slot)
        return [a for a in found if tag is None or a.tag == tag]

    def free(self, allocation_id: str) -> bool:
        found = self.allocations.pop(allocation_id, None)
        if found is None:
            return False
        self.memory.release(found.handle)
        self.metadata = {k: m for k, m in self.metadata.items() if m.allocation_id != allocation_id}
        return True

    def clear(self) -> int:
        """Drop everything; returns how many allocations there were."""
        count = len(self.allocations)
        for allocation in self.allocations.values():
            self.memory.release(allocation.handle)
        self.allocations.clear()
        self.metadata.clear()
        self.layout_hash = ""
        self._next_slot = 0
        return count

    def put_metadata(self, key: str, allocation_id: str, offset_bytes: int, value: bytes) -> None:
        allocation = self.get(allocation_id)
        if offset_bytes < 0:
            raise RequestError(f"offset_bytes must be >= 0, got {offset_bytes}")
        if offset_bytes >= allocation.aligned_size:
            raise RequestError(
                f"offset_bytes {offset_bytes} out of range for allocation {allocation_id} "
                f"(aligned_size={allocation.aligned_size})"
            )
        self.metadata[key] = Metadata(allocation_id, offset_bytes, value)

    def seal(self) -> str:
        """Compute the layout hash at commit: a hash of shape and metadata, not of contents.

        Allocations count by their rank in slot order: gaps that freed ones left make no other layout.
        """
        digest = hashlib.sha256()
        ranks = {}
        for rank, a in enumerate(self.listed(None)):
            ranks[a.allocation_id] = rank
            digest.update(f"{rank}:{a.size}:{a.aligned_size}:{a.tag}".encode())
        for key in sorted(self.metadata):
            m = self.metadata[key]
            digest.update(f"{key}:{ranks[m.allocation_id]}:{m.offset_bytes}:".encode())
            digest.update(m.value)
        self.layout_hash = digest.hexdigest()
        return self.layout_hash
