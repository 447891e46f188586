"""Read and write etcd through its JSON gateway, with nothing but the standard library.

For commands that must start quickly and ask once. The agent and everything that watches use `client`.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from gms_launch.cohort.membership import clock_skew
from gms_launch.errors import NoContactError


class Gateway:
    """One etcd endpoint; logs in when a user is given. Raises `NoContactError` when it does not answer."""

    def __init__(self, endpoints: tuple[str, ...], user: str = "", password: str = "", timeout: float = 3.0) -> None:
        self._endpoints, self._timeout = endpoints, timeout
        self._user, self._password = user, password
        self._connection: http.client.HTTPConnection | None = None
        self._token = ""
        self._clock = (0.0, 0.0, 0.0)

    def clock_skew(self) -> float:
        """How far our clock is surely off that of the last answer's server (seconds); 0 when it need not be."""
        return clock_skew(*self._clock) if self._clock[1] else 0.0

    def _open(self) -> http.client.HTTPConnection:
        if self._connection is not None:
            return self._connection
        errors = []
        for url in self._endpoints:
            parts = urlsplit(url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.hostname or "", parts.port, timeout=self._timeout)
            try:
                connection.connect()
            except OSError as exc:
                errors.append(f"{url}: {exc.strerror or exc}")
                continue
            self._connection = connection
            if self._user:
                login = {"name": self._user, "password": self._password}
                self._token = self._post("/v3/auth/authenticate", login).get("token", "")
            return connection
        raise NoContactError("etcd does not answer (" + "; ".join(errors) + ")")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = self._open()
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = self._token
        before = time.time()
        try:
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            data: dict[str, Any] = json.loads(answer.read())
            if date := answer.getheader("Date"):
                self._clock = (before, parsedate_to_datetime(date).timestamp(), time.time())
        except (OSError, http.client.HTTPException, ValueError) as exc:
            self._connection = None
            raise NoContactError(f"etcd at {self._endpoints[0]} does not answer: {exc or type(exc).__name__}") from None
        except BaseException:
            self._connection = None  # interrupted in the middle: this one is out of step
            raise
        if answer.status != 200:
            if "not enabled" in str(data.get("error", "")):
                return {}  # passwords are not switched on (yet): go on without
            raise NoContactError(f"etcd refused {path}: {data.get('error', answer.status)}")
        return data

    def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """Every key under `prefix` by a linearizable read."""
        key = prefix.encode()
        end = key[:-1] + bytes([key[-1] + 1])
        self._open()
        found = self._post("/v3/kv/range", {"key": _encode(key), "range_end": _encode(end)})
        return {
            base64.b64decode(kv["key"]).decode(): base64.b64decode(kv.get("value", "")) for kv in found.get("kvs", [])
        }

    def silence(self, key: str) -> tuple[int, int] | None:
        """Of the lease that `key` is on: seconds since it was last renewed, and its whole time to live.

        Both by etcd's clock, in whole seconds. None when there is no such key or no lease.
        """
        self._open()
        found = self._post("/v3/kv/range", {"key": _encode(key.encode())}).get("kvs", [])
        if not found or not int(found[0].get("lease", 0)):
            return None
        told = self._post("/v3/lease/timetolive", {"ID": found[0]["lease"]})
        left, granted = int(told.get("TTL", 0)), int(told.get("grantedTTL", 0))
        return (max(0, granted - left), granted) if left > 0 else None

    def put(self, key: str, value: bytes, lease: int = 0) -> None:
        self._open()
        self._post("/v3/kv/put", {"key": _encode(key.encode()), "value": _encode(value), "lease": str(lease)})

    def delete(self, key: str) -> None:
        self._open()
        self._post("/v3/kv/deleterange", {"key": _encode(key.encode())})

    def delete_first_version(self, key: str) -> bool:
        """Delete a key that nobody has put again since it was made; False when somebody has, or it is gone."""
        self._open()
        name = _encode(key.encode())
        done = self._post(
            "/v3/kv/txn",
            {
                "compare": [{"key": name, "target": "VERSION", "result": "EQUAL", "version": "1"}],
                "success": [{"requestDeleteRange": {"key": name}}],
            },
        )
        return bool(done.get("succeeded"))

    def grant(self, ttl: int) -> int:
        """A new lease of `ttl` seconds; returns its id."""
        self._open()
        return int(self._post("/v3/lease/grant", {"TTL": str(ttl)})["ID"])

    def renew(self, lease: int) -> None:
        """Keep a lease alive. Raises `NoContactError` too when it has ended."""
        self._open()
        if not int(self._post("/v3/lease/keepalive", {"ID": str(lease)}).get("result", {}).get("TTL", 0)):
            raise NoContactError(f"etcd at {self._endpoints[0]} has ended our lease")

    def revoke(self, lease: int) -> None:
        """End a lease, and with it the keys that are on it."""
        self._open()
        self._post("/v3/lease/revoke", {"ID": str(lease)})

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
