"""The CUDA backend without a GPU: the order of driver calls as a GPU run recorded it, and what errors become."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gms_launch.gms import probe
from gms_launch.gms import protocol as p
from gms_launch.gms.backends import OutOfMemoryError, cuda
from gms_launch.gms.backends.host import HostMapper
from gms_launch.gms.client import GmsClient, GmsError
from gms_launch.gms.devices import device_uuid, socket_path
from gms_launch.gms.protocol import LockType
from tests.gpu import scenario
from tests.gpu.fake_driver import CUresult, FakeDriver
from tests.support import eventually

TRACE = Path(__file__).with_name("trace-h200.json")


def test_the_driver_is_called_as_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver()
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    assert scenario.record() == json.loads(TRACE.read_text())


def test_the_recorded_run_keeps_its_addresses_and_its_rights() -> None:
    trace = json.loads(TRACE.read_text())
    names = [call[0] for call in trace]
    assert names.count("cuMemAddressReserve") == names.count("cuMemAddressFree") == 3, "addresses are made once"
    assert names.count("cuMemMap") == names.count("cuMemUnmap") == 8
    rights = [call[-1] for call in trace if call[0] == "cuMemSetAccess"]
    write, read = "CU_MEM_ACCESS_FLAGS_PROT_READWRITE", "CU_MEM_ACCESS_FLAGS_PROT_READ"
    assert rights == [write, write, read, read, write, read, read, write], (
        "readers read; the writer, scratch and KV write"
    )
    assert names.count("cuMemExportToShareableHandle") == 3, "once an allocation: closing the last descriptor is slow"
    assert "cuCtxCreate" not in names and names.index("cuMemCreate") > names.index("cuInit")


@pytest.mark.parametrize(
    ("result", "kind", "says"),
    [
        (CUresult.CUDA_ERROR_OUT_OF_MEMORY, OutOfMemoryError, "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"),
        (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, cuda.CudaError, "cuMemCreate: CUDA_ERROR_ILLEGAL_ADDRESS: as told"),
        (CUresult.CUDA_ERROR_NO_DEVICE, cuda.NoDriverError, "cuMemCreate: CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_errors_have_the_calls_and_the_drivers_name(
    result: CUresult, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeDriver(cuMemCreate=result)
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    with pytest.raises(kind, match=says):
        cuda.CudaMemory(0).create(2 << 20)


def test_only_so_many_descriptors_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what the process may have: with more allocations than that the rest are exported on request."""
    monkeypatch.setattr(cuda, "driver", FakeDriver)
    memory = cuda.CudaMemory(0)
    memory._keep = 2
    before = len(os.listdir("/proc/self/fd"))
    handles = [memory.create(2 << 20) for _ in range(5)]
    for _ in range(2):
        for handle in handles:
            os.close(memory.export(handle, writable=True))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    for handle in handles:
        memory.release(handle)
    assert len(os.listdir("/proc/self/fd")) == before and memory.used == 0


def test_an_export_without_a_descriptor_does_not_reach_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's own error for it says less and would end the server."""
    monkeypatch.setattr(cuda, "driver", lambda: FakeDriver(cuMemExportToShareableHandle=CUresult.CUDA_ERROR_NO_DEVICE))
    memory = cuda.CudaMemory(0)
    handle = memory.create(2 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            memory.export(handle, writable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_gpu_that_is_not_there_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gms_launch.gms", "--device", "99", "--memory", "cuda"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "there is no GPU 99 here" in done.stderr and "Traceback" not in done.stderr


def test_a_drivers_out_of_memory_is_refused_waited_for_and_granted(fast_dir: Path) -> None:
    """The CUDA backend under the real server; on a GPU, test_backend_contract.py fills the device itself."""
    code = """
import sys
from gms_launch.gms import __main__ as server
from gms_launch.gms.backends import cuda
from tests.gpu.fake_driver import FakeDriver
fake = FakeDriver(room=16 << 20)
cuda.driver = lambda: fake
server.make_memory = lambda options, uuid: cuda.CudaMemory(0)
sys.argv = ["gms", "--device", "0", "--alloc-retry-timeout", "3", "--alloc-retry-interval", "30"]
server.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"GMS_SOCKET_DIR": str(fast_dir)})
    uuid = device_uuid("host", 0)
    weights, kv = (GmsClient(socket_path(fast_dir, uuid, tag), HostMapper()) for tag in ("weights", "kv_cache"))
    try:
        weights.connect(LockType.RW, server_wait=60.0)
        kv.connect(LockType.RW)
        weights._request(p.AllocateRequest(12 << 20), p.AllocateResponse)
        with pytest.raises(GmsError, match="Timed out waiting for GPU memory: requested_size=8388608"):
            kv.allocate(8 << 20)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(kv._ask(p.AllocateRequest(8 << 20))[0]))
        waiting.start()
        eventually(lambda: [e.kind for e in probe.event_history(kv.path)].count("allocation_oom") == 2)
        weights.disconnect()
        waiting.join(60)
        assert isinstance(answers[0], p.AllocateResponse)
    finally:
        process.terminate()
        process.wait()


def test_a_server_does_not_live_on_after_an_unexpected_driver_error(fast_dir: Path) -> None:
    """What the driver holds is not known then. Engines keep their mappings; the launcher sees the server's end."""
    code = """
import sys
from gms_launch.gms import __main__ as server
from gms_launch.gms.backends import cuda
from gms_launch.gms.backends.host import HostMemory
def create(self, size):
    raise cuda.CudaError("cuMemCreate", "CUDA_ERROR_ILLEGAL_ADDRESS", "as told")
HostMemory.create = create
sys.argv = ["gms", "--device", "0", "--memory-mib", "16"]
server.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"GMS_SOCKET_DIR": str(fast_dir)},
        stderr=subprocess.PIPE,
        text=True,
    )
    path = socket_path(fast_dir, device_uuid("host", 0), "weights")
    client = GmsClient(path, HostMapper())
    client.connect(LockType.RW, server_wait=60.0)
    with pytest.raises(GmsError):
        client.allocate(4096, "weights")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "giving up all memory" in errors and "CUDA_ERROR_ILLEGAL_ADDRESS" in errors
    client.disconnect()
    with pytest.raises(probe.ProbeError):
        probe.runtime_state(path)
