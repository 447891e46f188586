"""A host that takes connections and says nothing, as a frozen one does: its kernel still answers."""

from __future__ import annotations

import socket
import subprocess
import sys


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
