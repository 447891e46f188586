"""The lock of one GMS socket: who may hold it, and what a grant does. Pure; waiting is the server's business.

The connection is the lock: it is taken by the handshake and given back by closing. Rules as upstream's server has
them (server/fsm.py, server/session.py): RW needs nobody else and forgets what was committed; RO needs a committed
layout, no writer, and no writer waiting; RW_OR_RO writes when nothing is committed yet and reads otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from gms_launch.gms.protocol import LockType


class State(str, Enum):
    """What upstream's probe calls the state of a socket."""

    EMPTY = "EMPTY"
    RW = "RW"
    COMMITTED = "COMMITTED"
    RO = "RO"


@dataclass
class LockTable:
    """Sessions are named by any hashable id."""

    writer: int | None = None
    readers: set[int] = field(default_factory=set)
    waiting_writers: int = 0
    committed: bool = False

    @property
    def state(self) -> State:
        if self.writer is not None:
            return State.RW
        if self.readers:
            return State.RO
        return State.COMMITTED if self.committed else State.EMPTY

    def offer(self, wanted: LockType) -> LockType | None:
        """What could be granted now; None means wait."""
        can_write = self.writer is None and not self.readers
        can_read = self.committed and self.writer is None and self.waiting_writers == 0
        if wanted is LockType.RW:
            return LockType.RW if can_write else None
        if can_read:
            return LockType.RO
        if wanted is LockType.RW_OR_RO and can_write and not self.committed:
            return LockType.RW
        return None

    def grant(self, session: int, granted: LockType) -> None:
        """Record a grant that `offer` allowed."""
        if granted is LockType.RW:
            assert self.writer is None and not self.readers
            self.writer = session
            self.committed = False
        else:
            assert self.committed and self.writer is None
            self.readers.add(session)

    def commit(self, session: int) -> None:
        assert self.writer == session
        self.writer = None
        self.committed = True

    def release(self, session: int) -> bool:
        """Forget a session; True when it was a writer that had not committed, whose layout must be dropped."""
        self.readers.discard(session)
        if self.writer == session:
            self.writer = None
            return True
        return False
