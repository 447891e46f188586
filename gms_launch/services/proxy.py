"""HAProxy in front of Dynamo's frontend, which asks nobody for a key: it does, and speaks HTTPS where that is wanted.

It runs only with --api-key-file. What clients must find unchanged behind it: streams come token by token, a stream or a
request that waits for the next engine is cut by no timeout, nothing is asked twice, and whoever hangs up is heard to.
"""

from __future__ import annotations

import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gms_launch.errors import UsageError
from gms_launch.process.lifecycle import Command
from gms_launch.services.base import LISTENS, NotReadyError, Service, http_answer
from gms_launch.services.etcd import host
from gms_launch.services.frontend import Where
from gms_launch.spool.files import write_private

#: `http_auth_bearer` is not in older ones.
OLDEST = (2, 5)
#: Lines of one command on its socket: it takes 16 KiB.
AT_ONCE = 100
#: What anybody may ask, for load balancers: GET or HEAD, answered without what the frontend says of its engines.
OPEN = ("/health", "/live")
#: What needs a key and does no harm; who comes without must be turned away.
ASKED = "/v1/models"


@dataclass(frozen=True)
class Proxy:
    """Where clients come in (`address`, `port`, with `tls`), the frontend behind, and the files, ours alone."""

    address: str
    port: int
    tls: bool
    inner: Where
    where: Where
    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "proxy.cfg"

    @property
    def keys(self) -> Path:
        return self.directory / "proxy.keys"

    @property
    def pem(self) -> Path:
        return self.directory / "proxy.pem"

    @property
    def socket(self) -> Path:
        return self.directory / "proxy.sock"


def configure(proxy: Proxy, hashes: tuple[str, ...], pem: str = "") -> None:
    """Write what the proxy reads, and reads again when it is restarted. Raises `OSError`."""
    write_private(proxy.keys, _map(hashes))
    if proxy.tls:
        write_private(proxy.pem, pem)
    write_private(proxy.config, text(proxy))


def text(proxy: Proxy) -> str:
    """HAProxy's configuration."""
    tls = f" ssl crt {proxy.pem} alpn http/1.1 ssl-min-ver TLSv1.2" if proxy.tls else ""
    return f"""\
global
    # Two descriptors a connection, as many as the agent may have; threads for streams, not one for every core.
    fd-hard-limit 65536
    nbthread 4
    stats socket {proxy.socket} mode 600 level admin
defaults
    mode http
    timeout connect 5s
    # A stream stands still for as long as a failover takes, and a request may wait for its first token as long.
    timeout server 24d
    # Does not count while the client waits for us. A handshake that is not gone on with has no other limit.
    timeout client 5m
    timeout tunnel 24d
    timeout http-request 30s
    timeout http-keep-alive 5m
    # Whoever is gone without a word is found by the kernel.
    option clitcpka
    clitcpka-idle 60s
    clitcpka-intvl 15s
    clitcpka-cnt 4
    # Nothing is asked twice, and nothing is sent on a connection that the frontend may have closed.
    retries 0
    no option redispatch
    http-reuse never
    option http-server-close
    # Token by token; and who hangs up before the first is given up.
    option http-no-delay
    option abortonclose
    http-error status 502 content-type application/json string '{_error("the frontend ended in the middle")}'
    http-error status 503 content-type application/json string '{_error("the frontend is not there, try again")}'
frontend clients
    bind "fd@${{{LISTENS}}}"{tls}
    # Hashes are looked up and not keys, so the time that it takes tells nothing of a key.
    acl known http_auth_bearer,sha2(256),hex,map({proxy.keys}) -m found
    acl open path {" ".join(OPEN)}
    acl looks method GET HEAD
    http-request return status 401 content-type application/json hdr WWW-Authenticate Bearer string \
'{_error("a key is needed: Authorization: Bearer KEY", "invalid_api_key")}' if !known !open or !known !looks
    http-request set-var(txn.stranger) bool(true) if !known
    http-request del-header upgrade if !known
    http-request del-header authorization
    http-response return status 200 content-type text/plain string "ok\\n" if \
{{ var(txn.stranger) -m bool }} {{ status 200 }}
    http-response return status 503 content-type text/plain string "not well\\n" if {{ var(txn.stranger) -m bool }}
    default_backend dynamo
backend dynamo
    server frontend {host(proxy.inner.address)}:{proxy.inner.port}
"""


def _error(message: str, code: str = "unavailable") -> str:
    """An error as OpenAI's clients read it. Quotes of another kind would end the string in the configuration."""
    kind = "invalid_request_error" if code == "invalid_api_key" else "server_error"
    return f'{{"error":{{"message":"{message}","type":"{kind}","param":null,"code":"{code}"}}}}'


def _map(hashes: tuple[str, ...]) -> str:
    return "".join(f"{name} 1\n" for name in hashes)


def service(proxy: Proxy, binary: str, timeout: float, liveness: float = 0.0) -> Service:
    """The proxy, ready within `timeout` seconds and restarted when it is silent for `liveness` (0: never)."""
    # -db: in the foreground, as one process.
    command = Command((binary, "-db", "-f", str(proxy.config)), {})
    ready, at = lambda: probe(proxy), (proxy.address, proxy.port)
    return Service("proxy", command, ready, timeout, port=proxy.port, liveness=liveness, binds=at)


def probe(proxy: Proxy) -> None:
    """Whoever brings no key is turned away. Says nothing of the frontend, which has a probe of its own.

    Without a key of ours: whoever listens there instead would have it. Raises `NotReadyError`.
    """
    where = proxy.where
    status, _ = http_answer(where.address, where.port, ASKED, context=where.context)
    if status != 401:
        raise NotReadyError(f"GET {ASKED} without a key: HTTP {status}, and 401 is right")


def renew(proxy: Proxy, hashes: tuple[str, ...]) -> None:
    """Other keys from now on, for requests that come: nothing is reloaded, and streams go on.

    One that is not there reads them when it is. Raises `OSError`.
    """
    write_private(proxy.keys, _map(hashes))
    try:
        said = ask(proxy.socket, f"prepare map {proxy.keys}")
        found = re.search(r"New version created: (\d+)", said)
        if found is None:
            raise OSError(f"haproxy: {said}")
        version = found[1]
        for first in range(0, len(hashes), AT_ONCE):
            lines = _map(hashes[first : first + AT_ONCE])
            _expect_nothing(ask(proxy.socket, f"add map @{version} {proxy.keys} <<\n{lines}"))
        _expect_nothing(ask(proxy.socket, f"commit map @{version} {proxy.keys}"))
    except (ConnectionRefusedError, FileNotFoundError):
        return


def _expect_nothing(said: str) -> None:
    if said:
        raise OSError(f"haproxy: {said}")


def ask(path: Path, command: str) -> str:
    """One command on HAProxy's own socket. Raises `OSError`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2.0)
        connection.connect(str(path))
        connection.sendall(command.encode() + b"\n")
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return answer.decode(errors="replace").strip()


def check_version(binary: str) -> str:
    """The version. Raises `UsageError` for a HAProxy that is too old."""
    try:
        said = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise UsageError(f"{binary} -v: {exc}") from None
    found = re.search(r"version (\d+)\.(\d+)\S*", said)
    if found is None:
        raise UsageError(f"{binary} is no HAProxy: {said.strip()[:80]!r}")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise UsageError(
            f"{binary} is HAProxy {found[1]}.{found[2]}, and gms-launch needs {'.'.join(map(str, OLDEST))} or later"
        )
    return found[0].removeprefix("version ")
