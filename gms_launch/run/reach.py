"""Where Dynamo's processes of a node listen for each other: on its loopback, or where other nodes reach them.

An engine listens for requests, and the frontend for answers, which come over connections of their own. Where both are
on one node, as in every run of one engine, nobody else has to reach them.
"""

from __future__ import annotations

import socket
from pathlib import Path

from gms_launch.engines.base import Reach
from gms_launch.errors import UsageError
from gms_launch.run import topology
from gms_launch.run.topology import Topology
from gms_launch.urls import is_loopback

#: An address outside of every network (RFC 5737): what leads there is the default route, which Dynamo goes by too.
OUTSIDE = "192.0.2.0"


def of(home: Topology, wide: bool, frontends: int = 1) -> Reach:
    """For the node at `home` in the run; `wide`: others have to reach its Dynamo processes. Raises `UsageError`.

    `frontends`: how many there are, on the first nodes.
    """
    if not wide:
        return Reach()
    return Reach(home.address, interface(home.address) if home.node_rank < frontends else "lo")


def interface(address: str) -> str:
    """What tells Dynamo's frontend to take answers there; empty where it finds that by itself. Raises `UsageError`.

    It wants an interface's name, and takes the last address of that: with IPv6 on it a link-local one, on which nobody
    can listen. Without a name it takes the address of the default route. Of an address that is none of this node's it
    is not known, which is said in its place.
    """
    if is_loopback(address):
        return "lo"
    own = topology.addresses()
    if address not in own.values():
        return f"<interface of {address}>"  # a plan, made on another node
    name = next(n for n, a in own.items() if a == address)
    if not _has_ipv6(name):
        return name
    try:
        found = topology.route_to(OUTSIDE)
    except UsageError:
        found = ""
    if found == address:
        return ""
    raise UsageError(
        f"Dynamo's frontend has to take answers at {address} on {socket.gethostname()}, since another node leads a "
        f"group, and can be told so by an interface's name only: {name} has IPv6 addresses too, of which it "
        f"would take one, and the default route is by {found or 'none'}. Name the network of the default route with "
        "--interface, switch IPv6 off on that interface (sysctl net.ipv6.conf.NAME.disable_ipv6=1), or give every "
        "group its first GPUs on the first node"
    )


def _has_ipv6(name: str) -> bool:
    try:
        return any(line.split()[-1] == name for line in Path("/proc/net/if_inet6").read_text().splitlines())
    except OSError:
        return False  # the kernel has none
