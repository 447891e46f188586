"""Three real members of one etcd, as the launcher starts them: how they come together, what the loss of one costs."""

from __future__ import annotations

import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.control import cluster, terms
from gms_launch.control.access import Access
from gms_launch.control.authority import Authority
from gms_launch.control.client import Etcd
from gms_launch.control.keys import prefix
from gms_launch.control.lease import LeaseKeeper
from gms_launch.control.roles import establish
from gms_launch.control.watch import Watch
from gms_launch.errors import NoContactError
from gms_launch.services import etcd
from gms_launch.services.base import NotReadyError, Service
from gms_launch.services.pem import PemFiles
from tests.support import LONG, PATIENCE, eventually, free_port, freeze

#: Of the leases here (seconds).
TTL = 3.0


class Three:
    """Three members on this machine's loopback, with certificates, joined by `control.cluster`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.create()
        self.root = self.authority.leaf("root", client=True)
        self.ports = {k: (free_port(), free_port()) for k in range(3)}
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.services: dict[int, Service] = {}
        self.wanting = ""

    def url(self, number: int) -> str:
        return f"https://127.0.0.1:{self.ports[number][0]}"

    def access(self, *numbers: int) -> Access:
        return Access(tuple(map(self.url, numbers)), self.authority.cert, self.root.cert, self.root.key)

    def member(self, number: int, joins: str = "") -> etcd.Member:
        place = self.directory / str(number)
        place.mkdir(exist_ok=True)
        pem = PemFiles.of(place, "etcd")
        pem.write(self.authority.cert, self.authority.leaf("etcd", ("127.0.0.1",), server=True, client=True))
        client, peer = self.ports[number]
        where = ("127.0.0.1", client, peer, place / "data", pem, self.access(number))
        return etcd.Member("r", *where, members=3, name=f"m{number}", joins=joins)

    def spawn(self, number: int) -> None:
        with open(self.directory / f"{number}.log", "ab") as log:
            self.running[number] = subprocess.Popen(self.services[number].command.argv, stdout=log, stderr=log)
        eventually(lambda: self.ready(number), LONG, lambda: f"member {number} is up: {self.log(number)}")

    def log(self, number: int) -> str:
        return f"{self.wanting}: {(self.directory / f'{number}.log').read_text()[-4000:]}"

    def ready(self, number: int) -> bool:
        assert self.running[number].poll() is None, f"member {number} has ended: {self.log(number)}"
        try:
            self.services[number].probe()
        except NotReadyError as exc:
            self.wanting = str(exc)
            return False
        return True

    def begin(self) -> None:
        self.services[0] = etcd.service(self.member(0), "etcd", 30.0)
        self.spawn(0)
        establish(Etcd(self.access(0)), {"dynamo": ("v1/",)})
        for number in (1, 2):
            self.join(number, 0)

    def join(self, number: int, *by: int) -> None:
        asked = Etcd(self.access(*by), brisk=True)
        member = self.member(number)
        found = cluster.take_place(asked, member.name, member.peer_url, PATIENCE)
        joins = cluster.started_with(found, member.name, member.peer_url)
        self.services[number] = etcd.service(self.member(number, joins), "etcd", 30.0)
        self.spawn(number)
        (new,) = (m for m in cluster.members(asked) if member.peer_url in m.peers)
        assert new.learner, "it has no vote before it knows what the others know"
        cluster.promote(asked, new.id, PATIENCE)
        asked.close()

    def leader(self) -> int:
        """The number of the member that leads."""

        def look() -> list[int]:
            return [n for n in self.running if self.leads(n)]

        return int(eventually(look)[0])

    def leads(self, number: int) -> bool:
        one = Etcd(self.access(number), timeout=0.5)
        try:
            return cluster.standing(one).leads
        except NoContactError:
            return False
        finally:
            one.close()

    def kill(self, number: int) -> None:
        process = self.running.pop(number)
        process.kill()
        process.wait()

    def close(self) -> None:
        ended = [n for n, process in self.running.items() if process.poll() is not None]
        told = [f"member {n} ({self.running[n].returncode}) {self.log(n)}" for n in ended]
        for number in list(self.running):
            self.running[number].send_signal(signal.SIGCONT)
            self.kill(number)
        assert not told, "\n".join(told)


@pytest.fixture
def three(fast_dir: Path) -> Iterator[Three]:
    made = Three(fast_dir)
    try:
        made.begin()
        yield made
    finally:
        made.close()


class Watched:
    """A watch, a lease and writes over one client, and how long each was held up."""

    def __init__(self, three: Three, *order: int) -> None:
        self.etcd = Etcd(three.access(*order), brisk=True)
        self.changes: queue.Queue[tuple[str, bytes | None]] = queue.Queue()
        self.states: queue.Queue[str | None] = queue.Queue()
        self.lost: list[str] = []
        granted = threading.Event()
        self.etcd.put("/a/landmark", b"")  # by which a watch knows the store
        self.watch = Watch(
            self.etcd,
            [prefix("/a/")],
            lambda _: None,
            lambda c: self.changes.put((c.key, c.value)),
            self.states.put,
        )
        self.keeper = LeaseKeeper(self.etcd, TTL, lambda _: granted.set(), self.lost.append)
        self.watch.start()
        self.keeper.start()
        assert granted.wait(PATIENCE)
        assert self.states.get(timeout=PATIENCE) is None

    def change(self) -> tuple[str, bytes | None]:
        return self.changes.get(timeout=PATIENCE)

    def close(self) -> None:
        self.watch.stop()
        self.keeper.stop()
        self.etcd.close()


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_client_goes_to_another_member_with_its_watch_and_its_lease(three: Three, how: str) -> None:
    """Of a frozen member no packet says that it is gone. It is one that does not lead: no election is in between."""
    leader = three.leader()
    victim = next(n for n in range(3) if n != leader)
    others = [n for n in range(3) if n != victim]
    seen = Watched(three, victim, *others)
    lease = seen.keeper.lease
    other = Etcd(three.access(*others))
    other.put("/a/0", b"before")
    assert seen.change() == ("/a/0", b"before")
    if how == "kill":
        three.kill(victim)
    else:
        freeze(three.running[victim].pid)
    begun = time.monotonic()
    other.put("/a/1", b"1")
    assert seen.change() == ("/a/1", b"1")
    took = time.monotonic() - begun
    assert took < PATIENCE / 2
    print(f"{how}: a watch's change was {took:.2f} s late")
    seen.etcd.put("/a/2", b"2")
    assert seen.change() == ("/a/2", b"2"), "nothing was missed and nothing came twice"
    assert seen.watch.resyncs == 1
    time.sleep(terms.granted(TTL) + 1)  # longer than the lease
    assert seen.lost == [] and seen.keeper.lease == lease, "the lease was kept all the time"
    seen.close()
    other.close()


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_the_loss_of_the_leader_is_decided_and_no_lease_is_lost(three: Three, how: str) -> None:
    leader = three.leader()
    others = [n for n in range(3) if n != leader]
    seen = Watched(three, leader, *others)
    lease = seen.keeper.lease
    if how == "kill":
        three.kill(leader)
    else:
        freeze(three.running[leader].pid)
    begun = time.monotonic()
    seen.etcd.put("/a/1", b"1", retry=LONG)
    print(f"{how}: a write came through after {time.monotonic() - begun:.2f} s")
    assert seen.change() == ("/a/1", b"1")
    eventually(lambda: any(three.leads(n) for n in others))
    time.sleep(terms.granted(TTL) + 1)  # longer than the lease
    assert seen.lost == [] and seen.keeper.lease == lease
    seen.close()


def test_a_member_that_comes_back_empty_takes_its_old_place(three: Three) -> None:
    asked = Etcd(three.access(1, 2), brisk=True)
    asked.put("/a/1", b"kept")
    before = {m.name: m.id for m in cluster.members(asked)}
    three.kill(0)
    shutil.rmtree(three.directory / "0" / "data")
    asked.put("/a/2", b"kept too", retry=LONG)
    three.join(0, 1, 2)
    after = {m.name: m for m in cluster.members(asked)}
    assert set(after) == {"m0", "m1", "m2"} and not any(m.learner for m in after.values())
    assert after["m0"].id != before["m0"] and after["m1"].id == before["m1"]
    alone = Etcd(three.access(0))
    assert alone.get_prefix("/a/") == {"/a/1": b"kept", "/a/2": b"kept too"}
    # Its vote counts: with another one gone, the two that are left decide.
    three.kill(1)
    alone.put("/a/3", b"3", retry=LONG)
    stranger = Etcd(Access((three.url(0),), three.authority.cert), timeout=1.0)
    with pytest.raises(NoContactError):
        stranger.get("/a/1", retry=0.0)
    for one in (asked, alone, stranger):
        one.close()


def test_a_member_restarted_on_its_data_is_the_same_member(three: Three) -> None:
    asked = Etcd(three.access(0, 1), brisk=True)
    before = cluster.members(asked)
    three.kill(2)
    asked.put("/a/1", b"1", retry=LONG)
    three.spawn(2)
    assert cluster.members(asked) == before
    eventually(lambda: Etcd(three.access(2)).get("/a/1") == b"1")
    asked.close()


def test_who_the_members_are_is_said_by_none_that_may_have_missed_a_change(three: Three) -> None:
    """A member that stood still knows an old list, and shows it to whoever asks for no more than what it knows."""
    late = Etcd(three.access(2))
    assert len(cluster.members(late)) == 3
    freeze(three.running[2].pid)
    asked = Etcd(three.access(0, 1), brisk=True)
    cluster.take_place(asked, "m3", f"https://127.0.0.1:{free_port()}", PATIENCE)
    assert len(cluster.members(asked)) == 4
    for number in (0, 1):
        freeze(three.running[number].pid)
    three.running[2].send_signal(signal.SIGCONT)
    with pytest.raises(NoContactError):
        cluster.members(late, retry=1.0)
    for number in (0, 1):
        three.running[number].send_signal(signal.SIGCONT)
    assert len(cluster.members(late, retry=LONG)) == 4
    late.close()
    asked.close()


def test_members_leave_until_one_is_left(three: Three) -> None:
    """As a run ends: the last one decides alone again."""
    asked = Etcd(three.access(0), brisk=True)
    for number in (2, 1):
        (gone,) = (m for m in cluster.members(asked) if m.name == f"m{number}")
        cluster.remove(asked, gone.id)
        process: Any = three.running.pop(number)
        process.wait(PATIENCE)  # it ends by itself
    asked.put("/a/1", b"1", retry=LONG)
    assert [m.name for m in cluster.members(asked)] == ["m0"]
    asked.close()


def test_a_member_without_the_others_tells_its_watchers_so(three: Three) -> None:
    for number in (1, 2):
        freeze(three.running[number].pid)
    states: queue.Queue[str | None] = queue.Queue()
    alone = Etcd(three.access(0), brisk=True)
    watch = Watch(alone, [prefix("/a/")], lambda _: None, lambda _: None, states.put)
    watch.start()
    assert states.get(timeout=LONG) is not None
    watch.stop()
    alone.close()
