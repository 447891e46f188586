"""Who is connected to a TCP port of ours: processes of this machine, and other hosts.

Asks the kernel's sock_diag(7), which is several times as fast as /proc/net/tcp, about this network namespace. Which
process it is on another host cannot be seen from here; there the host stands for all of them. Blocking, for some
milliseconds; call it in a thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gms_launch.process import proc
from gms_launch.process.proc import ProcessId

Address = tuple[str, int]

#: Bits of the states that are asked for: established, and on their way to the end.
_STATES = sum(1 << state for state in (1, 4, 5, 8, 9, 11))
_ESTABLISHED, _CLOSE_WAIT, _LISTEN = 1, 8, 10
#: NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP; and the types of messages that end an answer.
_SOCK_DIAG, _BY_FAMILY, _DUMP, _ERROR, _DONE = 4, 20, 0x301, 2, 3
#: struct inet_diag_req_v2 up to the address, which is all zero; struct inet_diag_msg: family, state, ports, addresses,
#: what waits to be read (of who listens: to be taken in), user id, inode.
_REQUEST, _ANSWER = struct.Struct("=IHHIIBBBBI48x"), struct.Struct("=BBxx2s2s16s16s16xI4xII")


@dataclass(frozen=True)
class Client:
    """A process of this machine, or (None) whoever it is at `host`."""

    host: str
    process: ProcessId | None = None

    @property
    def alive(self) -> bool:
        """False for a process that has ended; of other hosts nothing is known."""
        return self.process is None or proc.alive(self.process)


class Clients:
    """Remembers whose a connection is once it was found. `likely` names the pid to look at first, 0 for none; where
    that one is on another machine, `host` says its address.
    """

    def __init__(self, likely: Callable[[], int] = lambda: 0, host: Callable[[], str] = lambda: "") -> None:
        self._likely, self._host = likely, host
        self._found: dict[int, dict[int, ProcessId | None]] = {}

    def own(self) -> Client | None:
        """The likely one, if it runs, or its machine."""
        if host := self._host():
            return Client(host)
        who = proc.identity(pid) if (pid := self._likely()) else None
        return None if who is None else Client("", who)

    def of(self, *ports: int) -> list[dict[Address, Client]]:
        """The clients of each port, by the address that they come from; of a closed connection too while it lingers.

        Other users of this machine, root excepted, are left out: no request of the run's comes from them. Raises
        `OSError` where the kernel does not tell.
        """
        rows = connections()
        return [self._of(port, rows) for port in ports]

    def _of(self, port: int, rows: list[Row]) -> dict[Address, Client]:
        ends = [row for row in rows if row.there[1] == port]
        strangers = {row.here for row in ends if row.inode and row.user not in (0, os.getuid())}
        theirs = {row.here: row.inode for row in ends}
        owners = self._owners(port, {inode for end, inode in theirs.items() if inode and end not in strangers})
        found: dict[Address, Client] = {}
        for row in rows:
            if row.here[1] != port or row.there in strangers:
                continue
            inode = theirs.get(row.there)
            if inode is None and row.there[0] != row.here[0]:
                found[row.there] = Client(row.there[0])
            elif inode:  # 0: its process has closed it
                who = owners[inode]
                found[row.there] = Client(row.there[0]) if who is None else Client("", who)
        return found

    def _owners(self, port: int, inodes: set[int]) -> dict[int, ProcessId | None]:
        """Which processes have these sockets; None for those that we may not look into."""
        known = self._found.get(port, {})
        found = {inode: known[inode] for inode in inodes & known.keys()}
        left = inodes - found.keys()
        for pid in itertools.chain([self._likely()], proc.pids()):
            if not left:
                break
            for inode in _sockets(pid) & left:
                found[inode] = proc.identity(pid)
                left.discard(inode)
        self._found[port] = found | dict.fromkeys(left)
        return self._found[port]


@dataclass(frozen=True)
class Row:
    """One TCP connection: its ends, and the inode of our socket (0: its process has closed it, or not taken it in).

    `user` is whose our socket is; `whole`: neither end has ended it; `waits`: of one that listens, how many are to be
    taken in.
    """

    here: Address
    there: Address
    inode: int
    user: int = 0
    whole: bool = True
    waits: int = 0


def connections() -> list[Row]:
    """All that are established or on their way to the end here. Raises `OSError` where the kernel does not tell."""
    return _rows(_STATES)


def waiting(port: int) -> dict[Address, bool]:
    """The connections to a port of this machine that nobody has taken in: where from, and whether they are whole.

    Raises `OSError` where the kernel does not tell.
    """
    if not any(row.waits for row in _rows(1 << _LISTEN) if row.here[1] == port):
        return {}
    # In other states without a socket are those that their process has closed, and they may linger for a minute.
    rows = _rows(1 << _ESTABLISHED | 1 << _CLOSE_WAIT)
    return {row.there: row.whole for row in rows if row.here[1] == port and not row.inode}


def _rows(states: int) -> list[Row]:
    found: list[Row] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
        kernel.settimeout(1.0)
        for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            asked = (_REQUEST.size, _BY_FAMILY, _DUMP, 1, 0, family, socket.IPPROTO_TCP, 0, 0, states)
            kernel.send(_REQUEST.pack(*asked))
            for answer in _answers(kernel):
                _, state, *ends, waits, user, inode = _ANSWER.unpack_from(answer)
                ports, hosts = ends[:2], ends[2:]
                here, there = (
                    (plain(socket.inet_ntop(family, host[:size])), int.from_bytes(port, "big"))
                    for host, port in zip(hosts, ports, strict=True)
                )
                found.append(Row(here, there, inode, user, state == _ESTABLISHED, waits))
    return found


def _answers(kernel: socket.socket) -> Iterator[bytes]:
    """The bodies of the messages of one dump. Raises `OSError` when it was refused."""
    while True:
        data = kernel.recv(1 << 18)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == _ERROR:
                raise OSError(-int(struct.unpack_from("=i", data, 16)[0]), "sock_diag")
            if kind == _DONE:
                return
            yield data[16:length]
            data = data[(length + 3) & ~3 :]


def plain(host: str) -> str:
    """The address of IPv4 that one of IPv6 stands for, where it does."""
    return host.removeprefix("::ffff:") if "." in host else host


def _sockets(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("socket:["):
                    found.add(int(name[8:-1]))
    return found
