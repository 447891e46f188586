"""What a life leaves on its node besides processes: temporary files, sockets, shared memory. Named, and removed.

Each life has a directory of its own for temporary files (TMPDIR). Segments in /dev/shm have no such place: those of a
life are the ones that its processes were seen to have mapped, and those with one of their pids in the name, if they are
this user's and were made while it lived. What a life makes and unmaps between two looks under a name that says nothing
is not found. Nothing here touches a process, follows a link or leaves the file system that it began in.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

SHM = Path("/dev/shm")
#: How long clearing up after one life may take (seconds): a directory of the user's choice may be slow.
CLEAR_TIMEOUT = 10.0
_MAPPED = re.compile(r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +/dev/shm/([^/\n]+)$", re.MULTILINE)
_NUMBER = re.compile(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])")


def file_time() -> float:
    """Now by the clock that file times are of (Unix seconds), whatever anybody sets it to."""
    return time.time()


@dataclass(frozen=True)
class Segment:
    """A file of shared memory by its name in /dev/shm and its inode."""

    name: str
    inode: int


def mapped(pids: Collection[int]) -> frozenset[Segment]:
    """The segments that these processes have mapped. A process that is gone, or another user's, has none."""
    found = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", errors="replace") as file:
                text = file.read()
        except OSError:
            continue
        for _, _, inode, name in _MAPPED.findall(text):
            if not name.endswith(" (deleted)"):
                found.add(Segment(name, int(inode)))
    return frozenset(found)


def named_after(pids: Collection[int], names: Collection[str]) -> list[str]:
    """The names with one of these pids in them, as a word of its own. Pure."""
    wanted = {str(pid) for pid in pids if pid > 1}
    return sorted(name for name in names if wanted & set(_NUMBER.findall(name)))


@dataclass(frozen=True)
class Litter:
    """What one life may have left. `since` is when it began (Unix seconds); `spared` are segments of other lives."""

    directory: Path
    since: float
    pids: frozenset[int] = frozenset()
    segments: frozenset[Segment] = frozenset()
    spared: frozenset[Segment] = frozenset()


def clear(litter: Litter, timeout: float = CLEAR_TIMEOUT) -> str:
    """Remove what a dead life left; returns what could not be removed, for people. Blocks, at most about `timeout`."""
    wrong = [f"{litter.directory}: {text}" for text in [remove_tree(litter.directory, timeout)] if text]
    try:
        names = os.listdir(SHM)
    except OSError as exc:
        return "; ".join([*wrong, f"{SHM}: {exc.strerror}"])
    inodes = {s.name: s.inode for s in litter.segments - litter.spared}
    spared = {s.name for s in litter.spared}
    for name in {*inodes, *named_after(litter.pids, names)} - spared:
        try:
            _remove_segment(SHM / name, inodes.get(name), litter.since)
        except OSError as exc:
            wrong.append(f"{SHM / name}: {exc.strerror}")
    return "; ".join(wrong)


def _remove_segment(path: Path, inode: int | None, since: float) -> None:
    """Unlink a segment if it is the one that was seen, this user's, and not older than the life. Raises `OSError`."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    # File times are of a clock that ticks every few ms, and so a little behind.
    young = found.st_ctime >= since - 0.1
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and young and inode in (None, found.st_ino):
        path.unlink(missing_ok=True)


def remove_tree(path: Path, timeout: float) -> str:
    """Remove a directory and all in it; returns why it is still there, empty when it is not. Never follows a link."""
    deadline = time.monotonic() + timeout
    try:
        device = path.lstat().st_dev
        if not stat.S_ISDIR(path.lstat().st_mode):
            return "is no directory"
        for _, below, names, fd in os.fwalk(path, topdown=False, follow_symlinks=False):
            if os.fstat(fd).st_dev != device:
                return "something is mounted in it"
            for name in names:
                os.unlink(name, dir_fd=fd)
                if time.monotonic() > deadline:
                    return f"not removed within {timeout:g} s"
            for name in below:
                if stat.S_ISLNK(os.lstat(name, dir_fd=fd).st_mode):
                    os.unlink(name, dir_fd=fd)
                else:
                    os.rmdir(name, dir_fd=fd)
        path.rmdir()
    except FileNotFoundError:
        return ""
    except RecursionError:
        return "directories in it are nested too deeply"
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


class Clearer:
    """Clears up in threads of its own: fencing goes on beside them, and the agent ends whatever they run into."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def begin(self, litter: Litter, wrong: Callable[[str], None]) -> None:
        """Clear up after a life soon; `wrong`, called in that thread, gets what could not be removed."""

        def work() -> None:
            if text := clear(litter):
                wrong(text)

        thread = threading.Thread(target=work, name="clearer", daemon=True)
        self._threads = [*(t for t in self._threads if t.is_alive()), thread]
        thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for what was begun, no longer than that. Blocks."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
