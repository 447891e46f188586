"""How a file for people is written: whole or not at all, readable by its owner only. Blocks as long as the disk does.

For what must be there before a start goes on, and for `Writer`, which does it off the event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
#: What an error of a write says about the place, in a word for people.
_PLACES = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EROFS: "read-only",
    errno.ENOENT: "gone",
    errno.ENOTDIR: "gone",
    errno.ESTALE: "gone",
    errno.EACCES: "not writable",
    errno.EPERM: "not writable",
}


def write_private(path: Path, text: str) -> None:
    """Replace `path` at once by a file that only its owner reads; a reader sees the old or the new text.

    Raises `OSError`, and leaves the old file as it was then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            file.write(text)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append(path: Path, data: bytes) -> int:
    """Add to the end of `path`, as far as there is room; returns how many bytes that was.

    Opened anew each time: a descriptor that is kept goes on writing to a file that nobody finds any more. Raises
    `OSError` when not a byte could be written.
    """
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        done = 0
        while done < len(data):
            try:
                done += os.write(fd, data[done:])
            except OSError:
                if not done:
                    raise
                break
        return done
    finally:
        os.close(fd)


def allocate(fd: int, size: int) -> str:
    """Take the room for the first `size` bytes of a file, whose length stays; returns why not, if that failed."""
    return _fallocate(fd, _KEEP_SIZE, 0, size)


def punch(fd: int, start: int, end: int) -> str:
    """Give back the room of a part of a file, which reads as zeros from then on; returns why not, if that failed."""
    return _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, start, end - start)


def _fallocate(fd: int, mode: int, start: int, size: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return os.strerror(ctypes.get_errno()) if libc.fallocate(fd, mode, start, size) else ""


def trouble(error: OSError) -> str:
    """What is wrong with the place: full, read-only, gone, not writable, or the error's own words."""
    return _PLACES.get(error.errno or 0, error.strerror or str(error))
