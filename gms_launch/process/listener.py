"""A second descriptor of a socket that another process listens on: found, checked, taken, and never accepted on early.

An open socket belongs to whoever has a descriptor of it. While its owner lives, ours does nothing; when the owner dies
the kernel does not close it, and goes on completing connections into its backlog. `pidfd_getfd` needs the right to
trace the owner: a child of ours, or one of its children. Where that is refused (Yama's scope 2 and 3, seccomp filters)
`bind` is what is left: the dead owner's port, with a moment between its end and ours in which connections are refused.
Blocking, for at most some milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from urllib.parse import urlsplit

from gms_launch.errors import LaunchError
from gms_launch.process import clients, proc

#: pidfd_getfd(2), the same number on all architectures; Linux 5.6.
SYS_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


class TakeError(LaunchError):
    """A listening socket could not be found or taken."""


class ClosedError(TakeError):
    """It was closed while it was being taken."""


def advertised(instance: bytes) -> tuple[str, int] | None:
    """Where one of Dynamo's instances takes requests: the address in its record; None when it is not on TCP."""
    try:
        parts = urlsplit("//" + json.loads(instance)["transport"]["tcp"])
        return (parts.hostname, parts.port) if parts.hostname and parts.port else None
    except (ValueError, KeyError, TypeError):
        return None


def take(group: Iterable[int], port: int) -> socket.socket:
    """A descriptor of the socket that a process of `group` (pids, the likeliest first) listens on at TCP `port`.

    Closed when the owner starts a program, as all of ours are. Raises `TakeError`.
    """
    looked = []
    for pid in group:
        inodes = proc.listening(port, pid)
        looked.append(pid)
        for fd, inode in _sockets(pid):
            if inode in inodes:
                return _checked(_getfd(pid, fd), port, inode)
    raise TakeError(f"none of the processes {', '.join(map(str, looked))} listens on port {port}")


def sever(pid: int, host: str) -> int:
    """End a child's connections with another host, which is lost and will never say so; returns how many there were.

    The child reads the end of each at once, and not when TCP gives up. Raises `TakeError` and `OSError`.
    """
    return _end(pid, {str(row.inode) for row in clients.connections() if row.there[0] == host and row.inode})


def turn_out(pid: int, ports: Iterable[int]) -> int:
    """End the connections that other users of this machine have to a child at these ports of its, root's excepted;
    returns how many there were. Of those who come from another machine nobody can say who they are.

    Raises `TakeError` and `OSError`.
    """
    rows, own = clients.connections(), {0, os.getuid()}
    theirs = {(row.there, row.here) for row in rows if row.there[1] in ports and row.inode and row.user not in own}
    return _end(pid, {str(row.inode) for row in rows if row.inode and (row.here, row.there) in theirs})


def _end(pid: int, inodes: set[str]) -> int:
    count = 0
    for fd, inode in _sockets(pid) if inodes else ():
        if inode in inodes:
            try:
                own = _getfd(pid, fd)
            except ClosedError:
                continue  # it has ended that one itself
            if os.readlink(f"/proc/self/fd/{own}") != f"socket:[{inode}]":  # the number is another's by now
                os.close(own)
                continue
            with socket.socket(fileno=own) as found, contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def bind(address: str, port: int) -> socket.socket:
    """Listen where a dead process did. Raises `OSError` while something of it is left."""
    found = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((address, port))
        found.listen(4096)
        found.setblocking(False)
    except OSError:
        found.close()
        raise
    return found


def refused() -> str:
    """Why this process may not take a descriptor of a child of its own; empty when it may."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        os.close(_getfd(child.pid, 0))
    except TakeError as exc:
        return str(exc)
    finally:
        child.communicate(b"\n")
    return ""


def accept_all(listener: socket.socket, limit: int) -> tuple[list[socket.socket], bool]:
    """Take at most `limit` of the connections that wait; and whether there may be more that cannot be taken now."""
    found: list[socket.socket] = []
    try:
        while len(found) < limit:
            found.append(listener.accept()[0])
    except BlockingIOError:
        return found, False
    except OSError:  # no descriptor is left
        return found, True
    return found, True


def asked(connection: socket.socket) -> bool:
    """Whether anything was sent over it, or its other end is gone."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _sockets(pid: int) -> Iterable[tuple[int, str]]:
    """The descriptors of a process that are sockets, with their inodes."""
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for fd in fds:
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/{pid}/fd/{fd}")
            if name.startswith("socket:["):
                yield int(fd), name[8:-1]


def _getfd(pid: int, fd: int) -> int:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as exc:
        raise TakeError(f"process {pid}: {exc.strerror}") from None
    try:
        got = int(_libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0))
        if got < 0:
            why = os.strerror(number := ctypes.get_errno())
            kind = ClosedError if number == errno.EBADF else TakeError
            raise kind(f"pidfd_getfd of descriptor {fd} of process {pid}: {why}")
    finally:
        os.close(pidfd)
    return got


def _checked(fd: int, port: int, inode: str) -> socket.socket:
    """The descriptor as a socket, if it is the one that was meant: its number may have been given anew meanwhile."""
    os.set_inheritable(fd, False)
    if os.readlink(f"/proc/self/fd/{fd}") != f"socket:[{inode}]":
        os.close(fd)
        raise TakeError(f"the socket on port {port} was closed while it was being taken")
    found = socket.socket(fileno=fd)
    if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or found.getsockname()[1] != port:
        found.close()
        raise TakeError(f"the socket that was taken does not listen on port {port}")
    return found


def pids_of(pgid: int) -> list[int]:
    """The group's leader, and then its other members."""
    return [pgid, *(info.pid for info in proc.group(pgid) if info.pid != pgid)]
