"""Every port that the launcher hands out.

`layout` is pure: it gives each purpose its port, taking the wanted number where `free` says it is free and the next
free one where it is not. `Reservation` keeps two runs of one user on a node from choosing the same numbers before
either has bound them. Ports that the user fixed are never moved: if one is taken, that is an error.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.settings.declared import Settings
from gms_launch.settings.rules import COHORT_STRIDE

#: Incarnations of a cohort take turns on this many master ports, so that one in TIME_WAIT is not met again soon.
INCARNATION_STEPS = 50


@dataclass(frozen=True)
class Ports:
    """The ports of one run on the leader node; per cohort where the name says so. `extra` are an engine's own."""

    frontend: int
    etcd: int
    etcd_peer: int
    nats: int
    master_base: int
    system: tuple[int, ...]
    nixl: tuple[int, ...]
    vllm: tuple[int, ...]
    word: int
    #: Dynamo's frontend, on loopback behind the proxy; 0 where there is none.
    frontend_inner: int = 0
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def master(self, cohort_id: int, incarnation: int) -> int:
        """Where the ranks of that life of the cohort meet."""
        return self.master_base + COHORT_STRIDE * cohort_id + (incarnation - 1) % INCARNATION_STEPS


#: How many files of dead reservations are looked at when a new one is made.
CLEARED = 500


class _Chooser:
    """Hands out ports, none of them twice."""

    def __init__(self, settings: Settings, free: Callable[[int], bool]) -> None:
        self._settings, self._free = settings, free
        self._taken: set[int] = set()

    def usable(self, port: int) -> bool:
        return port not in self._taken and port <= 65535 and self._free(port)

    def one(self, name: str, wanted: int) -> int:
        if self._settings.was_set(name) and not self.usable(wanted):
            raise UsageError(
                f"{name} {wanted} is in use on this node (from {self._settings.sources[name]}); "
                "stop what listens there or choose another port"
            )
        for port in range(wanted, min(wanted + 2000, 65536)):
            if self.usable(port):
                self._taken.add(port)
                return port
        raise UsageError(f"{name}: no free port from {wanted} on")


def moved(settings: Settings, chosen: Ports) -> str:
    """The services' ports that are not the wanted ones, for people; empty when none had to be moved."""
    names = ("frontend", "etcd", "etcd_peer", "nats")
    pairs = [(n, getattr(settings, f"{n}_port"), getattr(chosen, n)) for n in names]
    return ", ".join(f"{name} {port} instead of {wanted}" for name, wanted, port in pairs if port != wanted)


def follow(
    settings: Settings, leaders: Mapping[str, Any], free: Callable[[int], bool], extra: Mapping[str, int] | None = None
) -> Ports:
    """The ports of a node that is not the leader: its engines' own from this node, everything else the leader's."""
    one = _Chooser(settings, free).one
    cohorts = range(settings.cohorts)
    own = {
        "nixl": tuple(one("nixl_port", settings.nixl_port + k) for k in cohorts),
        "vllm": tuple(one("vllm_port", settings.vllm_port + COHORT_STRIDE * k) for k in cohorts),
        "word": one("word_port", settings.word_port),
    }
    return Ports(**{**leaders, "system": tuple(leaders["system"]), **own, "extra": _extra(one, extra, cohorts)})


def _extra(one: Callable[[str, int], int], first: Mapping[str, int] | None, cohorts: range) -> dict[str, Any]:
    return {
        name: tuple(one(f"port {name} of the engine file", port + k) for k in cohorts)
        for name, port in (first or {}).items()
    }


def layout(settings: Settings, free: Callable[[int], bool], extra: Mapping[str, int] | None = None) -> Ports:
    """Give every purpose a port. Raises `UsageError` if a port the user fixed is taken or none is left.

    `extra` are an engine's own, by name: the wanted port of cohort 0.
    """
    chooser = _Chooser(settings, free)
    one, usable = chooser.one, chooser.usable
    frontend = one("frontend_port", settings.frontend_port)
    inner = one("frontend_inner_port", settings.frontend_inner_port) if settings.api_key_file else 0
    etcd = one("etcd_port", settings.etcd_port)
    peer = one("etcd_peer_port", settings.etcd_peer_port)
    nats = one("nats_port", settings.nats_port)
    cohorts = range(settings.cohorts)
    system = tuple(one("system_port", settings.system_port + k) for k in cohorts)
    nixl = tuple(one("nixl_port", settings.nixl_port + k) for k in cohorts)
    vllm = tuple(one("vllm_port", settings.vllm_port + COHORT_STRIDE * k) for k in cohorts)
    word = one("word_port", settings.word_port)
    own = _extra(one, extra, cohorts)
    span = COHORT_STRIDE * settings.cohorts
    base = settings.master_port
    while True:
        if base + span > 65535:
            raise UsageError(f"master_port: no free range of {span} ports from {settings.master_port} on")
        if all(usable(base + COHORT_STRIDE * k) for k in cohorts):
            break
        if settings.was_set("master_port"):
            raise UsageError(f"master_port {settings.master_port}: it or a port of its range is in use on this node")
        base += span
    return Ports(frontend, etcd, peer, nats, base, system, nixl, vllm, word, inner, own)


def is_free(address: str, port: int) -> bool:
    """True when `port` can be bound on `address` right now."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


class Reservation:
    """Locks held by this process on the ports it chose, one file a port, let go by `close` or by its death."""

    def __init__(self, directory: Path, *addresses: str) -> None:
        self._directory = directory
        self._addresses = dict.fromkeys(addresses)
        self._held: dict[int, int] = {}
        # Another network namespace has ports of its own, and may share this directory.
        self._network = os.stat("/proc/self/ns/net").st_ino
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clear()

    def free(self, port: int) -> bool:
        """True when `port` is free and now reserved for us."""
        if port in self._held:
            return True
        path = self._directory / f"{port}-{self._network}"
        while (fd := _locked(path, os.O_CREAT)) is not None and not _is_at(fd, path):
            os.close(fd)  # whoever had it has just removed it
        if fd is None:
            return False
        if not all(is_free(address, port) for address in self._addresses):
            _let_go(fd, path)
            return False
        self._held[port] = fd
        return True

    def close(self) -> None:
        for port, fd in self._held.items():
            _let_go(fd, self._directory / f"{port}-{self._network}")
        self._held.clear()

    def _clear(self) -> None:
        """Remove what was left by those who were killed: files that nobody has locked."""
        for path in list(self._directory.iterdir())[:CLEARED]:
            if (fd := _locked(path)) is not None:
                _let_go(fd, path)


def _locked(path: Path, flags: int = 0) -> int | None:
    """The file, locked by us; None when it is another's, or is not there."""
    try:
        fd = os.open(path, flags | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _is_at(fd: int, path: Path) -> bool:
    """True while `path` is the file that we have open: one that was removed locks nobody out."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _let_go(fd: int, path: Path) -> None:
    """Remove a file that we have locked, while we have it, and let go of it."""
    if _is_at(fd, path):
        path.unlink(missing_ok=True)
    os.close(fd)
