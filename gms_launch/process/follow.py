"""Follow growing log files, told by the kernel when there is more.

A log is watched only as long as somebody wants its lines: a serving engine writes one a request.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

from inotify_simple import INotify, flags

#: A line longer than this is cut (bytes); nothing that we look for is near it.
LINE_MAX = 65536
#: Read at one look (bytes): the event loop waits for that.
READ_MAX = 128 * 1024


class LogFollower:
    """Hands out the complete lines that were added to a file since the last look, `READ_MAX` bytes of them at most;
    `behind` when there is more. What was given back of the file meanwhile is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.behind = False
        self._offset = 0
        self._rest = b""

    def lines(self) -> list[str]:
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:  # truncated by a rotation
                    self._offset, self._rest = 0, b""
                begin = _data(file.fileno(), self._offset, size)
                file.seek(begin)
                data = file.read(READ_MAX)
        except OSError:  # what is not read now is read later: whoever looks may have a group to kill
            self.behind = False
            return []
        if begin > self._offset:
            self._rest = b""
        self._offset = begin + len(data)
        self.behind = self._offset < size
        *complete, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-LINE_MAX:]
        return [line.decode(errors="replace") for line in complete]


def _data(fd: int, offset: int, size: int) -> int:
    """Where a file goes on behind `offset`, without the hole that may be there. Raises `OSError`."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) if offset < size else offset
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # nothing but a hole
            return size
        raise


class FileWatcher:
    """Calls back on the event loop when a watched file was written to."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._inotify = INotify()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop = loop
        loop.add_reader(self._inotify.fileno(), self._ready)

    def add(self, path: Path, callback: Callable[[], None]) -> int:
        """Watch `path`, which must exist; returns a number for `remove`."""
        descriptor = int(self._inotify.add_watch(str(path), flags.MODIFY))
        self._callbacks[descriptor] = callback
        return descriptor

    def remove(self, descriptor: int) -> None:
        if self._callbacks.pop(descriptor, None) is not None:
            try:
                self._inotify.rm_watch(descriptor)
            except OSError:
                pass  # the file is gone, and the watch with it

    def close(self) -> None:
        self._loop.remove_reader(self._inotify.fileno())
        self._inotify.close()

    def _ready(self) -> None:
        for descriptor in {event.wd for event in self._inotify.read(timeout=0)}:
            callback = self._callbacks.get(descriptor)
            if callback is not None:
                callback()
