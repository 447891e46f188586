"""What the processes of a run listen on, by the kernel's tables, and what docs/security.md says of it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gms_launch.process import proc

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
TCP_LISTEN, UDP_UNCONNECTED = "0A", "07"


class Row(NamedTuple):
    """Who listens for what, and where: `loopback`, `network` or `unix`."""

    who: str
    what: str
    where: str


class Listener(NamedTuple):
    """A socket that somebody could reach: of which process, which kind, its address and its port."""

    pid: int
    kind: str
    address: str
    port: int


def documented(column: int) -> set[Row]:
    """The table of ports on the page; column 2 is a run on one node, 3 on several, 4 with groups that others lead."""
    table = PAGE.read_text().partition("## Every port")[2].partition("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 5, "the table is there"
    places = {(r[0], r[1], place.strip()) for r in rows[2:] for place in r[column].split(";")}
    return {Row(who, what, place.split(",")[0]) for who, what, place in places if place != "-"}


def of_run(run: str, ports: Mapping[str, Any]) -> tuple[set[Row], list[Listener]]:
    """What all processes of a run listen on, on every node of a test: as the table has it, and as it is."""
    processes = {info.pid: tag.split("/")[1] for info, tag in proc.tagged(run)}
    # An agent is the parent of what it has started, and has no tag of its own.
    agents = {info.ppid for pid in processes if (info := proc.stat(pid)) is not None}
    names = {pid: "agent" for pid in agents if pid not in processes and re.search("gms.launch", proc.command_line(pid))}
    names |= {pid: _who(pid, part) for pid, part in processes.items()}
    found = [socket for pid in names for socket in _sockets(pid)]
    rows = {Row(names[s.pid], _what(s, names[s.pid], ports), _where(s)) for s in found}
    # The agent has a second descriptor of its engine's socket, for the requests that wait (docs/hold.md).
    theirs = {(s.address, s.port) for s in found if names[s.pid] == "engine"}
    own = [s for s in found if names[s.pid] != "agent" or (s.address, s.port) not in theirs]
    # And it listens itself where the proxies do, so that nobody takes their place between two starts.
    shared = {("agent", "requests"), *(("agent", r.what) for r in rows if r.who in ("proxy", "etcd-proxy"))}
    return {r for r in rows if (r.who, r.what) not in shared}, own


def _who(pid: int, part: str) -> str:
    if "process.guard" in proc.command_line(pid):
        return "agent"  # they share the socket on which they hear from other nodes
    return "engine" if part.isdigit() else re.sub(r"-\d+.*", "", part).rpartition(".")[2]  # a group's name is before it


def _where(socket: Listener) -> str:
    if socket.kind == "unix":
        return "unix"
    return "loopback" if socket.address in ("127.0.0.1", "::1") else "network"


def _what(socket: Listener, who: str, ports: Mapping[str, Any]) -> str:
    if socket.kind == "unix":
        return "abstract" if socket.address.startswith("@") else "socket"
    if socket.kind == "udp":
        return "words"
    known = {ports["etcd"]: "clients", ports["etcd_peer"]: "peers", ports["nats"]: "clients"}
    known |= {ports["frontend"]: "clients", ports["frontend_inner"]: "clients"}
    known |= {ports["etcd_proxy"]: "clients"} if ports.get("etcd_proxy") else {}
    known |= dict.fromkeys(ports["system"], "system")
    if socket.port in known:
        return known[socket.port]
    if who == "engine" and ports["master_base"] <= socket.port < ports["master_base"] + 200:
        return "meeting"
    return {"engine": "requests", "agent": "requests", "frontend": "answers"}.get(who, str(socket.port))


def _sockets(pid: int) -> Iterator[Listener]:
    """The sockets of a process that take connections or datagrams from anybody, of its own network namespace."""
    inodes = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if (link := os.readlink(f"/proc/{pid}/fd/{fd}")).startswith("socket:["):
                    inodes.add(link[8:-1])
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for parts in _table(pid, kind):
            listens = parts[3] == (TCP_LISTEN if kind.startswith("tcp") else UDP_UNCONNECTED)
            if listens and parts[9] in inodes:
                address, port = parts[1].split(":")
                yield Listener(pid, kind.rstrip("6"), _address(address), int(port, 16))
    for parts in _table(pid, "unix"):
        # Bound, and either accepting (the flag) or of datagrams, which need nobody to accept them.
        if parts[6] in inodes and len(parts) > 7 and (int(parts[3], 16) & 0x10000 or parts[4] == "0002"):
            yield Listener(pid, "unix", parts[7], 0)


def _table(pid: int, kind: str) -> Iterable[list[str]]:
    try:
        text = Path(f"/proc/{pid}/net/{kind}").read_text()
    except OSError:
        return []
    return [line.split() for line in text.splitlines()[1:]]


def _address(text: str) -> str:
    import ipaddress

    raw = b"".join(bytes.fromhex(text[k : k + 8])[::-1] for k in range(0, len(text), 8))
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
