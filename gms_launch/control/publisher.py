"""Write records to etcd without ever making the agent wait.

The last value of a key wins: while etcd is away, what piles up is one value a key, not a history. Events are kept
all. A thread of its own writes; it keeps trying until it is stopped.
"""

from __future__ import annotations

import logging
import threading

from gms_launch.control.store import Etcd, describe
from gms_launch.errors import NoContactError

log = logging.getLogger("agent")


class Publisher(threading.Thread):
    """`put` and `delete` return at once; `stop` waits for what is left."""

    def __init__(self, etcd: Etcd) -> None:
        super().__init__(name="publisher", daemon=True)
        self._etcd = etcd
        self._pending: dict[str, tuple[bytes | None, int]] = {}
        self._condition = threading.Condition()
        self._stopping = False

    def put(self, key: str, value: bytes, lease: int = 0) -> None:
        with self._condition:
            self._pending[key] = (value, lease)
            self._condition.notify()

    def delete(self, key: str) -> None:
        with self._condition:
            self._pending[key] = (None, 0)
            self._condition.notify()

    def stop(self, timeout: float) -> None:
        """Write what is left, for at most `timeout` seconds, and end."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self.join(timeout)

    def run(self) -> None:
        while True:
            with self._condition:
                while not self._pending:
                    if self._stopping:
                        return
                    self._condition.wait()
                key = next(iter(self._pending))
                value, lease = self._pending.pop(key)
            try:
                self._write(key, value, lease)
            except NoContactError:
                with self._condition:
                    # A newer value may have come meanwhile; ours is then out of date.
                    self._pending.setdefault(key, (value, lease))
                    if self._stopping:
                        return
                    self._condition.wait(0.1)
            except Exception as exc:
                log.warning("etcd refused %s: %s", key, describe(exc))

    def _write(self, key: str, value: bytes | None, lease: int) -> None:
        if value is None:
            self._etcd.delete(key, retry=1.0)
        else:
            self._etcd.put(key, value, lease=lease or None, retry=1.0)
