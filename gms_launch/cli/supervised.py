"""How `up` tells systemd: sd_notify(3), datagrams to the socket that NOTIFY_SOCKET names."""

from __future__ import annotations

import contextlib
import os
import socket

from gms_launch.cli.reporters import Terminal
from gms_launch.run.plan import Layout

VARIABLE = "NOTIFY_SOCKET"


def taken() -> str:
    """Where systemd listens, empty for nowhere. Taken out of the environment: engines are not to speak for the unit."""
    return os.environ.pop(VARIABLE, "")


class Supervised(Terminal):
    """Reports to systemd what it reports to a terminal, which is the journal then."""

    def __init__(self, layout: Layout, address: str) -> None:
        super().__init__(layout)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)  # a manager that does not read stops nobody
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def _notify(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendto(text.encode(errors="replace"), self._address)

    def progress(self, text: str) -> None:
        super().progress(text)
        self._notify("STATUS=" + " ".join(text.split()))

    def ready(self, text: str) -> None:
        super().ready(text)
        self._notify("READY=1")

    def stopping(self) -> None:
        self._notify("STOPPING=1")

    def close(self) -> None:
        super().close()
        self._socket.close()
