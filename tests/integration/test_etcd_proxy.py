"""What leads Dynamo's processes of a node to a member of etcd that lives, with Dynamo's real runtime behind it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.control.access import Access
from gms_launch.control.client import Etcd, etcd3
from gms_launch.engines.base import DynamoPlane, Nats
from gms_launch.process import listener
from gms_launch.services import etcd_proxy
from gms_launch.services.base import LISTENS, NotReadyError, Service
from tests.integration.test_cluster import Three, three
from tests.support import LONG, eventually, free_port, gms_launch

__all__ = ["three"]

#: Of Dynamo's leases (seconds).
TTL = 10.0


class Near:
    """HAProxy before three members, and a Dynamo frontend that knows nothing but it."""

    def __init__(self, three: Three, directory: Path, *order: int) -> None:
        leaf = three.authority.leaf("dynamo", client=True)
        access = Access(tuple(map(three.url, order)), three.authority.cert, leaf.cert, leaf.key)
        self.near = etcd_proxy.EtcdProxy(free_port(), access, directory)
        etcd_proxy.configure(self.near)
        asked = Access((self.near.url,), three.authority.cert, three.root.cert, three.root.key)
        self.service = etcd_proxy.service(self.near, "/usr/sbin/haproxy", asked, 30.0)
        self.log = directory / "frontend.log"
        self.listens, self.proxy = begin(self.service)
        eventually(self.ready, LONG)
        here = Access((self.near.url,), access.ca, access.cert, access.key)
        env = dict(os.environ)
        for name, value in DynamoPlane("127.0.0.1", "ns", here, TTL, "zmq", Nats()).environment().items():
            env.pop(name, None) if value is None else env.update({name: value})
        self.port = free_port()
        argv = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(self.port)]
        env["DYN_LOG"] = "info,dynamo_runtime::transports::etcd=debug"
        with open(self.log, "wb") as log:
            self.frontend = subprocess.Popen([*argv, "--namespace", "ns"], env=env, stdout=log, stderr=log)
        eventually(lambda: self.watches() >= 1 and self.instances() is not None, LONG, self.log.read_text)

    def ready(self) -> bool:
        try:
            self.service.probe()
        except NotReadyError:
            return False
        return True

    def watches(self) -> int:
        """How often it has begun to watch."""
        return len(re.findall("Watch stream established", self.log.read_text()))

    def instances(self) -> str | None:
        """What it finds in etcd when it is asked how it is; None when it finds nothing out."""
        failed = self.log.read_text().count("Failed to fetch instances")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=60) as answer:
                found = json.load(answer)
        except OSError:
            return None
        return None if self.log.read_text().count("Failed to fetch instances") > failed else json.dumps(found)

    def close(self) -> None:
        for process in (self.frontend, self.proxy):
            process.kill()
            process.wait()
        self.listens.close()


def begin(service: Service) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a service that listens at a descriptor of ours."""
    assert service.binds is not None
    listens = listener.bind(*service.binds)
    number = listens.fileno()
    env = os.environ | {LISTENS: str(number)}
    return listens, subprocess.Popen(service.command.argv, env=env, pass_fds=[number])


@pytest.fixture
def near(three: Three, tmp_path: Path) -> Iterator[Near]:
    made = Near(three, tmp_path, 1, 2, 0)
    try:
        yield made
    finally:
        made.close()


def leases(three: Three, *numbers: int) -> set[int]:
    one = Etcd(three.access(*numbers), brisk=True)
    try:
        asked = etcd3.etcdrpc.LeaseLeasesRequest()
        found = one.call(lambda c: c.leasestub.LeaseLeases(asked, timeout=2.0), retry=LONG)
        return {lease.ID for lease in found.leases}
    finally:
        one.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_dynamo_keeps_its_lease_and_its_watch_when_the_member_that_it_talks_to_goes(
    three: Three, near: Near, how: signal.Signals
) -> None:
    """A frozen one is like a node that is switched off: no connection is ended, and nobody answers."""
    before, watches = leases(three, 0, 2), near.watches()
    assert before
    if how == signal.SIGKILL:
        three.kill(1)
    else:
        three.running[1].send_signal(how)
    eventually(lambda: near.watches() > watches, LONG, "it watches by another member")
    one = Etcd(three.access(0, 2), brisk=True)
    lease = one.grant(TTL)
    try:
        # One more lease, granted now and never renewed: once it is over, the others would be too.
        eventually(lambda: lease not in leases(three, 0, 2), LONG, "longer than a lease")
    finally:
        one.close()
    assert near.frontend.poll() is None and before <= leases(three, 0, 2), near.log.read_text()
    for _ in range(10):
        assert near.instances() is not None, "no call of its goes to the member that is gone"


def test_it_leads_to_where_a_member_is_now(three: Three, near: Near) -> None:
    before = near.near.access.endpoints
    # The first is nobody, the others are behind it.
    nobody = f"https://127.0.0.1:{free_port()}"
    moved = etcd_proxy.EtcdProxy(
        near.near.port,
        Access((nobody, nobody, three.url(2)), near.near.access.ca, near.near.access.cert, near.near.access.key),
        near.near.directory,
    )
    etcd_proxy.move(moved, before)
    three.kill(1)
    three.kill(0) if three.leads(2) else None
    eventually(near.ready, LONG, "by the one that is left in its list")
    assert nobody.rpartition(":")[2] in near.near.config.read_text()


def test_without_a_haproxy_nothing_is_started(tmp_path: Path, model: Path) -> None:
    env = {"GMS_LAUNCH_HOME": str(tmp_path / "home")}
    flags = ("--engine", "reference", "--model", str(model), "--virtual-gpus", "1", "--nnodes", "3", "--node-rank", "0")
    flags += ("--leader-addr", "127.0.0.1", "--interface", "lo", "--etcd-members", "3")
    flags += ("--haproxy-bin", str(tmp_path / "none"), "--frontend-port", str(free_port()))
    for verb in ("plan", "up"):
        done = gms_launch(verb, *flags, env=env)
        assert done.returncode == 2 and "haproxy_bin" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "home").exists()
    looked = gms_launch("doctor", *flags, env=env)
    assert looked.returncode == 1 and "FAIL  haproxy" in looked.stdout
