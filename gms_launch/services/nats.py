"""NATS with JetStream on the leader node: command line, configuration, readiness.

Dynamo needs it up to 1.2 and for `--event-plane nats`; newer releases only connect to it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Mapping
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
    ready = lambda: probe(server)  # noqa: E731
    return Service(*("nats", command, ready, timeout), port=server.port, liveness=liveness, private=(server.port,))


def probe(server: Server) -> None:
    """INFO, CONNECT with the password, PING, PONG. Raises `NotReadyError`."""
    info = ask(server.address, server.port, {"user": server.user, "pass": server.password})
    if not info.get("jetstream"):
        raise NotReadyError("JetStream is not up")


def ask(
    address: str, port: int, login: Mapping[str, str], tls: ssl.SSLContext | None = None, timeout: float = 1.0
) -> Mapping[str, object]:
    """Log in to a NATS (`user` and `pass`, or `auth_token`) and return what it says of itself.

    Raises `NotReadyError`.
    """
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection((address, port), timeout=timeout))
            # Unbuffered: what follows the first line may be the server's part of a TLS handshake.
            info = stack.enter_context(connection.makefile("rb", buffering=0)).readline()
            if not info.startswith(b"INFO "):
                raise NotReadyError(f"expected INFO, got {info[:40]!r}")
            said: Mapping[str, object] = json.loads(info[5:])
            if tls is not None:
                connection = stack.enter_context(tls.wrap_socket(connection, server_hostname=address))
            options = json.dumps({**login, "verbose": False, "tls_required": tls is not None})
            connection.sendall(f"CONNECT {options}\r\nPING\r\n".encode())
            file = stack.enter_context(connection.makefile("rb"))
            answer = file.readline().strip()
            if answer.startswith(b"INFO "):  # again, once the connection is encrypted
                answer = file.readline().strip()
            if answer != b"PONG":
                raise NotReadyError(f"expected PONG, got {answer[:80]!r}")
            return said
    except (OSError, ValueError) as exc:
        raise NotReadyError(f"{address}:{port}: {exc}") from None
