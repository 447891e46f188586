"""How long a node may be silent: the numbers of its lease, in one place. Pure.

They keep an order. A cut of less than `lease_ttl` does nothing, however it falls between two renewals; then the node
that is cut off kills its ranks; and only then does etcd end its lease, upon which the others go on without it.
"""

from __future__ import annotations

import math


def renewal(lease_ttl: float) -> float:
    """Seconds between two renewals while all is well; an answer may take as long before others are asked for."""
    return lease_ttl / 6


def attempt(lease_ttl: float) -> float:
    """Seconds between two tries, each over a new connection, while no renewal is answered."""
    return lease_ttl / 10


def silence(lease_ttl: float) -> float:
    """Seconds since its last answered renewal was sent after which a node takes itself for cut off.

    Longer than the lease that users set: up to a renewal's pause had passed when the cut began, and when it is over
    a connection must be made.
    """
    return lease_ttl + max(1.0, lease_ttl / 4)


def granted(lease_ttl: float) -> int:
    """The lease to ask etcd for, in its whole seconds: not over before `silence` is.

    Etcd counts from when a renewal came, the node from when it was sent, so the node is always first.
    """
    return math.ceil(silence(lease_ttl))
