"""Everything that a client could do wrong, at a GMS server that others depend on: seeded, bounded, with a witness.

GMS_FUZZ_SEED repeats a run's attacks; GMS_FUZZ_SECONDS makes it longer. Clients are of this user (the socket is 0600),
so this is about broken ones more than about wicked ones.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from gms_launch.gms import probe
from gms_launch.gms import protocol as p
from gms_launch.gms.locks import State
from tests.gms_support import MIB, Server, client, dial, publish
from tests.support import eventually

SECONDS = float(os.environ.get("GMS_FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("GMS_FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))
CROWD = 500


@pytest.fixture
def server(fast_dir: Path) -> Iterator[Server]:
    running = Server(fast_dir, "--alloc-retry-timeout", "5", "--alloc-retry-interval", "0.05")
    try:
        yield running
    finally:
        running.stop()


class Witness(threading.Thread):
    """A reader as an engine is one: probes, locks, maps and reads, again and again. What goes wrong is in `errors`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rounds, self.errors = 0, Counter[str]()
        self._path, self._end = path, threading.Event()
        self._client = client(path, p.LockType.RO, 30_000)
        self._client.import_all()
        self._leave()

    def _leave(self) -> None:
        self._client.unmap_all()
        self._client.disconnect()

    def run(self) -> None:
        while not self._end.is_set():
            try:
                assert probe.runtime_state(self._path, timeout=30).committed
                assert probe.event_history(self._path, timeout=30)[-1].kind == "committed"
                self._client.connect(p.LockType.RO, 30_000)
                self._client.remap_all()
                assert bytes(self._client.mappings[0].view()[:7]) == b"weights"
                self._leave()
                self.rounds += 1
            except Exception as exc:
                self.errors[f"{type(exc).__name__}: {exc}"] += 1
                self._leave()
            self._end.wait(0.005)

    def finish(self) -> None:
        self._end.set()
        self.join(60)


class Attacker(threading.Thread):
    """One attack after another until `end`. `count` says how many of which kind."""

    def __init__(self, server: Server, seed: int, end: threading.Event) -> None:
        super().__init__()
        self.count, self.broken = Counter[str](), Counter[str]()
        self._server, self._end, self._rng = server, end, random.Random(seed)
        self._slow: list[socket.socket] = []

    def run(self) -> None:
        kinds: list[Callable[[], None]] = [
            self.nested,
            self.unknown_fields,
            self.huge,
            self.garbled,
            self.slow,
            self.cut_off,
            self.cut_off,
        ]
        while not self._end.is_set():
            kind = self._rng.choice(kinds)
            self.count[kind.__name__] += 1
            try:
                kind()
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server hung up on us, as it should
            except Exception as exc:  # a silence of a minute, say
                self.broken[f"{kind.__name__}: {type(exc).__name__}: {exc}"] += 1
        for sock in self._slow:
            sock.close()

    def _any_socket(self) -> Path:
        return self._rng.choice((self._server.weights, self._server.kv))

    def _request(self) -> p.Message:
        """Any request, mostly of a session; its allocation does not exist."""
        rng = self._rng
        return rng.choice(
            [
                p.GetRuntimeStateRequest(),
                p.GetEventHistoryRequest(),
                p.AllocateRequest(rng.choice((-1, 0, 1, 4096, MIB, 1 << 40, (1 << 63) - 1)), "t" * rng.randrange(50)),
                p.ExportAllocationRequest("none"),
                p.ListAllocationsRequest(rng.choice((None, "x"))),
                p.FreeAllocationRequest("none"),
                p.MetadataPutRequest("k", "none", rng.choice((-1, 0, 1 << 62)), rng.randbytes(rng.randrange(MIB))),
                p.MetadataGetRequest("k" * rng.randrange(1000)),
                p.MetadataListRequest(""),
                p.GetLayoutHashRequest(),
                p.CommitLayoutRequest(),
            ]
        )

    def _say(self, path: Path, *data: bytes) -> bytes:
        """Send on a connection of its own, and hear one piece of answer."""
        with dial(path) as sock:
            for part in data:
                sock.sendall(part)
            return sock.recv(65536)

    # -- the attacks -----------------------------------------------------------------------------------------------

    def nested(self) -> None:
        level = self._rng.choice((b"\x91", b"\x81\xa1k", b"\x92\x01", b"\x82\xa1a\x01\xa1b"))
        deep = level * self._rng.choice((3, 200, 980, 1000, 5000, 20_000)) + b"\xc0"
        body = self._rng.choice(
            (
                b"\x82\xa4type\xb9get_runtime_state_request\xa1x" + deep,
                b"\x82\xa4type" + deep + b"\xa1x\xc0",
                b"\x83\xa4type\xb1handshake_request\xa9lock_type\xa2ro\xaatimeout_ms" + deep,
                deep,
            )
        )
        assert self._say(self._any_socket(), p.HEADER.pack(len(body)), body), "it is told why"

    def unknown_fields(self) -> None:
        """A newer client's: they change nothing."""
        extra = {f"new{n}": self._rng.choice((None, 1.5, [1, {"a": b"b"}], "x" * 999)) for n in range(20)}
        body = msgspec.msgpack.encode({"type": "get_runtime_state_request", **extra})
        assert b"get_runtime_state_response" in self._say(self._any_socket(), p.HEADER.pack(len(body)), body)

    def huge(self) -> None:
        size = self._rng.choice((65_537, 20 * MIB, p.MAX_FRAME + 1, 0xFFFFFFFF))
        said = self._say(self._any_socket(), p.HEADER.pack(size) + self._rng.randbytes(self._rng.randrange(60_000)))
        assert b"longest allowed" in said

    def garbled(self) -> None:
        """Frames with bytes changed, also those of a session, with the length as it was or made right again."""
        messages = [p.HandshakeRequest(p.LockType.RO, 10), self._request(), self._request()]
        if self._rng.random() < 0.5:
            messages[0] = self._request()
        data = bytearray(b"".join(p.frame(m) for m in messages))
        for _ in range(self._rng.randrange(1, 20)):
            data[self._rng.randrange(4, min(len(data), 400))] = self._rng.randrange(256)
        with dial(self._server.weights) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(65536):
                    pass

    def slow(self) -> None:
        """A frame that comes byte by byte and stays unfinished for a while; some are always open."""
        self._slow.append(dial(self._any_socket()))
        data = p.frame(p.HandshakeRequest(p.LockType.RO))
        for byte in data[: self._rng.randrange(len(data))]:
            self._slow[-1].sendall(bytes((byte,)))
        while len(self._slow) > 20:
            self._slow.pop(self._rng.randrange(20)).close()

    def cut_off(self) -> None:
        """Gone in one of the states of a session of the KV socket, politely or with answers unread."""
        rng, mode = self._rng, self._rng.choice((p.LockType.RW, p.LockType.RW_DATA_OR_RW, p.LockType.RW_OR_RO))
        steps = [
            p.frame(p.HandshakeRequest(rng.choice((mode, p.LockType.RO)), rng.choice((None, 0, 50)))),
            p.frame(p.AllocateRequest(rng.choice((4096, MIB, 8 * MIB)))),
            p.frame(p.AllocateRequest(8 * MIB)),  # waits for memory after another
            p.frame(self._request()),
            p.frame(rng.choice((p.CommitRequest(), p.CommitLayoutRequest(), self._request()))),
            p.frame(p.AllocateRequest(4096)),
        ]
        data = b"".join(steps[: rng.randrange(1, len(steps) + 1)])
        with dial(self._server.kv) as sock:
            sock.settimeout(rng.choice((0.001, 0.02, 0.1)))
            with contextlib.suppress(TimeoutError):  # who waits for a lock or for memory is not read from
                sock.sendall(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
                while rng.random() < 0.7 and sock.recv(rng.choice((1, 100, 65536))):
                    pass


def crowd(server: Server) -> None:
    """500 at once, and then as many with so few descriptors that most must wait at the door."""
    pid = server.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for few in (False, True):
        eventually(lambda: server.descriptors() < 100, what="the crowd before is gone")
        limit = server.descriptors() + 100 if few else soft
        with contextlib.ExitStack() as stack:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
            for n in range(CROWD):
                stack.enter_context(dial((server.weights, server.kv)[n % 2]))
            if few:
                eventually(lambda: "cannot accept" in server.log.read_text(), what="it has run out of descriptors")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_no_client_hurts_the_server_or_another_client(server: Server) -> None:
    print(f"GMS_FUZZ_SEED={SEED}")
    publish(server, size=4 * MIB)
    witness, end = Witness(server.weights), threading.Event()
    attackers = [Attacker(server, SEED + n, end) for n in range(3)]
    for thread in (witness, *attackers):
        thread.start()
    begun = time.monotonic()
    try:
        crowd(server)
        warm = server.resident()
        while time.monotonic() - begun < SECONDS and server.process.poll() is None:
            end.wait(0.2)
        crowd(server)
    finally:
        end.set()
        for thread in attackers:
            thread.join(60)
        witness.finish()
    count = sum((a.count for a in attackers), Counter[str]())
    grown = (server.resident() - warm) / MIB
    print(f"{count.total()} attacks {dict(count)}; witness {witness.rounds} rounds; memory {grown:+.1f} MiB")
    assert server.process.poll() is None, server.log.read_text()[-3000:]
    assert not witness.errors and witness.rounds >= 10
    assert not sum((a.broken for a in attackers), Counter[str]()), "every attack was answered or hung up on"
    assert len(count) == 6 and count.total() >= 50
    assert grown < 32, "memory is flat"
    idle = Server.descriptors
    eventually(lambda: idle(server) <= 14, what="descriptors are flat: the loop's, two sockets, one an allocation")
    eventually(lambda: probe.runtime_state(server.kv).state in (State.EMPTY, State.LAYOUT_COMMITTED, State.COMMITTED))
    writer = client(server.kv, p.LockType.RW, 10_000)
    assert writer.allocate(8 * MIB).mapped, "the lock and the memory of all who were cut off are free"
    writer.disconnect()
    assert server.state().state == "COMMITTED" and server.state().allocated_bytes == 4 * MIB
