"""The one door to etcd: keys, leases, transactions.

`Etcd` wraps the `etcd3` client and adds what that lacks: several endpoints, reconnecting, and a limit on how long a
call may keep trying. Watching is in `watch`, keeping a lease alive in `lease`, who may do what in `roles`; all use
`Etcd.connection` or `Etcd.call`. Who we are is what our certificate says: there is no password. Every method may block
for up to its `retry` seconds: call from a thread, never from the agent's loop.
Nothing else in the package imports etcd3 or grpc.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gms_launch.control import etcd3_loader
from gms_launch.control.access import Access, split_endpoint
from gms_launch.errors import NoContactError, UsageError

etcd3 = etcd3_loader.load()

import grpc  # noqa: E402 - after etcd3_loader, beside the only module that needs it

# Whoever waits for a stream's next message looks ten times a second whether it has come, so that a signal is heard in
# the main thread. We wait in others, and are woken by what comes.
if (_waiting := sys.modules.get("grpc._common")) is not None:
    vars(_waiting)["MAXIMUM_WAIT_TIMEOUT"] = 60.0

T = TypeVar("T")
RpcError = grpc.RpcError

#: As etcd numbers them.
_ALARMS = {1: "NOSPACE", 2: "CORRUPT"}
#: An alarm is ended when no more than this share of the quota is in use.
ENOUGH = 0.8
#: A silent server is noticed by who waits for its word: a ping after so long, and the wait for its answer (ms). Etcd as
#: it is by default ends connections that ping more often than every 5 s, or without a call ("too_many_pings"). And what
#: a new connection may take, its handshake too, which has to wait where many begin one.
_KEEPALIVE = (6000, 2000, 2000)
#: The same where another member can be asked (grpc lets 1 s pass between two), and how long one answer may take (s).
_BRISK = (500, 400, 400)
BRISK = 1.0
_CHANNEL_OPTIONS = [
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    # A new channel shall be a new TCP connection, and not that of a channel whose packets are lost.
    ("grpc.use_local_subchannel_pool", 1),
]
_TRANSIENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"}
#: What etcd says while an alarm of its own makes it refuse what it is asked.
_ALARMED = ("database space exceeded", "corrupt cluster")


class AlarmedError(NoContactError):
    """etcd answers, and refuses: it is out of space, or takes its own data for corrupt."""


class _Client(etcd3.Etcd3Client):  # type: ignore[misc, name-defined]
    """etcd3's client, which would read the certificates from files: a home that hangs must not hang a connection."""

    def _get_secure_creds(self, ca_cert: str, cert_key: str | None = None, cert_cert: str | None = None) -> Any:
        texts = [text.encode() if text is not None else None for text in (ca_cert, cert_key, cert_cert)]
        return grpc.ssl_channel_credentials(*texts)


@dataclass(frozen=True)
class KeyValue:
    """A key as etcd holds it. `lease` is 0 without one."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True)
class Connection:
    """A connected client, and the number of the connection it belongs to."""

    client: Any
    generation: int


def describe(error: BaseException) -> str:
    """A short text for an error of grpc or etcd3."""
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Etcd:
    """A client of one etcd cluster. Safe to use from several threads; must not be carried over a fork.

    `brisk`: of several members, a silent one is left within a second. `patient`: a late answer costs no connection.
    """

    def __init__(self, access: Access, timeout: float = 3.0, brisk: bool = False, patient: bool = False) -> None:
        if not access.endpoints:
            raise UsageError("no etcd endpoint was given")
        for url in access.endpoints:
            split_endpoint(url)
        self._access, self.brisk, self._patient = access, brisk, patient
        self._timeout = min(timeout, BRISK) if brisk else timeout
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._connection: Connection | None = None
        self._generation = 0
        self._closed = False

    @property
    def timeout(self) -> float:
        """Seconds one request may take."""
        return self._timeout

    def learn(self, endpoints: tuple[str, ...]) -> None:
        """Use these from the next connection on: the first of them first."""
        with self._lock:
            self._access = replace(self._access, endpoints=endpoints)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.client.close()
                self._connection = None

    # -- connections -------------------------------------------------------------------------------------------

    def connection(self) -> Connection:
        """The current connection, made if there is none. Raises grpc's or etcd3's errors."""
        if (current := self._current()) is not None:
            return current
        with self._connecting:  # and not under `_lock`: it may take as long as a call, and others need not wait
            if (current := self._current()) is not None:
                return current
            generation = self._generation
            return self._adopt(self._connect(generation, self._timeout), generation)

    def _current(self) -> Connection | None:
        with self._lock:
            if self._closed:
                raise NoContactError("the etcd client is closed")
            return self._connection

    def _adopt(self, client: Any, generation: int, number: int = 0) -> Connection:
        """Use `client`, of the `number`-th endpoint after `generation`'s, unless somebody was quicker meanwhile."""
        with self._lock:
            if self._closed or (self._connection is not None and self._generation != generation):
                client.close()
            if self._closed:
                raise NoContactError("the etcd client is closed")
            if self._connection is None or self._generation == generation:
                # A new number, and the turn of the same endpoint.
                self._generation = max(self._generation, generation + number) + len(self._access.endpoints)
                self._connection = Connection(client, self._generation)
            return self._connection

    def drop(self, generation: int) -> None:
        """Give up the connection of that number: the next call connects anew, to the next endpoint."""
        with self._lock:
            if self._connection is not None and self._connection.generation == generation:
                # Not closed here: another thread may be inside a call on it; it is closed when collected.
                self._connection = None
            if self._generation == generation:
                self._generation += 1

    def _connect(self, number: int, timeout: float) -> Any:
        """A client of the endpoint whose turn it is."""
        access = self._access
        names = ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms", "grpc.min_reconnect_backoff_ms")
        options = [*_CHANNEL_OPTIONS, *zip(names, _BRISK if self.brisk else _KEEPALIVE, strict=True)]
        host, port, tls = split_endpoint(access.endpoints[number % len(access.endpoints)])
        secure = {"ca_cert": access.ca, "cert_cert": access.cert or None, "cert_key": access.key or None} if tls else {}
        return _Client(host=host, port=port, timeout=timeout, grpc_options=options, **secure)

    def call(self, request: Callable[[Any], T], retry: float = 8.0) -> T:
        """Run `request(client)`, again and again while the cluster cannot be reached, for up to `retry` seconds.

        Only for requests that may run twice. Raises `NoContactError` with the last error when time is up.
        """
        deadline = time.monotonic() + retry
        delay = 0.05
        while True:
            generation = self._generation
            try:
                connection = self.connection()
                generation = connection.generation
                return request(connection.client)
            except (etcd3.exceptions.ConnectionFailedError, etcd3.exceptions.ConnectionTimeoutError) as exc:
                error, late = exc, isinstance(exc, etcd3.exceptions.ConnectionTimeoutError)
            except grpc.RpcError as exc:
                if any(words in (exc.details() or "") for words in _ALARMED):
                    raise AlarmedError(f"etcd at {', '.join(self._access.endpoints)} refuses: {describe(exc)}") from exc
                if exc.code().name not in _TRANSIENT:
                    raise
                error, late = exc, exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if not (late and self._patient):
                self.drop(generation)
            if time.monotonic() + delay > deadline or self._closed:
                told = f"{self._access.silent}: {describe(error)}"
                try:
                    raise NoContactError(told) from error
                finally:
                    del error  # which holds this frame: as a ring they would keep the connection, and its attempts, up
            time.sleep(delay * random.uniform(0.5, 1.0))  # a pause between attempts; there is no event to wait for
            delay = min(delay * 2, 1.0)

    # -- keys --------------------------------------------------------------------------------------------------

    def put(self, key: str, value: bytes, lease: int | None = None, retry: float = 8.0) -> int:
        """Store `value`; returns the revision."""
        reply = self.call(lambda c: c.put(key, value, lease=lease), retry)
        return int(reply.header.revision)

    def put_many(self, values: Mapping[str, bytes | None], retry: float = 8.0) -> None:
        """Store or (None) delete several keys at once: one revision, one message to every watcher."""

        def request(client: Any) -> None:
            t = client.transactions
            steps = [t.delete(k) if v is None else t.put(k, v) for k, v in values.items()]
            client.transaction(compare=[], success=steps, failure=[])

        self.call(request, retry)

    def create(self, key: str, value: bytes, lease: int = 0, retry: float = 8.0) -> bool:
        """Store `value` if `key` does not exist; says whether it holds our value now."""

        def request(client: Any) -> bool:
            done, replies = client.transaction(
                compare=[client.transactions.create(key) == 0],
                success=[client.transactions.put(key, value, lease)],
                failure=[client.transactions.get(key)],
            )
            # A repeated attempt finds what the first one stored.
            return bool(done) or any(found == value for found, _ in replies[0])

        return self.call(request, retry)

    def replace_first_version(self, key: str, value: bytes, retry: float = 8.0) -> bool:
        """Put `value` in the place of what `key` was made with, on the same lease.

        Says whether the key holds our value now; False when it is gone or somebody else has put it again.
        """
        rpc, name = etcd3.etcdrpc, key.encode()

        def request(client: Any) -> bool:
            made = rpc.Compare(key=name, target=rpc.Compare.VERSION, result=rpc.Compare.EQUAL, version=1)
            put = rpc.RequestOp(request_put=rpc.PutRequest(key=name, value=value, ignore_lease=True))
            look = rpc.RequestOp(request_range=rpc.RangeRequest(key=name))
            reply = client.kvstub.Txn(
                rpc.TxnRequest(compare=[made], success=[put], failure=[look]),
                timeout=self._timeout,
            )
            # A repeated attempt finds what the first one stored.
            return bool(reply.succeeded) or any(kv.value == value for kv in reply.responses[0].response_range.kvs)

        return self.call(request, retry)

    def get(self, key: str, retry: float = 8.0) -> bytes | None:
        """The value of `key` by a linearizable read."""
        value: bytes | None = self.call(lambda c: c.get(key)[0], retry)
        return value

    def get_prefix(self, prefix: str, retry: float = 8.0) -> dict[str, bytes]:
        found = self.call(lambda c: list(c.get_prefix(prefix)), retry)
        return {meta.key.decode(): value for value, meta in found}

    def attached(self, prefix: str, lease: int, retry: float = 8.0) -> dict[str, bytes]:
        """What is stored under a prefix with that lease."""
        stop = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        request = etcd3.etcdrpc.RangeRequest(key=prefix.encode(), range_end=stop.encode())

        def ask(client: Any) -> Any:
            return client.kvstub.Range(request, timeout=self.timeout)

        return {kv.key.decode(): kv.value for kv in self.call(ask, retry).kvs if kv.lease == lease}

    def delete_first_version(self, key: str) -> bool:
        """Delete a key that nobody has put again since it was made; False when somebody has, or it is gone."""
        rpc, name = etcd3.etcdrpc, key.encode()
        made = rpc.Compare(key=name, target=rpc.Compare.VERSION, result=rpc.Compare.EQUAL, version=1)
        delete = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=name))
        request = rpc.TxnRequest(compare=[made], success=[delete])
        # Not tried again: a second attempt would find its own work and deny it.
        return bool(self.call(lambda c: c.kvstub.Txn(request, timeout=self._timeout), retry=0.0).succeeded)

    def delete(self, key: str, retry: float = 8.0) -> bool:
        return bool(self.call(lambda c: c.delete(key), retry))

    def delete_prefix(self, prefix: str, retry: float = 8.0) -> int:
        return int(self.call(lambda c: c.delete_prefix(prefix), retry).deleted)

    def compact(self, revision: int) -> None:
        """Forget history before `revision`."""
        self.call(lambda c: c.compact(revision))

    # -- alarms ------------------------------------------------------------------------------------------------

    def alarms(self, retry: float = 1.0) -> tuple[str, ...]:
        """The alarms that etcd has raised: NOSPACE and CORRUPT; with either it refuses writes."""
        return tuple(sorted({_ALARMS.get(a.alarm, f"alarm {a.alarm}") for a in self._raised(retry)}))

    def _raised(self, retry: float) -> list[Any]:
        ask = etcd3.etcdrpc.AlarmRequest(action=etcd3.etcdrpc.AlarmRequest.GET, alarm=etcd3.etcdrpc.NONE)
        return list(self.call(lambda c: c.maintenancestub.Alarm(ask, timeout=self._timeout), retry).alarms)

    def relieve(self, quota: int) -> bool:
        """Make room: forget all history, give its room back, and end the alarm if that is enough of `quota` bytes.

        etcd answers nobody while it does the second, a few ms for every MiB.
        """
        rpc = etcd3.etcdrpc
        revision = self.call(
            lambda c: c.kvstub.Range(rpc.RangeRequest(key=b"/"), timeout=self._timeout)
        ).header.revision
        with contextlib.suppress(grpc.RpcError):  # already compacted up to here
            self.call(lambda c: c.kvstub.Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=30.0))
        self.call(lambda c: c.maintenancestub.Defragment(rpc.DefragmentRequest(), timeout=30.0), retry=0.0)
        size = self.call(lambda c: c.maintenancestub.Status(rpc.StatusRequest(), timeout=self._timeout)).dbSize
        if size > quota * ENOUGH:
            return False
        for raised in self._raised(1.0):
            if raised.alarm == rpc.NOSPACE:
                whose = {"memberID": raised.memberID, "alarm": rpc.NOSPACE}
                over = rpc.AlarmRequest(action=rpc.AlarmRequest.DEACTIVATE, **whose)
                self.call(lambda c, over=over: c.maintenancestub.Alarm(over, timeout=self._timeout))  # type: ignore[misc]
        return True

    # -- leases ------------------------------------------------------------------------------------------------

    def grant(self, ttl: float, retry: float = 8.0) -> int:
        """A new lease of `ttl` seconds (etcd counts whole ones); returns its id."""
        return int(self.call(lambda c: c.lease(max(1, round(ttl))).id, retry))

    def time_to_live(self, key: str) -> tuple[int, int] | None:
        """Of the lease that `key` is on: seconds left, and seconds granted; None without one, or when it is over."""
        found = self.call(lambda c: c.get(key)[1], retry=0.0)
        lease = found.lease_id if found is not None else 0
        if not lease:
            return None
        told = self.call(lambda c: c.get_lease_info(lease), retry=0.0)
        return (int(told.TTL), int(told.grantedTTL)) if told.TTL > 0 else None

    def keep(self, lease: int, retry: float = 1.0) -> bool:
        """Keep a lease of anybody's alive once; False when it no longer exists. Raises `NoContactError`."""
        return self.call(lambda c: self._renewed(c, lease, self.timeout), retry)

    def refresh(self, lease: int, timeout: float) -> bool:
        """Keep a lease alive once, over the connection that stands; False when it no longer exists.

        Does not retry: raises on the first failure, and when there is no connection.
        """
        connection = self._current()
        if connection is None:
            raise NoContactError("there is no connection to etcd")
        return self._renewed(connection.client, lease, timeout)

    def refresh_anew(self, lease: int, number: int, timeout: float) -> bool:
        """The same over a new connection, the `number`-th try; others use it from then on if it is answered first.

        Takes up to twice `timeout` seconds.
        """
        generation = self._generation
        client = self._connect(generation + number, timeout)
        try:
            alive = self._renewed(client, lease, timeout)
        except BaseException:
            client.close()
            raise
        self._adopt(client, generation, number)
        return alive

    def _renewed(self, client: Any, lease: int, timeout: float) -> bool:
        """A stream of one request and one answer is a plain call on the wire, and as such costs a third: no threads."""
        rpc = etcd3.etcdrpc
        ask = client.channel.unary_unary(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            request_serializer=rpc.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=rpc.LeaseKeepAliveResponse.FromString,
        )
        return bool(ask(rpc.LeaseKeepAliveRequest(ID=lease), timeout=timeout).TTL > 0)

    def revoke(self, lease: int, retry: float = 8.0) -> bool:
        """End a lease and delete its keys; False when it does not exist (any more)."""
        try:
            self.call(lambda c: c.revoke_lease(lease), retry)
        except grpc.RpcError as exc:
            if exc.code() is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True
