"""NATS with JetStream on the leader node: command line, configuration, readiness.

Dynamo needs it up to 1.2 and for `--event-plane nats`; newer releases only connect to it.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

from gms_launch.process.lifecycle import Command
from gms_launch.services.base import NotReadyError, Service
from gms_launch.spool.files import write_private


def configure(path: Path, address: str, port: int, data: Path, user: str, password: str) -> None:
    """Write NATS's configuration, readable by us alone: a command line would show the password to everybody."""
    lines = [
        f"listen: {json.dumps(f'{address}:{port}')}",
        f"jetstream {{ store_dir: {json.dumps(str(data))} }}",
        f"authorization {{ user: {json.dumps(user)}, password: {json.dumps(password)} }}",
    ]
    write_private(path, "\n".join(lines) + "\n")


def service(
    binary: str, config: Path, address: str, port: int, user: str, password: str, timeout: float, liveness: float = 0.0
) -> Service:
    command = Command((binary, "-c", str(config)), {})
    return Service("nats", command, lambda: probe(address, port, user, password), timeout, port=port, liveness=liveness)


def probe(address: str, port: int, user: str, password: str) -> None:
    """INFO, CONNECT with the password, PING, PONG. Raises `NotReadyError`."""
    try:
        with socket.create_connection((address, port), timeout=1.0) as connection:
            file = connection.makefile("rb")
            info = file.readline()
            if not info.startswith(b"INFO "):
                raise NotReadyError(f"expected INFO, got {info[:40]!r}")
            if not json.loads(info[5:]).get("jetstream"):
                raise NotReadyError("JetStream is not up")
            login = json.dumps({"user": user, "pass": password, "verbose": False})
            connection.sendall(f"CONNECT {login}\r\nPING\r\n".encode())
            answer = file.readline().strip()
            if answer != b"PONG":
                raise NotReadyError(f"expected PONG, got {answer[:80]!r}")
    except (OSError, ValueError) as exc:
        raise NotReadyError(f"{address}:{port}: {exc}") from None
