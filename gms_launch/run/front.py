"""How clients come in: where the frontend listens, what is before it, by which URL it is reached.

Without keys it is Dynamo's frontend itself, on loopback unless another address was asked for. With --api-key-file a
proxy takes the address and the port, and the frontend is on loopback behind it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gms_launch.engines import installed
from gms_launch.engines.base import LOOPBACK, DynamoPlane
from gms_launch.errors import UsageError
from gms_launch.numbers import numbered
from gms_launch.run.nodedir import NodeDir
from gms_launch.run.ports import Ports
from gms_launch.run.topology import Topology
from gms_launch.services import certificate, etcd, frontend, keyring, proxy
from gms_launch.services.base import Service, find_binary
from gms_launch.settings.declared import Settings
from gms_launch.urls import is_loopback

#: The frontend may be silent for longer than etcd: nobody ends because of it.
LATER = 4


@dataclass(frozen=True)
class Front:
    """The way in to one run."""

    settings: Settings
    topology: Topology
    ports: Ports
    node_dir: NodeDir

    @property
    def here(self) -> bool:
        """Whether this node has one."""
        return self.topology.node_rank < self.number

    @property
    def apart(self) -> bool:
        """Whether a frontend and an engine of the run are on different nodes, groups aside."""
        return self.number > 1 or self.settings.hybrid

    @property
    def number(self) -> int:
        """How many the run has, on its first nodes. Each is one of its own: nothing is before them."""
        return self.settings.fronts(self.topology.nnodes)

    @property
    def address(self) -> str:
        """Where clients come in. Another address than loopback takes a word of the user's."""
        said = self.settings.frontend_host
        let_in = self.settings.api_key_file or self.settings.open_frontend
        own = self.topology.address if self.here and self.number > 1 else self.topology.leader_address
        return said or (own if let_in else LOOPBACK)

    @property
    def tls(self) -> bool:
        return bool(self.settings.tls_cert)

    @property
    def proxied(self) -> bool:
        return bool(self.settings.api_key_file)

    @property
    def url(self) -> str:
        address = etcd.host(frontend.connect_address(self.address))
        return f"{'https' if self.tls else 'http'}://{address}:{self.ports.frontend}"

    @property
    def hint(self) -> str:
        """How to reach it from elsewhere, for people; empty when the URL says all."""
        elsewhere = self.topology.nnodes > 1 or "SLURM_JOB_ID" in os.environ
        if not (elsewhere and is_loopback(self.address)):
            return ""
        if not self.here:
            return ", on the leader's node only"
        port = self.ports.frontend
        tunnel = f"ssh -L {port}:{etcd.host(self.address)}:{port} {self.topology.host}"
        return f", on {self.topology.host} only; from elsewhere: {tunnel}"

    @property
    def where(self) -> frontend.Where:
        """Where the agent asks: always the frontend itself, so that a fault of the proxy is no fault of an engine."""
        if self.proxied:
            return frontend.Where(LOOPBACK, self.ports.frontend_inner)
        return self._outer

    @property
    def _outer(self) -> frontend.Where:
        return frontend.Where(frontend.connect_address(self.address), self.ports.frontend, self.tls)

    @property
    def proxy(self) -> proxy.Proxy:
        return proxy.Proxy(self.address, self.ports.frontend, self.tls, self.where, self._outer, self.node_dir.path)

    def services(self, plane: DynamoPlane, python: str) -> list[Service]:
        """What runs for clients on the leader node, in the order of its start."""
        s, liveness = self.settings, LATER * self.settings.service_liveness
        own_tls = self.tls and not self.proxied
        front = frontend.Frontend(
            address=LOOPBACK if self.proxied else self.address,
            port=self.ports.frontend_inner if self.proxied else self.ports.frontend,
            plane=plane,
            migration_limit=s.migration_limit,
            tls_cert=s.tls_cert if own_tls else "",
            tls_key=s.tls_key if own_tls else "",
        )
        found = [frontend.service(front, python, s.service_timeout, liveness)]
        if self.proxied:
            found.append(proxy.service(self.proxy, self.binary(), s.service_timeout, liveness))
        return found

    def binary(self) -> str:
        """Raises `UsageError`."""
        return find_binary("haproxy_bin", self.settings.haproxy_bin, "haproxy", "haproxy")

    def described(self) -> str:
        """The proxy and the keys, for people. Raises `UsageError`."""
        binary = self.binary()
        version = proxy.check_version(binary)
        return f"{binary} {version}, {numbered(len(self.keys()), 'key')} in {self.settings.api_key_file}"

    def keys(self) -> tuple[str, ...]:
        """The keys of now, hashed. Raises `UsageError`."""
        return keyring.read(Path(self.settings.api_key_file))

    def configure(self) -> tuple[str, ...]:
        """Write what the proxy needs, and return the keys. Raises `UsageError` and `OSError`."""
        if not self.proxied:
            return ()
        pem = certificate.check(self.settings.tls_cert, self.settings.tls_key) if self.tls else ""
        keys = self.keys()
        proxy.configure(self.proxy, keys, pem)
        return keys

    def check(self) -> None:
        """Raise `UsageError` for what would stop it from coming up; for a node that has one only."""
        if self.number > self.topology.nnodes:
            nodes = numbered(self.topology.nnodes, "node")
            raise UsageError(f"frontends {self.number}: each is on a node of its own, and engines are on {nodes}")
        if self.number > 1 and self.settings.frontend_host not in ("", "0.0.0.0", "::"):
            raise UsageError(
                f"--frontend-host {self.settings.frontend_host} is one node's, and --frontends {self.number} are on "
                "several: leave it out, or say 0.0.0.0"
            )
        python = self.settings.python
        if installed.look(python, ("dynamo.frontend",)).missing:
            raise UsageError(
                f"dynamo.frontend cannot be imported by {python or sys.executable}; pip install 'gms-launch[dynamo]'"
            )
        if said := [name for name in frontend.OWNED if os.environ.get(name)]:
            raise UsageError(
                f"{said[0]} is set in the environment, so that the agent could not reach its own frontend: unset it; "
                "HTTPS is --tls-cert and --tls-key, and clients are asked for a key with --api-key-file"
            )
        if self.tls:
            certificate.check(self.settings.tls_cert, self.settings.tls_key)
        if self.proxied:
            self.described()
