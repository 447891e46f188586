"""etcd on the leader node: command line, readiness, passwords.

Its data is in the node-local directory, so that a restarted etcd knows everything it knew; it is a cluster of one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gms_launch.errors import LaunchError
from gms_launch.process.lifecycle import Command
from gms_launch.services.base import NotReadyError, Service, http_get
from gms_launch.spool import files

#: Room for etcd's records, which are a few MiB in a run of days (bytes).
RESERVED = 64 * 1024 * 1024
#: Tokens of a parked engine must be good after weeks without a request (seconds); etcd's default is 300.
TOKEN_TTL = 10 * 365 * 24 * 3600


@dataclass(frozen=True)
class Member:
    """The run's etcd: its name, where it listens (on that address only), where its data is, root's password."""

    run: str
    address: str
    port: int
    peer_port: int
    data: Path
    password: str


def service(member: Member, binary: str, timeout: float, liveness: float = 0.0) -> Service:
    """etcd, ready within `timeout` seconds and restarted when it is silent for `liveness` (0: never)."""
    run, port, address = member.run, member.port, host(member.address)
    client, peer = f"http://{address}:{port}", f"http://{address}:{member.peer_port}"
    argv = (
        *(binary, "--name", run, "--data-dir", str(member.data)),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"{run}={peer}", "--initial-cluster-token", run),
        # One member elects itself: the default of a second would be the longest part of a restart.
        *("--heartbeat-interval", "20", "--election-timeout", "200"),
        # Passwords are random and long, so hashing need not be slow.
        *("--bcrypt-cost", "4", "--auth-token-ttl", str(TOKEN_TTL)),
        *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"),
        *("--logger", "zap", "--log-level", "warn"),
    )
    env: dict[str, str | None] = {"ETCD_UNSUPPORTED_ARCH": None, "ETCDCTL_API": None}
    return Service(
        *("etcd", Command(argv, env), lambda: probe(client, member.password), timeout),
        port=port,
        liveness=liveness,
        alive=lambda: _alive(member.address, port, max(0.2, liveness / 4)),
        essential=True,  # every Dynamo process ends itself when its lease does
    )


def reserve(data: Path) -> str:
    """Take room for its records now: etcd ends, for good, when a write of them finds the file system full.

    Its log has its room from the start (two segments of 64 MB). Returns why not, if there is none.
    """
    try:
        fd = os.open(data / "member" / "snap" / "db", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return str(exc)
    try:
        return files.allocate(fd, RESERVED)
    finally:
        os.close(fd)


def probe(url: str, password: str) -> None:
    """A linearizable read, which needs an elected leader. Raises `NotReadyError`."""
    from gms_launch.control.client import Access, Etcd

    etcd = Etcd(Access((url,), "root", password), timeout=2.0)
    try:
        etcd.get("/gms-launch/ready", retry=0.0)
    except LaunchError as exc:
        raise NotReadyError(str(exc)) from None
    finally:
        etcd.close()


def _alive(address: str, port: int, timeout: float) -> None:
    """GET /health reads through the leader and needs no password. Raises `NotReadyError`."""
    http_get(address, port, "/health", timeout)


def host(address: str) -> str:
    """`address` as it stands in a URL."""
    return f"[{address}]" if ":" in address else address
