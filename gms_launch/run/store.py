"""The run's etcd: its members and where they are, which of them is this node's, and who goes to which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gms_launch.control.access import Access
from gms_launch.errors import UsageError
from gms_launch.numbers import numbered
from gms_launch.run import outside
from gms_launch.run.credentials import DYNAMO, ETCD, Credentials
from gms_launch.run.nodedir import NodeDir
from gms_launch.run.ports import Ports
from gms_launch.run.topology import Topology
from gms_launch.services import etcd, etcd_proxy, proxy
from gms_launch.services.base import Service, find_binary
from gms_launch.services.pem import PemFiles
from gms_launch.settings.declared import Settings


@dataclass
class Whereabouts:
    """Where the members are, by the URLs that clients use, as far as this node knows: a run may change it."""

    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Store:
    """Etcd as one node sees it. `home` is the node's place in the run."""

    run: str
    settings: Settings
    home: Topology
    ports: Ports
    node_dir: NodeDir
    credentials: Credentials
    where: Whereabouts = field(default_factory=Whereabouts)

    @property
    def own(self) -> bool:
        """Whether it is the run's own, and not the user's."""
        return not self.settings.etcd_endpoints

    @property
    def members(self) -> int:
        """How many it is to have; 0 when it is the user's."""
        return self.settings.members(self.home.nnodes) if self.own else 0

    @property
    def several(self) -> bool:
        return self.members > 1

    @property
    def is_member(self) -> bool:
        """Whether one of them is on this node: they are on the first."""
        return self.home.node_rank < self.members

    @property
    def room(self) -> int:
        """What it may take of the node-local directory (bytes)."""
        return etcd.ROOM if self.is_member else 0

    @property
    def url(self) -> str:
        """Where clients reach this node's member."""
        return self.member().client_url

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where this node's agent finds etcd: at its own member first, and otherwise not all at the same."""
        if not self.own:
            return outside.endpoints(self.settings)
        found = self.where.known or (self._first,)
        if self.is_member and self.url in found:
            return (self.url, *(u for u in found if u != self.url))
        turn = -1 - self.home.node_rank % len(found)  # the first node has the most to do
        return found[turn:] + found[:turn]

    @property
    def _first(self) -> str:
        return f"https://{etcd.host(self.home.leader_address)}:{self.ports.etcd}"

    @property
    def access(self) -> Access:
        """Etcd, as an agent reaches it."""
        return self.credentials.access(self.endpoints)

    @property
    def for_dynamo(self) -> Access:
        """Etcd, as Dynamo's processes of this node reach it: of several members by a proxy (`services.etcd_proxy`)."""
        return self.credentials.access((self.near.url,) if self.several else self.endpoints, DYNAMO)

    @property
    def near(self) -> etcd_proxy.EtcdProxy:
        """What leads Dynamo's processes of this node to a member that lives, their own node's first."""
        members = self.credentials.access(self.endpoints, DYNAMO)
        return etcd_proxy.EtcdProxy(self.ports.etcd_proxy, members, self.node_dir.path)

    def near_services(self) -> list[Service]:
        """It as a service, of several members. Raises `UsageError` when there is no binary, or an old one."""
        if not self.several:
            return []
        s, near = self.settings, self.near
        binary = find_binary("haproxy_bin", s.haproxy_bin, "haproxy", "haproxy")
        proxy.check_version(binary)
        asked = self.credentials.access((near.url,))
        return [etcd_proxy.service(near, binary, asked, s.service_timeout, s.service_liveness)]

    def learn(self, known: Mapping[int, str] | tuple[str, ...]) -> bool:
        """Take over where the members are; says whether that is news."""
        found = tuple(known) if isinstance(known, tuple) else tuple(u for _, u in sorted(known.items()))
        news, self.where.known = found != self.where.known, found
        return news

    def name_of(self, node_rank: int) -> str:
        """What a node's member is called, of several."""
        return f"{self.run}-{node_rank}"

    def member(self, joins: str = "") -> etcd.Member:
        """This node's. `joins`: see `etcd.Member`."""
        here = etcd.Member(
            run=self.run,
            address=self.home.address if self.several else self.home.leader_address,
            port=self.ports.etcd,
            peer_port=self.ports.etcd_peer,
            data=self.node_dir.etcd_data,
            pem=self.files,
            access=self.credentials.access(()),
            members=max(1, self.members),
            name=self.name_of(self.home.node_rank) if self.several else "",
            joins=joins,
        )
        return replace(here, access=self.credentials.access((here.client_url,)))

    def check(self) -> None:
        """Raise `UsageError` for what would keep this node's member, or its proxy, from being started."""
        if self.members > self.home.nnodes:
            numbers = numbered(self.home.nnodes, "node")
            spares = f", and {numbered(self.settings.spares, 'spare')}" if self.settings.spares else ""
            raise UsageError(
                f"etcd_members {self.members}: each is on a node of its own, and the run has {numbers}{spares}"
            )
        if self.is_member:
            self.service()
        self.near_services()

    @property
    def files(self) -> PemFiles:
        return PemFiles.of(self.node_dir.path, ETCD)

    def service(self, joins: str = "") -> Service:
        """This node's member. Raises `UsageError` when there is no binary."""
        binary = find_binary("etcd_bin", self.settings.etcd_bin, "etcd", "etcd-server")
        return etcd.service(self.member(joins), binary, self.settings.service_timeout, self.settings.service_liveness)
