"""Write records to etcd without ever making the agent wait.

The last value of a key wins: while etcd is away, what piles up is one value a key, not a history. What has piled up
goes out in one transaction, so that a burst of news costs every watcher one message. A record that somebody acts on
goes out at once; what is only kept for later (`later`) waits a moment for company. A thread of its own writes; it
keeps trying until it is stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from gms_launch.control import conditional
from gms_launch.control.client import AlarmedError, Etcd, describe
from gms_launch.control.conditional import Conditions
from gms_launch.errors import NoContactError

log = logging.getLogger("agent")

#: How long what is only kept for later waits for company (seconds): longer than a cohort takes to die.
LINGER = 0.1
#: Between two tries of what etcd refuses because of an alarm (seconds).
ALARMED = 0.5
#: Most keys in one transaction; etcd's default limit is 128.
BATCH = 100


class Entry(NamedTuple):
    """What is to be written: `value` (None deletes) under `lease` (0: none); only if the key `unless` is not there."""

    value: bytes | None
    lease: int = 0
    unless: str = ""


Pending = dict[str, Entry]


class Publisher(threading.Thread):
    """`put` and `delete` return at once; `stop` waits for what is left."""

    def __init__(
        self, etcd: Etcd, conditions: Conditions | None = None, on_refused: Callable[[], None] | None = None
    ) -> None:
        """Writes only as long as the conditions hold; the first time that they do not, `on_refused` is called, and
        nothing is written any more.
        """
        super().__init__(name="publisher", daemon=True)
        self._etcd = etcd
        self._conditions, self._on_refused = dict(conditions or {}), on_refused
        self._refused = False
        self._now: Pending = {}
        self._later: Pending = {}
        self._due: float | None = None
        self._condition = threading.Condition()
        self._stopping = False

    def put(self, key: str, value: bytes, lease: int = 0, later: bool = False, unless: str = "") -> None:
        """`unless`: nothing is stored if that key is there by then."""
        self._add(key, Entry(value, lease, unless), later)

    def delete(self, key: str) -> None:
        self._add(key, Entry(None), later=True)

    def _add(self, key: str, entry: Entry, later: bool) -> None:
        with self._condition:
            if not later or key in self._now:  # what was urgent stays so
                self._later.pop(key, None)
                self._now[key] = entry
                self._condition.notify()
                return
            self._later[key] = entry
            if self._due is None:
                self._due = time.monotonic() + LINGER
                self._condition.notify()

    def stop(self, timeout: float) -> None:
        """Write what is left, for at most `timeout` seconds, and end."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self.join(timeout)

    def run(self) -> None:
        while (batch := self._next()) is not None:
            try:
                self._write(batch)
            except NoContactError as exc:
                with self._condition:
                    # A newer value may have come meanwhile; ours is then out of date.
                    for key, entry in batch.items():
                        if key not in self._later:
                            self._now.setdefault(key, entry)
                    if self._stopping:
                        return
                    self._condition.wait(ALARMED if isinstance(exc, AlarmedError) else 0.1)
            except Exception as exc:
                log.warning("etcd refused %s: %s", ", ".join(batch), describe(exc))

    def _next(self) -> Pending | None:
        """Wait for something to write; None at the end.

        Keys with a lease come alone, since a dead lease fails its batch, and those that may have to be left out.
        """
        with self._condition:
            while not self._now:
                wait = None if self._due is None else self._due - time.monotonic()
                if self._later and (self._stopping or (wait is not None and wait <= 0)):
                    self._now, self._later, self._due = self._later, {}, None
                    break
                if self._stopping:
                    return None
                self._condition.wait(wait)
            first = next(iter(self._now))
            if self._now[first].lease or self._now[first].unless:
                return {first: self._now.pop(first)}
            keys = [k for k, entry in self._now.items() if not entry.lease and not entry.unless][:BATCH]
            return {k: self._now.pop(k) for k in keys}

    def _write(self, batch: Pending) -> None:
        ((key, (value, lease, unless)), *rest) = batch.items()
        if self._conditions:
            self._write_if(batch, lease, unless)
        elif rest:
            self._etcd.put_many({k: entry.value for k, entry in batch.items()}, retry=1.0)
        elif unless:
            conditional.write(self._etcd, {unless: None}, {key: value}, lease, retry=1.0)
        elif value is None:
            self._etcd.delete(key, retry=1.0)
        else:
            self._etcd.put(key, value, lease=lease or None, retry=1.0)

    def _write_if(self, batch: Pending, lease: int, unless: str) -> None:
        values = {k: entry.value for k, entry in batch.items()}
        if self._refused or conditional.write(self._etcd, self._conditions, values, lease, unless, retry=1.0):
            return
        self._refused = True
        if self._on_refused is not None:
            self._on_refused()
