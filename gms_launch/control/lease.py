"""Keep a lease alive, say when it was lost, and take a new one.

A lease is lost when etcd says so, or when its time to live has passed since the last renewal that was *sent* and
answered: a client that cannot reach etcd must assume the worst at the same moment as everybody else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gms_launch.control.store import Etcd, describe


class LeaseKeeper(threading.Thread):
    """Holds one lease at a time. Callbacks come from the keeper's thread.

    `on_granted(lease_id)` after each new lease, `on_renewed(sent)` with the monotonic time at which a renewal that was
    answered had been sent, `on_lost(reason)` once for each lease that was lost. `lease` and `sent` take over a lease
    that was granted before.
    """

    def __init__(
        self,
        etcd: Etcd,
        ttl: float,
        on_granted: Callable[[int], None],
        on_lost: Callable[[str], None],
        on_renewed: Callable[[float], None] = lambda _: None,
        lease: int = 0,
        sent: float = 0.0,
    ) -> None:
        super().__init__(name="lease", daemon=True)
        self._etcd = etcd
        self._ttl = ttl
        self._on_granted, self._on_lost, self._on_renewed = on_granted, on_lost, on_renewed
        self._stopping = threading.Event()
        self._sent = sent
        self.lease = lease

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        while not self._stopping.is_set():
            if not self.lease:
                self._sent = time.monotonic()
                try:
                    self.lease = self._etcd.grant(self._ttl, retry=0.0)
                except Exception:
                    self._stopping.wait(0.2)
                    continue
            self._on_granted(self.lease)
            self._on_renewed(self._sent)
            reason = self._keep(self._sent)
            if reason is None:
                return
            self.lease = 0
            self._on_lost(reason)

    def _keep(self, renewed: float) -> str | None:
        """Renew until the lease is lost; returns why, or None when told to stop."""
        pause = self._ttl / 3
        while not self._stopping.wait(pause):
            asked = time.monotonic()
            try:
                if not self._etcd.refresh(self.lease):
                    return "etcd no longer knows the lease"
                renewed, pause = asked, self._ttl / 3
                self._on_renewed(renewed)
            except Exception as exc:
                if time.monotonic() - renewed >= self._ttl:
                    return f"not renewed for {self._ttl:g} s: {describe(exc)}"
                pause = min(0.2, self._ttl / 10)
        return None
