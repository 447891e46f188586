"""What upstream's client and tests expect of a GMS server beyond the everyday: texts, gaps, sealed layouts.

Upstream's package is on no index, so its behaviour is written down here as its tests (test_runtime_flows.py) have it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.gms import probe
from gms_launch.gms import protocol as p
from gms_launch.gms.backends.host import HostMapper
from gms_launch.gms.client import GmsClient, GmsError, StaleLayoutError
from tests.gms_support import MIB, Server, client, dial, publish
from tests.support import eventually


@pytest.fixture
def server(fast_dir: Path) -> Iterator[Server]:
    running = Server(fast_dir, "--alloc-retry-timeout", "60", "--alloc-retry-interval", "30")
    try:
        yield running
    finally:
        running.stop()


def kinds(path: Path) -> list[str]:
    return [e.kind for e in probe.event_history(path)]


# -- layouts ---------------------------------------------------------------------------------------------------------


def publish_with_a_gap(server: Server, slots: int, freed: int, content: bytes) -> GmsClient:
    """Allocations of 4, 8, ... KiB with one freed before the commit, as upstream's clients prune."""
    writer = client(server.weights, p.LockType.RW)
    sizes = [4096 * (n + 1) for n in range(slots - 1)]
    sizes.insert(freed, 4096 * 99)
    for size in sizes:
        writer.allocate(size, "weights").view()[: len(content)] = content
    writer.free(freed)
    assert sorted(writer.mappings) == [n for n in range(slots) if n != freed]
    writer.commit()
    return writer


def test_the_layout_hash_counts_ranks_and_not_slots(server: Server) -> None:
    publish_with_a_gap(server, 4, freed=1, content=b"a")
    first = server.state().memory_layout_hash
    shape = [f"{rank}:{size}:{size}:weights" for rank, size in enumerate((4096, 8192, 12288))]
    assert first == hashlib.sha256("".join(shape).encode()).hexdigest(), "upstream's formula"
    publish_with_a_gap(server, 4, freed=2, content=b"b")
    assert server.state().memory_layout_hash == first


def test_a_layout_with_other_gaps_is_mapped_at_the_old_addresses(server: Server) -> None:
    reader = publish_with_a_gap(server, 4, freed=1, content=b"first")
    addresses = [m.address for m in reader.mappings.values()]
    publish_with_a_gap(server, 4, freed=2, content=b"again")
    reader.connect(p.LockType.RO)
    reader.remap_all()
    assert [m.address for m in reader.mappings.values()] == addresses
    assert sorted(reader.mappings) == [0, 1, 3]
    assert all(bytes(m.view()[:5]) == b"again" for m in reader.mappings.values())
    reader.unmap_all()
    reader.disconnect()
    publish(server, size=4096)
    reader.connect(p.LockType.RO)
    with pytest.raises(StaleLayoutError):
        reader.remap_all()


def test_a_slot_is_not_used_twice_until_the_layout_is_cleared(server: Server) -> None:
    writer = client(server.weights, p.LockType.RW)
    assert [writer.allocate(4096).layout_slot for _ in range(3)] == [0, 1, 2]
    writer.free(2)
    assert writer.allocate(4096).layout_slot == 3
    writer.disconnect()
    assert client(server.weights, p.LockType.RW).allocate(4096).layout_slot == 0


# -- sealed layouts (DYN_GMS_PERSIST_KV) -----------------------------------------------------------------------------


def sealed_by_a_dead_writer(server: Server) -> str:
    """A sealed layout whose writer has died after it wrote once more; returns the layout hash."""
    writer = client(server.kv, p.LockType.RW_DATA_OR_RW)
    assert writer.granted is p.LockType.RW, "nothing to adopt yet"
    mapping = writer.allocate(MIB, "kv_cache")
    digest = writer.commit_layout()
    assert writer.granted is p.LockType.RW_DATA
    assert digest == writer.layout_hash() != ""
    mapping.view()[:5] = b"later"
    state = probe.runtime_state(server.kv)
    assert (state.state, state.layout_committed, state.committed, state.is_ready) == ("RW", True, False, False)
    assert [s.mode for s in state.sessions] == ["rw_data"]
    writer.disconnect()
    eventually(lambda: probe.runtime_state(server.kv).state == "LAYOUT_COMMITTED")
    return digest


def test_a_sealed_layout_survives_its_writers_and_is_adopted_with_its_bytes(server: Server) -> None:
    digest = sealed_by_a_dead_writer(server)
    for _ in range(2):
        standby = client(server.kv, p.LockType.RW_DATA_OR_RW)
        assert (standby.granted, standby.committed) == (p.LockType.RW_DATA, False)
        (mapping,) = standby.import_all()
        assert bytes(mapping.view()[:5]) == b"later" and standby.layout_hash() == digest
        mapping.view()[:5] = b"later"  # it may write
        lock = standby._request(p.GetLockStateRequest(), p.GetLockStateResponse)
        assert (lock.state, lock.layout_committed) == ("RW", True)
        standby.disconnect()
        eventually(lambda: probe.runtime_state(server.kv).state == "LAYOUT_COMMITTED")
    assert kinds(server.kv) == [
        *("rw_connected", "layout_committed", "rw_disconnected"),
        *("rw_connected", "rw_disconnected"),
        *("rw_connected", "rw_disconnected"),
    ]


def test_a_sealed_layout_changes_its_shape_no_more(server: Server) -> None:
    sealed_by_a_dead_writer(server)
    standby = client(server.kv, p.LockType.RW_DATA_OR_RW)
    allocation = standby._listed()[0].allocation_id
    refused = [
        p.AllocateRequest(4096),
        p.FreeAllocationRequest(allocation),
        p.MetadataPutRequest("k", allocation, 0, b""),
        p.MetadataDeleteRequest("k"),
    ]
    for request in refused:
        answer, _ = standby._ask(request)
        text = f"{type(request).__name__} not allowed: the layout is committed. Reconnect with RW to replace it."
        assert answer == p.ErrorResponse(text)
    for again in (p.CommitRequest(), p.CommitLayoutRequest()):
        answer, _ = standby._ask(again)
        assert answer.error == f"{type(again).__name__} not allowed for RW_DATA session in state RW"
    standby.disconnect()


@pytest.mark.parametrize("mode", [p.LockType.RW, p.LockType.RW_OR_RO])
def test_who_asks_for_rw_replaces_a_sealed_layout(server: Server, mode: p.LockType) -> None:
    sealed_by_a_dead_writer(server)
    writer = client(server.kv, mode)
    assert writer.granted is p.LockType.RW
    state = probe.runtime_state(server.kv)
    assert (state.state, state.layout_committed, state.allocation_count) == ("RW", False, 0)
    writer.disconnect()
    eventually(lambda: probe.runtime_state(server.kv).state == "EMPTY")


def test_nobody_reads_a_sealed_layout(server: Server) -> None:
    sealed_by_a_dead_writer(server)
    with pytest.raises(GmsError, match="not to be had within 200 ms"):
        client(server.kv, p.LockType.RO, 200)


def test_an_unsealed_layout_dies_with_its_writer_and_a_commit_publishes_as_before(server: Server) -> None:
    writer = client(server.kv, p.LockType.RW_DATA_OR_RW)
    writer.allocate(4096)
    writer.disconnect()
    eventually(lambda: probe.runtime_state(server.kv).state == "EMPTY")
    publish(server)
    state = server.state()
    assert state.committed and state.layout_committed and state.is_ready
    assert client(server.weights, p.LockType.RW_DATA_OR_RW).granted is p.LockType.RW, "contents are replaced"


def test_writers_of_both_kinds_wait_for_each_other(server: Server) -> None:
    first = client(server.kv, p.LockType.RW_DATA_OR_RW)
    with pytest.raises(GmsError):
        client(server.kv, p.LockType.RW_DATA_OR_RW, 100)
    with dial(server.kv) as waiting:
        waiting.sendall(p.frame(p.HandshakeRequest(p.LockType.RW_DATA_OR_RW)))
        eventually(lambda: probe.runtime_state(server.kv).waiting_writers == 1)
    first.disconnect()


# -- texts and limits ------------------------------------------------------------------------------------------------


def test_what_upstreams_server_refuses_is_refused_in_its_words(server: Server) -> None:
    publish(server)
    reader = client(server.weights, p.LockType.RO)
    writer = client(server.kv, p.LockType.RW)
    for probing in (p.GetRuntimeStateRequest(), p.GetEventHistoryRequest()):
        name = type(probing).__name__
        assert reader._ask(probing)[0].error == f"{name} not allowed for RO session in state RO"
        assert writer._ask(probing)[0].error == f"{name} not allowed for RW session in state RW"
    assert reader._ask(p.CommitRequest())[0].error == "CommitRequest not allowed for RO session in state RO"
    assert writer._ask(p.GetAllocationRequest("x"))[0].error == "Unknown allocation: x"
    assert writer._ask(p.ExportAllocationRequest("x"))[0].error == "Unknown allocation: x"
    assert writer._ask(p.AllocateRequest(0))[0].error == "size must be > 0, got 0"
    assert writer.allocate(4096).mapped, "and the session goes on"
    for first in (p.CommitRequest(), p.HandshakeRequest(p.LockType.RW_DATA)):
        with dial(server.kv) as stranger:
            stranger.sendall(p.frame(first))
            assert b"Expected HandshakeRequest" in stranger.recv(1000)


def test_more_than_the_device_has_is_refused_at_once_and_told(server: Server) -> None:
    writer = client(server.kv, p.LockType.RW)
    text = "Timed out waiting for GPU memory: requested_size=17825792, .*can never be had.*has 16777216 bytes"
    with pytest.raises(GmsError, match=text):
        writer.allocate(17 * MIB)
    assert kinds(server.kv)[-1] == "allocation_oom"


def test_a_writer_may_send_tens_of_mib_and_a_stranger_may_not(server: Server) -> None:
    writer = client(server.weights, p.LockType.RW)
    mapping = writer.allocate(4096)
    value = os.urandom(MIB) * 40
    writer.put("big", mapping.allocation_id, 0, value)
    assert writer.get("big") == (mapping.allocation_id, 0, value)
    before = server.resident()
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stranger = stack.enter_context(dial(server.weights))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stranger.sendall(p.HEADER.pack(15 * MIB) + bytes(MIB))
            assert b"longest allowed here is 65536" in stranger.recv(1000)
        assert server.resident() - before < 16 * MIB
    with dial(server.kv) as sealed:  # who has given up the shape has nothing long to say either
        sealed.sendall(p.frame(p.HandshakeRequest(p.LockType.RW)) + p.frame(p.CommitLayoutRequest()))
        sealed.sendall(p.HEADER.pack(2 * MIB))
        heard = b""
        while data := sealed.recv(1000):
            heard += data
        assert b"rw_data" in heard and b"longest allowed here is 1048576" in heard


def test_a_writer_that_dies_behind_unread_data_while_it_waits_for_memory_frees_the_lock_at_once(server: Server) -> None:
    """The pause between two attempts is 30 s here: only the hang-up itself can end the wait."""
    publish(server, size=12 * MIB)
    dying = dial(server.kv)
    dying.sendall(p.frame(p.HandshakeRequest(p.LockType.RW)) + p.frame(p.AllocateRequest(8 * MIB)))
    dying.sendall(p.frame(p.GetLockStateRequest()))  # unread until the memory is had
    eventually(lambda: "allocation_oom" in kinds(server.kv), what="it waits for memory")
    dying.close()
    assert client(server.kv, p.LockType.RW, 10_000).granted is p.LockType.RW


def test_a_writer_that_dies_behind_unread_data_while_it_waits_for_the_lock_waits_no_more(server: Server) -> None:
    holder = client(server.kv, p.LockType.RW)
    dying = dial(server.kv)
    dying.sendall(p.frame(p.HandshakeRequest(p.LockType.RW)))
    eventually(lambda: probe.runtime_state(server.kv).waiting_writers == 1)
    dying.sendall(p.frame(p.AllocateRequest(4096)))  # unread until the lock is had
    dying.close()
    eventually(lambda: probe.runtime_state(server.kv).waiting_writers == 0)
    holder.disconnect()


def test_memory_that_a_new_writer_clears_is_had_by_one_who_waits(server: Server) -> None:
    publish(server, size=12 * MIB)
    kv = client(server.kv, p.LockType.RW)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(kv.allocate(8 * MIB).size))
    thread.start()
    eventually(lambda: "allocation_oom" in kinds(server.kv))
    writer = client(server.weights, p.LockType.RW)
    thread.join(20)  # the pause between two attempts is 30 s
    assert done == [8 * MIB]
    writer.disconnect()


def test_a_probe_waits_for_a_place_in_the_queue(fast_dir: Path) -> None:
    """A server that is busy for a moment has a full queue, and is not gone."""
    path = fast_dir / "full.sock"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(path))
        with pytest.raises(probe.ProbeError, match=r"no place in its queue within 0\.2 s"):
            probe.runtime_state(path, timeout=0.2)
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(probe.runtime_state(path, timeout=60).state))
        thread.start()
        for state in ("EMPTY", "RO"):
            connection = stack.enter_context(listener.accept()[0])
            if state == "RO":
                connection.sendall(p.frame(p.GetRuntimeStateResponse(state)))
        thread.join(60)
        assert answers == ["RO"]


def test_hundreds_may_wait_to_be_accepted(server: Server) -> None:
    os.kill(server.process.pid, 19)  # SIGSTOP: nothing is accepted
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(500):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(server.kv))
        finally:
            os.kill(server.process.pid, 18)
    assert server.state().state == "EMPTY"


# -- descriptors and flags -------------------------------------------------------------------------------------------


def test_allocations_may_number_more_than_the_usual_limit_of_descriptors(fast_dir: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    usual = len(os.listdir("/proc/self/fd")) + 128  # those that this process has, and what a server needs to begin
    assert hard > usual + 150
    resource.setrlimit(resource.RLIMIT_NOFILE, (usual, hard))
    try:
        server = Server(fast_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    writer = client(server.weights, p.LockType.RW)
    for _ in range(usual + 100):
        writer._request(p.AllocateRequest(4096), p.AllocateResponse)
    assert server.state().allocation_count == usual + 100
    server.stop()


def test_an_allocation_without_a_descriptor_is_an_error_and_the_layout_stays(server: Server) -> None:
    writer = client(server.weights, p.LockType.RW)
    writer.allocate(4096)
    writer.keys()  # once it answers, the descriptor that it exported before is closed
    taken = {int(fd) for fd in os.listdir(f"/proc/{server.process.pid}/fd")}
    limit = next(n for n in range(len(taken) + 1) if n not in taken)
    hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
    with pytest.raises(GmsError, match="AllocateRequest: Too many open files"):
        writer.allocate(4096)
    allocation = writer.mappings[0].allocation_id
    answer, fd = writer._ask(p.ExportAllocationRequest(allocation))
    assert (answer.error, fd) == ("ExportAllocationRequest: Too many open files", -1)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert writer.allocate(4096).layout_slot == 1, "the session and its layout are whole"
    assert server.state().allocation_count == 2
    writer.disconnect()
    assert "rejected AllocateRequest: AllocateRequest: Too many open files" in server.stop()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tag", "weights", "--tag", "weights"], "--tag values must be unique"),
        (["--device-type", "xpu"], "there is no XPU backend"),
        (["--device-type", "cuda", "--memory", "host"], "contradict each other"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gms_launch.gms", "--device", "0", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_upstreams_flags_are_understood(fast_dir: Path) -> None:
    server = Server(fast_dir, "-v", "--tag", "kv_cache", "--tag", "weights")
    client(server.weights, p.LockType.RW).disconnect()
    eventually(lambda: kinds(server.weights)[-1:] == ["allocations_cleared"])
    assert "DEBUG" in server.stop()


def test_sockets_are_named_as_told(fast_dir: Path) -> None:
    env = os.environ | {"GMS_SOCKET_DIR": str(fast_dir)}
    argv = [sys.executable, "-m", "gms_launch.gms", "--device", "0", "--memory-mib", "16", "--socket-uuid", "GPU-other"]
    process = subprocess.Popen(argv, env=env)
    path = fast_dir / "gms_GPU-other_weights.sock"
    try:
        eventually(lambda: Server.answers(path))
    finally:
        process.terminate()
        process.wait()


def test_device_type_cuda_means_a_gpus_memory() -> None:
    from gms_launch.gms.__main__ import parse

    assert parse(["--device", "0", "--device-type", "cuda"]).memory == "cuda"
    assert parse(["--device", "0"]).memory == "host"


def test_a_stranger_who_says_nothing_is_not_kept(fast_dir: Path) -> None:
    """In a process of its own, with three seconds where a server has 30."""
    code = """
import asyncio, sys
from pathlib import Path
from gms_launch.gms.backends.host import HostMemory
from gms_launch.gms.requests import Room
from gms_launch.gms.server import SocketServer
from gms_launch.gms.store import LayoutStore
async def main():
    server = SocketServer(Path(sys.argv[1]), LayoutStore(HostMemory(1 << 20)), Room(), first_frame_timeout=3)
    server.bind()
    print("bound", flush=True)
    await server.serve()
asyncio.run(main())
"""
    path = fast_dir / "own.sock"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "bound\n"
        holder = GmsClient(path, HostMapper())
        holder.connect(p.LockType.RW)
        with dial(path) as silent, dial(path) as slow:
            slow.sendall(b"\x00\x00")
            for stranger in (silent, slow):
                assert b"no complete message within 3 s" in stranger.recv(1000)
                assert stranger.recv(1) == b""
        assert holder.allocate(4096).mapped, "a session may be as quiet as it likes"
    finally:
        process.terminate()
        process.wait()
