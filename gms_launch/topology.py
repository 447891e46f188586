"""Who is this node: rank, number of nodes, leader, addresses.

Decides from the resolved settings. What it does not do: talk to the other nodes.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from gms_launch.config import Settings
from gms_launch.errors import UsageError


@dataclass(frozen=True)
class Topology:
    """This node's place in the run. `address` is what other nodes reach it by; `host` is for people."""

    node_rank: int
    nnodes: int
    host: str
    address: str
    leader_address: str

    @property
    def is_leader(self) -> bool:
        return self.node_rank == 0


def discover(settings: Settings) -> Topology:
    """Find this node's place. Raises `UsageError` when the leader's name has no address."""
    if settings.nnodes > 1:
        raise UsageError(
            f"nnodes {settings.nnodes}: this version runs on one node only; start it with --nnodes 1 (or unset NNODES)"
        )
    leader = _resolve(settings.leader_addr)
    return Topology(
        node_rank=settings.node_rank,
        nnodes=settings.nnodes,
        host=socket.gethostname(),
        address=leader,
        leader_address=leader,
    )


def _resolve(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0].__str__()
    except OSError as exc:
        raise UsageError(f"leader_addr {name!r} has no address: {exc.strerror}") from None
