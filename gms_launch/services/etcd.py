"""etcd on the leader node: command line, readiness, certificates.

Its data is in the node-local directory, so that a restarted etcd knows everything it knew; it is a cluster of one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gms_launch.control.access import Access
from gms_launch.errors import LaunchError
from gms_launch.process.lifecycle import Command
from gms_launch.services.base import NotReadyError, Service
from gms_launch.services.pem import PemFiles
from gms_launch.spool import files

if TYPE_CHECKING:
    from gms_launch.control.client import Etcd

#: Room for etcd's records, which are a few MiB in a run of days (bytes). Full, it refuses writes (NOSPACE).
RESERVED = 64 * 1024 * 1024
#: How long etcd remembers what was (a watch that breaks for longer reads everything anew).
HISTORY = "10m"
#: The name in its certificate, and in that of a peer.
CN = "etcd"
#: All that etcd takes: its records, and its log of two segments of 64 MB, one in use and the next.
ROOM = RESERVED + 2 * 64_000_000


@dataclass(frozen=True)
class Member:
    """The run's etcd: its name, where it listens, where its data is, what it shows, and how an agent asks it.

    Clients come from everywhere; peers it has none, so that port is on the loopback.
    """

    run: str
    address: str
    port: int
    peer_port: int
    data: Path
    pem: PemFiles
    access: Access


def service(member: Member, binary: str, timeout: float, liveness: float = 0.0) -> Service:
    """etcd, ready within `timeout` seconds and restarted when it is silent for `liveness` (0: never).

    From its first moment nobody gets a word in who has no certificate of the run.
    """
    run, pem = member.run, member.pem
    client, peer = f"https://{host(member.address)}:{member.port}", f"https://127.0.0.1:{member.peer_port}"
    argv = (
        *(binary, "--name", run, "--data-dir", str(member.data)),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--client-cert-auth", "--trusted-ca-file", str(pem.ca)),
        *("--cert-file", str(pem.cert), "--key-file", str(pem.key)),
        # It would forward what it is told as etcd itself and not as whoever asks.
        "--enable-grpc-gateway=false",
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--peer-client-cert-auth", "--peer-trusted-ca-file", str(pem.ca), "--peer-cert-allowed-cn", CN),
        *("--peer-cert-file", str(pem.cert), "--peer-key-file", str(pem.key)),
        *("--initial-cluster", f"{run}={peer}", "--initial-cluster-token", run),
        # One member elects itself: the default of a second would be the longest part of a restart.
        *("--heartbeat-interval", "20", "--election-timeout", "200"),
        # Nobody logs in with a password: those that etcd wants are thrown away, and need not be hashed slowly.
        *("--bcrypt-cost", "4"),
        *("--quota-backend-bytes", str(RESERVED)),
        *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", HISTORY),
        *("--logger", "zap", "--log-level", "warn"),
    )
    env: dict[str, str | None] = {"ETCD_UNSUPPORTED_ARCH": None, "ETCDCTL_API": None}
    return Service(
        *("etcd", Command(argv, env), lambda: probe(member.access), timeout),
        port=member.port,
        liveness=liveness,
        alive=Answers(member.access, max(0.2, liveness / 4)),
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


def probe(access: Access, timeout: float = 2.0) -> None:
    """A linearizable read, which needs an elected leader. Raises `NotReadyError`."""
    one = Answers(access, timeout)
    try:
        one()
    finally:
        one.close()


class Answers:
    """`probe` again and again, over a connection that is kept while it answers: a new one costs a handshake."""

    def __init__(self, access: Access, timeout: float) -> None:
        self._access, self._timeout = access, timeout
        self._etcd: Etcd | None = None

    def __call__(self) -> None:
        from gms_launch.control.client import AlarmedError, Etcd

        if self._etcd is None:
            self._etcd = Etcd(self._access, self._timeout)
        try:
            self._etcd.get("/gms-launch/ready", retry=0.0)
        except AlarmedError:
            return  # it answers: to start it again would change nothing of that
        except LaunchError as exc:
            self.close()
            raise NotReadyError(str(exc)) from None

    def close(self) -> None:
        if self._etcd is not None:
            self._etcd.close()
            self._etcd = None


def host(address: str) -> str:
    """`address` as it stands in a URL."""
    return f"[{address}]" if ":" in address else address
