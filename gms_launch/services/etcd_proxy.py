"""HAProxy between Dynamo's processes of a node and an etcd of several members: one endpoint that always leads to one
that lives.

Dynamo's client (tried with 1.4.2) spreads its calls over all endpoints that it is told of. A member that is silent
may take the leases and watches that went by it with it; one that is gone makes many calls fail until it is back.
Nothing is opened on the way: they show each other their certificates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gms_launch.control.access import Access
from gms_launch.process.lifecycle import Command
from gms_launch.services import etcd, proxy
from gms_launch.services.base import LISTENS, NotReadyError, Service
from gms_launch.spool.files import write_private

NAME = "etcd-proxy"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class EtcdProxy:
    """Where Dynamo's processes of a node find etcd (its loopback, at `port`), and the files, ours alone.

    `access` is Dynamo's to the members, the one to go to first: the others are for when it is gone.
    """

    port: int
    access: Access
    directory: Path

    @property
    def url(self) -> str:
        return f"https://{LOOPBACK}:{self.port}"

    @property
    def config(self) -> Path:
        return self.directory / f"{NAME}.cfg"

    @property
    def ca(self) -> Path:
        return self.directory / f"{NAME}.ca"

    @property
    def pem(self) -> Path:
        return self.directory / f"{NAME}.pem"

    @property
    def socket(self) -> Path:
        return self.directory / f"{NAME}.sock"


def configure(near: EtcdProxy) -> None:
    """Write what it reads, and reads again when it is restarted. Raises `OSError`."""
    write_private(near.ca, near.access.ca)
    write_private(near.pem, near.access.cert + near.access.key)
    write_private(near.config, text(near))


def text(near: EtcdProxy) -> str:
    """HAProxy's configuration.

    A member is looked at by a handshake, which one that is frozen does not answer; two that fail take 2.2 s at most,
    less than half of the shortest lease. Who was connected to it comes again at once, and is led to the next.
    """
    places = [_place(url) for url in near.access.endpoints]
    servers = "\n".join(
        f"    server m{k} {host}:{port}{' backup' if k else ''}" for k, (host, port) in enumerate(places)
    )
    return f"""\
global
    fd-hard-limit 4096
    nbthread 1
    stats socket {near.socket} mode 600 level admin
defaults
    mode tcp
    timeout connect 1s
    timeout check 700ms
    # A watch may have nothing to say for days.
    timeout client 24d
    timeout server 24d
    retries 3
    option redispatch 1
    default-server check check-ssl verify required ca-file {near.ca} crt {near.pem}
    default-server inter 500ms fastinter 250ms downinter 1s fall 2 rise 1
    default-server observe layer4 error-limit 1 on-error mark-down on-marked-down shutdown-sessions
frontend dynamo
    bind "fd@${{{LISTENS}}}"
    # Who does not begin to speak as Dynamo does is not led to a member.
    tcp-request inspect-delay 5s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    tcp-request content reject
    default_backend etcd
backend etcd
{servers}
"""


def _place(url: str) -> tuple[str, int]:
    found = urlsplit(url)
    return etcd.host(found.hostname or ""), found.port or 2379


def service(near: EtcdProxy, binary: str, asked: Access, timeout: float, liveness: float = 0.0) -> Service:
    """It, ready within `timeout` seconds when a member answers through it, and restarted when it is itself silent for
    `liveness` (0: never). `asked`: an agent's way to etcd through it.
    """
    command = Command((binary, "-db", "-f", str(near.config)), {})
    return Service(
        *(NAME, command, lambda: etcd.led(asked), timeout),
        port=near.port,
        liveness=liveness,
        alive=lambda: _answers(near),
        private=(near.port,),
        binds=(LOOPBACK, near.port),
    )


def _answers(near: EtcdProxy) -> None:
    """It is well whether or not etcd is. Raises `NotReadyError`."""
    try:
        proxy.ask(near.socket, "show version")
    except OSError as exc:
        raise NotReadyError(f"{near.socket}: {exc}") from None


def move(near: EtcdProxy, before: Sequence[str]) -> None:
    """Lead to where the members are now, `before` being where they were; who is connected stays. Raises `OSError`."""
    configure(near)
    for number, (url, old) in enumerate(zip(near.access.endpoints, before, strict=True)):
        if url != old:
            host, port = _place(url)
            said = proxy.ask(near.socket, f"set server etcd/m{number} addr {host.strip('[]')} port {port}")
            if "changed" not in said:
                raise OSError(f"haproxy: {said}")
