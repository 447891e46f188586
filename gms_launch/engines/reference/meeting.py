"""Who may sit at a cohort's meeting: both ends show that they know the life's secret, and seal what they say.

The worker calls with a number of its own, the leader answers with one of its own and its proof, the worker sends its
rank and its proof: HMACs over both numbers, so that nothing that was heard once is good for another time, and a worker
that has gone away meanwhile has not joined. Every frame after that has a mark over its place in the order and its
direction. Nobody else can take part, change, repeat or leave out anything; what is said can be heard, for nothing is
encrypted here. No more than that: what is said is `group`'s.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass

MAGIC = b"gms-launch-meet1"
NONCE = 16
PROOF = 32
#: Of a frame's mark (bytes).
MARK = 16
#: How long either end may take over its part before it is taken for a stranger (seconds).
PATIENCE = 10.0
_RANK = struct.Struct("!I")
_PLACE = struct.Struct("!Q")
#: Sizes of the three messages.
CALL, ANSWER, CLAIM = len(MAGIC) + NONCE, NONCE + PROOF, _RANK.size + PROOF


class StrangerError(Exception):
    """The other end does not know the secret."""


@dataclass
class Voice:
    """One direction of a line: marks what goes, or checks what comes."""

    key: bytes
    place: int = 0

    def mark(self, body: bytes) -> bytes:
        """The mark of the next frame."""
        self.place += 1
        return hmac.digest(self.key, _PLACE.pack(self.place) + body, "sha256")[:MARK]

    def check(self, body: bytes, mark: bytes) -> None:
        """Raises `StrangerError` unless this is the next frame of whoever has proved himself."""
        if not hmac.compare_digest(self.mark(body), mark):
            raise StrangerError("a frame that was changed, repeated or put in")


class Handshake:
    """One end's numbers. `leader_proof` and `worker_proof` as both ends compute them, once they know both numbers."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._mine = os.urandom(NONCE)
        self._both = b""

    def _prove(self, what: bytes, more: bytes = b"") -> bytes:
        return hmac.digest(self._secret, b" ".join((MAGIC, what, self._both, more)), "sha256")

    # -- the worker's end ----------------------------------------------------------------------------------------

    def call(self) -> bytes:
        return MAGIC + self._mine

    def claim(self, answer: bytes, rank: int) -> tuple[bytes, Voice, Voice]:
        """What to send, and the voices for what goes and what comes. Raises `StrangerError`."""
        self._both = self._mine + answer[:NONCE]
        if not hmac.compare_digest(self._prove(b"leader"), answer[NONCE:]):
            raise StrangerError("who listens at the master port is not the leader of this life")
        number = _RANK.pack(rank)
        return number + self._prove(b"worker", number), self._voice(b"up", number), self._voice(b"down", number)

    # -- the leader's end ----------------------------------------------------------------------------------------

    def answer(self, call: bytes) -> bytes:
        """Raises `StrangerError`."""
        if not call.startswith(MAGIC):
            raise StrangerError("no call of a worker")
        self._both = call[len(MAGIC) :] + self._mine
        return self._mine + self._prove(b"leader")

    def joined(self, claim: bytes) -> tuple[int, Voice, Voice]:
        """The rank, and the voices for what goes and what comes. Raises `StrangerError`."""
        number, proof = claim[: _RANK.size], claim[_RANK.size :]
        if not hmac.compare_digest(self._prove(b"worker", number), proof):
            raise StrangerError("no worker of this life")
        return _RANK.unpack(number)[0], self._voice(b"down", number), self._voice(b"up", number)

    def _voice(self, way: bytes, number: bytes) -> Voice:
        return Voice(self._prove(b"voice " + way, number))
