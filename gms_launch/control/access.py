"""Where an etcd is and what to show it. No I/O, and cheap to import."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from gms_launch.errors import UsageError


@dataclass(frozen=True)
class Access:
    """How to reach and convince etcd. `ca`, `cert` and `key` are PEM text, and empty where etcd speaks no TLS."""

    endpoints: tuple[str, ...]
    ca: str = ""
    cert: str = ""
    key: str = ""

    @property
    def silent(self) -> str:
        """That it does not answer, in words: of several members too few may."""
        few = f", or fewer than {len(self.endpoints) // 2 + 1} of its {len(self.endpoints)} members do"
        return f"etcd at {', '.join(self.endpoints)} does not answer{few if len(self.endpoints) > 1 else ''}"


def split_endpoint(url: str) -> tuple[str, int, bool]:
    """Host, port and TLS of an endpoint URL; the scheme may be missing. Raises `UsageError`."""
    parts = urlsplit(url if "//" in url else "//" + url, scheme="http")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port:
        raise UsageError(f"etcd endpoint {url!r}: expected something like http://10.0.0.1:2379")
    return parts.hostname, port, parts.scheme == "https"
