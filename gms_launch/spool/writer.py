"""The one door through which a running agent writes for people: the journal, run.json, ranks.json, its log, all logs.

The run directory is on a home that may be full, read-only, removed or hanging, and none of that may be felt by a run.
So nobody waits for a write: a thread makes them, what it cannot write is kept up to a bound and then dropped, oldest
first, and counted; it tries again until it succeeds. What is wrong is said by `places`, for status and events. The node
directory is memory and cannot hang: what belongs there is written on the spot (`here`), and again until it is there.

Not for what a start cannot do without (`files`), nor for what machines agree on, which is in etcd.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gms_launch.numbers import count
from gms_launch.spool import files
from gms_launch.spool.output import Output

#: How often outputs are copied, and how often what failed is tried again (seconds).
PERIOD = 1.0
#: News waits so long for company (seconds).
LINGER = 0.02
#: How often the run directory is looked at when there is nothing to write (seconds).
LOOK = 10.0
#: A write that takes longer makes the run directory slow (seconds).
SLOW = 3.0
#: Journal and log lines that wait for the disk (bytes).
BACKLOG = 4 * 1024 * 1024
#: What is kept of a log that cannot be copied, and of one that is copied and grows faster than that (bytes).
LOG_BACKLOG = 4 * 1024 * 1024
LOG_BURST = 32 * 1024 * 1024
#: Outputs of ended processes that wait for the disk.
ENDED = 16
#: Logs of dead lives that are kept for each component.
KEEP_LIVES = 20


@dataclass(frozen=True)
class Place:
    """How it is with a directory. `state` is empty when all is well; `dropped` counts entries and `dropped_bytes` the
    output of processes that were never written, since the start."""

    name: str
    path: str
    state: str = ""
    dropped: int = 0
    dropped_bytes: int = 0


class Writer:
    """Writes into the run directory `directory`. All calls return at once.

    A log that reaches `limit` bytes is put aside, and of the lives in `logs`, this node's, only the newest are kept.
    """

    def __init__(self, directory: Path, logs: Path, node_dir: Path, limit: int) -> None:
        self._directory, self._logs, self._node_dir, self._limit = directory, logs, node_dir, limit
        self._condition = threading.Condition()
        self._entries: deque[tuple[Path, bytes]] = deque()
        self._size = 0
        self._texts: dict[Path, str] = {}
        self._here: dict[Path, str] = {}
        self._here_state = ""
        self._outputs: list[Output] = []
        self._dropped = 0
        self._in_hand = 0
        self._dropped_bytes = 0
        self._state = ""
        self._busy_since = 0.0
        self._looked = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    # -- what is to be written -----------------------------------------------------------------------------------

    def append(self, path: Path, data: bytes) -> None:
        """Add to a file."""
        with self._condition:
            self._entries.append((path, data))
            self._size += len(data)
            self._bound()
            self._condition.notify()

    def replace(self, path: Path, text: str) -> None:
        """Replace a file; of several texts that wait only the last is written."""
        with self._condition:
            self._texts[path] = text
            self._condition.notify()

    def here(self, path: Path, text: str) -> None:
        """Replace a file in the node directory, now; one that cannot be written is tried again by `tick`."""
        try:
            files.write_private(path, text)
        except OSError as exc:
            self._here[path] = text
            self._here_state = files.trouble(exc)
        else:
            self._here.pop(path, None)

    def not_here(self, path: Path) -> None:
        """Remove a file of the node directory."""
        self._here.pop(path, None)
        with contextlib.suppress(OSError):
            path.unlink()

    def output(self, path: Path) -> Output:
        """Where a process prints to; it is copied to `path`. Raises `OSError` when there is no memory for it."""
        made = Output(path)
        with self._condition:
            self._outputs.append(made)
        return made

    def hasten(self) -> None:
        """Copy what processes have printed without delay: somebody may want to read it."""
        with self._condition:
            self._condition.notify()

    # -- how it goes ---------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Keep what waits within bounds, whatever the thread is stuck in. To be called every second or so."""
        in_trouble = bool(self._state) or self._stuck
        for output in list(self._outputs):
            output.bound(LOG_BACKLOG if in_trouble else LOG_BURST)
        for path, text in list(self._here.items()):
            self.here(path, text)
        if not self._here:
            self._here_state = ""

    @property
    def _stuck(self) -> bool:
        since = self._busy_since
        return bool(since) and time.monotonic() - since > SLOW

    def places(self) -> tuple[Place, ...]:
        """How it is with the run directory and the node directory, as far as there is something to tell."""
        with self._condition:
            lost = self._dropped_bytes + sum(o.dropped for o in self._outputs)
            state = "slow" if self._stuck else self._state
            found = (
                Place("run directory", str(self._directory), state, self._dropped, lost),
                Place("node directory", str(self._node_dir), self._here_state),
            )
        return tuple(p for p in found if p.state or p.dropped or p.dropped_bytes)

    def close(self, timeout: float) -> str:
        """Write what is left, within `timeout` seconds; returns what is wrong if that did not succeed. Blocks."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return "slow"
        return self._state

    @property
    def unwritten(self) -> int:
        """How many entries (events, lines of the agent's log) have never come to disk; for when it is closed."""
        return self._dropped + len(self._entries) + self._in_hand

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = False
        while not last:
            with self._condition:
                if not (self._closing or self._state or self._entries or self._texts):
                    self._condition.wait(PERIOD)
                elif self._state and not self._closing:
                    self._condition.wait_for(lambda: self._closing, PERIOD)
                last = self._closing
            if not last:
                time.sleep(LINGER)
            self._busy_since = time.monotonic()
            try:
                self._state = self._round(last)
            except Exception as exc:  # nothing that is written for people may end the one who writes it
                self._state = f"not written: {exc!r}"
            finally:
                self._busy_since, self._in_hand = 0.0, 0

    def _round(self, last: bool) -> str:
        """Write everything that waits; returns what is wrong, empty when all was written."""
        wrong = ""
        with self._condition:
            entries, self._entries, self._size = self._entries, deque(), 0
            self._in_hand = len(entries)
            texts, self._texts = self._texts, {}
        # One write a file. Newer entries stay behind: those of a round come first in their file.
        chunks: dict[Path, bytes] = {}
        for path, data in entries:
            chunks[path] = chunks.get(path, b"") + data
        left = []
        for path, data in chunks.items():
            done = 0
            try:
                done = files.append(path, data)
                self._rotate(path)
            except OSError as exc:
                wrong = wrong or files.trouble(exc)
            if done < len(data):
                wrong = wrong or "full"
                left += [(path, line) for line in data[done:].splitlines(keepends=True)]
        for path, text in texts.items():
            try:
                files.write_private(path, text)
            except OSError as exc:
                wrong = wrong or files.trouble(exc)
                with self._condition:
                    self._texts.setdefault(path, text)
        with self._condition:
            self._entries.extendleft(reversed(left))
            self._in_hand = 0
            self._size += sum(len(data) for _, data in left)
            self._bound()
        wrong = self._copy_outputs(last) or wrong
        if not wrong and time.monotonic() - self._looked > LOOK:
            wrong = self._look()
        return wrong

    def _bound(self) -> None:
        while self._size > BACKLOG:
            _, data = self._entries.popleft()
            self._size -= len(data)
            self._dropped += 1

    def _copy_outputs(self, last: bool) -> str:
        wrong = ""
        for output in list(self._outputs):
            ended = output.ended or last
            try:
                if output.copy():
                    self._rotate(output.path)
            except OSError as exc:
                wrong = wrong or files.trouble(exc)
            if ended and not (wrong and output.waiting):
                self._forget(output)
        ended_ones = [o for o in self._outputs if o.ended]
        for output in ended_ones[: -ENDED or None]:
            self._forget(output)
        return wrong

    def _forget(self, output: Output) -> None:
        output.close()
        with self._condition:
            self._outputs.remove(output)
            self._dropped_bytes += output.dropped

    def _look(self) -> str:
        try:
            os.stat(self._directory)
            self._looked = time.monotonic()
            _drop_old_lives(self._logs)
        except OSError as exc:
            return files.trouble(exc)
        return ""

    def _rotate(self, path: Path) -> None:
        """Put a log that has grown too large aside. By name: a copy would need room, and there may be none."""
        if path.suffix == ".log" and path.stat().st_size > self._limit:
            path.replace(path.with_suffix(".log.1"))


def _drop_old_lives(logs: Path) -> None:
    """Remove the logs of every component's oldest lives."""
    lives: dict[str, list[tuple[int, Path]]] = {}
    for log in logs.glob("*.log"):
        component, _, suffix = log.stem.rpartition(".")
        if (life := count(suffix)) is not None:
            lives.setdefault(component, []).append((life, log))
    for found in lives.values():
        for _, log in sorted(found)[:-KEEP_LIVES]:
            log.unlink(missing_ok=True)
            log.with_suffix(".log.1").unlink(missing_ok=True)


class LogHandler(logging.Handler):
    """The agent's log through the writer: a file handler waits for the disk, and the event loop with it."""

    def __init__(self, append: Callable[[Path, bytes], None], path: Path) -> None:
        super().__init__()
        self._append, self._path = append, path

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._append(self._path, (self.format(record) + "\n").encode(errors="backslashreplace"))
        except Exception:
            self.handleError(record)
