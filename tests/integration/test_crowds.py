"""Another user of a node who holds connections by the thousand at ports where he has no business."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import selectors
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gms_launch.process import clients, listener
from gms_launch.run import credentials
from gms_launch.services import etcd_proxy
from tests.integration.test_etcd_proxy import begin
from tests.integration.test_strangers import DROP
from tests.support import LONG, Deployment, eventually, free_port

pytestmark = [pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")]

#: Holds $2 connections to port $1 and says nothing; one that is ended is held anew.
HOLDS = """
import resource, select, socket, sys
port, count = map(int, sys.argv[1:])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held, poll, told = {}, select.poll(), ""
while True:
    while len(held) < count:
        s = socket.socket()
        s.setblocking(False)
        s.connect_ex(("127.0.0.1", port))
        held[s.fileno()] = s
        poll.register(s, select.POLLIN)
    if not told:
        told = print("there", flush=True) or "there"
    for fd, _ in poll.poll(100):
        poll.unregister(fd)
        held.pop(fd).close()
        if told == "there":
            told = print("ended", flush=True) or "ended"  # once: nobody may read what more there is
"""


@contextmanager
def crowd(port: int, count: int) -> Iterator[subprocess.Popen[str]]:
    argv = [*DROP, "/usr/bin/python3", "-c", HOLDS, str(port), str(count)]
    with subprocess.Popen(argv, cwd="/", stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        try:
            assert stranger.stdout.readline() == "there\n"
            yield stranger
        finally:
            stranger.kill()


def hello() -> bytes:
    """How somebody begins who speaks TLS."""
    said = ssl.MemoryBIO()
    talk = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), said, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        talk.do_handshake()
    return said.read()


def serve(listener: socket.socket, greeted: list[socket.socket]) -> None:
    """Greet everybody, and end what they end, as a member of etcd does. Ends with its listener."""
    with selectors.DefaultSelector() as all_of_them:
        all_of_them.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in all_of_them.select():
                found = key.fileobj
                assert isinstance(found, socket.socket)
                try:
                    if found is listener:
                        connection = listener.accept()[0]
                        greeted.append(connection)
                        connection.sendall(b"served")
                        all_of_them.register(connection, selectors.EVENT_READ)
                        continue
                    if found.recv(4096):
                        continue
                except OSError:
                    if found is listener:
                        return
                all_of_them.unregister(found)
                found.close()


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "home", model, "--event-plane", "nats") as deployment:
        deployment.wait_full()
        yield deployment


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 8192, reason="too few descriptors (ulimit -n)")
def test_who_holds_all_places_of_etcds_proxy_is_turned_out_and_nobody_else(tmp_path: Path) -> None:
    secrets = credentials.make(("127.0.0.1",))
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as member:
        greeted: list[socket.socket] = []
        threading.Thread(target=serve, args=(member, greeted), daemon=True).start()
        access = secrets.access((f"https://127.0.0.1:{member.getsockname()[1]}",))
        near = etcd_proxy.EtcdProxy(free_port(), access, tmp_path)
        etcd_proxy.configure(near)
        # Whether the member is well is not what this is about.
        near.config.write_text(near.config.read_text().replace("check check-ssl verify required ca-file", "#"))
        service = etcd_proxy.service(near, "/usr/sbin/haproxy", access, 60.0)
        assert service.private == (near.port,)
        listens, proxy = begin(service)

        def come(timeout: float = 1.0) -> socket.socket | None:
            client = socket.socket()
            client.settimeout(timeout)
            try:
                client.connect(("127.0.0.1", near.port))
                client.sendall(hello())
                if client.recv(6) == b"served":
                    return client
            except OSError:
                pass
            client.close()
            return None

        def is_full() -> bool:
            if len(os.listdir(f"/proc/{proxy.pid}/fd")) < 1600:
                return False  # it is busy, and not full
            if (client := come()) is not None:
                client.close()
            return client is None

        try:
            before = eventually(come, what="the proxy is up")
            with crowd(near.port, 2200) as stranger:
                eventually(is_full, what="whoever comes now waits")
                assert listener.turn_out(proxy.pid, service.private) > 1500
                assert stranger.stdout is not None and stranger.stdout.readline() == "ended\n"
                before.setblocking(False)
                with pytest.raises(BlockingIOError):
                    before.recv(1)
                after = eventually(
                    lambda: come(5.0) if listener.turn_out(proxy.pid, service.private) else None,
                    what="there is a place for us, although he comes again and again",
                )
                after.close()
            before.close()
            assert len(greeted) < 1000, "who says nothing is not led to a member"
        finally:
            proxy.kill()
            proxy.wait()
            listens.close()
            member.shutdown(socket.SHUT_RDWR)


def test_a_crowd_at_a_runs_port_is_turned_out_and_told(run: Deployment) -> None:
    before, lives = run.text(), [c["incarnation"] for c in run.status()["cohorts"]]
    assert before
    port = run.run_file["ports"]["nats"]
    with crowd(port, 400) as stranger:
        assert stranger.stdout is not None and stranger.stdout.readline() == "ended\n"
        told, *_ = run.happened("service_crowded")  # told again where the crowd stays for long
    assert told["detail"].startswith("nats ") and f"other users of this machine to port {port} ended" in told["detail"]
    eventually(lambda: run.text() == before)
    assert [c["incarnation"] for c in run.wait_full()["cohorts"]] == lives
    assert not run.events("service_exited")


@pytest.mark.slow
def test_a_crowd_at_an_engines_ports_is_turned_out_and_it_is_not_taken_for_hung(tmp_path: Path, model: Path) -> None:
    """Without a descriptor left an engine answers nobody who asks how it is. What is asked of it while all are taken
    may fail, so that is looked at when they have gone.
    """
    flags = ("--health-interval", "4", "--health-timeout", "12")
    with Deployment(tmp_path / "home", model, *flags) as run:
        before, found = run.text(), run.wait_full()
        assert before
        run.happened("hold_armed")
        engine = run.cohort(found["primary"])["ranks"][0]["pid"]
        limit = len(os.listdir(f"/proc/{engine}/fd")) + 800  # and the rest waits for its turn, as the agent does
        resource.prlimit(engine, resource.RLIMIT_NOFILE, (limit, limit))
        (requests,) = re.findall(r"127\.0\.0\.1:(\d+)/", run.etcdctl("get", "--prefix", "v1/instances/"))
        for port, seconds in ((run.run_file["ports"]["system"][found["primary"]], 20.0), (int(requests), 0.0)):
            with crowd(port, 1000) as stranger:
                assert stranger.stdout is not None and stranger.stdout.readline() == "ended\n"
                until = time.monotonic() + seconds  # longer than it may be silent
                eventually(lambda t=until: time.monotonic() > t)
            eventually(lambda: run.text() == before, LONG)
        told, *_ = run.happened("engine_crowded")
        assert told["cohort_id"] == found["primary"] and "other users of this machine" in told["detail"]
        assert not run.events("hung") and run.wait_full()["primary"] == found["primary"]
        assert run.cohort(found["primary"])["ranks"][0]["pid"] == engine


def test_an_etcd_that_a_crowd_made_deaf_to_its_peers_is_started_again(run: Deployment) -> None:
    """Without a descriptor left for one connection it takes in none there for good, and keeps a core busy with that."""
    before, lives = run.text(), [c["incarnation"] for c in run.status()["cohorts"]]
    etcd = next(s for s in run.status()["nodes"][0]["services"] if s["name"] == "etcd")
    port = run.run_file["ports"]["etcd_peer"]
    resource.prlimit(etcd["pid"], resource.RLIMIT_NOFILE, (100, 100))
    with crowd(port, 600):
        eventually(lambda: clients.waiting(port), what="it has no descriptor left")
        eventually(lambda: run.events("service_exited"), what="it is started again")
    told, *_ = run.events("service_exited")
    assert f"takes in nobody at its peers' port {port}" in told["detail"]
    assert [c["incarnation"] for c in run.wait_full()["cohorts"]] == lives, "nothing else was"
    eventually(lambda: run.text() == before)
    eventually(lambda: not clients.waiting(port), what="and it takes in who comes")


def test_a_connection_that_ends_while_it_is_taken_is_no_reason_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """NATS ends who says nothing, too: one may be closed between the list of its descriptors and the look at it."""
    with socket.socketpair()[0] as here:
        inode = os.readlink(f"/proc/self/fd/{here.fileno()}")[len("socket:[") : -1]
        listed = [(1 << 20, inode), (here.fileno(), inode)]
        monkeypatch.setattr(listener, "_sockets", lambda pid: listed)
        assert listener._end(os.getpid(), {inode}) == 1
        assert here.recv(1) == b""
