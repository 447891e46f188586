"""Hosts that take connections and let nobody in: one that says nothing, as a frozen one does, one that hangs up."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest

from gms_launch.errors import NoContactError
from gms_launch.transport import ssh


def test_a_frozen_host_is_named_and_nothing_else_is_said() -> None:
    code = (
        "import sys\nfrom gms_launch.errors import NoContactError\nfrom gms_launch.transport import ssh\n"
        "try:\n    ssh.connect(sys.argv[1], timeout=0.5)\n"
        "except NoContactError as exc:\n    print(exc)\n"
    )
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        host = f"127.0.0.1:{frozen.getsockname()[1]}"
        done = subprocess.run([sys.executable, "-c", code, host], capture_output=True, text=True, check=True)
    assert done.stdout == (f"{host}: no SSH server answers there within 0.5 s: is the host frozen, or overloaded?\n")
    assert done.stderr == ""


def test_a_host_that_hangs_up_is_named() -> None:
    def hang_up(host: socket.socket) -> None:
        client, _ = host.accept()
        with client:
            client.sendall(b"SSH-2.0-x\r\n")
            client.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as host:
        threading.Thread(target=hang_up, args=(host,), daemon=True).start()
        name = f"127.0.0.1:{host.getsockname()[1]}"
        with pytest.raises(NoContactError, match=f"^{name}: its SSH server hung up"):
            ssh.connect(name)
