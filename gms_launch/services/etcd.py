"""etcd, one or several members: command line, readiness, certificates.

Its data is in the node-local directory, so that a restarted etcd knows everything it knew. The first member is begun as
a cluster of one; every other joins it, when the run begins as when its node comes back (`control.cluster`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gms_launch.control.access import Access
from gms_launch.errors import LaunchError
from gms_launch.process import clients
from gms_launch.process.lifecycle import Command
from gms_launch.services.base import NotReadyError, Service, StuckError
from gms_launch.services.pem import PemFiles
from gms_launch.spool import files

if TYPE_CHECKING:
    from gms_launch.control.client import Etcd

#: Room for etcd's records, which are a few MiB in a run of days (bytes). Full, it refuses writes (NOSPACE).
RESERVED = 64 * 1024 * 1024
#: How long etcd remembers what was (a watch that breaks for longer reads everything anew).
HISTORY = "10m"
#: So many who wait at its peers' port at once are a flood that goes on.
FLOOD = 1000
#: The name in its certificate, and in that of a peer.
CN = "etcd"
#: All that etcd takes: its records, and its log of two segments of 64 MB, one in use and the next.
ROOM = RESERVED + 2 * 64_000_000


@dataclass(frozen=True)
class Member:
    """The run's etcd on a node: its name, where it listens, where its data is, what it shows, and how an agent asks it.

    Clients come from everywhere. Where it is the only one of `members`, that port of its peers is on the loopback.
    `joins`: the members that it joins, as etcd wants them said; empty for the first.
    """

    run: str
    address: str
    port: int
    peer_port: int
    data: Path
    pem: PemFiles
    access: Access
    members: int = 1
    name: str = ""
    joins: str = ""

    @property
    def client_url(self) -> str:
        return f"https://{host(self.address)}:{self.port}"

    @property
    def peer_url(self) -> str:
        return f"https://{host(self.address if self.members > 1 else '127.0.0.1')}:{self.peer_port}"

    @property
    def timing(self) -> tuple[str, ...]:
        if self.members == 1:
            # One member elects itself: the default of a second would be the longest part of a restart.
            return ("--heartbeat-interval", "20", "--election-timeout", "200")
        # A busy machine must not look like a dead one to its peers, and one that comes back end nobody's term.
        return ("--heartbeat-interval", "100", "--election-timeout", "1000", "--pre-vote")

    @property
    def among_several(self) -> tuple[str, ...]:
        """What only a member of several needs."""
        if self.members == 1:
            return ()
        return (
            *("--initial-cluster-state", "existing" if self.joins else "new"),
            # Clients look more often whether a member is there, since they can go to another.
            *("--grpc-keepalive-min-time", "100ms"),
            # It would refuse a member for 5 s after every other one; learners take nobody's quorum.
            "--strict-reconfig-check=false",
            # Whoever has etcd's certificate is a member, by whichever of its addresses it comes.
            "--experimental-peer-skip-client-san-verification",
        )


def service(member: Member, binary: str, timeout: float, liveness: float = 0.0) -> Service:
    """etcd, ready within `timeout` seconds and restarted when it is silent for `liveness` (0: never).

    From its first moment nobody gets a word in who has no certificate of the run.
    """
    run, pem, name = member.run, member.pem, member.name or member.run
    client, peer, several = member.client_url, member.peer_url, member.members > 1
    argv = (
        *(binary, "--name", name, "--data-dir", str(member.data)),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--client-cert-auth", "--trusted-ca-file", str(pem.ca)),
        *("--cert-file", str(pem.cert), "--key-file", str(pem.key)),
        # It would forward what it is told as etcd itself and not as whoever asks.
        "--enable-grpc-gateway=false",
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--peer-client-cert-auth", "--peer-trusted-ca-file", str(pem.ca), "--peer-cert-allowed-cn", CN),
        *("--peer-cert-file", str(pem.cert), "--peer-key-file", str(pem.key)),
        *("--initial-cluster", member.joins or f"{name}={peer}", "--initial-cluster-token", run),
        *member.timing,
        *member.among_several,
        # Nobody logs in with a password: those that etcd wants are thrown away, and need not be hashed slowly.
        *("--bcrypt-cost", "4"),
        *("--quota-backend-bytes", str(RESERVED)),
        *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", HISTORY),
        *("--logger", "zap", "--log-level", "warn"),
    )
    env: dict[str, str | None] = {"ETCD_UNSUPPORTED_ARCH": None, "ETCDCTL_API": None}
    answers = Answers(member.access, max(0.2, liveness * 2 / 3), alone=not several)
    hears = HearsPeers(member.peer_port)

    def alive() -> None:
        answers()
        hears()

    return Service(
        *("etcd", Command(argv, env), (lambda: led(member.access)) if several else lambda: probe(member.access)),
        timeout,
        port=member.port,
        liveness=liveness,
        alive=alive,
        # Every Dynamo process ends itself when its lease does; of several members, one can be done without.
        essential=not several,
        private=(member.port, member.peer_port),
        bears_load=True,
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


def led(access: Access, timeout: float = 2.0) -> None:
    """A member that is up and knows a leader; a learner too, which reads for nobody. Raises `NotReadyError`."""
    one = Answers(access, timeout, alone=False)
    try:
        if not one():
            raise NotReadyError("it has no leader")
    finally:
        one.close()


class Answers:
    """Whether one server answers, again and again, over a connection that is kept while it does: a new one costs a
    handshake.

    One that is `alone` has to read, as `probe` has it. One of several is well when it answers at all: that the others
    are away is nothing that its restart would mend.
    That connection is kept when no answer comes within `timeout` seconds, too: who is too busy to answer is too busy
    for handshakes.
    """

    def __init__(self, access: Access, timeout: float, alone: bool = True) -> None:
        self._access, self._timeout, self._alone = access, timeout, alone
        self._etcd: Etcd | None = None

    def __call__(self) -> int:
        """The leader that it knows; 0 for none, or when it is alone. Raises `NotReadyError`."""
        from gms_launch.control import cluster
        from gms_launch.control.client import AlarmedError, Etcd

        if self._etcd is None:
            self._etcd = Etcd(self._access, self._timeout, patient=True)
        try:
            if not self._alone:
                return cluster.standing(self._etcd).leader
            self._etcd.get("/gms-launch/ready", retry=0.0)
        except AlarmedError:
            pass  # it answers: to start it again would change nothing of that
        except LaunchError as exc:
            raise NotReadyError(str(exc)) from None
        return 0

    def close(self) -> None:
        if self._etcd is not None:
            self._etcd.close()
            self._etcd = None


class HearsPeers:
    """Whether a member takes in who comes to its peers' port, asked again and again.

    An etcd (3.4, 3.5) that had no descriptor left for one there takes in nobody any more, keeps a core busy with that,
    and answers its clients as before: only its restart mends it. Not while the flood that did it goes on, since what
    it has with its peers it keeps until then.
    """

    def __init__(self, port: int) -> None:
        self._port, self._waited = port, frozenset[tuple[str, int]]()

    def __call__(self) -> None:
        """Raises `StuckError` when somebody waits there who waited at the last look."""
        try:
            found = clients.waiting(self._port)
        except OSError:
            return  # the kernel does not tell
        before, self._waited = self._waited, frozenset(found)
        if before & found.keys() and sum(found.values()) < FLOOD:
            raise StuckError(f"it takes in nobody at its peers' port {self._port}: {len(found)} wait there")


def host(address: str) -> str:
    """`address` as it stands in a URL."""
    return f"[{address}]" if ":" in address else address
