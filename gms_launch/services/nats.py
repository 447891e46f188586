"""NATS with JetStream on the leader node: command line, configuration, readiness.

Dynamo needs it up to 1.2 and for `--event-plane nats`; newer releases only connect to it.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path

from gms_launch.process.lifecycle import Command
from gms_launch.services.base import NotReadyError, Service
from gms_launch.spool.files import write_private


@dataclass(frozen=True)
class Server:
    """The run's NATS: where it listens, where its configuration and data are, who may log in."""

    address: str
    port: int
    config: Path
    data: Path
    user: str
    password: str


def configure(server: Server) -> None:
    """Write NATS's configuration, readable by us alone: a command line would show the password to everybody."""
    lines = [
        f"listen: {json.dumps(f'{server.address}:{server.port}')}",
        f"jetstream {{ store_dir: {json.dumps(str(server.data))} }}",
        f"authorization {{ user: {json.dumps(server.user)}, password: {json.dumps(server.password)} }}",
    ]
    write_private(server.config, "\n".join(lines) + "\n")


def service(server: Server, binary: str, timeout: float, liveness: float = 0.0) -> Service:
    """NATS, ready within `timeout` seconds and restarted when it is silent for `liveness` (0: never)."""
    command = Command((binary, "-c", str(server.config)), {})
    return Service("nats", command, lambda: probe(server), timeout, port=server.port, liveness=liveness)


def probe(server: Server) -> None:
    """INFO, CONNECT with the password, PING, PONG. Raises `NotReadyError`."""
    try:
        with socket.create_connection((server.address, server.port), timeout=1.0) as connection:
            file = connection.makefile("rb")
            info = file.readline()
            if not info.startswith(b"INFO "):
                raise NotReadyError(f"expected INFO, got {info[:40]!r}")
            if not json.loads(info[5:]).get("jetstream"):
                raise NotReadyError("JetStream is not up")
            login = json.dumps({"user": server.user, "pass": server.password, "verbose": False})
            connection.sendall(f"CONNECT {login}\r\nPING\r\n".encode())
            answer = file.readline().strip()
            if answer != b"PONG":
                raise NotReadyError(f"expected PONG, got {answer[:80]!r}")
    except (OSError, ValueError) as exc:
        raise NotReadyError(f"{server.address}:{server.port}: {exc}") from None
