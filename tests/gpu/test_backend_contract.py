"""What every kind of GMS memory must do, with a real server process: host memory always, a GPU's by `make test-gpu`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.engines.reference import compute as computing
from gms_launch.engines.reference.compute.base import Compute, Piece, Span
from gms_launch.gms import probe
from gms_launch.gms import protocol as p
from gms_launch.gms.backends.host import HostMapper
from gms_launch.gms.client import GmsClient, GmsError
from gms_launch.gms.devices import device_uuid, real_devices, socket_path
from gms_launch.gms.protocol import LockType
from tests.support import eventually

MIB = 1 << 20
KINDS = ["host", *(["cuda"] if os.environ.get("GMS_LAUNCH_GPU_TESTS") else [])]
MASK = (1 << 64) - 1


class Server:
    """`python -m gms_launch.gms --device 0` for a kind of memory."""

    def __init__(self, kind: str, directory: Path, patience: float = 1.0) -> None:
        self.kind = kind
        uuid = device_uuid(kind, 0)
        self.weights, self.kv = (socket_path(directory, uuid, tag) for tag in ("weights", "kv_cache"))
        argv = [sys.executable, "-m", "gms_launch.gms", "--device", "0", "--memory", kind, "--memory-mib", "512"]
        argv += ["--alloc-retry-timeout", str(patience), "--alloc-retry-interval", "0.05"]
        env = {k: v for k, v in os.environ.items() if k != "GMS_LAUNCH_GPU_TESTS"} | {"GMS_SOCKET_DIR": str(directory)}
        self.process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
        eventually(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
        try:
            return bool(probe.runtime_state(self.weights).state)
        except probe.ProbeError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, fast_dir: Path) -> Iterator[Server]:
    running = Server(request.param, fast_dir)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def compute(server: Server) -> Compute:
    return computing.make(server.kind, 0)


def connected(path: Path, compute: Compute, mode: LockType, timeout_ms: int = 20_000) -> GmsClient:
    client = GmsClient(path, compute.mapper)
    client.connect(mode, timeout_ms)
    return client


def publish(server: Server, compute: Compute, sizes: list[int]) -> tuple[GmsClient, list[int]]:
    """Allocations with a word of their own at either end, committed; returns their addresses."""
    writer = connected(server.weights, compute, LockType.RW)
    addresses = []
    for number, size in enumerate(sizes):
        mapping = writer.allocate(size, "weights")
        compute.store(mapping.address, 1000 + number)
        compute.store(mapping.address + mapping.aligned_size - 8, 2000 + number)
        addresses.append(mapping.address)
    writer.commit()
    return writer, addresses


def test_what_was_written_is_there_after_unmap_and_remap_at_the_same_addresses(
    server: Server, compute: Compute
) -> None:
    client, addresses = publish(server, compute, [MIB, 5 * MIB, 3])
    for _ in range(3):
        client.connect(LockType.RO)
        client.remap_all()
        assert [m.address for m in client.mappings.values()] == addresses
        for number, mapping in enumerate(client.mappings.values()):
            assert compute.load(mapping.address) == 1000 + number
            assert compute.load(mapping.address + mapping.aligned_size - 8) == 2000 + number
        client.unmap_all()
        client.disconnect()
    assert probe.runtime_state(server.weights).allocation_count == 3, "there is one copy"


def test_sizes_are_rounded_to_the_granularity(server: Server, compute: Compute) -> None:
    writer = connected(server.weights, compute, LockType.RW)
    mapping = writer.allocate(1, "weights")
    assert mapping.size == 1 and mapping.aligned_size == compute.mapper.granularity
    assert compute.mapper.granularity == (2 * MIB if server.kind == "cuda" else os.sysconf("SC_PAGESIZE"))
    assert mapping.address % compute.mapper.granularity == 0
    writer.disconnect()


def test_memory_outlives_a_writer_that_is_killed_after_its_commit(
    server: Server, compute: Compute, tmp_path: Path
) -> None:
    code = f"""
import sys, time
from pathlib import Path
from gms_launch.engines.reference import compute
from gms_launch.gms.backends.host import HostMapper
from gms_launch.gms.client import GmsClient
from gms_launch.gms.protocol import LockType
c = compute.make({server.kind!r}, 0)
client = GmsClient(Path(sys.argv[1]), c.mapper)
client.connect(LockType.RW)
m = client.allocate(8 << 20, "weights")
c.store(m.address, 4711)
client.put("t", m.allocation_id, 0, b"x")
client.commit()
print("done", flush=True)
time.sleep(600)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(server.weights)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert writer.stdout is not None and writer.stdout.readline() == "done\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    reader = connected(server.weights, compute, LockType.RO)
    (mapping,) = reader.import_all()
    assert compute.load(mapping.address) == 4711
    reader.disconnect()


def test_out_of_memory_is_retried_until_a_deadline_and_then_refused(server: Server, compute: Compute) -> None:
    writer = connected(server.weights, compute, LockType.RW)
    too_much = 1 << 40 if server.kind == "cuda" else 1 << 30
    begun = time.monotonic()
    with pytest.raises(GmsError, match="Timed out waiting for GPU memory"):
        writer.allocate(too_much, "weights")
    half = (512 * MIB) // 2 + MIB
    if server.kind == "host":
        writer.allocate(half, "weights")
        with pytest.raises(GmsError, match="Timed out waiting for GPU memory"):
            writer.allocate(half, "weights")
        assert time.monotonic() - begun >= 1.0
    assert writer.allocate(MIB, "weights").mapped, "the session goes on"
    writer.disconnect()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_device_is_refused_waited_for_and_granted_when_memory_comes_back(kind: str, fast_dir: Path) -> None:
    """The device itself is full: the GPU's own memory, taken to the last piece, and not a limit that we keep."""
    server = Server(kind, fast_dir, patience=4.0)
    total = 512 * MIB if kind == "host" else next(d.memory for d in real_devices())
    # They look at none of the memory, so they need no context on the device, which would take some of it.
    weights, kv = GmsClient(server.weights, HostMapper()), GmsClient(server.kv, HostMapper())
    weights.connect(LockType.RW)
    kv.connect(LockType.RW)
    taken, piece = 0, total // 16
    while taken < total * 0.97 and piece >= 2 * MIB:  # ever smaller pieces
        answer, _ = weights._ask(p.AllocateRequest(piece, "weights"))
        if isinstance(answer, p.AllocateResponse):
            taken += answer.aligned_size
            continue
        assert "Timed out waiting for GPU memory" in answer.error
        piece //= 16
    assert taken > total * 0.9, "there is no room for an eighth of it any more"
    assert probe.runtime_state(server.weights).allocated_bytes == taken

    def ooms() -> int:
        return sum(e.kind == "allocation_oom" for e in probe.event_history(server.kv))

    wanted = total // 8
    assert "Timed out waiting for GPU memory" in kv._ask(p.AllocateRequest(wanted, "kv_cache"))[0].error
    assert ooms() == 1
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(kv._ask(p.AllocateRequest(wanted, "kv_cache"))[0]))
    waiting.start()
    eventually(lambda: ooms() == 2, what="it waits")
    freed = time.monotonic()
    weights.disconnect()  # as at the death of an engine: its memory comes back
    waiting.join(60)
    took = time.monotonic() - freed
    (granted,) = answers
    assert isinstance(granted, p.AllocateResponse) and granted.size == wanted
    eventually(lambda: probe.runtime_state(server.weights).allocated_bytes == 0)
    assert probe.runtime_state(server.kv).allocated_bytes == granted.aligned_size
    ms = took * 1000
    print(
        f"{kind}: {taken >> 20} of {total >> 20} MiB taken, {wanted >> 20} granted {ms:.1f} ms after they were let go"
    )
    kv.disconnect()
    server.stop()


def test_a_dead_kv_writers_memory_is_free_for_the_next(server: Server, compute: Compute) -> None:
    first = connected(server.kv, compute, LockType.RW)
    first.allocate(64 * MIB, "kv_cache")
    assert probe.runtime_state(server.kv).allocated_bytes == 64 * MIB
    first.unmap_all()
    first.disconnect()
    eventually(lambda: probe.runtime_state(server.kv).allocated_bytes == 0)
    second = connected(server.kv, compute, LockType.RW)
    assert second.allocate(64 * MIB, "kv_cache").mapped
    second.unmap_all()
    second.disconnect()


def test_scratch_and_then_real_memory_at_one_address(server: Server, compute: Compute) -> None:
    """A parked engine's scratch KV and its real KV after promotion: what captured the address need not be made anew."""
    client = GmsClient(server.kv, compute.mapper)
    size = 4 * MIB
    address = client.reserve_scratch(size)
    compute.store(address, 1)
    assert client.drop_scratch(address, size) == size
    client.connect(LockType.RW)
    mapping = client.allocate(size, "kv_cache", address=address)
    assert mapping.address == address
    compute.store(address + size - 8, 2)
    assert compute.load(address + size - 8) == 2
    client.unmap_all()
    client.disconnect()


def test_files_and_sums(server: Server, compute: Compute, tmp_path: Path) -> None:
    """A file of more than one staging buffer, read to an odd place, sums to what Python says."""
    rng = random.Random(1)
    data = rng.randbytes(70 * MIB)
    (tmp_path / "data").write_bytes(b"head" + data)
    writer = connected(server.weights, compute, LockType.RW)
    address = writer.allocate(len(data) + 64, "weights").address
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    compute.fill([Piece(fd, 4, len(data), address)])
    os.close(fd)
    compute.zero(address + len(data), 64)
    words = memoryview(data).cast("Q")
    spans = [Span(address, 1000, 0), Span(address + 8 * 77, 12345, 9), Span(address + len(data) - 8, 2, 5)]
    expected = [
        sum(words[i] * (2 * i + 1) for i in range(1000)) & MASK,
        sum(words[77 + i] * (2 * (9 + i) + 1) for i in range(12345)) & MASK,
        words[-1] * 11 & MASK,
    ]
    assert compute.weighted_sums(spans) == expected
    whole = compute.weighted_sums([Span(address, len(words), 0)])
    import numpy as np

    exact = np.frombuffer(data, dtype=np.uint64) * (2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1))
    assert whole == [int(exact.sum(dtype=np.uint64))]
    writer.unmap_all()
    writer.disconnect()


@pytest.mark.skipif("cuda" not in KINDS, reason="needs a GPU: make test-gpu")
def test_the_server_has_no_context_and_holds_no_mapping(fast_dir: Path) -> None:
    """NVML lists a process once it has a context: the server must never be listed."""
    from gms_launch.gms import gpus

    server = Server("cuda", fast_dir)
    compute = computing.make("cuda", 0)
    client, _ = publish(server, compute, [512 * MIB])
    listed = {pid for gpu in gpus.look() for pid, _ in gpu.processes}
    assert os.getpid() in listed, "NVML lists who has a context, and this test has one"
    assert server.process.pid not in listed
    client.unmap_all()
    server.stop()


@pytest.mark.skipif("cuda" not in KINDS, reason="needs a GPU: make test-gpu")
def test_a_reader_cannot_write_to_the_gpu(fast_dir: Path) -> None:
    """A write through a read-only mapping ends the writer's context; so in a process of its own."""
    server = Server("cuda", fast_dir)
    publish(server, computing.make("cuda", 0), [2 * MIB])
    code = """
import sys
from pathlib import Path
from gms_launch.engines.reference import compute
from gms_launch.gms.backends.host import HostMapper
from gms_launch.gms.client import GmsClient
from gms_launch.gms.protocol import LockType
c = compute.make("cuda", 0)
client = GmsClient(Path(sys.argv[1]), c.mapper)
client.connect(LockType.RO)
(m,) = client.import_all()
assert c.load(m.address) == 1000
c.zero(m.address, 8)
print("written", c.load(m.address))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(server.weights)], capture_output=True, text=True, check=False
    )
    assert "written" not in done.stdout and "CUDA_ERROR" in done.stderr, done.stderr
    server.stop()
