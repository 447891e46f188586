"""A GMS server of 16 MiB of host memory as a real process, and clients of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from gms_launch.gms import probe
from gms_launch.gms import protocol as p
from gms_launch.gms.backends.host import HostMapper
from gms_launch.gms.client import GmsClient
from gms_launch.gms.devices import socket_path, virtual_devices
from tests.support import eventually

MIB = 1 << 20


class Server:
    """`python -m gms_launch.gms --device 0` with 16 MiB."""

    def __init__(self, directory: Path, *extra: str) -> None:
        uuid = virtual_devices(1, 1)[0].uuid
        self.weights = socket_path(directory, uuid, "weights")
        self.kv = socket_path(directory, uuid, "kv_cache")
        self.argv = [sys.executable, "-m", "gms_launch.gms", "--device", "0", "--memory-mib", "16", *extra]
        self.env = os.environ | {"GMS_SOCKET_DIR": str(directory)}
        self.log = directory / "gms.log"  # a file: nobody reads a pipe, and a full one would stop the server
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.argv, env=self.env, stderr=log)
        eventually(lambda: self.answers(self.weights) and self.answers(self.kv))

    @staticmethod
    def answers(path: Path) -> bool:
        try:
            return bool(probe.runtime_state(path).state)
        except probe.ProbeError:
            return False

    def state(self) -> p.GetRuntimeStateResponse:
        return probe.runtime_state(self.weights)

    def events(self) -> list[str]:
        return [e.kind for e in probe.event_history(self.weights)]

    def stop(self) -> str:
        """End it; returns its log."""
        self.process.terminate()
        self.process.wait(timeout=60)
        return self.log.read_text()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident(self) -> int:
        """Its memory in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def client(path: Path, mode: p.LockType, timeout_ms: int | None = 20_000) -> GmsClient:
    made = GmsClient(path, HostMapper())
    made.connect(mode, timeout_ms)
    return made


def publish(server: Server, content: bytes = b"weights", size: int = MIB) -> GmsClient:
    writer = client(server.weights, p.LockType.RW)
    mapping = writer.allocate(size, "weights")
    mapping.view()[: len(content)] = content
    writer.put("tensor", mapping.allocation_id, 0, b"{}")
    writer.commit()
    return writer


def dial(path: Path) -> socket.socket:
    """A bare connection, for saying what no client says."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(path))
    return sock
