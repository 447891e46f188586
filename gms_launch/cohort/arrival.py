"""When the nodes of a large run come to its etcd, so that not a thousand come in one moment. Pure.

Coming is what costs etcd most: three TLS handshakes a node, a lease, a place, and all that is there to be read.
"""

from __future__ import annotations

#: So many nodes come at once, as all of a smaller run do.
AT_ONCE = 64
#: And so many a second after them: docs/measurements.md has what one costs.
A_SECOND = 100.0


def pause(node_rank: int, nnodes: int) -> float:
    """Seconds that a node waits once it knows of an etcd to come to."""
    return max(0, node_rank - AT_ONCE) / A_SECOND if nnodes > AT_ONCE else 0.0


def patience(nnodes: int, long: float) -> float:
    """Seconds in which an etcd must answer that has just done so: as `long` as one that starts where many come."""
    return long if nnodes > AT_ONCE else 2.0
