"""SSH through paramiko, the only module that imports it: connect with the user's own configuration, run, stop.

Host keys are checked against the user's and the system's known_hosts and never accepted unseen. ~/.ssh/config is
honoured for HostName, User, Port, IdentityFile and UserKnownHostsFile.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import paramiko

from gms_launch.errors import NoContactError, UsageError
from gms_launch.transport.base import Done

SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
# What goes wrong is raised, and said once by whoever asked; on the terminal paramiko's own lines only disturb.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False
#: A dead peer is noticed within about three of these (seconds).
KEEPALIVE = 10
#: What paramiko raises of a server that does not do its part; the second, without a word, when it hangs up.
BROKEN = (paramiko.SSHException, EOFError, OSError)


class Connection:
    """An open connection to one host."""

    def __init__(self, host: str, client: paramiko.SSHClient) -> None:
        self.host = host
        self._client = client

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def start(self, argv: Sequence[str], first: str = "") -> Remote:
        """Start a command. On its standard input it gets `first`, and end of file when this side ends it or is gone."""
        try:
            stdin, stdout, stderr = self._client.exec_command(shlex.join(argv))
            stdin.write(first)
            stdin.flush()
        except BROKEN as exc:
            why = str(exc) or type(exc).__name__
            raise NoContactError(f"{self.host}: the command could not be started: {why}") from None
        return Remote(self.host, stdin, stdout, stderr)

    def run(self, argv: Sequence[str], timeout: float) -> Done:
        """Run a command to its end. Raises `NoContactError` when that does not come in time."""
        remote = self.start(argv)
        remote.end_input()
        remote.set_timeout(timeout)
        try:
            out, err = remote.read()
        except OSError:
            raise NoContactError(f"{self.host}: {shlex.join(argv)} did not end within {timeout:g} s") from None
        return Done(remote.exit_code(), out, err, "ssh")


class Remote:
    """A command that runs on a host."""

    def __init__(self, host: str, stdin: Any, stdout: Any, stderr: Any) -> None:
        self.host = host
        self._stdin, self._stdout, self._stderr = stdin, stdout, stderr

    def set_timeout(self, seconds: float) -> None:
        self._stdout.channel.settimeout(seconds)

    def lines(self) -> Iterator[str]:
        """Its output as it comes, in whatever letters."""
        for line in self._stdout.channel.makefile("rb"):
            yield line.decode(errors="replace").rstrip("\n")

    def read(self) -> tuple[str, str]:
        """All its output and all its error output."""
        return self._stdout.read().decode(errors="replace"), self._stderr.read().decode(errors="replace")

    def errors(self) -> str:
        return str(self._stderr.read().decode(errors="replace")).strip()

    def exit_code(self) -> int:
        """Waits for the end; -1 when the connection broke before."""
        return int(self._stdout.channel.recv_exit_status())

    def end_input(self, last: str = "") -> None:
        """End its standard input, with a last word: an agent takes the end for "stop"."""
        with contextlib.suppress(OSError):  # it is gone already
            self._stdin.write(last)
            self._stdin.flush()
            self._stdin.channel.shutdown_write()


def split(host: str) -> tuple[str | None, str, int | None]:
    """User, name and port of `[user@]host[:port]`. Raises `UsageError`."""
    found = re.fullmatch(r"(?:([^@\s]+)@)?([^@:\s]+)(?::([0-9]{1,9}))?", host)
    if found is None:
        raise UsageError(f"host {host[:120]!r}: expected [user@]host[:port]")
    port = int(found.group(3)) if found.group(3) else None
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"host {host!r}: {port} is no port (1 to 65535)")
    return found.group(1), found.group(2), port


def options(name: str) -> dict[str, Any]:
    """What ~/.ssh/config says of a host."""
    path = Path.home() / ".ssh" / "config"
    if not path.is_file():
        return {}
    return dict(paramiko.SSHConfig.from_path(str(path)).lookup(name))


def connect(host: str, timeout: float = 10.0) -> Connection:
    """Connect to `[user@]host[:port]`. Raises `NoContactError` with the host's name and what to do."""
    user, name, port = split(host)
    config = options(name)
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    for file in [SYSTEM_KNOWN_HOSTS, *str(config.get("userknownhostsfile", "")).split()]:
        with contextlib.suppress(OSError):
            client.load_system_host_keys(str(Path(file).expanduser()))
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    address = config.get("hostname", name)
    keys = [str(Path(f).expanduser()) for f in config.get("identityfile", [])]
    explain: Callable[[object], NoContactError] = lambda why: NoContactError(f"{host}: {why}")  # noqa: E731
    try:
        client.connect(
            address,
            port=port or int(config.get("port", 22)),
            username=user or config.get("user"),
            key_filename=keys or None,  # type: ignore[arg-type]  # a list is fine, and the stubs do not know
            timeout=timeout,
            banner_timeout=timeout,
            auth_timeout=timeout,
        )
    except paramiko.BadHostKeyException as exc:
        client.close()
        raise explain(
            f"its host key is not the one in known_hosts ({exc.key.get_name()}): somebody else may answer"
        ) from None
    except paramiko.AuthenticationException as exc:
        client.close()
        raise explain(f"login refused ({exc}); `ssh {host} true` must work without a password") from None
    except BROKEN as exc:
        client.close()
        text = str(exc) or type(exc).__name__
        if isinstance(exc, EOFError):
            text = "its SSH server hung up before we were let in: is it stopping, or has it too many who log in?"
        if isinstance(exc, TimeoutError) or "banner" in text or "No existing session" in text:
            text = f"no SSH server answers there within {timeout:g} s: is the host frozen, or overloaded?"
        if "not found in known_hosts" in text:
            text = f"its host key is not in known_hosts; connect once with `ssh {host}` and check the key"
        raise explain(text) from None
    transport = client.get_transport()
    assert transport is not None
    transport.channel_timeout = timeout  # a host may freeze at any time, and paramiko waits for an hour
    transport.set_keepalive(KEEPALIVE)
    return Connection(host, client)
