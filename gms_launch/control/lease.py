"""Keep a lease alive, say when it was lost, and take a new one.

A lease is lost when etcd says so, or when nobody has answered since the last renewal that was *sent* and answered, for
as long as `terms.silence` says: a client that cannot reach etcd must assume the worst before everybody else does.

A renewal without an answer may be in a connection that waits in TCP's back-off for seconds after the network is back,
so from then on each try has a connection of its own, and several are under way at once. The first that is answered
counts, and its connection is used from then on. One more is sent over the connection that stands: a server that is too
busy for handshakes still answers there, late.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from gms_launch.control import terms
from gms_launch.control.client import Etcd, describe


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
                    self.lease = self._etcd.grant(terms.granted(self._ttl), retry=0.0)
                except Exception:
                    self._stopping.wait(0.2)
                    continue
            self._on_granted(self.lease)
            self._on_renewed(self._sent)
            reason = self._keep()
            if reason is None:
                return
            self.lease = 0
            self._on_lost(reason)

    def _keep(self) -> str | None:
        """Renew until the lease is lost; returns why, or None when told to stop."""
        pause = terms.renewal(self._ttl)
        while not self._stopping.wait(max(0.0, self._sent + pause - time.monotonic())):
            asked = time.monotonic()
            try:
                alive = self._etcd.refresh(self.lease, max(pause, 0.5))
            except Exception as exc:
                found = self._race(exc)
                if isinstance(found, str):
                    return found
                asked, alive = found
            if not alive:
                return "etcd no longer knows the lease"
            self._sent = asked
            self._on_renewed(asked)
        return None

    def _race(self, error: BaseException) -> tuple[float, bool] | str:
        """Try over new connections until one is answered: when that was sent, and whether the lease is still known.

        Returns why the lease is lost when none is answered in time, which `error` may say.
        """
        answers: queue.SimpleQueue[tuple[float, bool] | BaseException] = queue.SimpleQueue()
        lease, patience = self.lease, self._ttl / 2

        def renew(number: int) -> None:
            asked = time.monotonic()
            try:
                answers.put((asked, self._etcd.refresh_anew(lease, number, patience)))
            except Exception as exc:
                answers.put(exc)

        def renew_here() -> None:
            asked = time.monotonic()
            with contextlib.suppress(Exception):
                answers.put((asked, self._etcd.refresh(lease, end - asked)))

        number = 0
        begun = float("-inf")
        end = self._sent + terms.silence(self._ttl)
        threading.Thread(target=renew_here, name="renewal 0", daemon=True).start()
        while not self._stopping.is_set() and (now := time.monotonic()) < end:
            if now - begun >= terms.attempt(self._ttl):
                begun, number = now, number + 1
                threading.Thread(target=renew, args=(number,), name=f"renewal {number}", daemon=True).start()
            try:
                answer = answers.get(timeout=max(0.0, min(begun + terms.attempt(self._ttl), end) - time.monotonic()))
            except queue.Empty:
                continue
            if not isinstance(answer, BaseException):
                return answer
            error = answer
        return f"not renewed for {time.monotonic() - self._sent:.1f} s: {describe(error)}"
