"""The control plane against a real etcd: what happens to watches, leases and calls when etcd has trouble."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from gms_launch.control import tls
from gms_launch.control.access import Access
from gms_launch.control.authority import Authority
from gms_launch.control.client import Etcd, etcd3
from gms_launch.control.door import Door
from gms_launch.control.keys import Keys, Range, prefix
from gms_launch.control.lease import LeaseKeeper
from gms_launch.control.link import ControlLink
from gms_launch.control.publisher import Publisher
from gms_launch.control.roles import establish
from gms_launch.control.watch import Change, Watch
from gms_launch.errors import NoContactError, RefusedError
from gms_launch.services.pem import PemFiles
from tests.support import PATIENCE, EtcdServer, eventually, free_port


@pytest.fixture
def store(etcd: EtcdServer) -> Iterator[Etcd]:
    client = Etcd(Access((etcd.url,)), timeout=1.0)
    yield client
    client.close()


class Seen:
    """Collects what a watch says."""

    def __init__(self) -> None:
        self.messages: queue.Queue[tuple[str, Any]] = queue.Queue()

    def watch(self, store: Etcd, *ranges: Range) -> Watch:
        watch = Watch(
            store,
            ranges or [prefix("/a/")],
            lambda found: self.messages.put(("snapshot", {k: v.value for k, v in found.items()})),
            lambda change: self.messages.put(("change", (change.key, change.value))),
            lambda reason: self.messages.put(("state", reason)),
        )
        watch.start()
        return watch

    def wait(self, wanted: Callable[[str, Any], bool], timeout: float = PATIENCE) -> Any:
        deadline = time.monotonic() + timeout
        while True:
            kind, value = self.messages.get(timeout=max(0.01, deadline - time.monotonic()))
            if wanted(kind, value):
                return value

    def change(self, key: str, value: bytes | None) -> None:
        self.wait(lambda k, v: k == "change" and v == (key, value))


def standing(kind: str, value: Any) -> bool:
    return kind == "state" and value is None


def test_etcd3_leaves_no_environment_variable_and_no_public_descriptor() -> None:
    code = (
        "import os; before = dict(os.environ)\n"
        "from gms_launch.control import client\n"
        "assert dict(os.environ) == before\n"
        "from google.protobuf import descriptor_pool\n"
        "try: descriptor_pool.Default().FindFileByName('rpc.proto')\n"
        "except KeyError: print('private')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "private"


def test_put_get_create_delete(store: Etcd) -> None:
    assert store.get("/a/1") is None
    assert store.create("/a/1", b"x")
    assert not store.create("/a/1", b"y")
    assert store.get("/a/1") == b"x"
    store.put("/a/2", b"z")
    assert store.get_prefix("/a/") == {"/a/1": b"x", "/a/2": b"z"}
    assert store.delete("/a/1")
    assert store.delete_prefix("/a/") == 1


def test_watch_resumes_after_a_kill_without_losing_a_change(store: Etcd, etcd: EtcdServer) -> None:
    store.put("/a/1", b"1")
    seen = Seen()
    watch = seen.watch(store)
    assert seen.wait(lambda k, _: k == "snapshot") == {"/a/1": b"1"}
    seen.wait(standing)
    etcd.kill()
    assert seen.wait(lambda k, v: k == "state" and v is not None)
    etcd.start()
    # Written before the watch is back: it must come all the same.
    other = Etcd(Access((etcd.url,)), timeout=1.0)
    other.put("/a/2", b"2")
    seen.change("/a/2", b"2")
    assert watch.resyncs == 1, "it resumed, it did not start over"
    watch.stop()


def test_a_watch_of_several_ranges_sees_all_of_them_and_nothing_else(store: Etcd, etcd: EtcdServer) -> None:
    for key in ("/a/1", "/b", "/b/1", "/c/1"):
        store.put(key, b"1")
    seen = Seen()
    watch = seen.watch(store, prefix("/a/"), Range("/b"), prefix("/d/"))
    assert seen.wait(lambda k, _: k == "snapshot") == {"/a/1": b"1", "/b": b"1"}
    seen.wait(standing)
    store.put_many({"/a/2": b"2", "/b": b"2", "/b/1": b"2", "/c/1": b"2", "/d/1": b"2"})
    changed = [seen.wait(lambda k, _: k == "change") for _ in range(3)]
    assert sorted(changed) == [("/a/2", b"2"), ("/b", b"2"), ("/d/1", b"2")]
    etcd.kill()
    assert seen.wait(lambda k, v: k == "state" and v is not None)
    etcd.start()
    other = Etcd(Access((etcd.url,)), timeout=1.0)
    other.put_many({"/b": b"3", "/d/1": None, "/c/1": b"3"})
    changed = [seen.wait(lambda k, _: k == "change") for _ in range(2)]
    assert sorted(changed, key=str) == [("/b", b"3"), ("/d/1", None)]
    assert watch.resyncs == 1, "it resumed, it did not start over"
    watch.stop()


def test_an_agent_follows_what_the_others_must_know_and_no_more() -> None:
    keys = Keys("r")

    def followed(key: str) -> bool:
        ranges = keys.followed(cohorts=2)
        return any(key == r.first if not r.end else r.first <= key < r.end for r in ranges)

    for key in (keys.run, keys.cohort(1), keys.rank(1, 0), keys.life_ended(0, 7), keys.command("u"), keys.result("u")):
        assert followed(key), key
    for key in (
        keys.rank(0, 1),
        keys.rank(0, 10),
        keys.node(0),
        keys.event(1, 0, 1),
        keys.refusal("w"),
        "v1/instances/x",
    ):
        assert not followed(key), key


def test_what_many_say_at_once_is_heard_once(store: Etcd) -> None:
    publishers = [Publisher(store) for _ in range(3)]
    seen = Seen()
    watch = seen.watch(store)
    seen.wait(standing)
    for number, publisher in enumerate(publishers):
        publisher.put("/a/ended", b"%d" % number, unless="/a/ended")
        publisher.put(f"/a/{number}", b"x")
        publisher.start()
    changes = [seen.wait(lambda k, _: k == "change")[0] for _ in range(4)]
    assert sorted(changes) == ["/a/0", "/a/1", "/a/2", "/a/ended"]
    for publisher in publishers:
        publisher.stop(PATIENCE)
    watch.stop()


@pytest.mark.parametrize("held", [False, True])
def test_what_has_waited_too_long_is_not_said_any_more(store: Etcd, held: bool) -> None:
    """Whoever was stopped says what has waited before hearing what has happened since."""
    store.put("/a/seat", b"mine")
    publisher = Publisher(store, {"/a/seat": b"mine"} if held else None)
    publisher.put("/a/run", b"well", unless="/a/over")
    publisher.put("/a/other", b"too", unless="/a/over/other")
    store.put_many({"/a/run": b"over", "/a/over": b"why"})
    publisher.start()
    publisher.put("/a/last", b"x")
    publisher.stop(PATIENCE)
    assert store.get("/a/run") == b"over"
    assert store.get("/a/other") == b"too" and store.get("/a/last") == b"x"


def test_watch_costs_nothing_while_etcd_is_away(store: Etcd, etcd: EtcdServer) -> None:
    seen = Seen()
    watch = seen.watch(store)
    seen.wait(standing)
    etcd.kill()
    seen.wait(lambda k, v: k == "state" and v is not None)
    begun, cpu = time.monotonic(), time.process_time()
    seen.wait(lambda k, v: k == "state" and v is not None and time.monotonic() - begun > 2.0)
    assert time.process_time() - cpu < 0.5 * (time.monotonic() - begun), "the watch must not spin"
    watch.stop()


def test_watch_survives_a_frozen_etcd(store: Etcd, etcd: EtcdServer) -> None:
    seen = Seen()
    watch = seen.watch(store)
    seen.wait(standing)
    etcd.send(signal.SIGSTOP)
    with pytest.raises(NoContactError):
        store.put("/a/1", b"1", retry=0.0)
    etcd.send(signal.SIGCONT)
    store.put("/a/2", b"2")
    seen.change("/a/2", b"2")
    watch.stop()


def test_watch_starts_over_after_compaction(store: Etcd, etcd: EtcdServer) -> None:
    store.put("/a/0", b"0")
    seen = Seen()
    watch = seen.watch(store)
    seen.wait(standing)
    etcd.kill()
    seen.wait(lambda k, v: k == "state" and v is not None)
    store_two = Etcd(Access((etcd.url,)), timeout=1.0)
    # Keep the watch out while history is written and forgotten.
    watch._etcd = Etcd(Access((f"http://127.0.0.1:{free_port()}",)), timeout=0.2)
    etcd.start()
    for n in range(5):
        revision = store_two.put("/a/1", b"%d" % n)
    store_two.compact(revision)
    watch._etcd = store_two
    assert seen.wait(lambda k, _: k == "snapshot") == {"/a/0": b"0", "/a/1": b"4"}
    assert watch.resyncs == 2
    watch.stop()


def test_watch_notices_a_wiped_store(store: Etcd, etcd: EtcdServer) -> None:
    for n in range(5):
        store.put("/a/1", b"%d" % n)
    seen = Seen()
    watch = seen.watch(store)
    seen.wait(standing)
    etcd.kill()
    subprocess.run(["rm", "-rf", str(etcd.data)], check=True)
    etcd.start()
    assert seen.wait(lambda k, _: k == "snapshot") == {}
    store.put("/a/9", b"9")
    seen.change("/a/9", b"9")
    watch.stop()


def test_watch_notices_a_wiped_store_whose_revision_has_caught_up(store: Etcd, etcd: EtcdServer) -> None:
    store.put("/a/1", b"old")
    seen = Seen()
    watch = seen.watch(store)
    seen.wait(standing)
    etcd.kill()
    subprocess.run(["rm", "-rf", str(etcd.data)], check=True)
    watch._etcd = Etcd(Access((f"http://127.0.0.1:{free_port()}",)), timeout=0.2)
    etcd.start()
    fresh = Etcd(Access((etcd.url,)), timeout=1.0)
    for n in range(50):
        fresh.put("/a/2", b"%d" % n)
    watch._etcd = fresh
    assert seen.wait(lambda k, _: k == "snapshot") == {"/a/2": b"49"}
    watch.stop()


def test_lease_is_kept_and_its_loss_is_told(store: Etcd, etcd: EtcdServer) -> None:
    granted: queue.Queue[int] = queue.Queue()
    lost: queue.Queue[str] = queue.Queue()
    keeper = LeaseKeeper(store, 4.0, granted.put, lost.put)
    keeper.start()
    first = granted.get(timeout=PATIENCE)
    store.put("/a/node", b"here", lease=first)
    time.sleep(6.0)  # longer than the lease: only renewal keeps the key
    assert store.get("/a/node") == b"here"
    assert lost.empty()
    store.revoke(first)
    assert "no longer knows" in lost.get(timeout=PATIENCE)
    second = granted.get(timeout=PATIENCE)
    assert second != first
    etcd.send(signal.SIGSTOP)
    assert "not renewed" in lost.get(timeout=PATIENCE)
    etcd.send(signal.SIGCONT)
    assert granted.get(timeout=PATIENCE)
    keeper.stop()


def test_publisher_writes_the_last_value_when_etcd_is_back(store: Etcd, etcd: EtcdServer) -> None:
    publisher = Publisher(store)
    publisher.start()
    publisher.put("/a/1", b"before")
    eventually(lambda: store.get("/a/1") == b"before")
    etcd.kill()
    for n in range(100):
        publisher.put("/a/1", b"%d" % n)
    etcd.start()
    eventually(lambda: store.get("/a/1") == b"99")
    publisher.stop(PATIENCE)


def test_what_is_kept_for_later_goes_out_together(store: Etcd) -> None:
    publisher = Publisher(store)
    changes: queue.Queue[Change] = queue.Queue()
    watch = Watch(store, [prefix("/a/")], lambda _: None, changes.put)
    watch.start()
    eventually(lambda: watch.resumes)
    for n in range(5):
        publisher.put(f"/a/{n}", b"later", later=True)
    publisher.put("/a/now", b"now")
    publisher.start()  # now: what is put for later waits for a tenth of a second only
    found = [changes.get(timeout=PATIENCE) for _ in range(6)]
    assert found[0].key == "/a/now", "what somebody waits for does not wait for the rest"
    assert len({c.revision for c in found[1:]}) == 1, "one transaction"
    publisher.put("/a/0", b"urgent")
    publisher.put("/a/0", b"newer", later=True)
    eventually(lambda: store.get("/a/0") == b"newer")
    publisher.stop(PATIENCE)
    watch.stop()


def test_another_endpoint_is_used_when_one_is_dead(etcd: EtcdServer) -> None:
    client = Etcd(Access((f"http://127.0.0.1:{free_port()}", etcd.url)), timeout=1.0)
    client.put("/a/1", b"1")
    assert client.get("/a/1") == b"1"
    client.close()
    none = Etcd(Access(tuple(f"http://127.0.0.1:{free_port()}" for _ in range(3))), timeout=1.0)
    with pytest.raises(NoContactError, match="does not answer, or fewer than 2 of its 3 members do: "):
        none.get("/a/1", retry=0.1)
    none.close()


#: Where the servers of these tests are.
HOSTS = ("127.0.0.1",)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture
def secure(fast_dir: Path, authority: Authority) -> Iterator[EtcdServer]:
    """An etcd that wants a certificate from everybody."""
    files = PemFiles.of(fast_dir, "etcd")
    files.write(authority.cert, authority.leaf("etcd", HOSTS, server=True, client=True))
    flags = ("--trusted-ca-file", files.ca, "--cert-file", files.cert, "--key-file", files.key)
    server = EtcdServer(fast_dir, "--client-cert-auth", *map(str, flags), scheme="https").start()
    try:
        yield server
    finally:
        server.kill()


def known_as(cn: str, etcd: EtcdServer, authority: Authority) -> Etcd:
    """A client whose certificate says that it is `cn`."""
    leaf = authority.leaf(cn, client=True)
    return Etcd(Access((etcd.url,), authority.cert, leaf.cert, leaf.key), timeout=2.0)


def test_a_certificate_says_who_may_what(secure: EtcdServer, authority: Authority) -> None:
    root, dynamo = (known_as(cn, secure, authority) for cn in ("root", "dynamo"))
    establish(root, {"dynamo": ["v1/"]})
    root.put("/a/1", b"1")
    dynamo.put("v1/x", b"1")
    for forbidden in (lambda: dynamo.put("/a/1", b"2"), lambda: dynamo.get("/a/1"), lambda: dynamo.put("v2", b"2")):
        with pytest.raises(Exception, match="permission denied"):
            forbidden()
    with pytest.raises(Exception, match=r"user name not found|permission denied"):
        known_as("etcd", secure, authority).put("v1/x", b"2")
    seen = Seen()
    watch = seen.watch(root)
    seen.wait(standing)
    secure.kill()
    secure.start()  # and it still knows
    root.put("/a/2", b"2")
    seen.change("/a/2", b"2")
    watch.stop()
    with pytest.raises(Exception, match="permission denied"):
        dynamo.put("/a/1", b"2")
    establish(root, {"dynamo": ["v1/"]}, again=True)  # nothing to do
    door = Door(Access((secure.url,), authority.cert, *astuple(authority.leaf("root", client=True))))
    assert door.get_prefix("/a/") == {"/a/1": b"1", "/a/2": b"2"}
    assert door.clock_skew() == 0.0
    for client in (root, dynamo, door):
        client.close()


@contextlib.contextmanager
def slow_to_begin(port: int, seconds: float) -> Iterator[int]:
    """A way to a server on which nothing comes through at first; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as opened:

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = opened.enter_context(listener.accept()[0])
                    time.sleep(seconds)  # this is what it is about
                    server = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
                    for ends in ((client, server), (server, client)):
                        threading.Thread(target=pump, args=ends, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("brisk", "seconds"), [(False, 0.8), (True, 0.2)])
def test_a_server_that_is_slow_to_shake_hands_is_waited_for(
    secure: EtcdServer, authority: Authority, brisk: bool, seconds: float
) -> None:
    """Where many begin handshakes each takes its time, and who gives up and begins again is one more of them."""
    root = known_as("root", secure, authority)
    root.put("/a/1", b"1")
    with slow_to_begin(secure.port, seconds) as port:
        access = Access((f"https://127.0.0.1:{port}",), authority.cert, *astuple(authority.leaf("root", client=True)))
        client = Etcd(access, brisk=brisk)
        assert client.get("/a/1", retry=0.0) == b"1"
        client.close()
    root.close()


def test_a_store_that_knows_somebody_already_is_not_taken(secure: EtcdServer, authority: Authority) -> None:
    root = known_as("root", secure, authority)
    establish(root, {"dynamo": ["v1/"]})
    for again, users in ((False, {"dynamo": ["v1/"]}), (True, {})):
        with pytest.raises(RefusedError, match="knows dynamo, root already"):
            establish(root, users, again)
    root.close()


def test_nobody_makes_himself_root_in_etcds_first_moments(secure: EtcdServer, authority: Authority) -> None:
    """Somebody asks for a user of his own from before etcd listens until it has been told who there is."""
    secure.kill()
    over, refused, added = threading.Event(), [], []

    def race() -> None:
        rpc = etcd3.etcdrpc
        while not over.is_set():
            stranger = Etcd(Access((secure.url,), authority.cert), timeout=0.5)
            try:
                stranger.call(
                    lambda c: c.authstub.UserAdd(rpc.AuthUserAddRequest(name="b", password="b"), timeout=0.5), 0
                )
                added.append("b")
            except Exception as exc:
                refused.append(exc)
            stranger.close()

    racer = threading.Thread(target=race)
    racer.start()
    try:
        secure.start()
        root = known_as("root", secure, authority)
        root.get("/ready", retry=60.0)
        establish(root, {"dynamo": ["v1/"]})  # refuses when somebody is there already
    finally:
        over.set()
        racer.join()
    assert added == [] and len(refused) > 1
    root.close()


def test_a_stranger_at_a_port_of_the_runs_is_one_error_and_no_line_of_grpcs(secure: EtcdServer) -> None:
    """As when the port of a member that has ended is another run's by now."""
    ours = Authority.create()
    leaf = ours.leaf("root", client=True)
    eventually(secure.listens)
    code = (
        "import os, sys\nfrom gms_launch.control.access import Access\nfrom gms_launch.control.door import Door\n"
        "from gms_launch.errors import NoContactError\ndoor = Door(Access((sys.argv[1],), *sys.argv[2:]), 2.0)\n"
        "try:\n    door.get_prefix('/')\nexcept NoContactError:\n"
        "    print('no contact', 'GRPC_VERBOSITY' in os.environ)\n"
    )
    argv = [sys.executable, "-c", code, secure.url, ours.cert, leaf.cert, leaf.key]
    env = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False, env=env)
    assert (done.stdout, done.stderr) == ("no contact False\n", "")


def test_who_has_no_certificate_of_the_run_is_not_heard(secure: EtcdServer, authority: Authority) -> None:
    ours, stranger = known_as("root", secure, authority), Authority.create()
    ours.put("/a/1", b"1")
    lease = ours.grant(60)
    seen = Seen()
    watch = seen.watch(ours)
    assert seen.wait(lambda k, _: k == "snapshot") == {"/a/1": b"1"}
    watch.stop()
    theirs = stranger.leaf("root", client=True)
    for access in (
        Access((secure.url.replace("https", "http"),)),
        Access((secure.url,), authority.cert),
        Access((secure.url,), authority.cert, theirs.cert, theirs.key),
        Access((secure.url,), stranger.cert, theirs.cert, theirs.key),
    ):
        client = Etcd(access, timeout=1.0)
        # Of the run's etcd without certificates, etcd itself asks for no login but for the first.
        for call in (
            lambda c=client: c.put("/a/1", b"2", retry=0.0),
            lambda c=client: c.alarms(retry=0.0),
            lambda c=client: c.grant(5, retry=0.0),
            lambda c=client: c.keep(lease, retry=0.0),
            lambda c=client: c.revoke(lease, retry=0.0),
            lambda c=client: c.call(lambda e: e.compact(1), retry=0.0),
            lambda c=client: c.get_prefix("/", retry=0.0),
        ):
            with pytest.raises(NoContactError):
                call()
        client.close()
    assert ours.keep(lease), "nobody has ended it"
    assert tls.answers(Access((secure.url,), authority.cert), 30.0)
    assert not tls.answers(Access((secure.url,), stranger.cert), 5.0), "another run's, on the same port"
    ours.close()


def test_what_a_leader_says_counts_as_long_as_the_role_is_its_own(store: Etcd, etcd: EtcdServer) -> None:
    links = [ControlLink(Access((etcd.url,)), lambda call, *args: None) for _ in range(2)]
    first, second = links
    try:
        leases = [store.grant(60), store.grant(60)]
        assert first.take_lead("/lead", b"first", leases[0])
        assert not second.take_lead("/lead", b"second", leases[1]), "somebody has it"
        first.lead_while("/lead", b"first")
        first.say("/said", b"by the first")
        eventually(lambda: store.get("/said") == b"by the first")
        assert first.write_if({}, {"/done": b"1"})
        store.revoke(leases[0])
        assert second.take_lead("/lead", b"second", leases[1])
        second.lead_while("/lead", b"second")
        first.say("/said", b"by one that slept")
        assert not first.write_if({}, {"/done": b"2"})
        second.say("/said", b"by the second")
        eventually(lambda: store.get("/said") == b"by the second")
        first.close(5.0, leave=False)  # what it still wanted has been tried by then
        assert store.get("/said") == b"by the second" and store.get("/done") == b"1"
        # The same agent may come to lead again, under another lease.
        store.revoke(leases[1])
        leases.append(store.grant(60))
        assert second.take_lead("/lead", b"second again", leases[2])
        second.say("/said", b"under the old word")
        second.lead_while("/lead", b"second again")
        second.say("/said", b"anew")
        eventually(lambda: store.get("/said") == b"anew")
    finally:
        for link in links:
            link.close(5.0, leave=False)
