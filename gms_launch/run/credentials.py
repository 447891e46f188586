"""What only the run's own processes know: its certificates, and the secrets for what takes no certificate.

Made by the leader's agent before it starts anything, and given to the other agents by a file that only this user can
read (`RunDir`).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import NamedTuple

import msgspec

from gms_launch.control.access import Access
from gms_launch.control.authority import Authority, Leaf
from gms_launch.errors import LaunchError
from gms_launch.process.forked import fork


class Use(NamedTuple):
    """What a certificate is good for: whose name is in it, and whether it is shown by a server, a client or both."""

    cn: str
    server: bool = False
    client: bool = False


#: Every certificate of a run. The name in it is what etcd knows its owner by: agents are its root.
AGENT, ETCD, DYNAMO = "agent", "etcd", "dynamo"
USES: Mapping[str, Use] = {
    AGENT: Use("root", client=True),
    # Members show each other the certificate that they are servers with.
    ETCD: Use("etcd", server=True, client=True),
    DYNAMO: Use("dynamo", client=True),
}
#: Where every server of the leader's is reached, besides the addresses that other nodes know.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Pem(msgspec.Struct, frozen=True):
    """What the user gave for a server of their own, as PEM text: whom to trust and what to show; empty without TLS."""

    ca: str = ""
    cert: str = ""
    key: str = ""


class Credentials(msgspec.Struct, frozen=True):
    """`secret` is what the agents sign datagrams with; `leaves` has a certificate for each of `USES`.

    `external`: for an etcd that is not the run's own.
    """

    secret: str
    nats_user: str
    nats_password: str
    authority: Authority
    leaves: dict[str, Leaf]
    external: Pem | None = None

    def access(self, endpoints: tuple[str, ...], owner: str = AGENT) -> Access:
        """The run's etcd, as `owner` (one of `USES`) may reach it.

        Dynamo speaks TLS only if it has a certificate to show. A server that asks for none never sees it.
        """
        own, given = Pem(self.ca, *astuple(self.leaves[owner])), self.external or Pem()
        shown = own if self.external is None else given
        if given.ca and not given.cert and owner == DYNAMO:
            shown = Pem(given.ca, own.cert, own.key)
        return Access(endpoints, shown.ca, shown.cert, shown.key)

    @property
    def ca(self) -> str:
        """The certificate that everybody of the run trusts, as PEM text."""
        return self.authority.cert

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Credentials:
        """Raises `msgspec.MsgspecError`."""
        return msgspec.json.decode(text, type=cls)

    @classmethod
    def hidden(cls, word: str, external: Pem | None = None) -> Credentials:
        """For a plan that is printed: `word` stands for every secret."""
        return cls(word, "dynamo", word, Authority(word, word), {name: Leaf(word, word) for name in USES}, external)


def make(hosts: Sequence[str], external: Pem | None = None) -> Credentials:
    """New ones, for servers that are reached at `hosts`. `external`: see `Credentials`.

    In a process of its own, since what makes certificates would stay in the agent's memory. Not to be called when
    other threads run. Raises `LaunchError`.
    """
    reader, writer = os.pipe()
    if (child := fork()) == 0:
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                pipe.write(_made(hosts, external).to_json())
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    try:
        return Credentials.from_json(text)
    except msgspec.MsgspecError:
        raise LaunchError("the run's certificates could not be made; is the package cryptography sound?") from None


def for_member(known: Credentials, hosts: Sequence[str]) -> Leaf:
    """What a member of etcd on another node shows, which is reached at `hosts`. Blocks, and in a process of its own.

    Raises `LaunchError`.
    """
    asked = msgspec.json.encode((known.authority, tuple(hosts)))
    argv = [sys.executable, "-m", "gms_launch.run.credentials"]
    done = subprocess.run(argv, input=asked, capture_output=True, check=False)
    try:
        return msgspec.json.decode(done.stdout, type=Leaf)
    except msgspec.MsgspecError:
        raise LaunchError(f"no certificate could be made for etcd here: {done.stderr.decode()[-500:]}") from None


def _leaf(authority: Authority, name: str, hosts: Sequence[str]) -> Leaf:
    use = USES[name]
    everywhere = (*hosts, *LOOPBACK)
    return authority.leaf(use.cn, everywhere if use.server else (), server=use.server, client=use.client)


def _made(hosts: Sequence[str], external: Pem | None) -> Credentials:
    authority = Authority.create()
    leaves = {name: _leaf(authority, name, hosts) for name in USES}
    return Credentials(secrets.token_hex(16), "dynamo", secrets.token_hex(16), authority, leaves, external)


if __name__ == "__main__":
    ours, where = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[Authority, tuple[str, ...]])
    sys.stdout.buffer.write(msgspec.json.encode(_leaf(ours, ETCD, where)))
