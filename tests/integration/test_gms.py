"""The GMS server as a real process, spoken to over its socket; and what a bad client can do to it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.gms import probe
from gms_launch.gms import protocol as p
from gms_launch.gms.backends.host import HostMapper
from gms_launch.gms.client import GmsError, StaleLayoutError
from tests.gms_support import MIB, Server, client, dial, publish
from tests.support import eventually


@pytest.fixture
def server(fast_dir: Path) -> Iterator[Server]:
    running = Server(fast_dir, "--alloc-retry-timeout", "3", "--alloc-retry-interval", "0.05")
    try:
        yield running
    finally:
        running.stop()


def test_probe_bytes_are_upstreams() -> None:
    assert p.frame(p.GetRuntimeStateRequest()) == b"\x00\x00\x00\x20\x81\xa4type\xb9get_runtime_state_request"


def test_a_commit_is_read_by_another_process_at_its_own_addresses(server: Server) -> None:
    publish(server)
    code = (
        "import sys; from pathlib import Path\n"
        "from gms_launch.gms.client import GmsClient\nfrom gms_launch.gms.backends.host import HostMapper\n"
        "from gms_launch.gms.protocol import LockType\n"
        "c = GmsClient(Path(sys.argv[1]), HostMapper()); c.connect(LockType.RO)\n"
        "print(bytes(c.import_all()[0].view()[:7]).decode())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(server.weights)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "weights"
    eventually(lambda: server.state().state == "COMMITTED")
    assert server.state().is_ready
    assert server.events() == ["rw_connected", "committed"]


def test_remap_brings_the_same_bytes_to_the_same_address(server: Server) -> None:
    writer = publish(server)
    address = writer.mappings[0].address
    for _ in range(3):
        assert writer.connect(p.LockType.RO) is p.LockType.RO
        writer.remap_all()
        assert writer.mappings[0].address == address
        assert bytes(writer.mappings[0].view()[:7]) == b"weights"
        writer.unmap_all()
        writer.disconnect()
    assert server.state().allocated_bytes == MIB, "there is one copy"


def test_a_reader_cannot_write(server: Server) -> None:
    publish(server)
    reader = client(server.weights, p.LockType.RO)
    with pytest.raises(GmsError, match="AllocateRequest not allowed for RO session in state RO"):
        reader.allocate(4096)
    allocation = reader._listed()[0].allocation_id
    _, fd = reader._ask(p.ExportAllocationRequest(allocation))
    address = HostMapper().reserve(MIB)
    with pytest.raises(OSError, match="ermission"):
        HostMapper().map(address, MIB, fd, writable=True)
    os.close(fd)


def test_a_changed_layout_is_not_mapped_over_old_addresses(server: Server) -> None:
    first = publish(server)
    first.connect(p.LockType.RO)
    first.remap_all()
    first.unmap_all()
    first.disconnect()
    publish(server, size=2 * MIB)
    first.connect(p.LockType.RO)
    with pytest.raises(StaleLayoutError):
        first.remap_all()
    assert "allocations_cleared" in server.events()


def test_a_writer_that_dies_leaves_nothing(server: Server) -> None:
    writer = client(server.weights, p.LockType.RW)
    writer.allocate(MIB)
    writer.disconnect()
    eventually(lambda: server.state().state == "EMPTY")
    assert server.events() == ["rw_connected", "rw_aborted", "allocations_cleared"]
    assert client(server.weights, p.LockType.RW_OR_RO).granted is p.LockType.RW


def test_rw_or_ro_reads_what_is_committed(server: Server) -> None:
    publish(server)
    assert client(server.weights, p.LockType.RW_OR_RO).granted is p.LockType.RO


def test_locks_wait_with_a_deadline(server: Server) -> None:
    begun = time.monotonic()
    with pytest.raises(GmsError, match="not to be had within 200 ms"):
        client(server.weights, p.LockType.RO, 200)
    assert time.monotonic() - begun >= 0.2
    assert server.state().waiting_writers == 0


def test_readers_wait_for_the_commit(server: Server) -> None:
    writer = client(server.weights, p.LockType.RW)
    granted: list[p.LockType | None] = []
    thread = threading.Thread(target=lambda: granted.append(client(server.weights, p.LockType.RO, None).granted))
    thread.start()
    writer.allocate(4096)
    assert granted == []
    writer.commit()
    thread.join(60)
    assert granted == [p.LockType.RO]


def test_a_waiting_writer_keeps_new_readers_out_until_it_hangs_up(server: Server) -> None:
    publish(server)
    reader = client(server.weights, p.LockType.RO)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(server.weights))
    waiting.sendall(p.frame(p.HandshakeRequest(p.LockType.RW)))
    eventually(lambda: server.state().waiting_writers == 1)
    with pytest.raises(GmsError):
        client(server.weights, p.LockType.RO, 100)
    waiting.close()
    eventually(lambda: server.state().waiting_writers == 0)
    assert client(server.weights, p.LockType.RO).granted is p.LockType.RO
    reader.disconnect()


def test_out_of_memory_is_retried_until_room_is_made(server: Server) -> None:
    publish(server, size=12 * MIB)
    kv = client(server.kv, p.LockType.RW)
    with pytest.raises(GmsError, match="Timed out waiting for GPU memory: requested_size=8388608"):
        kv.allocate(8 * MIB)
    assert "allocation_oom" in [e.kind for e in probe.event_history(server.kv)]
    with pytest.raises(GmsError, match="can never be had"):
        kv.allocate(17 * MIB)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(kv.allocate(8 * MIB).size))
    thread.start()
    writer = client(server.weights, p.LockType.RW)  # clears the weights
    thread.join(60)
    assert done == [8 * MIB]
    writer.disconnect()


def test_metadata_must_lie_inside_its_allocation(server: Server) -> None:
    writer = client(server.weights, p.LockType.RW)
    mapping = writer.allocate(4096)
    with pytest.raises(GmsError, match=rf"out of range for allocation {mapping.allocation_id} \(aligned_size=4096\)"):
        writer.put("k", mapping.allocation_id, 4096, b"")
    with pytest.raises(GmsError, match="offset_bytes must be >= 0, got -1"):
        writer.put("k", mapping.allocation_id, -1, b"")
    with pytest.raises(GmsError, match="Unknown allocation: somebody"):
        writer.put("k", "somebody-else's", 0, b"")
    writer.put("k", mapping.allocation_id, 4095, b"v")
    assert writer.get("k") == (mapping.allocation_id, 4095, b"v")
    assert writer.get("nothing") is None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param(struct.pack("!I", 0xFFFFFFFF) + b"x", id="huge length"),
        pytest.param(struct.pack("!I", 100) + b"half", id="half a frame"),
        pytest.param(struct.pack("!I", 3) + b"\xc1\xc1\xc1", id="no MessagePack"),
        pytest.param(p.frame(p.AllocateRequest(4096)), id="no handshake"),
        pytest.param(b"", id="nothing"),
        pytest.param(p.frame(p.HandshakeRequest(p.LockType.RW)) + b"\xff" * 50, id="garbage while holding the lock"),
    ],
)
def test_a_bad_client_costs_its_own_connection_only(server: Server, data: bytes) -> None:
    publish(server)
    reader = client(server.kv, p.LockType.RW)
    bad = socket.socket(socket.AF_UNIX)
    bad.connect(str(server.kv if b"rw" not in data else server.weights))
    bad.sendall(data)
    time.sleep(0.05)  # let the server take it in before we vanish
    bad.close()
    eventually(lambda: server.state().state in ("COMMITTED", "EMPTY"))
    assert server.process.poll() is None
    assert reader.allocate(4096).mapped, "the other session goes on"


def ask_raw(path: Path, data: bytes) -> bytes:
    """What the server says to `data`, up to the end of the connection or 64 KiB."""
    with dial(path) as sock:
        sock.sendall(data)
        return sock.recv(65536)


def nested_probe(depth: int) -> bytes:
    """A valid probe with an unknown field that is `depth` arrays deep."""
    body = b"\x82\xa4type\xb9get_runtime_state_request\xa1x" + b"\x91" * depth + b"\xc0"
    return struct.pack("!I", len(body)) + body


@pytest.mark.parametrize("depth", [5, 400, 990, 1100, 100_000])
def test_a_deeply_nested_field_costs_its_own_connection_only(server: Server, depth: int) -> None:
    publish(server)
    answer = ask_raw(server.weights, nested_probe(depth))
    assert b"get_runtime_state_response" in answer or b"not a GMS message" in answer or b"longest" in answer
    assert server.process.poll() is None
    assert server.state().allocated_bytes == MIB, "the memory is still there"


def test_a_server_without_descriptors_accepts_again_when_it_has_some(server: Server) -> None:
    publish(server)
    fds = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    reader = client(server.weights, p.LockType.RO)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (fds + 40, fds + 40))
    crowd = [dial(server.weights) for _ in range(60)]
    eventually(lambda: "cannot accept" in server.log.read_text())
    assert len(reader.import_all()) == 1, "who is in goes on"
    with pytest.raises(probe.ProbeError):
        probe.runtime_state(server.weights, timeout=0.5)
    for sock in crowd:
        sock.close()
    eventually(lambda: server.answers(server.weights), what="it accepts again")
    assert server.state().allocated_bytes == MIB
    assert "cannot accept" in server.stop()


def test_a_live_socket_is_not_taken_over_and_a_dead_one_is(server: Server, fast_dir: Path) -> None:
    second = subprocess.run(server.argv, env=server.env, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert "already answers" in second.stderr
    publish(server)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    assert server.weights.exists(), "a killed server leaves its socket behind"
    third = Server(fast_dir)
    assert third.state().state == "EMPTY", "a new server is empty"
    third.stop()
    assert not third.weights.exists()
