"""A service of a node: what to run, how to see that it is ready, when to start it again.

`Service` is a description; `runner` brings it to life. `restart_delay` is the pure part of the restart policy.
"""

from __future__ import annotations

import http.client
import shutil
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gms_launch.errors import UsageError
from gms_launch.printable import plain
from gms_launch.process.lifecycle import Command
from gms_launch.spool.output import Output
from gms_launch.spool.reading import within

#: The variable that says at which descriptor a service is to listen.
LISTENS = "GMS_LAUNCH_LISTENS"
#: A service that ran this long before it died is started again without delay (seconds).
STABLE_AFTER = 30.0
#: Longest pause before a start (seconds); shorter for one that the run cannot go on without.
RESTART_MAX = 30.0
ESSENTIAL_MAX = 5.0
#: How many times as long a service is given that does not answer and is busy: its restart would make it no less so, and
#: all who are connected would come anew. It is, if it used that share of a core since the last look.
BUSY, SHARE = 5, 0.1
#: So many ends in a row, none of them after `STABLE_AFTER`, are told as a loop.
LOOP = 3
#: As much of a log is searched for a traceback (bytes).
LOG_READ = 8 * 1024 * 1024
#: What reading a log may take while the agent waits (seconds).
EXCERPT = 1.0


class NotReadyError(Exception):
    """A probe's answer: not ready, and why."""


class StuckError(NotReadyError):
    """It will not be ready by itself, however long it is given."""


class AwayError(NotReadyError):
    """Who was to be asked is away: that says nothing of what was asked about."""


@dataclass(frozen=True)
class Service:
    """`probe` blocks for at most a second or two and raises `NotReadyError` until the service is ready.

    `port`: where it must itself be listening, since another server could answer the probe. `restart` False: when it
    dies it stays dead, and what follows is for the controller to say. `liveness`: once ready, it is killed when it
    gives no answer for so long (seconds; 0: never), `BUSY` times that if it `bears_load` and is at work all the while;
    `alive` is a cheaper probe for that. `essential`: the run cannot go on when it cannot be brought back within
    `timeout`. `private`: its ports at which other users of this machine have no business. `binds`: an address and a
    port at which the agent itself listens, from the first start to the end, and whose descriptor each start is told of
    in `LISTENS`: nobody takes the port between two, and who comes then waits.
    """

    name: str
    command: Command
    probe: Callable[[], None]
    timeout: float
    restart: bool = True
    port: int | None = None
    liveness: float = 0.0
    alive: Callable[[], object] | None = None
    essential: bool = False
    private: tuple[int, ...] = ()
    binds: tuple[str, int] | None = None
    bears_load: bool = False


def connect(
    address: str, port: int, timeout: float, context: ssl.SSLContext | None = None
) -> http.client.HTTPConnection:
    """A connection for one request: HTTPS with a `context`, else HTTP."""
    if context is None:
        return http.client.HTTPConnection(address, port, timeout=timeout)
    return http.client.HTTPSConnection(address, port, timeout=timeout, context=context)


def http_answer(
    address: str, port: int, path: str, timeout: float = 2.0, context: ssl.SSLContext | None = None
) -> tuple[int, str]:
    """Status and body of what comes to a GET. Raises `NotReadyError` when nothing does."""
    connection = connect(address, port, timeout, context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as exc:
        raise NotReadyError(f"GET {path}: {exc or type(exc).__name__}") from None
    finally:
        connection.close()


def http_get(address: str, port: int, path: str, timeout: float = 2.0, context: ssl.SSLContext | None = None) -> str:
    """The body of an answer 200. Raises `NotReadyError` for any other and for none."""
    status, body = http_answer(address, port, path, timeout, context)
    if status != 200:
        raise NotReadyError(f"GET {path}: HTTP {status}: {body[:200]}")
    return body


def restart_delay(failures: int, most: float = RESTART_MAX) -> float:
    """Seconds to wait before start number `failures` + 1: nothing the first time, then 0.2 s doubling to `most`."""
    if failures <= 1:
        return 0.0
    return min(most, 0.2 * 2.0 ** min(failures - 2, 10))


def shown(path: str | Path) -> str:
    """A path for a message: no longer than one reads."""
    text = str(path)
    return text if len(text) <= 300 else text[:300] + "..."


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


def log_excerpt(path: Path, lines: int = 15) -> str:
    """What a log says of a failure, for an error message: its first traceback, since the later ones tell of the
    consequences; without one its end."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_READ))
            text = file.read().decode(errors="replace")
    except OSError as exc:
        return f"(no log: {exc})"
    return excerpt(text, lines)


def copied_excerpt(path: Path) -> str:
    """The same while the event loop waits: the log may be on a home that hangs, and is then not waited for."""
    return within(EXCERPT, partial(log_excerpt, path), "  | (the home does not answer)")


def last_words(output: Output) -> str:
    """What a child of this agent said last, for an error message; of its copy where the memory has been given back."""
    kept = output.kept()
    return copied_excerpt(output.path) if kept is None else excerpt(kept)


def excerpt(text: str, lines: int = 15) -> str:
    """The same of a log that has been read."""
    everything = plain(text).splitlines()
    shown = first_traceback(everything) or everything[-lines:]
    return "\n".join("  | " + line for line in shown) or "  | (the log is empty)"


def first_traceback(lines: list[str], most: int = 40) -> list[str]:
    """The first Python traceback in `lines`, cut in the middle to `most` lines; empty when there is none.

    Engines put a prefix before every line, such as "(EngineCore pid=7) ERROR 11-02 [core.py:9] ".
    """
    start = next((k for k, line in enumerate(lines) if "Traceback (most recent call last):" in line), None)
    if start is None:
        return []
    prefix = lines[start].partition("Traceback")[0]
    found = [lines[start]]
    for line in lines[start + 1 :]:
        body = line[len(prefix) :] if prefix.strip() and line[:8] == prefix[:8] else line
        found.append(line)
        if body and not body[0].isspace():  # the error itself ends it
            break
    return found if len(found) <= most else [*found[: most // 3], "    ...", *found[-2 * most // 3 :]]
