"""What a child prints: kept in memory, copied to its log in the run directory when that can be done.

The child's standard output is a memfd. No file system is behind it: a write to it never waits, is never refused for a
full disk or a full /dev/shm, and needs nobody who reads, so that a stopped agent stops no engine (a pipe would). The
kernel announces every write (inotify), which is how phases are seen. What has been copied is given back by punching
holes, all but the tail that error messages quote; what cannot be copied is kept up to a bound and then dropped from its
beginning. Not for the agent's own words: those go to `Writer.append`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from gms_launch.spool import files

#: What is kept of a log that is copied, for error messages (bytes).
TAIL = 256 * 1024
#: Copied at once (bytes).
CHUNK = 1024 * 1024
PAGE = 4096


class Output:
    """One child's output. `fd` is for the child; `source` reads as a file while this is open; `path` is the copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        memory = os.memfd_create(path.name, os.MFD_CLOEXEC)
        # Opened anew by name: appending, and so that its writes are announced.
        self.fd = os.open(f"/proc/self/fd/{memory}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        os.close(memory)
        self.ended = False
        self.dropped = 0
        self._copied = 0
        self._untold = 0
        self._punched = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def source(self) -> Path:
        """Where it can be read: its memory, or the copy when that has been given back."""
        return self.path if self._closed else Path(f"/proc/self/fd/{self.fd}")

    def kept(self) -> str | None:
        """What is in memory of it, the end at least; None when that was given back."""
        with self._lock:
            if self._closed:
                return None
            return os.pread(self.fd, os.fstat(self.fd).st_size - self._punched, self._punched).decode(errors="replace")

    @property
    def waiting(self) -> int:
        """Bytes that are not copied yet."""
        with self._lock:
            return 0 if self._closed else os.fstat(self.fd).st_size - self._copied

    def copy(self) -> bool:
        """Bring the copy up to what there is now; False when it was. Blocks as the disk does. Raises `OSError`.

        What is added meanwhile is for the next time: who prints faster than the disk writes keeps nobody from his turn.
        """
        if not (waiting := self.waiting):
            return False
        goal = self._copied + waiting
        while self.waiting > 0 and self._copied < goal:
            with self._lock:
                start, untold = self._copied, self._untold
                data = os.pread(self.fd, CHUNK, start)
            if untold:
                files.append(self.path, f"\n[gms-launch: {untold} bytes could not be written here]\n".encode())
                with self._lock:
                    self._untold -= untold
            done = files.append(self.path, data)
            with self._lock:
                self._copied = max(self._copied, start + done)  # it may have been bounded meanwhile
                self._give_back(self._copied - TAIL)
        return True

    def bound(self, most: int) -> None:
        """Drop the oldest of what waits for a disk, beyond `most` bytes. Never blocks."""
        with self._lock:
            if self._closed:
                return
            least = os.fstat(self.fd).st_size - most
            if least > self._copied:
                self.dropped += least - self._copied
                self._untold += least - self._copied
                self._copied = least
                self._give_back(least)

    def close(self) -> None:
        """Give the memory back. What was not copied is dropped."""
        with self._lock:
            if not self._closed:
                self.dropped += os.fstat(self.fd).st_size - self._copied
                self._closed = True
                os.close(self.fd)

    def _give_back(self, end: int) -> None:
        end -= end % PAGE
        if end > self._punched:
            files.punch(self.fd, self._punched, end)
            self._punched = end
