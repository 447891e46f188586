"""Who is this node: rank, number of nodes, leader, addresses.

Decides from the resolved settings. What it does not do: talk to the other nodes.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from dataclasses import dataclass

from gms_launch.config import Settings
from gms_launch.errors import UsageError


@dataclass(frozen=True)
class Topology:
    """This node's place in the run. `address` is what other nodes reach it by, `interface` the network
    interface that has it (empty when that cannot be told); `host` is for people.
    """

    node_rank: int
    nnodes: int
    host: str
    address: str
    leader_address: str
    interface: str = ""

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
        interface=interface_of(leader),
    )


def interface_of(address: str) -> str:
    """The interface of this node whose IPv4 address is `address`; empty when none has it."""
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # no IPv4 address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return ""


def _resolve(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as exc:
        raise UsageError(f"leader_addr {name!r} has no address: {exc.strerror}") from None
