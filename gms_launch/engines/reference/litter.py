"""What a real engine leaves when it is killed, for tests: temporary files, sockets, and shared memory of two kinds."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import uuid
from pathlib import Path

SIZE = 1 << 16


def leave() -> list[object]:
    """Make it all in TMPDIR and /dev/shm; what is returned keeps it open and mapped."""
    place = Path(tempfile.gettempdir())
    (place / f"tmp{uuid.uuid4().hex}.json").write_text("{}")
    below = place / f"vllm_prometheus_{os.getpid()}"
    below.mkdir()
    (below / "gauge.db").write_bytes(b"x" * SIZE)
    (below / "elsewhere").symlink_to("/dev/shm")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / str(uuid.uuid4())))
    listener.listen()
    # Names as Python's shared memory and joblib have them: one tells nothing, one has the pid.
    return [listener, _segment(f"psm_{uuid.uuid4().hex[:8]}"), _segment(f"sem.loky-{os.getpid()}-0")]


def _segment(name: str) -> mmap.mmap:
    fd = os.open(f"/dev/shm/{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.ftruncate(fd, SIZE)
    try:
        return mmap.mmap(fd, SIZE)
    finally:
        os.close(fd)
