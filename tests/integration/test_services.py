"""Services as real processes: readiness by a real probe, the log when it does not come, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gms_launch.control.access import Access
from gms_launch.control.client import Etcd
from gms_launch.control.keys import prefix
from gms_launch.control.watch import Watch
from gms_launch.gms.devices import virtual_devices
from gms_launch.process import lifecycle
from gms_launch.process.lifecycle import Command
from gms_launch.run import credentials
from gms_launch.services import etcd as etcd_of_the_run
from gms_launch.services import gms, nats
from gms_launch.services import runner as runner_module
from gms_launch.services.base import NotReadyError, Service, StuckError, find_binary, restart_delay
from gms_launch.services.etcd import Answers, Member
from gms_launch.services.pem import PemFiles
from gms_launch.services.runner import ServiceError, ServiceRunner
from gms_launch.spool.output import Output
from tests.support import LONG, EtcdServer, eventually, free_port


@pytest.fixture
def run() -> Iterator[str]:
    name = "s" + uuid.uuid4().hex[:8]
    yield name
    assert lifecycle.kill_tagged(name, 60.0) == []


def output(directory: Path) -> Callable[[str], Output]:
    """What a service's runner is given to make the outputs of its starts with."""
    return lambda name: Output(directory / name)


def etcd_service(directory: Path, timeout: float = 60.0, port: int | None = None) -> Service:
    binary = find_binary("etcd_bin", "", "etcd", "etcd-server")
    secrets, port = credentials.make(("127.0.0.1",)), port or free_port()
    files = PemFiles.of(directory, credentials.ETCD)
    files.write(secrets.ca, secrets.leaves[credentials.ETCD])
    access = secrets.access((f"https://127.0.0.1:{port}",))
    member = Member("t", "127.0.0.1", port, free_port(), directory / "e", files, access)
    return etcd_of_the_run.service(member, binary, timeout)


def test_delays_grow_and_end() -> None:
    assert [restart_delay(n) for n in (1, 2, 3, 4)] == [0.0, 0.2, 0.4, 0.8]
    assert restart_delay(50) == 30.0
    assert restart_delay(50, 5.0) == 5.0


def test_etcd_is_asked_whether_it_lives_over_one_connection_for_as_long_as_it_answers(etcd: EtcdServer) -> None:
    answers = Answers(Access((etcd.url,)), LONG)

    def connections() -> set[str]:
        """Our sockets that are connected to etcd, by inode."""
        tables = [Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6")]
        rows = [line.split() for text in tables for line in text.splitlines()[1:]]
        found = {r[9] for r in rows if r[2].endswith(f":{etcd.port:04X}") and r[3] == "01"}
        return found & {name[8:-1] for fd in os.listdir("/proc/self/fd") if (name := link(fd)).startswith("socket:[")}

    def link(fd: str) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{fd}")
        return ""

    def does() -> bool:
        with contextlib.suppress(NotReadyError):
            answers()
            return True
        return False

    eventually(does)
    eventually(lambda: len(connections()) == 1, what="of an attempt that failed nothing is left")
    first = connections()
    for _ in range(5):
        answers()
    assert connections() == first
    answers.close()
    answers = Answers(Access((etcd.url,)), 1.0)
    eventually(does)
    eventually(lambda: len(connections()) == 1 and not connections() & first)
    first = connections()
    etcd.send(signal.SIGSTOP)
    with pytest.raises(NotReadyError):
        answers()
    etcd.send(signal.SIGCONT)
    eventually(does)
    assert connections() == first, "who was slow is not asked to shake hands as well"
    answers.close()


@pytest.mark.slow
def test_an_etcd_as_it_is_by_default_ends_no_connection_for_being_asked_whether_it_is_there(etcd: EtcdServer) -> None:
    """It ends one at the third ping that comes within 5 s of the last, or without a call; a silent one is noticed."""
    client, states = Etcd(Access((etcd.url,))), queue.Queue[str | None]()
    client.put("/a/landmark", b"")
    watch = Watch(client, [prefix("/a/")], lambda _: None, lambda _: None, states.put)
    answers = Answers(Access((etcd.url,)), LONG)
    answers()
    watch.start()
    assert states.get(timeout=LONG) is None
    with pytest.raises(queue.Empty):
        states.get(timeout=30.0)
    answers()
    etcd.send(signal.SIGSTOP)
    assert "ping" in (states.get(timeout=LONG) or "")
    etcd.send(signal.SIGCONT)
    watch.stop()
    client.close()
    answers.close()


def test_etcd_and_nats_become_ready_and_come_back(run: str, fast_dir: Path) -> None:
    port = free_port()
    server = nats.Server("127.0.0.1", port, fast_dir / "nats.conf", fast_dir / "n", "u", "p")
    nats.configure(server)
    assert (fast_dir / "nats.conf").stat().st_mode & 0o077 == 0
    binary = find_binary("nats_bin", "", "nats-server", "nats-server")
    services = [etcd_service(fast_dir), nats.service(server, binary, 60.0)]

    async def live() -> list[str]:
        seen: list[str] = []
        again = asyncio.Event()

        def told(runner: ServiceRunner, event: str, _: str) -> None:
            seen.append(f"{runner.service.name} {event}")
            if event == "restarted":
                again.set()

        for service in services:
            runner = ServiceRunner(service, f"{run}/{service.name}", 0, output(fast_dir), told)
            await runner.start()
            assert runner.state == "ready"
            again.clear()
            os.kill(runner.pid, signal.SIGKILL)
            await asyncio.wait_for(again.wait(), 60)
            service.probe()
            assert runner.starts == 2
            await runner.stop()
        return seen

    seen = asyncio.run(live())
    assert seen == [f"{name} {event}" for name in ("etcd", "nats") for event in ("ready", "exited", "restarted")]
    with pytest.raises(NotReadyError):
        nats.probe(server)


def test_a_service_that_dies_at_once_each_time_is_started_with_growing_pauses_and_that_is_told(
    run: str, fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process that is ready and ends, until it is left alone; then it is steady, and that is told too."""
    monkeypatch.setattr(runner_module, "STABLE_AFTER", 3.0)
    broken = fast_dir / "broken"
    broken.touch()
    code = f"import os, time\nif os.path.exists({str(broken)!r}): raise SystemExit(7)\ntime.sleep(600)"
    service = Service("fragile", Command((sys.executable, "-c", code), {}), lambda: None, 20.0)

    async def live() -> list[tuple[str, str, float]]:
        loop = asyncio.get_running_loop()
        seen: list[tuple[str, str, float]] = []
        looped, steady = asyncio.Event(), asyncio.Event()

        def told(runner: ServiceRunner, event: str, detail: str) -> None:
            seen.append((event, detail, loop.time()))
            if sum(e == "looping" for e, *_ in seen) >= 4:
                looped.set()
            if event == "steady":
                steady.set()

        runner = ServiceRunner(service, f"{run}/fragile", 0, output(fast_dir), told)
        broken.unlink()
        await runner.start()
        broken.touch()
        os.kill(runner.pid, signal.SIGKILL)
        await asyncio.wait_for(looped.wait(), 60)
        assert runner.status().state == "restarting" and "times in a row" in runner.status().detail
        broken.unlink()
        await asyncio.wait_for(steady.wait(), 60)
        assert (runner.state, runner.detail) == ("ready", "")
        await runner.stop()
        return seen

    seen = asyncio.run(live())
    looping = [(detail, at) for event, detail, at in seen if event == "looping"]
    assert (
        "ended 3 times in a row, each time within 3 s of its start; the next start after a pause of 0.4 s"
        in (looping[0][0])
    )
    gaps = [b[1] - a[1] for a, b in pairwise(looping[:4])]
    assert all(gap >= pause for gap, pause in zip(gaps, (0.4, 0.8, 1.6), strict=True)), gaps


@pytest.mark.parametrize(
    ("does", "error", "patience"),
    [
        ("while True: pass", NotReadyError, 5),
        ("while True: pass", StuckError, 1),
        ("import time; time.sleep(600)", NotReadyError, 1),
    ],
)
def test_a_service_that_is_silent_and_at_work_is_given_its_time(
    run: str, fast_dir: Path, does: str, error: type[NotReadyError], patience: int
) -> None:
    """To start it again would make it no less busy. One that hangs does nothing."""
    told = queue.Queue[str]()

    def silent() -> None:
        raise error("says nothing")

    async def live() -> None:
        command = Command((sys.executable, "-c", does), {})
        service = Service("x", command, lambda: None, 60.0, liveness=0.6, alive=silent, bears_load=True)
        tell = lambda _, kind, detail: told.put(detail) if kind == "exited" else None  # noqa: E731
        runner = ServiceRunner(service, f"{run}/x", 0, output(fast_dir), tell)
        await runner.start()
        why = await asyncio.to_thread(told.get, True, LONG)
        assert why == f"killed: no answer for {patience * 0.6:g} s (says nothing)"
        await runner.stop()

    asyncio.run(live())


def test_a_wrong_password_is_not_ready(run: str, fast_dir: Path) -> None:
    port = free_port()
    server = nats.Server("127.0.0.1", port, fast_dir / "nats.conf", fast_dir / "n", "u", "p")
    nats.configure(server)
    binary = find_binary("nats_bin", "", "nats-server", "nats-server")

    async def live() -> None:
        service = nats.service(server, binary, 60.0)
        runner = ServiceRunner(service, f"{run}/nats", 0, output(fast_dir), lambda *_: None)
        await runner.start()
        with pytest.raises(NotReadyError, match="Authorization Violation"):
            nats.probe(replace(server, password="wrong"))
        await runner.stop()

    asyncio.run(live())


def test_who_has_the_port_of_etcds_peers_is_told_too(run: str, fast_dir: Path) -> None:
    async def live() -> None:
        service = etcd_service(fast_dir)
        with socket.create_server(("127.0.0.1", service.private[1])), pytest.raises(ServiceError) as caught:
            await ServiceRunner(service, f"{run}/etcd", 0, output(fast_dir), lambda *_: None).start()
        said = f"; a process of uid {os.getuid()} listens on port {service.private[1]}\n"
        assert "ended while it was starting" in str(caught.value) and said in str(caught.value)

    asyncio.run(live())


def test_a_service_that_cannot_start_shows_its_log_at_once(run: str, fast_dir: Path) -> None:
    async def live() -> None:
        first = ServiceRunner(etcd_service(fast_dir, port=port), f"{run}/etcd", 0, output(fast_dir), lambda *_: None)
        await first.start()
        (fast_dir / "two").mkdir()
        second = etcd_service(fast_dir / "two", timeout=1000.0, port=port)
        begun = asyncio.get_running_loop().time()
        with pytest.raises(ServiceError, match="ended while it was starting") as caught:
            await ServiceRunner(second, f"{run}/etcd", 0, output(fast_dir), lambda *_: None).start()
        assert asyncio.get_running_loop().time() - begun < 300.0
        assert "address already in use" in str(caught.value)
        assert f"; a process of uid {os.getuid()} listens on port {port}\n" in str(caught.value), "who has it is told"
        await first.stop()

    port = free_port()
    asyncio.run(live())


def test_a_service_that_is_never_ready_is_ended_at_its_deadline(run: str, fast_dir: Path) -> None:
    def probe() -> None:
        raise NotReadyError("still thinking")

    service = Service("slow", Command(("sh", "-c", "echo thinking; exec sleep 600"), {}), probe, 2.0)

    async def live() -> ServiceRunner:
        runner = ServiceRunner(service, f"{run}/slow", 0, output(fast_dir), lambda *_: None)
        with pytest.raises(ServiceError, match=r"not ready within 2 s \(still thinking\)") as caught:
            await runner.start()
        assert "| thinking" in str(caught.value)
        return runner

    runner = asyncio.run(live())
    assert runner.pid == 0


class Hasty(Output):
    """Its memory is given back the moment that somebody wants to read it, as the writer may do when a child ended."""

    def kept(self) -> str | None:
        self.copy()
        self.close()
        return super().kept()


def test_the_last_words_of_a_service_are_told_when_only_the_copy_is_left(run: str, fast_dir: Path) -> None:
    service = Service("brief", Command(("sh", "-c", "echo no room; exit 1"), {}), lambda: None, 60.0, port=free_port())

    async def live() -> None:
        runner = ServiceRunner(service, f"{run}/brief", 0, lambda name: Hasty(fast_dir / name), lambda *_: None)
        with pytest.raises(ServiceError, match="ended while it was starting") as caught:
            await runner.start()
        assert "| no room" in str(caught.value)

    asyncio.run(live())


def test_gms_is_ready_when_every_socket_answers(run: str, fast_dir: Path) -> None:
    devices = virtual_devices(2, 64)

    async def live() -> None:
        for service in gms.services(gms.Servers("builtin", "host", sys.executable, fast_dir, 60.0), devices):
            with pytest.raises(NotReadyError):
                service.probe()
            runner = ServiceRunner(service, f"{run}/{service.name}", 0, output(fast_dir), lambda *_: None)
            await runner.start()
            service.probe()

    asyncio.run(live())
    assert len(list(fast_dir.glob("gms_*.sock"))) == 4
