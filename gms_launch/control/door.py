"""Etcd for commands, which ask once and say what came of it: every failure is a `NoContactError`.

The agent and everything that watches use `client`, which is imported only when something is asked: it takes 0.05 s.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from gms_launch.cohort.membership import clock_skew
from gms_launch.control import tls
from gms_launch.control.access import Access, split_endpoint
from gms_launch.errors import LaunchError, NoContactError

if TYPE_CHECKING:
    from gms_launch.control.client import Etcd

T = TypeVar("T")


class Door:
    """One etcd, asked over a connection that is made at the first question. `timeout`: seconds for one answer."""

    def __init__(self, access: Access, timeout: float = 3.0) -> None:
        self._access, self._timeout = access, timeout
        self._etcd: Etcd | None = None

    def _ask(self, question: Callable[[Etcd], T]) -> T:
        """Raises `NoContactError`. Every endpoint gets its turn."""
        from gms_launch.control import client

        if self._etcd is None:
            several = len(self._access.endpoints) > 1
            self._etcd = client.Etcd(self._access, timeout=self._timeout, brisk=several)
        turns = len(self._access.endpoints)
        while True:
            turns -= 1
            try:
                return question(self._etcd)
            except NoContactError:
                if not turns:
                    raise
            except LaunchError:
                raise
            except Exception as exc:
                raise NoContactError(f"etcd refused: {client.describe(exc)}") from None

    def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """Every key under `prefix` by a linearizable read."""
        return self._ask(lambda etcd: etcd.get_prefix(prefix, retry=0.0))

    def silence(self, key: str) -> tuple[int, int] | None:
        """Of the lease that `key` is on: seconds since it was last renewed, and its whole time to live.

        Both by etcd's clock, in whole seconds. None when there is no such key or no lease.
        """
        told = self._ask(lambda etcd: etcd.time_to_live(key))
        return None if told is None else (max(0, told[1] - told[0]), told[1])

    def alarms(self) -> tuple[str, ...]:
        """See `Etcd.alarms`."""
        return self._ask(lambda etcd: etcd.alarms(retry=0.0))

    def put(self, key: str, value: bytes, lease: int = 0) -> None:
        self._ask(lambda etcd: etcd.put(key, value, lease or None, retry=0.0))

    def delete(self, key: str) -> None:
        self._ask(lambda etcd: etcd.delete(key, retry=0.0))

    def delete_first_version(self, key: str) -> bool:
        """Delete a key that nobody has put again since it was made; False when somebody has, or it is gone."""
        return self._ask(lambda etcd: etcd.delete_first_version(key))

    def grant(self, ttl: int) -> int:
        """A new lease of `ttl` seconds; returns its id."""
        return self._ask(lambda etcd: etcd.grant(ttl, retry=0.0))

    def renew(self, lease: int) -> None:
        """Keep a lease alive. Raises `NoContactError` too when it has ended."""
        if not self._ask(lambda etcd: etcd.keep(lease, retry=0.0)):
            raise NoContactError(f"etcd at {self._access.endpoints[0]} has ended our lease")

    def revoke(self, lease: int) -> None:
        """End a lease, and with it the keys that are on it."""
        self._ask(lambda etcd: etcd.revoke(lease, retry=0.0))

    def clock_skew(self) -> float:
        """How far our clock is surely off the first that tells of etcd's machines (seconds); 0 when it need not be."""
        for url in self._access.endpoints[:-1]:
            with contextlib.suppress(NoContactError):
                return self._skew_to(url)
        return self._skew_to(self._access.endpoints[-1])

    def _skew_to(self, url: str) -> float:
        import http.client

        host, port, secure = split_endpoint(url)
        connection: Any = (
            http.client.HTTPSConnection(host, port, timeout=self._timeout, context=tls.context(self._access))
            if secure
            else http.client.HTTPConnection(host, port, timeout=self._timeout)
        )
        try:
            before = time.time()
            connection.request("GET", "/version")
            date = connection.getresponse().getheader("Date")
            return clock_skew(before, parsedate_to_datetime(date).timestamp(), time.time()) if date else 0.0
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise NoContactError(f"etcd at {host}:{port} does not tell the time: {exc or type(exc).__name__}") from None
        finally:
            connection.close()

    def close(self) -> None:
        if self._etcd is not None:
            self._etcd.close()
