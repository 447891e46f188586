"""Whether a machine with an endpoint of etcd's is there at all, when etcd does not answer."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def reach(endpoints: tuple[str, ...], timeout: float) -> str:
    """How the machine of an endpoint reacts to a connection: "silent" (it accepts), "refused" or "unreachable"."""
    found = "unreachable"
    for url in endpoints:
        parts = urlsplit(url)
        try:
            with socket.create_connection((parts.hostname, parts.port or 80), timeout):
                return "silent"
        except ConnectionRefusedError:
            found = "refused"
        except OSError:
            continue
    return found
