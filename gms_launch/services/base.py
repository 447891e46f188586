"""A service of a node: what to run, how to see that it is ready, when to start it again.

`Service` is a description; `runner` brings it to life. `restart_delay` is the pure part of the restart policy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gms_launch.cohort.process import Command
from gms_launch.errors import UsageError

#: A service that ran this long before it died is started again without delay (seconds).
STABLE_AFTER = 30.0
RESTART_MAX = 5.0


class NotReadyError(Exception):
    """A probe's answer: not ready, and why."""


@dataclass(frozen=True)
class Service:
    """`probe` blocks for at most a second or two and raises `NotReadyError` until the service is ready.

    `port`: where it must itself be listening, since another server could answer the probe. `restart` False: when it
    dies it stays dead, and what follows is for the controller to say.
    """

    name: str
    command: Command
    probe: Callable[[], None]
    timeout: float
    restart: bool = True
    port: int | None = None


def restart_delay(failures: int) -> float:
    """Seconds to wait before start number `failures` + 1: nothing the first time, then 0.2 s doubling to 5 s."""
    if failures <= 1:
        return 0.0
    return min(RESTART_MAX, 0.2 * 2.0 ** min(failures - 2, 10))


def find_binary(setting: str, configured: str, name: str, package: str) -> str:
    """The binary of a service: as configured, else from PATH. Raises `UsageError` that names Debian's package."""
    if configured:
        found = shutil.which(configured)
        if found is None:
            raise UsageError(f"{setting} {configured!r} is not an executable file")
        return found
    # Debian puts servers where an ordinary user's PATH does not look.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    if found is None:
        raise UsageError(
            f"{name} was not found on PATH; install it (Debian: apt-get install {package}), or say where it is with "
            f"--{setting.replace('_', '-')}"
        )
    return found


def log_tail(path: Path, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16384))
            text = file.read().decode(errors="replace")
    except OSError as exc:
        return f"(no log: {exc})"
    tail = text.splitlines()[-lines:]
    return "\n".join("  | " + line for line in tail) or "  | (the log is empty)"
