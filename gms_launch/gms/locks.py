"""The lock of one GMS socket: who may hold it, and what a grant does. Pure; waiting is the server's business.

The connection is the lock: it is taken by the handshake and given back by closing. Rules as upstream's server has
them (server/fsm.py, server/session.py): RW needs nobody else and forgets what was committed; RO needs a committed
layout, no writer, and no writer waiting; RW_OR_RO writes when nothing is committed yet and reads otherwise.

A writer may also seal the layout without publishing its contents: it goes on as RW_DATA, which writes into what is
there and changes no shape, and the layout outlives it. RW_DATA_OR_RW is given that layout where there is one, and RW
otherwise; it is only ever granted in place of RW.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from gms_launch.gms.protocol import LockType

#: Requests for the one writer's place.
WRITERS = (LockType.RW, LockType.RW_DATA_OR_RW)


class State(str, Enum):
    """What upstream's probe calls the state of a socket."""

    EMPTY = "EMPTY"
    RW = "RW"
    LAYOUT_COMMITTED = "LAYOUT_COMMITTED"
    COMMITTED = "COMMITTED"
    RO = "RO"


class Left(Enum):
    """What a session's end leaves of the layout."""

    AS_IT_WAS = "as it was"
    DROPPED = "dropped: its writer had neither committed nor sealed it"
    SEALED = "sealed, for the next writer"


@dataclass
class LockTable:
    """Sessions are named by any hashable id. `sealed`: the layout's shape is final and outlives its writer."""

    writer: int | None = None
    readers: set[int] = field(default_factory=set)
    waiting_writers: int = 0
    committed: bool = False
    sealed: bool = False

    @property
    def state(self) -> State:
        if self.writer is not None:
            return State.RW
        if self.readers:
            return State.RO
        if self.committed:
            return State.COMMITTED
        return State.LAYOUT_COMMITTED if self.sealed else State.EMPTY

    def offer(self, wanted: LockType) -> LockType | None:
        """What could be granted now; None means wait."""
        can_write = self.writer is None and not self.readers
        can_read = self.committed and self.writer is None and self.waiting_writers == 0
        if wanted in WRITERS:
            if not can_write:
                return None
            adopt = wanted is LockType.RW_DATA_OR_RW and self.state is State.LAYOUT_COMMITTED
            return LockType.RW_DATA if adopt else LockType.RW
        if can_read:
            return LockType.RO
        if wanted is LockType.RW_OR_RO and can_write and not self.committed:
            return LockType.RW
        return None

    def grant(self, session: int, granted: LockType) -> None:
        """Record a grant that `offer` allowed."""
        if granted is LockType.RO:
            assert self.committed and self.writer is None
            self.readers.add(session)
            return
        assert self.writer is None and not self.readers
        self.writer = session
        self.committed = False
        self.sealed = granted is LockType.RW_DATA

    def commit(self, session: int) -> None:
        assert self.writer == session
        self.writer = None
        self.committed = True

    def seal(self, session: int) -> None:
        """The writer keeps its place, as RW_DATA."""
        assert self.writer == session
        self.sealed = True

    def release(self, session: int) -> Left:
        """Forget a session; says what becomes of the layout."""
        self.readers.discard(session)
        if self.writer != session:
            return Left.AS_IT_WAS
        self.writer = None
        return Left.SEALED if self.sealed else Left.DROPPED
