"""The unit for bare metal, and what it is told: a real socket where systemd would listen."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gms_launch.process import proc
from tests.support import GMS_LAUNCH, LONG, Deployment, eventually

UNITS = Path(__file__).parents[2] / "systemd"


def test_systemd_takes_the_unit_as_it_is(tmp_path: Path) -> None:
    unit = tmp_path / "gms-launch@demo.service"
    shutil.copy(UNITS / "gms-launch@.service", unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "gms-launch" not in done.stderr, done


class Manager:
    """The socket of a service manager, and what came there."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.heard: list[str] = []

    def has(self, text: str) -> bool:
        while True:
            try:
                self.heard.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return any(text in h.splitlines() for h in self.heard)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_a_service_says_when_it_is_full_and_when_it_stops(tmp_path: Path, model: Path, kind: str) -> None:
    run = Deployment(tmp_path / "home", model)
    address = f"@gms-launch-{run.run}" if kind == "abstract" else str(tmp_path / "notify")
    manager = Manager(address)
    # As the unit starts it, with nothing behind the two dashes.
    env = run.env | {"NOTIFY_SOCKET": address}
    agent = subprocess.Popen([*GMS_LAUNCH, "up", *run.flags, "--"], env=env, stderr=subprocess.DEVNULL)
    try:

        def full() -> bool:
            assert agent.poll() is None, "it has ended"
            return manager.has("READY=1")

        eventually(full, LONG, "READY=1")
        eventually(lambda: run.status()["redundancy"] == "full")
        eventually(lambda: manager.has("STATUS=redundancy full"))
        assert not manager.has("STOPPING=1")
        for pid in run.alive():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a look at a rank that has ended by now
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes(), proc.command_line(pid)
        agent.send_signal(signal.SIGTERM)
        eventually(lambda: manager.has("STOPPING=1"), what="STOPPING=1")
        assert agent.wait(LONG) == 0
        eventually(lambda: run.alive() == [], what="the guard ends after its agent")
    finally:
        run.__exit__()
        agent.wait(LONG)
        manager.socket.close()


def test_bad_settings_end_it_at_once_and_nobody_is_told_that_it_is_ready(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    env = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "GMS_LAUNCH_HOME": str(tmp_path)}
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "gms_launch", "up", "--model", "/none"], env=env, check=False)
    assert done.returncode == 2 and not manager.has("READY=1") and time.monotonic() - begun < 60
    manager.socket.close()
