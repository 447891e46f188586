"""The word of a life's end, straight from node to node, beside etcd.

A datagram says that a rank of a life has ended, and nothing else can be said. It is sealed with a key of the run's own
attempt. It may be lost, repeated or late, and a stranger may send again what he has heard: a life that has ended never
comes back, so to hear it twice changes nothing. Who floods the port can keep words from being heard, and no more: they
are read a few at a time, between other things. Etcd stays the truth; this is for the moments in which it is silent.
No more than the standard library, since the guard reads it too.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC = b"gms-launch-ended 1"
#: In a cohort's place: the node's agent itself is dead, which one is in the incarnation's, and all of that node ends.
AGENT = -1
#: Longest datagram that is looked at (bytes).
LONGEST = 256
#: So many datagrams are read before something else has its turn.
AT_ONCE = 256
#: A word is said again after so long (seconds): datagrams are lost.
AGAIN = (0.0, 0.05, 0.25, 1.0, 3.0)

Peer = tuple[str, int]


@dataclass(frozen=True)
class Word:
    """A rank of the life (cohort, incarnation) has ended on a node."""

    cohort_id: int
    incarnation: int
    node_rank: int

    @property
    def life(self) -> tuple[int, int]:
        return self.cohort_id, self.incarnation


def secret(password: str, attempt: str) -> bytes:
    """The key of one attempt of a run, from a password that only its agents know."""
    import hmac

    return hmac.digest(password.encode(), MAGIC + b" " + attempt.encode(), "sha256")


def seal(word: Word, key: bytes) -> bytes:
    import hmac

    body = b"%s %d %d %d" % (MAGIC, word.cohort_id, word.incarnation, word.node_rank)
    return body + b" " + hmac.digest(key, body, "sha256").hex().encode()


def unseal(data: bytes, key: bytes) -> Word | None:
    """What a datagram says; None unless it was sealed with our key."""
    import hmac

    body, _, mark = data.rpartition(b" ")
    if not hmac.compare_digest(hmac.digest(key, body, "sha256").hex().encode(), mark):
        return None
    return Word(*(int(n) for n in body[len(MAGIC) :].split()))


def listen(address: str, port: int) -> socket.socket:
    """A socket for words on one address of this node. Raises `OSError`."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        made.setblocking(False)
        made.bind((address, port))
    except OSError:
        made.close()
        raise
    return made


def say(line: socket.socket, word: Word, key: bytes, peers: Iterable[Peer]) -> None:
    """Send a word to every peer, once. One that cannot be reached does not keep it from the others."""
    data = seal(word, key)
    for peer in peers:
        with contextlib.suppress(OSError):
            line.sendto(data, peer)


def hear(line: socket.socket, key: bytes, most: int = AT_ONCE) -> list[Word]:
    """The words among the first `most` datagrams that nobody has read."""
    words: list[Word] = []
    for _ in range(most):
        try:
            data = line.recv(LONGEST)
        except BlockingIOError:
            return words
        except OSError:  # a peer's host said that nobody listens there
            continue
        if (word := unseal(data, key)) is not None:
            words.append(word)
    return words
